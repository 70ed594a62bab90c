"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import checks, trees
from bilevel.solvers.linear_solver import LinearSolver, MatrixProduct, Solution


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients on (H + damping·I) x = b, for H symmetric positive definite.

    After k products the error in the H-norm is at most 2((√κ − 1)/(√κ + 1))^k times the initial one, where κ is the
    condition number. In exact arithmetic M products are enough. A direction of negative curvature shows that H is not
    positive definite. The iteration then stops and returns its last iterate with `converged=False`.

    Args:
        iterations: the largest number of products with H.
        tolerance: the iteration stops at ‖b − Hx‖ ≤ tolerance · ‖b‖.
        damping: a number added to the diagonal of H, against negative or tiny curvature. It biases the solution.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> ConjugateGradient().solve(lambda v: [matrix @ v[0]], [torch.tensor([3.0, 4.0])]).x
    [tensor([1.0000, 1.0000])]

    Reference: Hestenes and Stiefel, 1952.
    """

    iterations: int = 20
    tolerance: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        checks.whole_number(self.iterations, "iterations")
        checks.not_negative(self.tolerance, "tolerance")
        checks.not_negative(self.damping, "damping")

    @property
    def products(self) -> int:
        return self.iterations

    def solve(self, product: MatrixProduct, b: Sequence[Tensor]) -> Solution:
        x = [torch.zeros_like(part) for part in b]
        residual = [part.clone() for part in b]
        direction = residual
        target = trees.squared_norm(b)
        rho, spent = target, 0
        if target == 0:
            return Solution(x, 0.0, 0, True, "the right-hand side is zero")
        while spent < self.iterations and rho > self.tolerance**2 * target:
            image = [h + self.damping * v for h, v in zip(product(direction), direction, strict=True)]
            spent += 1
            curvature = trees.dot(direction, image)
            if not curvature > 0:
                met = f"after {spent} of {self.iterations} products"
                if curvature.isnan():
                    return Solution(x, math.nan, spent, False, f"conjugate gradients met NaN in Hv {met}")
                message = (
                    f"conjugate gradients met a direction of negative curvature {met}: the inner Hessian is not "
                    "positive definite here; add ConjugateGradient(damping=...), or train the inner loop longer"
                )
                return Solution(x, float((rho / target).sqrt()), spent, False, message)
            alpha = rho / curvature
            x = [p + alpha * v for p, v in zip(x, direction, strict=True)]
            residual = [r - alpha * h for r, h in zip(residual, image, strict=True)]
            rho, previous = trees.squared_norm(residual), rho
            direction = [r + rho / previous * v for r, v in zip(residual, direction, strict=True)]
        relative = float((rho / target).sqrt())
        converged = relative <= self.tolerance
        message = f"conjugate gradients reached a relative residual of {relative:.2g} after {spent} products"
        if not converged:
            message += f", not the tolerance {self.tolerance:.2g}; raise iterations, the tolerance, or damping"
        return Solution(x, relative, spent, converged, message)
