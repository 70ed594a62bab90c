"""The first part of a check: the plain PyTorch loop beside the library's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import randomness, trees
from bilevel.checking.subject import Subject, described, require_one_outer_loss
from bilevel.report.findings import Finding, Verdict
from bilevel.unrolling.loop_comparison import Apart, SideBySide
from bilevel.unrolling.plain_copies import NoPlainLoopError
from bilevel.unrolling.plain_loop import PlainLoop
from bilevel.unrolling.unroll import Unroll

PART = "the loop"
_ADVICE = (
    "the hypergradient is that of another loop than yours; report it with Report.save, and describe the step by "
    "bilevel.Problem meanwhile"
)


def compare_loops(subject: Subject) -> Iterator[Finding]:
    """Yield rows on parameters, buffers and outer value of the two loops.

    The comparison in the user's dtype decides if the loops agree there. If not, float64 decides, in which rounding does
    not grow to the size of a difference.
    """
    plain = subject.plain(in_double=False)
    if isinstance(plain, str):
        yield Finding(PART, "parameters and outer value", Verdict.NOT_CHECKED, plain, "pass plain=my_loop")
        return
    first = _compared(subject.run, plain, "")
    if not isinstance(first, str) and all(row.verdict is Verdict.RIGHT for row in first):
        yield from first
        return
    double = subject.double
    if subject.dtype == torch.float64 or isinstance(double, str):
        why = (
            "" if not isinstance(double, str) or subject.dtype == torch.float64 else f"; no double precision: {double}"
        )
        if isinstance(first, str):
            yield Finding(PART, "parameters and outer value", Verdict.UNJUDGED, first + why)
            return
        for row in first:
            doubtful = row.verdict is Verdict.WRONG and subject.dtype != torch.float64
            doubtful = doubtful and row.numbers.get("relative", math.inf) < 0.05
            verdict = Verdict.UNJUDGED if doubtful else row.verdict
            yield Finding(row.part, row.tested, verdict, row.found + why, row.advice, row.numbers)
        return
    precise = subject.plain(in_double=True)
    if isinstance(precise, str):
        yield Finding(PART, "parameters and outer value", Verdict.UNJUDGED, precise)
        return
    second = _compared(double, precise, "in float64: ")
    if isinstance(second, str):
        yield Finding(PART, "parameters and outer value", Verdict.UNJUDGED, second)
    else:
        yield from second


def _compared(run: Unroll, plain: PlainLoop, prefix: str) -> list[Finding] | str:
    """The rows, or why the plain loop could not be run."""
    try:
        both = SideBySide(run, plain)
        if both.trains_others:
            return [Finding(PART, "trained tensors", Verdict.WRONG, prefix + both.trains_others, _ADVICE)]
        for t in range(run.steps):
            both.advance(t)
        theirs = plain.outer_value()
    except NoPlainLoopError as error:
        return str(error)
    except Exception as error:  # the user's code does not take the module itself, or an error of the optimiser
        return f"the plain loop raised {described(error)}"
    ours = run.outer_loss(both.state, run.meta).detach()
    require_one_outer_loss(ours)
    rows = [_row(both.apart, run.steps, prefix, both.largest)]
    if names := both.unfollowed():
        rows.append(
            Finding(PART, "buffers", Verdict.WRONG, f"{prefix}the plain loop changes {', '.join(names[:3])}", _ADVICE)
        )
    rows.append(_of_values(ours, theirs, prefix))
    return rows


def _row(apart: Apart | None, steps: int, prefix: str, largest: float) -> Finding:
    tested = f"parameters after each of {steps} steps"
    if apart is None:
        found = f"{prefix}equal within rounding (at most {largest:.2g} of what is allowed)"
        return Finding(PART, tested, Verdict.RIGHT, found, numbers={"of_tolerance": largest})
    when = "before the first step" if apart.step < 0 else f"after step {apart.step}"
    if not math.isfinite(apart.distance):
        return Finding(PART, tested, Verdict.UNJUDGED, f"{prefix}{apart.what} is not finite {when}", "lower the rate")
    relative = apart.distance / apart.moved if apart.moved else math.inf
    found = f"{prefix}{apart.what} differs {when}: {apart.distance:.2g} apart, moved {apart.moved:.2g} so far"
    return Finding(PART, tested, Verdict.WRONG, found, _ADVICE, {"relative": relative, "step": float(apart.step)})


def _of_values(ours: Tensor, theirs: Tensor, prefix: str) -> Finding:
    a, b = float(ours), float(theirs)
    epsilon = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
    relative = abs(a - b) / max(abs(a), abs(b), 1e-300)
    numbers = {"ours": a, "plain": b, "relative": relative}
    if not (math.isfinite(a) and math.isfinite(b)):
        same = not math.isfinite(a) and not math.isfinite(b)
        return Finding(PART, "outer value", Verdict.UNJUDGED if same else Verdict.WRONG, f"{prefix}{a:.6g} and {b:.6g}")
    if relative <= epsilon**0.5 or a == b:
        return Finding(PART, "outer value", Verdict.RIGHT, f"{prefix}{a:.9g}, equal within {relative:.1g}", "", numbers)
    found = f"{prefix}{a:.9g}, and {b:.9g} in the plain loop"
    return Finding(PART, "outer value", Verdict.WRONG, found, _ADVICE, numbers)


# -- a loop of the user's own ------------------------------------------------------------------------------------------


def own_value(subject: Subject, loop: Callable[[Any], Any], seed: int = 0) -> float:
    """Return the outer value of a user's own loop at φ, under a seed."""
    with randomness.PROCESS_WIDE, randomness.seeded(seed, randomness.STEP):
        return float(loop(_fresh(subject.meta)))


def compare_own_loop(subject: Subject, loop: Callable[[Any], Any]) -> Iterator[Finding]:
    """Yield a row on the outer value of a loop that the user handed over."""
    tested = "outer value of your own loop"
    try:
        values = [own_value(subject, loop, seed) for seed in (0, 0, 1)]
    except Exception as error:
        yield Finding(PART, tested, Verdict.UNJUDGED, f"it raised {described(error)}", "plain(meta) returns a number")
        return
    value = subject.run.value()[0]
    require_one_outer_loss(value)
    ours = float(value)
    spread = max(values) - min(values)
    gap = abs(ours - values[0])
    scale = max(abs(ours), abs(values[0]), 1e-300)
    numbers = {"ours": ours, "plain": values[0], "relative": gap / scale}
    if spread > 0:
        found = f"{ours:.6g}; yours gives {', '.join(f'{v:.6g}' for v in values)} from run to run"
        yield Finding(
            PART, tested, Verdict.UNJUDGED, found, "take the randomness out of plain (dropout, shuffling)", numbers
        )
    elif gap <= torch.finfo(subject.dtype).eps ** 0.5 * scale:
        yield Finding(PART, tested, Verdict.RIGHT, f"{ours:.9g}, equal within {gap / scale:.1g}", "", numbers)
    else:
        found = f"{ours:.9g}, and {values[0]:.9g} in your loop"
        advice = "the problem describes another loop: compare optimiser, batches, modes and the number of steps"
        yield Finding(PART, tested, Verdict.WRONG, found, advice, numbers)


def _fresh(meta: Any) -> Any:
    """A copy of φ in the user's own form."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):
            return copy.deepcopy(leaf)
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    return trees.map_leaves(copied, meta)
