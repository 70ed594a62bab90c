"""Hypergradients from one loop: parameters, linear system and meta parameters move together. SOBA, AmIGO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from bilevel import autodiff, checks, trees
from bilevel.errors import NonFiniteError
from bilevel.estimators.base import Estimate, Estimator, like_meta, require_gradient_descent, require_one_outer_loss
from bilevel.estimators.implicit import stationarity_transpose_at, subtract_mixed_product
from bilevel.problem import Descent, GradientDescent
from bilevel.unrolling import diagnosis
from bilevel.unrolling.unroll import Unroll


@dataclass(frozen=True)
class SingleLoop(Estimator):
    """Hypergradient whose linear system is solved along the stream, a few steps in each window. SOBA, AmIGO.

    `Implicit` solves Hv = −d anew for every estimate. Here v `[M]` is carried from window to window, and each of its
    steps is stochastic: with the Hessian H `[M, M]` of one inner batch, d = ∂outer/∂θ `[M]`, c = ∂outer/∂φ `[N]` and
    Y = ∂²g/∂θ∂φ `[M, N]`,

        v ← v − ρ (H v + d),   ∇h ≈ c + vᵀ Y.

    It is meant for `fit(stream=True)`, where θ goes on from window to window as well. A call that goes on from no other
    begins with v = 0.

    Args:
        step_size: ρ > 0; it must be below 2/λ_max of H.
        solver_steps: K, the steps of v in a window, on the last K inner batches (in turn, if K > T). With
            `order="simultaneous"` v makes one step with each inner step, and K has no meaning.
        order: `"alternating"`: first the T inner steps, then K steps of v at θ_T, then the estimate from both. This is
            AmIGO. `"simultaneous"`: at each inner step, the steps of θ and v and the estimate are all taken from the
            same θ, v and batch, and the estimate is that of the last inner step. With T = 1 this is SOBA.
        average: a in (0, 1]; the result is the moving average m ← (1 − a) m + a (c + vᵀY), carried along the stream.
            1 for no average.

    Cost: T + 3K + 2 units: for each step of v, 1 for a gradient with its graph and 2 for the product with H, and 2 for
    the product with Y. Simultaneously 5T: 3 for v and 1 for a gradient of the outer loss with each inner step. Memory:
    the graph of one inner gradient, v and one state, whatever T.
    Bias: none where θ and v have come to rest, which is where ∇h of `Implicit` is. On the way, both lag behind φ, the
    more so the larger the outer steps are; v forgets its start at the rate 1 − ρλ_min. Dependence on φ through the
    initial state or the learning rate is not seen. Running statistics of modules are taken as constants.

    Departures: the papers let one schedule lower all step sizes; here θ has the inner optimiser and its schedule, φ the
    outer one, and ρ is constant. The moving average begins with the first estimate rather than with zero.

    Reference: Dagréou et al., NeurIPS 2022 (SOBA, arXiv 2201.13409); Chen et al., 2023 (its moving average,
    2306.12067); Arbel and Mairal, ICLR 2022 (AmIGO, 2111.14580).

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (2 * theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.25),
    ... )
    >>> bilevel.SingleLoop(step_size=0.25)(problem, torch.tensor(2.0), 1).grad  # H = 4
    tensor(0.5000)
    """

    step_size: float = 0.01
    solver_steps: int = 1
    order: Literal["alternating", "simultaneous"] = "alternating"
    average: float = 1.0
    is_biased: ClassVar[bool] = True
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.positive(self.step_size, "step_size")
        checks.whole_number(self.solver_steps, "solver_steps")
        checks.one_of(self.order, "order", ("alternating", "simultaneous"))
        if not checks.positive(self.average, "average") <= 1:
            raise ValueError(f"average={self.average!r}: a number in (0, 1] is needed; 1 for no average")
        if self.order == "simultaneous" and self.solver_steps != 1:
            raise ValueError(
                f'solver_steps={self.solver_steps} with order="simultaneous", where v makes one step with each inner '
                'step; take order="alternating", or leave solver_steps out'
            )

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return 5.0 * steps if self.order == "simultaneous" else steps + 3.0 * self.solver_steps + 2.0

    def _estimate(self, run: Unroll) -> Estimate:
        problem = require_gradient_descent(run, self)
        memory = self._memory(run)
        found = (self._together if self.order == "simultaneous" else self._in_turn)(run, problem, memory["solution"])
        if not trees.all_finite(found.v):
            diagnosis.require_finite(run, found.value, found.state)
            raise NonFiniteError(
                "SingleLoop: the hypergradient is not finite, because v, which is to solve Hv = −∂outer/∂θ, became NaN "
                f"or infinite with step_size={self.step_size:g}. Lower it below 2/λ_max of the inner Hessian; if that "
                "has negative eigenvalues, let the inner loop train longer before. Or a second derivative of "
                "inner_loss overflows or is undefined at the inner state",
                last_finite_state=found.state,
            )
        grad = found.grad
        if memory["mean"] is not None:
            pairs = zip(memory["mean"], grad, strict=True)
            grad = [(1 - self.average) * old + self.average * new for old, new in pairs]
        kept = {"solution": found.v, "mean": grad if self.average < 1 else None}
        end = run.window_end(found.state, kept)
        diagnostics = {"residual": found.residual}
        return Estimate(found.value, like_meta(run, grad), found.state, diagnostics=diagnostics, carried=end)

    def _in_turn(self, run: Unroll, problem: GradientDescent, kept: list[Tensor] | None) -> _Found:
        state: Descent = run.final_state()
        value, d, c = run.outer_cotangents(state)
        require_one_outer_loss(self, value)
        v = _start(kept, state)
        count, last = len(v), run.steps - 1

        def linearised(number: int) -> tuple[autodiff.Transpose, list[Tensor]]:
            """The Jacobian on the batch so many steps before the last, and Hv + d."""
            reached: list[bool] = []
            jacobian = stationarity_transpose_at(run, problem, state, [(last - number) % run.steps], reached)
            return jacobian, _residual(jacobian(v, of=[0])[0], d[:count], reached)

        for number in range(self.solver_steps - 1, 0, -1):
            v = self._moved(v, linearised(number)[1])
        jacobian, residual = linearised(0)
        v = self._moved(v, residual)
        grad = subtract_mixed_product(run, problem, state, c, jacobian, [-part for part in v], None)
        return _Found(value, state, v, grad, _relative(residual, d[:count]))

    def _together(self, run: Unroll, problem: GradientDescent, kept: list[Tensor] | None) -> _Found:
        state: Descent = run.start()
        v = _start(kept, state)
        count, last, relative = len(v), run.steps - 1, 0.0
        grad: list[Tensor] = []
        for t in range(run.steps):
            reached: list[bool] = []
            value, d, c = run.outer_cotangents(state, final=False)
            require_one_outer_loss(self, value)
            jacobian = stationarity_transpose_at(run, problem, state, [t], reached)
            residual = _residual(jacobian(v, of=[0])[0], d[:count], reached)
            if t == last:
                grad = subtract_mixed_product(run, problem, state, c, jacobian, [-part for part in v], None)
                relative = _relative(residual, d[:count])
            v, state = self._moved(v, residual), run.descend(state, t, t + 1)
        value = run.outer_loss(state, run.meta).detach()
        run.same_value("plain", value)
        return _Found(value, state, v, grad, relative)

    def _moved(self, v: Sequence[Tensor], residual: Sequence[Tensor]) -> list[Tensor]:
        return [part - self.step_size * r for part, r in zip(v, residual, strict=True)]

    @staticmethod
    def _memory(run: Unroll) -> dict[str, Any]:
        """Return what the window before left: v and the moving average."""
        memory = run.carried_memory
        if memory is None:
            return {"solution": None, "mean": None}
        if not isinstance(memory, dict) or "solution" not in memory:
            raise ValueError(
                f"carried holds the memory of another estimator ({type(memory).__name__}), not the linear system that "
                "SingleLoop goes on with; pass the carried of its own estimates, or carried=None to begin"
            )
        return memory


class _Found(NamedTuple):
    """The result of one window."""

    value: Tensor
    state: Descent
    v: list[Tensor]
    grad: list[Tensor]
    residual: float
    """‖Hv + d‖ / ‖d‖ before the last step of v."""


def _start(kept: list[Tensor] | None, state: Descent) -> list[Tensor]:
    return [torch.zeros_like(p) for p in trees.split(state.params).differentiable] if kept is None else list(kept)


def _residual(product: Sequence[Tensor | None], d: Sequence[Tensor], reached: Sequence[bool]) -> list[Tensor]:
    """Return Hv + d; zeros for parameters that the inner loss does not reach, which no solution moves."""
    filled = autodiff.zeros_where_none(product, d)
    return [h + part if there else torch.zeros_like(part) for h, part, there in zip(filled, d, reached, strict=True)]


def _relative(residual: Sequence[Tensor], d: Sequence[Tensor]) -> float:
    length = float(trees.squared_norm(d).sqrt())
    return float(trees.squared_norm(residual).sqrt()) / length if length else 0.0
