"""Hypergradients with the inverse Hessian replaced by something cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bilevel import autodiff, checks, trees
from bilevel.estimators.base import Estimate, Estimator, like_meta, require_gradient_descent
from bilevel.estimators.implicit import (
    StationaryPoint,
    require_dependence_of_loss,
    stationarity_transpose,
    subtract_mixed_product,
)
from bilevel.estimators.reverse_pass import ReversePass
from bilevel.problem import Descent, GradientDescent
from bilevel.unrolling import diagnosis
from bilevel.unrolling.first_order import objective_by_meta, outer_gradients
from bilevel.unrolling.held_stops import HeldStops
from bilevel.unrolling.unroll import Losses, Unroll


@dataclass(frozen=True)
class HessianFree(Estimator):
    """Hypergradient with a multiple of the identity in place of the inverse Hessian. The literature's T1–T2, SAMA.

    `Implicit` with H⁻¹ replaced,

        ∇h ≈ c − α (P d)ᵀ Y,

    with d = ∂outer/∂θ `[M]` and c = ∂outer/∂φ `[N]` at θ_T, Y = ∂²g/∂θ∂φ `[M, N]` at θ_T on the last inner batch, and P
    the identity, or −∂u/∂(gradient) for one more update u of the optimiser from its final state, with the learning rate
    of the last step: that learning rate for SGD, and for Adam its adaptive scale, entry by entry.

    `HessianFree(preconditioner="optimizer", mixed="difference")` is SAMA: with v = P d and ε = step_size/‖v‖,

        vᵀ Y ≈ (∂_φ g(θ_T + εv, φ) − ∂_φ g(θ_T − εv, φ)) / 2ε,

    from first derivatives alone, so that fused attention, activation checkpointing and mixed precision work.

    Args:
        scale: α > 0. Without explicit dependence (c = 0) it scales the result and nothing else.
        preconditioner: P: `"identity"`, or `"optimizer"` for the scales that the optimiser gives each entry of d.
        mixed: how the product with Y is made: `"exact"`, or by the `"difference"` above.
        step_size: how far the difference moves θ_T to each side, as a part of ‖θ_T‖. `None` for the cube root of the
            precision of θ_T's dtype, which balances the bias against rounding: 6e-6 in float64, 5e-3 in float32.
        lookahead: d and c are taken after one more step of the optimiser on the last batch, rather than at θ_T. With
            `preconditioner="optimizer"` and α = 1 the result is then the exact derivative of the outer loss through
            that one step.

    Cost: at most T + 3 units: T for the inner loop, 1 for a gradient with its graph, 2 for the product with Y (a
    difference takes 2 in all); 1 more with the optimiser's scale, and 1 more for the look-ahead, whose gradient serves
    both. Memory: the graph of one inner gradient; with `mixed="difference"` one first-order gradient.
    Bias: of the order of the hypergradient itself, unless the inner Hessian is close to I/α; the difference adds
    O(step_size²). Dependence on φ through the initial state or the learning rate is not seen. Running statistics of
    modules (BatchNorm) are taken as constants. A vector of m outer losses adds 2(m − 1) units: the inner loop and the
    gradients serve all of them.

    Departures from SAMA: the step of the difference is relative to ‖θ_T‖, where SAMA takes a fixed length; P has the
    derivative of Adam's second moment, of both moments' bias corrections, and of any other optimiser, where SAMA writes
    Adam's by hand.

    Reference: Luketina et al., ICML 2016 (T1–T2); Choe et al., NeurIPS 2023 (SAMA, arXiv 2310.05674); Shen et al.,
    NeurIPS 2024, App. B.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (2 * theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.25),
    ... )
    >>> bilevel.HessianFree(scale=0.25)(problem, torch.tensor(2.0), bilevel.no_batches(1)).grad  # H = 4
    tensor(0.5000)
    """

    scale: float = 1.0
    preconditioner: Literal["identity", "optimizer"] = "identity"
    mixed: Literal["exact", "difference"] = "exact"
    step_size: float | None = None
    lookahead: bool = False
    is_biased: ClassVar[bool] = True
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.positive(self.scale, "scale")
        checks.one_of(self.preconditioner, "preconditioner", ("identity", "optimizer"))
        checks.one_of(self.mixed, "mixed", ("exact", "difference"))
        if self.step_size is not None:
            checks.positive(self.step_size, "step_size")
            if self.mixed == "exact":
                raise ValueError(f'step_size={self.step_size!r} has no effect with mixed="exact"; take "difference"')
        if not isinstance(self.lookahead, bool):
            raise ValueError(f"lookahead={self.lookahead!r}: True or False is needed")

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        product = 2.0 * losses + (self.mixed == "exact")
        return steps + product + (self.preconditioner == "optimizer" or self.lookahead)

    @property
    def first_order(self) -> bool:
        """Whether first derivatives of the inner loss are enough."""
        return self.mixed == "difference"

    def reverse_pass(self, run: Unroll) -> ReversePass:
        require_gradient_descent(run, self)
        if self.lookahead:
            raise ValueError(
                "HessianFree(lookahead=True) judges the parameters one step beyond the state that bilevel.solve "
                "returns; take lookahead=False"
            )
        return StationaryPoint(run, run.final_state(), lambda *through: self._through(run, *through))

    def _estimate(self, run: Unroll) -> Estimate:
        problem = require_gradient_descent(run, self)
        state: Descent = run.final_state()
        problem.require_no_hooks(state.params)
        ahead = _OneMoreStep(run, problem, state) if self.lookahead or self.preconditioner == "optimizer" else None
        judged = ahead.after if ahead is not None and self.lookahead else state
        final = judged is state
        value, d, c = outer_gradients(run, judged) if self.first_order else run.outer_cotangents(judged, final)
        if not final:
            value = run.outer_loss(state, run.meta).detach()
        run.same_value("plain", value)
        grad = self._through(run, state, d, c, Losses.of(value).number, ahead)
        return Estimate(value, like_meta(run, grad), state)

    def _through(
        self,
        run: Unroll,
        state: Descent,
        d: Sequence[Tensor],
        c: list[Tensor],
        count: int | None,
        ahead: _OneMoreStep | None = None,
    ) -> list[Tensor]:
        """Return c − α (P d)ᵀ Y. With a count m, d, c and the result have a leading axis of that length."""
        problem = require_gradient_descent(run, self)
        d = list(d[: len(trees.split(state.params).differentiable)])
        if self.preconditioner == "optimizer":
            d = (ahead or _OneMoreStep(run, problem, state)).scaled(d, count)
        d = [self.scale * part for part in d]
        if self.mixed == "difference":
            if count is None:
                return self._subtract_difference(run, problem, state, c, d)
            each = [
                self._subtract_difference(run, problem, state, [part[j] for part in c], [part[j] for part in d])
                for j in range(count)
            ]
            return [torch.stack(parts) for parts in zip(*each, strict=True)]
        jacobian = stationarity_transpose(run, problem, state, batches=1)
        return subtract_mixed_product(run, problem, state, c, jacobian, d, count)

    def _subtract_difference(
        self, run: Unroll, problem: GradientDescent, state: Descent, c: list[Tensor], vector: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return c − vᵀY, with the product taken by a central difference of ∂_φ g along v."""
        diagnosis.require_finite(run, run.outer_loss(state, run.meta).detach(), state, [*vector, *c])
        parts = trees.split(state.params)
        length, speed = (float(trees.squared_norm(ts).sqrt()) for ts in (parts.differentiable, vector))
        if speed == 0:
            require_dependence_of_loss(run, problem, state)
            return c
        relative = self.step_size or max(torch.finfo(t.dtype).eps for t in parts.differentiable) ** (1 / 3)
        step = relative * (length or 1.0) / speed

        stops = HeldStops(problem, state)

        def beside(sign: int) -> list[Tensor] | None:
            moved = [p + sign * step * v for p, v in zip(parts.differentiable, vector, strict=True)]
            return objective_by_meta(run, stops.problem, state._replace(params=parts.rebuild(moved)), batches=1)

        ahead, behind = stops.pair(beside)
        mixed: list[Tensor] = []
        if ahead is not None and behind is not None:
            mixed = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
        if not any(bool(part.any()) for part in mixed):
            require_dependence_of_loss(run, problem, state)
            diagnosis.require_finite_losses(run)
            return c
        return [old - new for old, new in zip(c, mixed, strict=True)]


