"""Hypergradients from first derivatives alone: the inner problem becomes a penalty, with a second inner copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bilevel import checks, trees
from bilevel.errors import NonFiniteError
from bilevel.estimators.base import Estimate, Estimator, like_meta, require_gradient_descent, require_one_outer_loss
from bilevel.estimators.implicit import require_dependence_of_loss
from bilevel.problem import Descent, GradientDescent
from bilevel.unrolling import diagnosis
from bilevel.unrolling.first_order import objective_by_meta, outer_gradients
from bilevel.unrolling.kept_states import restored, stored
from bilevel.unrolling.replay import require_repeatable
from bilevel.unrolling.unroll import Unroll


@dataclass(frozen=True)
class Penalty(Estimator):
    """Hypergradient of a penalty for not minimising the inner loss. The literature's value function, F²SA, ScaleBiO.

    With the outer loss f and the inner loss g, "θ minimises g" is replaced by a penalty λ > 0,

        L_λ(φ) = min_y [f(y, φ) + λ g(y, φ)] − λ min_z g(z, φ),
        ∇L_λ   = ∂_φ f(y, φ) + λ (∂_φ g(y, φ) − ∂_φ g(z, φ)),

    with y `[M]` and z `[M]` the two minimisers. z is the final state of the inner loop. y is a second copy of the
    parameters that descends on g + f/λ with the same optimiser, batches and random numbers. In both, g has the
    optimiser's weight decay added where that acts through the gradient. Every gradient is a first one, so fused
    attention, activation checkpointing and mixed precision work as in plain training.

    The second copy starts at θ_0, where the inner loop starts. If a call goes on from an earlier one (a stream), the
    second copy goes on as well.

    Args:
        penalty: λ, in units of f over units of g. The bias falls with 1/λ, and rounding errors grow with λ. The inner
            learning rate must suit the curvature of g + f/λ.
        growth: p ≥ 0 of the schedule λ_k = penalty · (1 + k)^p in the k-th window of a stream, k = 0, 1, …. Without a
            stream, λ is `penalty`; phases with a penalty each make a schedule there.
        steps: s; the second copy takes the last s inner steps only, from θ_{T−s} on, in every window anew. `None` for
            all T.
        batches: the two ∂_φ g are means over the last so many inner batches.

    Cost: T + 2s + 2·batches units with s = T for `steps=None`: each step of the second copy takes a gradient of g and
    one of f, which counts as a unit here. Memory: two inner states and two first-order
    gradients, whatever T.
    Bias: O(1/λ) where both copies have come to rest. Before that, for gradient descent on a quadratic g and λ → ∞, the
    result is that of `Implicit` with s terms of a Neumann series. The copies end about ‖H⁻¹∂f/∂θ‖/λ apart (the
    diagnostic `distance` is ‖y − z‖), and rounding costs a relative error of about λ times the precision of g's
    gradient. Dependence on φ through the initial state or the learning rate is not seen. Hooks on parameters are
    refused.

    Departures: BOME chooses λ anew in every step from the angle between ∇f and the gradient of the penalty, and starts
    z from y; here λ follows a schedule, and the two copies run side by side, so that what both still have to descend
    cancels in their difference. F²SA descends on f + λg with a step size of its own for y.

    Reference: Kwon et al., ICML 2023 (F²SA, arXiv 2301.10945); Ye et al., NeurIPS 2022 (BOME, 2209.08709); Pan et al.,
    2024 (ScaleBiO, 2406.19976).

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (2 * theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.25),
    ... )
    >>> bilevel.Penalty(100.0)(problem, torch.tensor(2.0), 10).grad  # θ* = φ/2
    tensor(0.5000)
    """

    penalty: float = 100.0
    growth: float = 0.0
    steps: int | None = None
    batches: int = 1
    is_biased: ClassVar[bool] = True
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.positive(self.penalty, "penalty")
        checks.not_negative(self.growth, "growth")
        if self.steps is not None:
            checks.whole_number(self.steps, "steps")
        checks.whole_number(self.batches, "batches")

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return steps + 2.0 * (steps if self.steps is None else self.steps) + 2.0 * self.batches

    @property
    def first_order(self) -> bool:
        """Whether first derivatives of the inner loss are enough: always."""
        return True

    def _estimate(self, run: Unroll) -> Estimate:
        problem = require_gradient_descent(run, self)
        for name, count in (("steps", self.steps), ("batches", self.batches)):
            if count is not None and count > run.steps:
                raise ValueError(
                    f"Penalty({name}={count}) of an inner loop with {run.steps} steps; take {name} <= {run.steps}"
                )
        memory = self._memory(run)
        weight = self.penalty * (1.0 + memory["windows"]) ** self.growth
        first = 0 if self.steps is None else run.steps - self.steps
        state, second = _both_copies(run, problem, first, memory["second"])
        value = run.outer_loss(state, run.meta).detach()
        require_one_outer_loss(self, value)
        for t in range(first, run.steps):
            second = _penalised_step(run, problem, t, second, weight)
        run.same_value("plain", value)
        diagnosis.require_finite(run, value, state)
        if not trees.all_finite(second):
            diagnosis.require_finite(run, value, state, outer_gradients(run, state)[1:])
            raise NonFiniteError(
                f"Penalty: the second copy became NaN or infinite while it descended on inner_loss + outer_loss/λ with "
                f"λ = {weight:g}, and the inner loop did not; take a larger penalty, or a smaller inner learning rate",
                last_finite_state=state,
            )
        _, _, explicit = outer_gradients(run, second)
        above, below = (objective_by_meta(run, problem, at, self.batches) for at in (second, state))
        apart = [] if above is None or below is None else [a - b for a, b in zip(above, below, strict=True)]
        if not any(bool(part.any()) for part in apart):
            require_dependence_of_loss(run, problem, state)
            diagnosis.require_finite_losses(run)
            apart = [torch.zeros_like(part) for part in explicit]
        grad = [c + weight * part for c, part in zip(explicit, apart, strict=True)]
        kept = {"windows": memory["windows"] + 1, "second": stored(second) if self.steps is None else None}
        copies = (trees.split(at.params).differentiable for at in (second, state))
        distance = trees.squared_norm([y - z for y, z in zip(*copies, strict=True)]).sqrt()
        diagnostics = {"penalty": weight, "distance": float(distance)}
        end = run.window_end(state, kept)
        return Estimate(value, like_meta(run, grad), state, diagnostics=diagnostics, carried=end)

    def _memory(self, run: Unroll) -> dict[str, Any]:
        """Return what the window before left: the number of windows so far, and the second copy."""
        memory = run.carried_memory
        if memory is None:
            return {"windows": 0, "second": None}
        if not isinstance(memory, dict) or "second" not in memory:
            raise ValueError(
                f"carried holds the memory of another estimator ({type(memory).__name__}), not the second copy that "
                "Penalty goes on with; pass the carried of its own estimates, or carried=None to begin"
            )
        return memory if self.steps is None else {**memory, "second": None}


def _both_copies(run: Unroll, problem: GradientDescent, first: int, kept: Any) -> tuple[Descent, Descent]:
    """Return θ_T, and the second copy before step `first`: θ_first, or what the window before kept of it."""
    state = run.start()
    problem.require_no_hooks(state.params)
    second = None if kept is None else restored(kept, state)
    for t in range(run.steps):
        if t == first and second is None:
            second = state
        before, state = state, run.descend(state, t, t + 1)
        require_repeatable(run, t, before, state)
    assert second is not None
    return state, second


def _penalised_step(run: Unroll, problem: GradientDescent, t: int, state: Descent, weight: float) -> Descent:
    """Return the second copy after one step on g + f/λ. Parameters that g does not reach are left alone."""
    found = run.at_step(t, lambda batch: problem.evaluate(state.params, run.meta, batch, state.buffers))
    factor, count = problem.optimizer.sign / weight, len(found.gradient)
    outer = outer_gradients(run, state)[1][:count]  # the rest are those by the optimiser's memory
    gradient = [
        None if inner is None else inner + factor * part for inner, part in zip(found.gradient, outer, strict=True)
    ]
    del outer
    with torch.no_grad():
        return trees.detach(problem.apply(state, gradient, run.meta, found.buffers))
