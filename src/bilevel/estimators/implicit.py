"""Hypergradients by the implicit function theorem."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bilevel import autodiff, checks, trees
from bilevel.errors import NoDependenceError, NonFiniteError
from bilevel.estimators.base import Estimate, Estimator, like_meta, require_gradient_descent
from bilevel.estimators.reverse_pass import ReversePass
from bilevel.problem import Descent, GradientDescent
from bilevel.solvers import ConjugateGradient, LinearSolver
from bilevel.trees import Tree
from bilevel.unrolling import diagnosis
from bilevel.unrolling.unroll import Losses, Unroll


@dataclass(frozen=True)
class Implicit(Estimator):
    """Hypergradient from the condition that the inner loss is stationary at θ_T. The literature's IFT, AID, iMAML.

    If ∇_θ g(θ_T, φ) = 0, then dθ/dφ = −H⁻¹Y with H = ∂²g/∂θ² `[M, M]` and Y = ∂²g/∂θ∂φ `[M, N]`, hence

        ∇h ≈ c − λᵀY,   Hλ = d,

    with d = ∂outer/∂θ_T `[M]` and c = ∂outer/∂φ `[N]`. g is the inner loss, with the optimiser's weight decay added
    where that acts through the gradient.

    Args:
        solver: how Hλ = d is solved without forming H: `ConjugateGradient(...)`, `Neumann(...)`, `Nystrom(...)`, or
            `EmpiricalFisher(...)`, which is made from the gradients of the inner steps.
        batches: g is the mean over the last so many inner batches.

    Cost: T + 3 + 2·products units: T for the inner loop, 1 for a gradient with its graph, 2 for each of the solver's
    products with H, and at most 2 for the product with Y. All but the first T are multiplied by `batches`. For a vector
    of m outer losses there are m linear systems, so 2·products and the 2 for Y come m times. Memory: the graph of one
    inner gradient, whatever T.
    Bias: the inner loop must have come to rest; what is missing, d(dθ_T/dφ + H⁻¹Y), is not measured by the method (the
    diagnostic `gradient_norm`, ‖∇g(θ_T)‖, says how far from rest it is). The solver adds its own error. Dependence on φ
    through the initial state or the learning rate does not move the solution and is not seen. Running statistics of
    modules (BatchNorm) are taken as constants. Hooks on parameters, which move the solution, are refused.

    Reference: Pedregosa, ICML 2016 (CG); Lorraine et al., AISTATS 2020 (Neumann); Hataya and Yamada, AISTATS
    2023 (Nyström); Shen et al., NeurIPS 2024, App. B.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (2 * theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.25),
    ... )
    >>> bilevel.Implicit()(problem, torch.tensor(2.0), bilevel.no_batches(1)).grad  # θ* = φ/2
    tensor(0.5000)
    """

    solver: LinearSolver = field(default_factory=ConjugateGradient)
    batches: int = 1
    is_biased: ClassVar[bool] = True
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(
                f"solver is {self.solver!r} ({type(self.solver).__name__}); a solver with its settings is needed, such "
                "as ConjugateGradient(iterations=20), Neumann(iterations=20, step_size=0.01) or Nystrom(rank=10)"
            )
        checks.whole_number(self.batches, "batches")

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        # For each batch: the gradient with its graph, and two units for each product with H and for the one with Y.
        return steps + self.batches * (1.0 + 2.0 * losses * (self.solver.products + 1))

    def reverse_pass(self, run: Unroll) -> ReversePass:
        self._problem_of(run)
        solver, final = self._after_inner_loop(run)
        return StationaryPoint(run, final, lambda *through: self._through(run, solver, *through)[0])

    def _estimate(self, run: Unroll) -> Estimate:
        self._problem_of(run)
        solver, state = self._after_inner_loop(run)
        value, d, c = run.outer_cotangents(state)
        grad, diagnostics = self._through(run, solver, state, d, c, Losses.of(value).number)
        return Estimate(value, like_meta(run, grad), state, diagnostics=diagnostics)

    def _problem_of(self, run: Unroll) -> GradientDescent:
        problem = require_gradient_descent(run, self)
        if self.batches > run.steps:
            raise ValueError(
                f"Implicit(batches={self.batches}) of an inner loop with {run.steps} batches; take batches <= "
                f"{run.steps}"
            )
        return problem

    def _after_inner_loop(self, run: Unroll) -> tuple[LinearSolver, Descent]:
        """Return θ_T, and the solver, made from the gradients on the way if it needs them."""
        if not self.solver.gradients_wanted:
            return self.solver, run.final_state()
        last: deque[list[Tensor | None]] = deque(maxlen=self.solver.gradients_wanted)
        state: Descent = run.final_state(seen=last.append)
        gradients = [trees.detach(autodiff.fill_zeros(gradient, state.params)) for gradient in last]
        return self.solver.with_gradients(gradients), state

    def _through(
        self,
        run: Unroll,
        solver: LinearSolver,
        state: Descent,
        d: Sequence[Tensor],
        c: list[Tensor],
        count: int | None,
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Return c − λᵀY with Hλ = d, and what the solver observed.

        With a count m, the leaves of d and c have a leading axis of that length, for m outer losses.
        """
        problem, reached = self._problem_of(run), list[bool]()
        jacobian = stationarity_transpose(run, problem, state, self.batches, reached)
        theta = trees.split(state.params).differentiable
        # Neither the optimiser's memory nor parameters that g does not reach are part of the solution.
        d = [part if there else torch.zeros_like(part) for part, there in zip(d, reached, strict=False)]

        def hessian(vector: Sequence[Tensor]) -> list[Tensor]:
            return autodiff.fill_zeros(jacobian(vector, of=[0])[0], theta)

        sides = [[part[j] for part in d] for j in range(count)] if count is not None else [d]
        with trees.without_autocast():
            solutions = [solver.solve(hessian, side) for side in sides]
        for solution in solutions:
            if not (math.isfinite(solution.residual) and trees.all_finite(solution.x)):
                raise NonFiniteError(
                    f"Implicit: the solution of Hλ = d is not finite: {solution.message}. Either the solver diverges, "
                    "or a second derivative of inner_loss overflows or is undefined at the final state",
                    last_finite_state=state,
                )
        vector = solutions[0].x
        if count is not None:
            vector = [torch.stack(parts) for parts in zip(*(solution.x for solution in solutions), strict=True)]
        grad = subtract_mixed_product(run, problem, state, c, jacobian, vector, count)
        left = next((solution for solution in solutions if not solution.converged), None)
        if left is not None:
            warnings.warn(f"Implicit: {left.message}", stacklevel=5)  # where the estimator was called
        diagnostics = {
            "solver_iterations": float(max(solution.iterations for solution in solutions)),
            "solver_residual": max(solution.residual for solution in solutions),
            "gradient_norm": float(trees.squared_norm(jacobian.value).sqrt()),
        }
        return grad, diagnostics