class _OneMoreStep:
    """One more update from the final state, on the last batch, and its derivative with respect to the gradient.

    It is made with the settings of the last step: the ones after it may be a learning rate annealed to zero.
    """

    def __init__(self, run: Unroll, problem: GradientDescent, state: Descent) -> None:
        last = run.steps - 1
        again, meta = state._replace(steps=last), run.meta
        gradient = run.at_step(last, lambda batch: problem.gradient(state.params, meta, batch, state.buffers))

        def update(gradient: list[Tensor | None]) -> Descent:
            return problem.apply(again, gradient, meta)

        self._gradient, self._sign = gradient, problem.optimizer.sign
        self._transpose = autodiff.Transpose(
            lambda g: trees.split(update(g).params).differentiable, [gradient], run.memory
        )
        self.after: Descent = state._replace(params=trees.split(state.params).rebuild(self._transpose.value))

    def scaled(self, d: list[Tensor], count: int | None) -> list[Tensor]:
        """Return P d = −dᵀ ∂θ'/∂gradient, the gradient being what is descended on; for each of `count` outer losses."""
        (found,) = self._transpose(d, keep=False) if count is None else self._transpose.many_or_none(d)
        return [-self._sign * part for part in autodiff.placed_where_reached(found, self._gradient, d)]
