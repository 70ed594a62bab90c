"""The eighth part of a check, on request: whether tangents grow from step to step, and at which learning rates.

A small change of θ_0 becomes y_t = A_t … A_1 y_0 after t steps. If ‖y_t‖ grows over the last half of the loop, the
inner loop is chaotic there, and its exact hypergradient is dominated by growth. The learning-rate schedule is
multiplied by powers of two, and the interval is then halved, to find the largest multiple without growth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bilevel import autodiff, trees
from bilevel.checking.subject import Subject, described
from bilevel.models.module_view import modules_in
from bilevel.optim.settings import of_meta_and_step
from bilevel.optim.update_rule import Optimizer
from bilevel.problem import GradientDescent
from bilevel.report.findings import Finding, Verdict
from bilevel.unrolling.derivative_checks import directions_like
from bilevel.unrolling.step_products import push_step
from bilevel.unrolling.unroll import Unroll

PART = "stability"
SOLVES = 8
_FLAT = 0.02
"""Growth of the logarithm of ‖y‖ over the last half that counts as none."""


def examine_stability(subject: Subject) -> Iterator[Finding]:
    """Yield rows on the growth of tangents, and on the learning rates at which there is none. At most eight solves."""
    run = subject.run if isinstance(subject.double, str) else subject.double
    try:
        lengths = tangent_lengths(run)
    except Exception as error:
        yield Finding(PART, "growth of tangents", Verdict.UNJUDGED, described(error))
        return
    growth = last_half(lengths)
    numbers = {f"step {t}": length for t, length in enumerate(lengths)}
    each = math.exp(growth / max(len(lengths) // 2, 1)) if math.isfinite(growth) else math.inf
    found = f"over the last half, a tangent grows by a factor of {each:.3g} in a step"
    if growth <= _FLAT:
        yield Finding(PART, "growth of tangents", Verdict.RIGHT, found, "", numbers)
    else:
        advice = "lower the inner learning rate, or take fewer steps; ZerothOrder sees a smoothed outer loss"
        yield Finding(PART, "growth of tangents", Verdict.UNJUDGED, found, advice, numbers)
    problem = run.problem.as_gradient_descent
    if problem is None:
        yield Finding(PART, "learning rate", Verdict.NOT_CHECKED, "the problem is given by its own steps")
        return
    multiple, at_most = _largest_multiple(run, problem, growth <= _FLAT)
    sign = "at least" if at_most is None else "about"
    found = f"tangents do not grow up to {sign} {multiple:.3g} times the learning rates of the schedule"
    verdict = Verdict.RIGHT if multiple >= 1 else Verdict.UNJUDGED
    advice = "" if multiple >= 1 else f"multiply the inner learning rate by {multiple:.2g}"
    yield Finding(PART, "learning rate", verdict, found, advice, {"multiple": multiple})


def tangent_lengths(run: Unroll) -> list[float]:
    """Return ‖y_t‖ after each step, for a random y_0 of length 1 in the parameters, and φ held still."""
    state = run.start()
    leaves = trees.split(state).differentiable
    y = directions_like(leaves, 60)
    problem = run.problem.as_gradient_descent
    count = len(trees.split(state.params).differentiable) if problem is not None else len(leaves)
    y = [v if i < count else torch.zeros_like(v) for i, v in enumerate(y)]
    scale = float(trees.squared_norm(y).sqrt())
    tangents = [(v / scale).unsqueeze(0) for v in y]
    still = [torch.zeros_like(leaf).unsqueeze(0) for leaf in trees.leaves(run.meta)]
    lengths, factor = [], 0.0
    with autodiff.differentiable_kernels(modules_in([run.meta, state])):
        for t in range(run.steps):
            pushed = push_step(run, t, autodiff.Pushed(state, tangents), still)
            state, tangents = pushed.value, pushed.tangents
            length = float(trees.squared_norm(tangents[:count]).sqrt())
            lengths.append(length * math.exp(factor))
            if not math.isfinite(length) or length == 0:
                break
    return lengths


def last_half(lengths: list[float]) -> float:
    """Return the growth of log ‖y‖ over the last half.

    >>> round(last_half([1.0, 1.0, 2.0, 4.0]), 3)
    1.386
    """
    if not lengths or not math.isfinite(lengths[-1]):
        return math.inf
    start = lengths[max(len(lengths) // 2 - 1, 0)]
    if lengths[-1] == 0 or start == 0:
        return -math.inf if lengths[-1] == 0 else math.inf
    return math.log(lengths[-1] / start)


def _largest_multiple(run: Unroll, problem: GradientDescent, stable: bool) -> tuple[float, float | None]:
    """Return the largest multiple that was seen to be stable, and the smallest that was not, if any."""
    solves, good, bad = 1, (1.0 if stable else 0.0), (None if stable else 1.0)
    multiple = 2.0 if stable else 0.5
    while solves < SOLVES:
        scaled: Any = copy.copy(problem)
        scaled.optimizer = with_rates_times(problem.optimizer, multiple)
        scaled._eager = scaled
        try:
            growth = last_half(tangent_lengths(replace(run, problem=scaled)))
        except (ArithmeticError, RuntimeError):
            growth = math.inf
        solves += 1
        if growth <= _FLAT:
            good = multiple
        else:
            bad = multiple
        if bad is None:
            multiple *= 2
        elif good == 0:
            multiple /= 2
        else:
            multiple = math.sqrt(good * bad)
    return good, bad


def with_rates_times(optimizer: Optimizer, multiple: float) -> Optimizer:
    """Return the same optimiser with all learning rates multiplied by a number."""
    lr = optimizer.settings.get("lr", optimizer._step.timetable.defaults.get("lr"))

    def times(value: Any) -> Any:
        return trees.map_leaves(lambda v: v * multiple, value)

    if callable(lr):
        function = of_meta_and_step(lr)
        scaled: Any = lambda meta, step: times(function(meta, step))  # noqa: E731
    else:
        scaled = times(lr)
    return Optimizer(optimizer.algorithm, {**optimizer.settings, "lr": scaled}, optimizer.schedule, optimizer.clipping)
