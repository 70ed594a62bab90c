"""Hypergradients with the inverse Hessian replaced by something cheap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bilevel import autodiff, checks, trees
from bilevel.estimators.base import Estimate, Estimator, like_meta, require_gradient_descent
from bilevel.estimators.implicit import stationarity_transpose, subtract_mixed_product
from bilevel.problem import Descent, GradientDescent
from bilevel.unrolling.unroll import Losses, Unroll


@dataclass(frozen=True)
class HessianFree(Estimator):
    """Hypergradient with a multiple of the identity in place of the inverse Hessian. The literature's T1–T2, SAMA.

    `Implicit` with H⁻¹ replaced,

        ∇h ≈ c − α (P d)ᵀ Y,

    with d = ∂outer/∂θ_T `[M]`, c = ∂outer/∂φ `[N]`, Y = ∂²g/∂θ∂φ `[M, N]` at θ_T on the last inner batch, and P the
    identity, or −∂u/∂(gradient) for one more update u of the optimiser from its final state, with the learning rate of
    the last step: that learning rate for SGD, and for Adam its adaptive scale, entry by entry.

    Args:
        scale: α > 0. Without explicit dependence (c = 0) it scales the result and nothing else.
        preconditioner: P: `"identity"`, or `"optimizer"` for the scales that the optimiser gives each entry of d.

    Cost: at most T + 3 units: T for the inner loop, 1 for a gradient with its graph, 2 for the product with Y; 1 more
    with the optimiser's scale. Memory: the graph of one inner gradient. Bias: of the order of the hypergradient itself,
    unless the inner Hessian is close to I/α. Dependence on φ through the initial state or the learning rate is not
    seen. Running statistics of modules (BatchNorm) are taken as constants. A vector of m outer losses adds 2(m − 1)
    units: the inner loop and the gradients serve all of them.

    Reference: Luketina et al., ICML 2016 (T1–T2); Choe et al., NeurIPS 2023 (SAMA); Shen et al., NeurIPS 2024, App. B.

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
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.positive(self.scale, "scale")
        checks.one_of(self.preconditioner, "preconditioner", ("identity", "optimizer"))

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return steps + 1.0 + 2.0 * losses + (self.preconditioner == "optimizer")

    def _estimate(self, run: Unroll) -> Estimate:
        problem = require_gradient_descent(run, self)
        state: Descent = run.final_state()
        value, d, c = run.outer_cotangents(state)
        count = Losses.of(value).number
        d = d[: len(trees.split(state.params).differentiable)]
        jacobian = stationarity_transpose(run, problem, state, batches=1)
        if self.preconditioner == "optimizer":
            d = _through_update(run, problem, state, d, count)
        grad = subtract_mixed_product(run, problem, state, c, jacobian, [self.scale * part for part in d], count)
        return Estimate(value, like_meta(run, grad), state)


def _through_update(
    run: Unroll, problem: GradientDescent, state: Descent, d: list[Tensor], count: int | None
) -> list[Tensor]:
    """−dᵀ ∂θ'/∂gradient for one more update θ' from the final state, the gradient being what is descended on.

    It is made with the settings of the last step: the ones after it may be a learning rate annealed to zero.
    """
    last = run.steps - 1
    again = state._replace(steps=last)
    gradient = run.at_step(last, lambda batch: problem.gradient(state.params, run.meta, batch, state.buffers))

    def update(gradient: list[Tensor | None]) -> list[Tensor]:
        return trees.split(problem.apply(again, gradient, run.meta).params).differentiable

    if count is None:
        _, (found,) = autodiff.pull_back(update, [gradient], d)
    else:
        _, (found,) = autodiff.pull_back_many(update, [gradient], d, run.memory)
    return [-problem.optimizer.sign * part for part in autodiff.placed_where_reached(found, gradient, d)]
