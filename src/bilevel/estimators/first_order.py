"""First-order MAML: the gradient at the final state, taken as the gradient by the initial state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import NoDependenceError
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.problem import Descent
from bilevel.trees import Tree
from bilevel.unrolling.first_order import outer_gradients
from bilevel.unrolling.unroll import Losses, Unroll


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """Biased hypergradient that takes dθ_T/dθ_0 for the identity. The literature's first-order MAML, FOMAML.

    With d = ∂outer/∂θ_T `[M]`, c = ∂outer/∂φ `[N]` and the initial parameters θ_0(φ),

        ∇h ≈ d · dθ_0/dφ + c.

    With learned initial parameters (θ_0 = φ) this is the gradient of the outer loss at the adapted parameters. Every
    other way in which the inner loop depends on φ (the inner loss, a learning rate) is not seen.

    Cost: T units, those of the inner loop alone, for a vector of outer losses as well. Memory: one state. Bias: of the
    order of the hypergradient itself, unless the steps are short: for SGD with rate η on a loss whose Hessians are
    bounded by L it is at most ((1 + ηL)^T − 1)·‖d‖·‖dθ_0/dφ‖.

    Raises:
        NoDependenceError: the initial state does not depend on φ.

    Reference: Finn, Abbeel and Levine, ICML 2017, section 5.2; Nichol, Achiam and Schulman, 2018.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * theta.square().sum(),
    ...     outer_loss=lambda theta, phi, batch: theta.sum(),
    ...     params=lambda phi: phi,
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> bilevel.FirstOrder()(problem, torch.ones(2), 2).grad  # exact: 0.5² = 0.25
    tensor([1., 1.])
    """

    is_biased: ClassVar[bool] = True
    is_random: ClassVar[bool] = False

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return float(steps)

    @property
    def first_order(self) -> bool:
        """True: no second derivative is taken, so any kernel will do."""
        return True

    def _estimate(self, run: Unroll) -> Estimate:
        state = run.final_state()
        value, d, c = outer_gradients(run, state)
        if not any(bool(trees.whole(part.any())) for part in d):
            run.outer_cotangents(state)  # raises if the outer loss does not depend on the state
        start = autodiff.Transpose(lambda meta: _followed(run.init(meta)), [run.meta], run.memory)
        kept = _cotangents(state, d)
        count = Losses.of(value).number
        (through,) = start(kept, keep=False) if count is None else start.many_or_none(kept)
        if all(part is None for part in through):
            raise NoDependenceError(
                "the initial state does not depend on the meta parameters, and FirstOrder sees no other dependence of "
                "the inner loop; start from them (params=lambda meta: ..., or the same module as params and meta), "
                "without .detach() on the way, or take Reverse, which sees every dependence"
            )
        grad = [a + b for a, b in zip(autodiff.fill_zeros(through, run.meta, count), c, strict=True)]
        return Estimate(value, like_meta(run, grad), state)


def _followed(state: Tree) -> Tree:
    """Return what of an initial state has a counterpart in the final one: not the memory of an optimiser."""
    return (state.params, state.buffers) if isinstance(state, Descent) else state


def _cotangents(state: Tree, d: list[Tensor]) -> list[Tensor]:
    """Return the cotangents of what `_followed` returns, from those of the whole final state."""
    if not isinstance(state, Descent):
        return d
    params, buffers = (len(trees.split(part).differentiable) for part in (state.params, state.buffers))
    return [*d[:params], *d[len(d) - buffers :]]