class StationaryPoint(ReversePass):
    """Multiplies by what stands for dθ_T/dφ at a stationary point; nothing is kept but the final state."""

    def __init__(
        self,
        run: Unroll,
        state: Descent,
        through: Callable[[Descent, Sequence[Tensor], list[Tensor], int | None], list[Tensor]],
    ) -> None:
        """`through(state, d, c, count)` returns c + d · dθ_T/dφ; with a count, for a leading axis of that length."""
        self._run, self._through = run, through
        self.from_start = False
        self.state = state

    def pull_back(
        self,
        last: Tree,
        d: Sequence[Tensor],
        keep: bool = False,  # noqa: ARG002
        count: int | None = None,
    ) -> list[Tensor]:
        meta = self._run.meta
        zeros = autodiff.fill_zeros([None] * len(trees.split(meta).differentiable), meta, count)
        return self._through(last, d, zeros, count)


def stationarity_transpose(
    run: Unroll, problem: GradientDescent, state: Descent, batches: int, reached: list[bool] | None = None
) -> autodiff.Transpose:
    """Evaluate (θ, φ) ↦ ∇_θ g at the final state, for its transposed Jacobian.

    g is the mean over the last `batches` batches. `reached`, if given, is filled with whether g reaches each leaf of θ.
    """
    return stationarity_transpose_at(run, problem, state, range(run.steps - batches, run.steps), reached)


def stationarity_transpose_at(
    run: Unroll, problem: GradientDescent, state: Descent, steps: Sequence[int], reached: list[bool] | None = None
) -> autodiff.Transpose:
    """Evaluate (θ, φ) ↦ ∇_θ g at a state, where g is the mean over the batches of these inner steps."""

    def gradient(params: trees.Tree, meta: trees.Tree) -> list[Tensor]:
        moved = state._replace(params=params)
        each = []
        for t in steps:
            each.append(run.at_step(t, lambda batch: problem.stationarity(moved, meta, batch)))
        if reached is not None:
            reached[:] = [any(part is not None for part in parts) for parts in zip(*each, strict=True)]
        return [
            torch.stack(parts).mean(0) for parts in zip(*(autodiff.fill_zeros(e, params) for e in each), strict=True)
        ]

    return autodiff.Transpose(gradient, [state.params, run.meta], run.memory)


def subtract_mixed_product(
    run: Unroll,
    problem: GradientDescent,
    state: Descent,
    c: list[Tensor],
    jacobian: autodiff.Transpose,
    vector: list[Tensor],
    count: int | None,
) -> list[Tensor]:
    """Compute c − vᵀY, and raise if the inner loss does not depend on φ on any batch.

    With a count m, the leaves of c and v have a leading axis of that length, for m outer losses.
    """
    mixed = (jacobian(vector, of=[1], keep=False) if count is None else jacobian.many_or_none(vector, of=[1]))[0]
    if all(part is None for part in mixed):
        require_dependence_of_loss(run, problem, state)
    if not any(part is not None and bool(part.any()) for part in mixed):
        diagnosis.require_finite_losses(run)
    return [old - new for old, new in zip(c, autodiff.fill_zeros(mixed, run.meta, count), strict=True)]


def require_dependence_of_loss(run: Unroll, problem: GradientDescent, state: Descent) -> None:
    """Raise unless ∇_θ g is computed from φ on some batch, if not on the last ones."""
    meta = autodiff.start_graph(run.meta)
    for t in range(run.steps):
        with torch.enable_grad():
            found = run.at_step(t, lambda batch: problem.eager.stationarity(state, meta, batch))
        if autodiff.has_graph(found):
            return
    raise NoDependenceError(
        "inner_loss does not depend on the meta parameters (in no term that has params in it as well), and an implicit "
        "method sees no other dependence; for meta parameters in the optimiser's settings or in the initial parameters "
        "take Reverse, Forward or ForwardGradient; else use meta in inner_loss, without .detach(), .item() or "
        "torch.no_grad() on the way"
    )
