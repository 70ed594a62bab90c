"""The third part of a check: derivatives of single steps beside differences."""

from __future__ import annotations

from collections.abc import Iterator

from bilevel import trees
from bilevel.checking.subject import Subject, described
from bilevel.errors import BilevelError
from bilevel.report.findings import Finding, Verdict
from bilevel.unrolling.plain_copies import NoPlainLoopError
from bilevel.unrolling.step_checks import Compared, StepPoint, compare_step

PART = "one step"


def compare_derivatives(subject: Subject) -> Iterator[Finding]:
    """Yield one row for each function and argument, at the first, the last and one step between."""
    run = subject.double
    if isinstance(run, str):
        yield Finding(PART, "derivatives", Verdict.UNJUDGED, f"no double precision: {run}", "see the whole loop")
        return
    if any(leaf.is_complex() for leaf in trees.split(run.start()).differentiable):
        yield Finding(PART, "derivatives", Verdict.NOT_CHECKED, "parameters are complex", "see the whole loop")
        return
    plain = None
    if run.problem.as_gradient_descent is not None:
        plain = subject.plain(in_double=True, hooks=False)
        if isinstance(plain, str):
            yield Finding(PART, "derivatives", Verdict.NOT_CHECKED, plain)
            return
        plain.start()
    state = run.start()
    rows: dict[tuple[str, str], list[tuple[int, Compared]]] = {}
    done = 0
    for t in subject.chosen_steps():
        state = run.descend(state, done, t)
        done = t
        try:
            for compared in compare_step(StepPoint.near(run, t, state), plain):
                rows.setdefault((compared.part, compared.by), []).append((t, compared))
                if compared.tape is not None and compared.tape not in subject.tapes:
                    subject.tapes.append(compared.tape)
        except (BilevelError, ValueError, TypeError, RuntimeError, NoPlainLoopError, AttributeError) as error:
            yield Finding(PART, f"derivatives of step {t}", Verdict.UNJUDGED, described(error))
    for (part, by), compared in rows.items():
        yield row_of(PART, f"{part} by {by}", compared)


def row_of(part: str, tested: str, compared: list[tuple[int, Compared]]) -> Finding:
    """Return one row for comparisons of one derivative at several steps, in both modes."""
    verdicts = [c.judgement.verdict for _, c in compared]
    steps = ", ".join(map(str, sorted({t for t, _ in compared})))
    for verdict in (Verdict.WRONG, Verdict.UNJUDGED):
        if verdict in verdicts:
            t, bad = next((t, c) for t, c in compared if c.judgement.verdict is verdict)
            taped = bad.tape is not None and bool(bad.tape.not_replayed)
            how = bad.judgement.why or f"off by {bad.judgement.error:.2g} of its size"
            where = f" at {bad.judgement.worst}" if bad.judgement.worst else ""
            found = f"step {t}, {bad.mode} mode: {how}{where}"
            if verdict is Verdict.WRONG and taped:
                verdict = Verdict.UNJUDGED
                found += "; numbers without a derivative are used, see stopped gradients"
            return Finding(part, tested, verdict, found, _advice(verdict, bad), {"relative": bad.judgement.error})
    largest = max(c.judgement.error for _, c in compared)
    modes = " and ".join(dict.fromkeys(c.mode for _, c in compared))
    rounded = any(c.judgement.why for _, c in compared)
    found = f"steps {steps}, {modes}: off by at most {largest:.1g}{', which is rounding' if rounded else ''}"
    return Finding(part, tested, Verdict.RIGHT, found, numbers={"relative": largest})


def _advice(verdict: Verdict, compared: Compared) -> str:
    if verdict is Verdict.UNJUDGED:
        return "" if not compared.judgement.why.startswith("refused") else "take another estimator, see operations"
    other = "Reverse()" if compared.mode == "forward" else "ForwardGradient or ZerothOrder"
    return f"take {other} if that mode is right, and report this with Report.save"
