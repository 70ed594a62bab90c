"""`bilevel.check` compares a problem with the loop that the user would have written, and says what it could compare."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel import checks, randomness
from bilevel.checking import loop, one_step, operations, precision, repeated_steps, side_effects, stability, whole_loop
from bilevel.checking.report import Report, versions
from bilevel.checking.subject import Subject
from bilevel.estimators import Estimator, ForwardGradient, Reverse
from bilevel.problem import BilevelProblem, Unrollable
from bilevel.report.findings import Finding, Verdict
from bilevel.report.progress import bar
from bilevel.unrolling.short_check import short_check

_SHOWN_FROM = 2.0
"""Seconds from which progress is shown."""


@dataclass(frozen=True)
class _Part:
    """One part of a check, and what it costs in inner gradients."""

    name: str
    units: float
    findings: Callable[[], Iterator[Finding]]


def check(
    problem: BilevelProblem | Unrollable,
    meta: Any,
    inner_batches: Any = None,
    outer_batch: Any = None,
    seed: int = 0,
    *,
    plain: Callable[[Any], Any] | None = None,
    estimators: Sequence[Estimator] | None = None,
    directions: int = 2,
    stable: bool = False,
    budget: float | None = None,
    progress: bool = True,
) -> Report:
    """Compare a problem with the loop that you would have written, and its derivatives with differences.

    The hypergradient ∇h is claimed to be that of the loop

        θ_{t+1} = step of the real `torch.optim` object on θ_t, t = 0 … T − 1,   h(φ) = outer_loss(θ_T, φ).

    Eight parts, each with rows of its own: the loop beside a plain PyTorch loop on a deep copy; a step twice; the
    derivatives of single steps and of the whole loop beside central differences in float64; stopped gradients;
    operations without a derivative; digits that survive in your dtype; and, with `stable=True`, stability.

    Args:
        problem: as in the call of an estimator, and so are `meta`, the batches and `seed`.
        meta: φ, the point at which to check.
        inner_batches: T batches by random access, or the whole number T for a problem without data.
        outer_batch: passed to the outer loss.
        seed: determines every random number.
        plain: your own loop, a function from `meta` to the outer value. It is compared too.
        estimators: those whose ∇h · v is compared with differences of whole solves; by default `Reverse("sqrt")`,
            `ForwardGradient(1)` and `ForwardGradient(1, tangents="shared")` where the problem allows it.
        directions: the number of directions v for whole solves.
        stable: also examine whether tangents grow, with at most eight further solves.
        budget: seconds. Parts that would not fit, by the measured time of an inner step, are reported as not checked.
        progress: say what the check will cost before it begins, and show a progress bar if that is over two seconds.

    Returns:
        A `Report`. `print(report)` shows the table, `report.passed` and `report.exit_code` sum it up, and
        `report.save(path)` writes it for a bug report.

    Raises:
        TypeError, ValueError: an argument is not what it should be, as from an estimator.

    Cost: about 6T units for the first two parts, 100 for single steps, 9T for each direction of whole solves, one
    estimate for each estimator and direction, and 10T for the precision.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
    ...     outer_loss=lambda theta, phi, batch: theta.square().sum(),
    ...     params=torch.zeros(2, dtype=torch.float64),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> report = bilevel.check(problem, torch.ones(2, dtype=torch.float64), 3, progress=False)
    >>> report.passed, report.exit_code
    (True, 0)
    """
    checks.whole_number(directions, "directions")
    if plain is not None:
        checks.a_function(plain, "plain", "plain(meta)")
    if budget is not None:
        checks.positive(budget, "budget")
    subject = Subject(problem, meta, inner_batches, outer_batch, seed)
    begun = time.perf_counter()
    before = side_effects.Snapshot(subject)
    with randomness.preserved(), short_check(False):
        parts = _parts(subject, plain, _estimators(subject, estimators), directions, stable)
        each = _seconds_of_a_unit(subject)
        findings: list[Finding] = []
        left_out: list[str] = []
        left, units = budget, sum(part.units for part in parts)
        expected = each * units
        if progress:
            print(_announced(parts, each, budget), file=sys.stderr)
        with bar("checking", len(parts), show=progress and expected > _SHOWN_FROM) as shown:
            for part in parts:
                took = time.perf_counter()
                if left is not None and part.units * each > left:
                    found = f"about {part.units * each:.0f} s, and {max(left, 0):.0f} s of the budget are left"
                    left_out.append(part.name)
                    findings.append(Finding(part.name, "everything", Verdict.NOT_CHECKED, found, "raise budget"))
                else:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        findings += list(part.findings())
                if left is not None:
                    left -= time.perf_counter() - took
                shown.advance(part.name)
    findings += before.changes()
    if not stable:
        findings.append(
            Finding(stability.PART, "growth of tangents", Verdict.NOT_CHECKED, "not asked for", "stable=True")
        )
    return Report(findings, units, time.perf_counter() - begun, versions(), left_out)


def _parts(
    subject: Subject,
    plain: Callable[[Any], Any] | None,
    estimators: Sequence[Estimator],
    directions: int,
    stable: bool,
) -> list[_Part]:
    steps = subject.steps
    if subject.run.problem.is_black_box:
        return [
            _Part("black box", 0.0, lambda: _of_black_box()),
            _Part(repeated_steps.PART, 0.0, lambda: repeated_steps.compare_solves(subject)),
            _Part(whole_loop.PART, 0.0, lambda: whole_loop.compare_estimators(subject, estimators, directions, plain)),
        ]
    of_estimates = sum(estimator.units(steps, 1) for estimator in estimators)
    parts = [_Part(loop.PART, 4.0 * steps, lambda: loop.compare_loops(subject))]
    if plain is not None:
        own = plain
        parts.append(_Part(loop.PART, 4.0 * steps, lambda: loop.compare_own_loop(subject, own)))
    parts += [
        _Part("outside reads", 3.0, lambda: side_effects.find_outside_reads(subject)),
        _Part(repeated_steps.PART, 2.0 * steps + 3, lambda: repeated_steps.compare_repeated_steps(subject)),
        _Part(one_step.PART, steps + 100.0, lambda: one_step.compare_derivatives(subject)),
        _Part(operations.PART, 10.0, lambda: operations.cover_operations(subject)),
        _Part(
            whole_loop.PART,
            directions * (9.0 * steps + of_estimates),
            lambda: whole_loop.compare_estimators(subject, estimators, directions, plain),
        ),
        _Part("stopped gradients", 0.0, lambda: whole_loop.stopped_gradients(subject)),
        _Part(precision.PART, 10.0 * steps, lambda: precision.compare_precision(subject)),
    ]
    if stable:
        parts.append(
            _Part(stability.PART, 3.0 * stability.SOLVES * steps, lambda: stability.examine_stability(subject))
        )
    return parts


def _of_black_box() -> Iterator[Finding]:
    found = "a BlackBox has no steps and no derivatives"
    yield Finding("black box", "steps and derivatives", Verdict.NOT_CHECKED, found)


def _estimators(subject: Subject, estimators: Sequence[Estimator] | None) -> list[Estimator]:
    if estimators is not None:
        return list(estimators)
    if subject.run.problem.is_black_box:
        return []
    forward = [ForwardGradient(1)]
    if subject.run.problem.as_gradient_descent is not None:
        forward.append(ForwardGradient(1, tangents="shared"))
    return [Reverse("sqrt"), *forward]


def _seconds_of_a_unit(subject: Subject) -> float:
    """The time of the second inner step, since the first one also sets things up."""
    if subject.run.problem.is_black_box:
        return 0.0
    run, state, seconds = subject.run, subject.run.start(), 0.0
    for _ in range(2):
        begun = time.perf_counter()
        run.descend(state, 0, 1)
        seconds = time.perf_counter() - begun
    return seconds


def _announced(parts: Sequence[_Part], each: float, budget: float | None) -> str:
    units = sum(part.units for part in parts)
    limit = "" if budget is None else f"; the budget is {budget:.0f} s"
    return f"checking: about {units:.0f} inner gradients, {each * units:.1f} s{limit}"
