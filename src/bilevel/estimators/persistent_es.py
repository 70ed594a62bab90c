"""Persistent evolution strategies: whole histories of a stream, without derivatives. PES, NRES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bilevel import checks, randomness, trees
from bilevel.directions.distributions import Directions, seed_of_draw
from bilevel.estimators.base import Estimate, Estimator, like_meta, require_one_outer_loss
from bilevel.estimators.streaming_forward_gradient import SYMMETRIC
from bilevel.estimators.zeroth_order import warn_of_no_slopes
from bilevel.trees import Tree
from bilevel.unrolling import diagnosis
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.kept_states import restored, stored
from bilevel.unrolling.unroll import Unroll

_FRESH = 101
"""Tells the directions of later windows from those of an estimate, which have the same seed."""


@dataclass(frozen=True)
class PersistentES(Estimator):
    """Hypergradient of a stream from perturbed copies of the inner loop that go on from window to window. PES, NRES.

    Each of b pairs has two inner states of its own, which go on from window to window. In a window, pair i draws a
    direction v_i `[N]` with E[v vᵀ] = I and its copies make the T steps at φ + σv_i and φ − σv_i. With h⁺_i and h⁻_i
    the outer losses where they end,

        ∇h ≈ (1/b) Σ_i (h⁺_i − h⁻_i)/(2σ) · l_i,   l_i = the sum of the v_i of all windows so far.

    The inner loop may be anything that goes step by step, with or without derivatives; both copies see the same batches
    and the same random numbers. The estimate looks back to the beginning of the stream, which `ZerothOrder` on windows
    does not. `fit(stream=K)` starts the inner loop, and the sums l_i, over after every K windows.
    `StreamingForwardGradient` does the same with exact derivatives of the steps.

    Args:
        directions: b, the number of pairs.
        step_size: σ > 0, in the units of φ, as in `ZerothOrder`.
        carry: `"fresh"` draws directions for each window (PES). `"same"` keeps the directions of the first window, and
            l_i = v_i (NRES): less variance, but the noise of one window is that of the next until the stream starts
            over.
        distribution: `"rademacher"`, `"gaussian"` or `"low-rank"`: independent directions with mean zero.
        draw: another number gives other directions at the same seed.

    Cost: (1 + 2b)·T units. Memory: 1 + 2b inner states, whatever T. Every worker makes the whole estimate.
    Bias: O(σ²), none beyond that of central differences, at a φ that does not move between windows; otherwise as in
    `StreamingForwardGradient`. With `"gaussian"` directions there is none for the outer loss smoothed by the noise. The
    variance of `"fresh"` grows with the number of windows since the start.

    Reference: Vicol et al., ICML 2021 (PES, arXiv 2112.13835); Li et al., NeurIPS 2023 (NRES, 2304.12180).

    >>> import torch, bilevel
    >>> problem = bilevel.Problem(
    ...     init=lambda phi: torch.zeros(1),
    ...     step=lambda theta, phi, batch: 0.5 * theta + phi,
    ...     outer_loss=lambda theta, phi, batch: theta.sum(),
    ... )
    >>> estimator, phi = bilevel.PersistentES(1, step_size=0.5, carry="same"), torch.ones(1)
    >>> first = estimator(problem, phi, 1)
    >>> first.grad, estimator(problem, phi, 1, carried=first.carried).grad  # 1, 1 + 0.5
    (tensor([1.]), tensor([1.5000]))
    """

    directions: int = 8
    step_size: float = 1e-3
    carry: Literal["fresh", "same"] = "fresh"
    distribution: str = "rademacher"
    draw: int = 0
    needs_derivatives: ClassVar[bool] = False
    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.whole_number(self.directions, "directions")
        checks.positive(self.step_size, "step_size")
        checks.one_of(self.carry, "carry", ("fresh", "same"))
        checks.one_of(self.distribution, "distribution", SYMMETRIC)
        checks.whole_number(self.draw, "draw", at_least=0)

    def redrawn(self, number: int) -> PersistentES:
        return replace(self, draw=self.draw + number)

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return (1.0 + 2.0 * self.directions) * steps

    def _estimate(self, run: Unroll) -> Estimate:
        memory = self._memory(run)
        vectors = self._directions(run)
        labels = vectors
        if memory is not None and self.carry == "fresh":
            labels = [old + fresh for old, fresh in zip(memory["labels"], vectors, strict=True)]
        value, state = run.value()
        require_one_outer_loss(self, value)
        diagnosis.require_finite(run, value, state)
        start = None if memory is None else run.start()
        slopes, copies = [], []
        for i in range(self.directions):
            kept = (None, None) if memory is None else memory["copies"][i]
            ends = []
            for sign, before in zip((1, -1), kept, strict=True):
                direction = [v[i] for v in vectors]
                ends.append(self._end(run, sign, direction, None if before is None else restored(before, start)))
            slopes.append((ends[0][0] - ends[1][0]) / (2 * self.step_size))
            if not run.problem.is_black_box:
                copies.append(tuple(stored(end) for _, end in ends))
        slopes = torch.stack(slopes)
        if not bool(slopes.any()):
            warn_of_no_slopes("PersistentES", value, self.step_size, stacklevel=5)
        terms = [torch.einsum("b,b...->b...", slopes.to(label), label) for label in labels]
        grad = [term.mean(0) for term in terms]
        kept = None if run.problem.is_black_box else {"labels": labels, "copies": copies}
        return Estimate(
            value, like_meta(run, grad), state, _standard_error(terms, grad), carried=run.window_end(state, kept)
        )

    def _directions(self, run: Unroll) -> list[Tensor]:
        """Return the directions of this window, `[b, *leaf.shape]` for each leaf of φ."""
        fresh = self.carry == "fresh" and run.first_step > 0
        seed = randomness.derive(run.seed, _FRESH, run.first_step) if fresh else run.seed
        made = Directions(self.distribution, seed_of_draw(seed, self.draw), self.directions, _leaves(run))
        return made.draw(range(self.directions))

    def _end(self, run: Unroll, sign: int, direction: Sequence[Tensor], before: Tree) -> tuple[Tensor, Tree]:
        """Return the outer loss and the state of a copy at the end of the window."""
        moved = [leaf + sign * self.step_size * v for leaf, v in zip(_leaves(run), direction, strict=True)]
        copy = run.at(like_meta(run, moved))
        if before is not None:
            copy = replace(copy, carried=WindowEnd(before, run.first_step))
        value, state = copy.value()
        if not bool(torch.isfinite(value)):
            where = f"meta {'+' if sign > 0 else '-'} {self.step_size:g}·direction"
            what = f"the outer loss at {where} (finite at meta itself; a smaller step_size may help)"
            raise diagnosis.non_finite(copy, what, value, state)
        return value, state

    def _memory(self, run: Unroll) -> dict[str, Any] | None:
        """Return what the window before left, or raise if it does not fit to these settings."""
        memory = run.carried_memory
        if memory is None:
            return None
        if not isinstance(memory, dict) or "copies" not in memory:
            raise ValueError(
                f"carried holds the memory of another estimator ({type(memory).__name__}), not the copies of the inner "
                "loop that PersistentES goes on with; pass the carried of its own estimates, or carried=None to begin"
            )
        if len(memory["copies"]) != self.directions:
            raise ValueError(
                f"directions={self.directions}, but carried holds {len(memory['copies'])} pairs of inner loops"
            )
        return memory


def _leaves(run: Unroll) -> list[Tensor]:
    return trees.leaves(run.meta)


def _standard_error(terms: Sequence[Tensor], means: Sequence[Tensor]) -> float | None:
    """The root of E‖grad − ∇h‖², from the spread of the pairs; `None` for a single pair."""
    count = len(terms[0])
    if count == 1:
        return None
    spread = sum(float((term - mean).double().square().sum()) for term, mean in zip(terms, means, strict=True))
    return (spread / (count * (count - 1))) ** 0.5
