"""The truncated Neumann series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import checks, trees
from bilevel.solvers.linear_solver import LinearSolver, MatrixProduct, Solution


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The truncated Neumann series of H⁻¹b, x = α Σ_{k=0..K} (I − αH)^k b.

    The series converges for 0 < α < 2/λ_max(H) and a positive definite H. The error after K + 1 terms is
    (I − αH)^{K+1} H⁻¹b. The sum equals K + 1 steps of gradient descent with rate α on ½xᵀHx − bᵀx, started at 0.

    A series that diverges is reported. The ratios of the norms of successive terms never fall, so the series diverges
    as soon as one ratio is at least 1.

    Args:
        iterations: K. The solver takes K + 1 products with H: K for the terms and one for the residual.
        step_size: α.

    >>> Neumann(iterations=30, step_size=0.5).solve(lambda v: [2.0 * v[0]], [torch.tensor([3.0])]).x
    [tensor([1.5000])]

    Reference: Lorraine et al., AISTATS 2020.
    """

    iterations: int = 20
    step_size: float = 0.01

    def __post_init__(self) -> None:
        checks.whole_number(self.iterations, "iterations")
        checks.positive(self.step_size, "step_size")

    @property
    def products(self) -> int:
        return self.iterations + 1

    def solve(self, product: MatrixProduct, b: Sequence[Tensor]) -> Solution:
        x = [torch.zeros_like(part) for part in b]
        residual = list(b)  # b − Hx, which is also the next term over α
        target = rho = previous = trees.squared_norm(b)
        if target == 0:
            return Solution(x, 0.0, 0, True, "the right-hand side is zero")
        for _ in range(self.iterations + 1):
            x = [p + self.step_size * r for p, r in zip(x, residual, strict=True)]
            residual = [r - self.step_size * h for r, h in zip(residual, product(residual), strict=True)]
            rho, previous = trees.squared_norm(residual), rho
        relative = float((rho / target).sqrt())
        converged = bool(rho < previous) or bool(rho == 0)
        message = f"{self.iterations + 1} Neumann terms leave a relative residual of {relative:.2g}"
        if not converged:
            message += (
                " and no longer shrink: the series diverges; lower step_size below 2/λ_max of the inner Hessian, or, "
                "if that has negative eigenvalues, train the inner loop longer"
            )
        return Solution(x, relative, self.iterations + 1, converged, message)
