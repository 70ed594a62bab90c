"""Forward gradients of a stream: state and tangents go on from one window of the inner loop to the next.

A window is T inner steps between two outer updates. With Φ the product of its A_t and Γ what its B_t contribute, the
derivative of the state at its end is Z' = Φ Z + Γ, where Z is that at its start. Dropping Z at the border leaves Γ, the
truncated derivative. Both ways below keep Z, as far as b tangents can.

**The same directions** (`carry="tangents"`). y' = Φ y + Γ v for the v of the first window. If φ has not changed, K
windows of T steps are one of K·T, to the last bit but for rounding.

**Fresh directions** (`carry="fresh"`). Keep pairs (y_i, l_i) of a tangent and its label with E[mean y_i l_iᵀ] = Z. For
fresh directions u_i with E[u_i] = 0 and E[u_i u_iᵀ] = I, and numbers a_i that do not depend on them,

    y_i' = a_i Φ y_i + Γ u_i,   l_i' = l_i/a_i + u_i,   E[y_i' l_i'ᵀ] = Φ E[y_i l_iᵀ] + Γ,

since the mixed terms have u_i once. The slope w_i = d y_i' + c u_i times its label estimates d Z' + c. This is one step
of "unbiased online recurrent optimisation" for each window. The mixed terms are noise: about as much again as that of
the window's own, and with a_i = √(‖l‖ ‖Γu‖/(‖y‖ ‖u‖)) least; ‖Γu‖ is taken from the first window's tangents.

**What is unbiased.** At fixed φ both are, for the gradient through the whole history. When φ moves between windows, Φ,
Γ and Z are those of the φ of their time: what is estimated is d Z + c with Z a mixture of derivatives at past φ, as in
real-time recurrent learning. The difference from the gradient of the history at today's φ is of first order in how far
φ moved while the inner loop remembers. With the same directions all estimates of a run lie in the span of those b
directions, so the noise of one outer step is that of the next and does not average out, and a plain gradient descent
never leaves that span: right for a single gradient over a long history, wrong for training many meta parameters. Fresh
directions have neither fault and more variance. Cost: (1 + 2b)·T units for a window, as without carrying.

Workers share the directions chunk by chunk. At the end of a window all have the state and the tangents of all, b·M
numbers, so that a checkpoint holds them and any number of workers can go on.

Reference: Tallec and Ollivier, 2017 (UORO, whose step is one inner step and whose b is 1); Williams and Zipser, 1989,
on what a derivative carried through changing parameters is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bilevel import autodiff, distributed, randomness, trees
from bilevel.directions import distributions as random_directions
from bilevel.directions.distributed_slopes import agreed_state, everybodys_rows, spread_slopes
from bilevel.directions.distributions import Directions
from bilevel.distributed.work_assignment import Assignment
from bilevel.estimators import control_variates
from bilevel.estimators.base import Estimate, like_meta
from bilevel.unrolling.finite_differences import push_on_by_differences
from bilevel.unrolling.inner_loop import Carried
from bilevel.unrolling.unroll import Slopes, Unroll

_FRESH = 11
SYMMETRIC = ("rademacher", "gaussian", "low-rank")
"""Distributions with independent directions whose mean is zero."""


class Settings(Protocol):
    """The parts of an estimator with random directions that carrying its tangents needs."""

    @property
    def directions(self) -> int: ...
    @property
    def distribution(self) -> str: ...
    @property
    def control_variate(self) -> control_variates.ControlVariate | None: ...
    @property
    def draw(self) -> int: ...
    @property
    def carry(self) -> str: ...
    @property
    def first_order(self) -> bool: ...
    def _deal(self, run: Unroll) -> Assignment: ...
    def _combined(self, run: Unroll, directions: Directions, pushed: Slopes, variates: list[Tensor]) -> Estimate: ...


def estimate(settings: Settings, run: Unroll) -> Estimate:
    """One window by a `ForwardGradient` that carries its tangents."""
    if settings.carry == "fresh":
        return _with_fresh_directions(settings, run)
    directions = _directions(settings, run, run.seed)
    past = _past(run, settings.directions, 1.0)
    slopes, tangents, variates = _push(settings, run, directions.draw, past)
    estimate = settings._combined(run, directions, slopes, control_variates.scaled(variates, run))
    return replace(estimate, carried=Carried(slopes.state, run.first_step + run.steps, tangents))


def _with_fresh_directions(settings: Settings, run: Unroll) -> Estimate:
    count, before = settings.directions, run.carried
    directions = _directions(settings, run, randomness.derive(run.seed, _FRESH, run.first_step))
    vectors = labels = directions.draw(range(count))  # by every worker: all labels are needed for the gradient
    balance = 1.0
    if before is not None and before.tangents is not None:
        if before.labels is None:
            raise ValueError('carried comes from carry="tangents", whose directions are not kept; go on with the same')
        lengths = [float(trees.squared_norm(ts)) for ts in (before.labels, vectors, before.tangents)]
        if lengths[0] > 0 and lengths[2] > 0:
            balance = (lengths[0] / lengths[1]) ** 0.25 * (before.first_norm / lengths[2] ** 0.5) ** 0.5
        labels = [old / balance + fresh for old, fresh in zip(before.labels, vectors, strict=True)]
    slopes, tangents, _ = _push(settings, run, lambda numbers: _rows(vectors, numbers), _past(run, count, balance))
    terms = [torch.einsum("b,b...->b...", slopes.slopes.to(label), label) for label in labels]
    grad = [term.mean(0) for term in terms]
    error = None
    if count > 1:
        spread = sum(float((term - mean).double().square().sum()) for term, mean in zip(terms, grad, strict=True))
        error = (spread / (count * (count - 1))) ** 0.5
    goes_on = before is not None and before.tangents is not None
    norm = before.first_norm if before is not None and goes_on else float(trees.squared_norm(tangents).sqrt())
    carried = Carried(slopes.state, run.first_step + run.steps, tangents, labels, norm)
    return Estimate(slopes.value, like_meta(run, grad), slopes.state, error, carried=carried)


def _directions(settings: Settings, run: Unroll, seed: int) -> Directions:
    seed = random_directions.seed_of_draw(seed, settings.draw)
    directions = Directions(settings.distribution, seed, settings.directions, trees.leaves(run.meta))
    directions.require_count("Forward() gives the exact gradient")
    return directions


def _past(run: Unroll, count: int, scale: float) -> list[Tensor] | None:
    """The tangents that this window begins with."""
    if run.carried is None or run.carried.tangents is None:
        return None
    if len(run.carried.tangents[0]) != count:
        raise ValueError(f"directions={count}, but carried holds the tangents of {len(run.carried.tangents[0])}")
    return [scale * t for t in run.carried.tangents]


def _push(
    settings: Settings, run: Unroll, draw: Callable[[range], list[Tensor]], past: list[Tensor] | None
) -> tuple[Slopes, list[Tensor], list[list[Tensor]]]:
    """Slopes and tangents of all directions, of which this worker pushes its chunks, and the control variates."""
    workers, deal = distributed.current(), settings._deal(run)
    push = push_on_by_differences if settings.first_order else Unroll.push_on
    variates = control_variates.as_tuple(settings.control_variate)
    mine: list[list[Tensor]] = []

    def push_chunks(chunks: Sequence[range]) -> Slopes:
        found = []
        for numbers in chunks:
            vectors = draw(numbers)
            begun = run.push_init(vectors)
            if past is not None:
                begun = autodiff.Pushed(begun.value, _rows(past, numbers))
            slopes, tangents = push(run, begun, vectors)
            found.append(slopes)
            mine.append(tangents)
        together = torch.cat([slopes.slopes for slopes in found])
        return found[-1]._replace(slopes=together, moved=any(slopes.moved for slopes in found))

    def variate(number: int) -> list[Tensor]:
        return control_variates.gradient_of(variates[number], run)

    slopes, computed = spread_slopes(run, deal, push_chunks, variate, workers)
    run.require_connections(slopes.moved, slopes.slopes, slopes.state)
    slopes = slopes._replace(state=agreed_state(trees.detach(slopes.state), workers))
    return slopes, everybodys_rows("tangents", deal, mine, slopes.state, workers), computed


def _rows(stacks: Sequence[Tensor], numbers: range) -> list[Tensor]:
    return [stack[numbers.start : numbers.stop] for stack in stacks]
