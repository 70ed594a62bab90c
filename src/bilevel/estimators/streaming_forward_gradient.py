"""(FG)²U for a stream: state and tangents go on from one window of the inner loop to the next. UORO, online RTRL.

A window is the T inner steps between two outer updates. With Φ the product of its A_t and Γ the part that its B_t
contribute, the derivative of the state at its end is Z' = Φ Z + Γ, where Z is the derivative at its start. Dropping Z
at the border leaves Γ, the truncated derivative. Both ways below keep Z, as far as b tangents can.

**The same directions** (`carry="same"`). y' = Φ y + Γ v for the v of the first window. If φ has not changed, K windows
of T steps give the same as one window of K·T steps, up to rounding.

**Fresh directions** (`carry="fresh"`). Keep pairs (y_i, l_i) of a tangent and its label with E[mean y_i l_iᵀ] = Z. For
fresh directions u_i with E[u_i] = 0 and E[u_i u_iᵀ] = I, and numbers a_i that do not depend on them,

    y_i' = a_i Φ y_i + Γ u_i,   l_i' = l_i/a_i + u_i,   E[y_i' l_i'ᵀ] = Φ E[y_i l_iᵀ] + Γ,

since each mixed term contains u_i once. The slope w_i = d y_i' + c u_i times its label estimates d Z' + c. This is one
step of "unbiased online recurrent optimisation" (UORO) for each window. The mixed terms are noise, about as much again
as the noise of the window itself; it is least with a_i = √(‖l‖ ‖Γu‖/(‖y‖ ‖u‖)), where ‖Γu‖ is taken from the first
window.

**What is unbiased.** At fixed φ both are, for the gradient through the whole history. When φ moves between windows, Φ,
Γ and Z are those of the φ of their time: the estimated quantity is d Z + c with Z a mixture of derivatives at past φ,
as in real-time recurrent learning (RTRL). It differs from the gradient of the history at today's φ by an amount of
first order in how far φ moved while the inner loop remembers. With the same directions all estimates of a run lie in
the span of those b directions: the noise of one outer step is also that of the next and does not average out, and plain
gradient descent never leaves that span. This is right for a single gradient over a long history, and wrong for training
many meta parameters. Fresh directions have neither fault, and more variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bilevel import checks, distributed, randomness, trees
from bilevel.directions.distributed_slopes import agreed_tree, everybodys_rows, spread_slopes
from bilevel.directions.distributions import Directions
from bilevel.distributed.communication import Exchange
from bilevel.distributed.work_assignment import assign
from bilevel.estimators import directional, variates
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.estimators.variates import ControlVariate
from bilevel.unrolling.finite_differences import FiniteDifferences
from bilevel.unrolling.tangents import FORWARD_MODE, Slopes, push_on
from bilevel.unrolling.unroll import Unroll

_FRESH = 11
_EXACT_INSTEAD = "Forward() gives the exact gradient"
SYMMETRIC = ("rademacher", "gaussian", "low-rank")
"""Distributions with independent directions whose mean is zero, as fresh directions must be."""


@dataclass(frozen=True)
class StreamingForwardGradient(Estimator):
    """Unbiased hypergradient through the whole history of a stream, in memory that does not grow. UORO, online RTRL.

    For an inner loop that goes on from one outer step to the next: `fit(..., stream=True)`, or `carried=` in a call.
    Other estimators see only the T steps of their own window; this one carries the tangents y `[M]` of the inner state
    along b directions v `[N]` from window to window,

        y_0 = y_T of the window before,   y_t = A_t y_{t−1} + B_t v,   w = d y_T + c v,

    with A_t = ∂θ_t/∂θ_{t−1}, B_t = ∂θ_t/∂φ, d = ∂outer/∂θ_T, c = ∂outer/∂φ. The estimate is (1/b) Σ_i w_i l_i, where
    l_i is the direction v_i itself (`carry="same"`), or a label that goes on together with y_i (`carry="fresh"`); the
    formulas are at the top of `bilevel.estimators.streaming_forward_gradient`.

    Args:
        directions: b, at most the number of meta parameters N.
        carry: `"fresh"`: in each window new directions join the tangents. `"same"`: the directions of the first window
            are kept, which is right for one gradient over a long history and not for training.
        distribution: as in `ForwardGradient`; with fresh directions `"rademacher"`, `"gaussian"` or `"low-rank"`.
        chunk_size: directions that are pushed at once; `None` for all. The tangents of all b directions are kept.
        control_variate: as in `ForwardGradient`, with the same directions only.
        tangents: `"exact"`, in forward mode, or `"difference"`, as in `ForwardGradient`.
        draw: another number gives other directions for the same seed.
        exchange: as in `ForwardGradient`.

    Cost: (1 + 2b)·T units for a window of T steps, and T more for every further chunk, for a scalar outer loss as well
    as for a vector. Memory: 1 + b states. Bias: none
    at fixed φ; while φ moves, the estimate mixes derivatives at past φ, as real-time recurrent learning does.

    The memory between windows holds the `tangents`, and with fresh directions also `labels` and `first_norm`, the
    length of the first window's tangents. Workers share the directions chunk by chunk. At the end of a window all of
    them have the state and all tangents, b·M numbers, so that a checkpoint holds them and any number of workers can go
    on.

    Raises:
        ValueError: `carried` comes from another estimator, or from another number of directions.

    Reference: Tallec and Ollivier, 2017 (UORO, whose step is one inner step and whose b is 1); Williams and Zipser,
    1989 (RTRL, and what a derivative is that is carried through changing parameters).

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> estimator = bilevel.StreamingForwardGradient(1, carry="same")
    >>> phi, window = torch.tensor(1.0), bilevel.no_batches(2)
    >>> first = estimator(problem, phi, window)
    >>> second = estimator(problem, phi, window, carried=first.carried)
    >>> first.grad, second.grad  # 1 − 0.5², 1 − 0.5⁴
    (tensor(0.7500), tensor(0.9375))
    """

    directions: int = 1
    carry: Literal["fresh", "same"] = "fresh"
    distribution: str = "rademacher"
    chunk_size: int | None = None
    control_variate: ControlVariate | None = None
    tangents: Literal["exact", "difference"] = "exact"
    draw: int = 0
    exchange: Exchange = "auto"
    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        directional.check_settings(self)
        checks.one_of(self.carry, "carry", ("fresh", "same"))
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")
        checks.one_of(self.tangents, "tangents", ("exact", "difference"))
        if self.carry == "same" and variates.running_mean_of(self) is not None:
            raise ValueError(
                'carry="same" keeps its directions, and RunningMean() is made of estimates along them: as a control '
                "variate it would bring a bias; take another one"
            )
        if self.carry == "fresh" and (self.control_variate is not None or self.distribution not in SYMMETRIC):
            raise ValueError(
                f'carry="fresh" takes no control_variate, and independent directions ({", ".join(SYMMETRIC)}); '
                'carry="same" takes any'
            )

    def redrawn(self, number: int) -> StreamingForwardGradient:
        return replace(self, draw=self.draw + number)

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return (math.ceil(self.directions / (self.chunk_size or self.directions)) + 2.0 * self.directions) * steps

    @property
    def first_order(self) -> bool:
        """Whether the inner loop itself is differentiated once only, so that any kernel will do."""
        return self.tangents == "difference"

    def _estimate(self, run: Unroll) -> Estimate:
        return self._with_fresh_directions(run) if self.carry == "fresh" else self._with_the_same_directions(run)

    def _with_the_same_directions(self, run: Unroll) -> Estimate:
        directions = directional.directions_of(self, run, _EXACT_INSTEAD)
        memory = self._memory(run)
        past = None if memory is None else memory["tangents"]
        slopes, tangents, gradients, at_once = self._push(run, directions.draw, past)
        estimate = directional.estimate_from_slopes(
            self, run, directions, slopes.value, slopes.state, slopes.slopes, gradients, at_once
        )
        return replace(estimate, carried=run.window_end(slopes.state, {"tangents": tangents}, agreed=True))

    def _with_fresh_directions(self, run: Unroll) -> Estimate:
        seed = randomness.derive(run.seed, _FRESH, run.first_step)
        directions: Directions = directional.directions_of(self, run, _EXACT_INSTEAD, seed)
        count, memory = self.directions, self._memory(run)
        vectors = labels = directions.draw(range(count))  # by every worker: the gradient needs the labels of all
        past, balance = None, 1.0
        if memory is not None:
            lengths = [float(trees.squared_norm(ts)) for ts in (memory["labels"], vectors, memory["tangents"])]
            if lengths[0] > 0 and lengths[2] > 0:
                balance = (lengths[0] / lengths[1]) ** 0.25 * (memory["first_norm"] / lengths[2] ** 0.5) ** 0.5
            labels = [old / balance + fresh for old, fresh in zip(memory["labels"], vectors, strict=True)]
            past = [balance * t for t in memory["tangents"]]
        slopes, tangents, _, _ = self._push(run, lambda numbers: _rows(vectors, numbers), past)
        if slopes.value.ndim:
            each = [_mean_of_terms(column, labels) for column in slopes.slopes.unbind(1)]
            grad = [torch.stack(parts) for parts in zip(*(g for g, _ in each), strict=True)]
            error = torch.tensor([e for _, e in each], dtype=torch.float64) if count > 1 else None
        else:
            grad, error = _mean_of_terms(slopes.slopes, labels)
        norm = memory["first_norm"] if memory is not None else float(trees.squared_norm(tangents).sqrt())
        kept = {"tangents": tangents, "labels": labels, "first_norm": norm}
        end = run.window_end(slopes.state, kept, agreed=True)
        return Estimate(slopes.value, like_meta(run, grad), slopes.state, error, carried=end)

    def _memory(self, run: Unroll) -> dict[str, Any] | None:
        """Return what the window before left, or raise if it does not fit to these settings."""
        memory = run.carried_memory
        if memory is None:
            return None
        if not isinstance(memory, dict) or "tangents" not in memory:
            raise ValueError(
                f"carried holds the memory of another estimator ({type(memory).__name__}), not the tangents that "
                f"{type(self).__name__} goes on with; pass the carried of its own estimates, or carried=None to begin"
            )
        if self.carry == "fresh" and "labels" not in memory:
            raise ValueError('carried comes from carry="same", whose directions are not kept; go on with the same')
        if len(memory["tangents"][0]) != self.directions:
            raise ValueError(
                f"directions={self.directions}, but carried holds the tangents of {len(memory['tangents'][0])}"
            )
        return memory

    def _push(
        self, run: Unroll, draw: Callable[[range], list[Tensor]], past: list[Tensor] | None
    ) -> tuple[Slopes, list[Tensor], list[list[Tensor]], int]:
        """Return the slopes and tangents of all directions, the control variates, and the length of a chunk.

        This worker pushes its own chunks, and receives the rest from the others.
        """
        workers, rule = distributed.current(), FiniteDifferences() if self.first_order else FORWARD_MODE
        costs = variates.costs(self.control_variate, run)
        assigned = assign(self.directions, workers.size, self.chunk_size, costs)
        several = variates.as_tuple(self.control_variate)
        mine: list[list[Tensor]] = []

        def push_chunks(chunks: Sequence[range]) -> Slopes:
            found = []
            for numbers in chunks:
                vectors = draw(numbers)
                begun = run.push_init(vectors)
                tangents = begun.tangents if past is None else _rows(past, numbers)
                slopes, tangents = push_on(run, begun.value, tangents, vectors, rule)
                found.append(slopes)
                mine.append(tangents)
            together = torch.cat([slopes.slopes for slopes in found])
            return found[-1]._replace(slopes=together, moved=any(slopes.moved for slopes in found))

        def variate(number: int) -> list[Tensor]:
            return variates.gradient_of(several[number], run)

        slopes, gradients = spread_slopes(run, assigned, push_chunks, variate, workers)
        run.require_connections(slopes.moved, slopes.slopes, slopes.state)
        slopes = slopes._replace(state=agreed_tree(trees.detach(slopes.state), workers))
        tangents = everybodys_rows("tangents", assigned, mine, slopes.state, workers)
        return slopes, tangents, gradients, assigned.longest_chunk


def _mean_of_terms(slopes: Tensor, labels: Sequence[Tensor]) -> tuple[list[Tensor], float | None]:
    """Return the mean over b directions of slope times label, and its standard error if b is at least 2."""
    terms = [torch.einsum("b,b...->b...", slopes.to(label), label) for label in labels]
    grad, count = [term.mean(0) for term in terms], len(slopes)
    if count == 1:
        return grad, None
    spread = sum(float((term - mean).double().square().sum()) for term, mean in zip(terms, grad, strict=True))
    return grad, (spread / (count * (count - 1))) ** 0.5


def _rows(stacks: Sequence[Tensor], numbers: range) -> list[Tensor]:
    return [stack[numbers.start : numbers.stop] for stack in stacks]
