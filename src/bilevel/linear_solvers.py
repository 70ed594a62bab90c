"""Solvers of Hx = b for a symmetric H that is known only by its products with vectors.

Vectors are lists of tensors. Each solver is a frozen object with settings and `solve(product, b) -> Solution`. Its cost
is counted in products; one with the Hessian of an inner loss takes `Implicit` 2 units.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel import checks, randomness, trees

Vector: TypeAlias = "list[Tensor]"
Product: TypeAlias = Callable[[Sequence[Tensor]], Vector]
"""v ↦ Hv."""


@dataclass(frozen=True)
class Solution:
    """What a solver found."""

    x: Vector
    residual: float
    """‖b − Hx‖ / ‖b‖ (of the damped system, if damped)."""
    iterations: int
    """Products with H that were spent."""
    converged: bool
    """Whether the solver reached what it aims at."""
    message: str
    """What happened, in a sentence."""


class LinearSolver(ABC):
    """A method for Hx = b."""

    @property
    def products(self) -> int:
        """How many products with H a solution takes, or at most takes; to plan with."""
        return 20

    @abstractmethod
    def solve(self, product: Product, b: Sequence[Tensor]) -> Solution:
        """x with Hx ≈ b, given v ↦ Hv."""


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients on (H + damping·I) x = b, for H symmetric positive definite.

    After k products the error in the H-norm is at most 2((√κ − 1)/(√κ + 1))^k of the initial one, κ the condition
    number; at most M products are needed in exact arithmetic. A direction of negative curvature, which means that H is
    not positive definite, stops the iteration and is reported: the last iterate is returned, `converged` is false.

    Args:
        iterations: products at most.
        tolerance: stop at ‖b − Hx‖ ≤ tolerance · ‖b‖.
        damping: added to the diagonal, against negative or tiny curvature; biases the solution.

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

    def solve(self, product: Product, b: Sequence[Tensor]) -> Solution:
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


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """x = α Σ_{k=0..K} (I − αH)^k b, the truncated Neumann series of H⁻¹b.

    Converges for 0 < α < 2/λ_max(H) and H positive definite; the error after K + 1 terms is (I − αH)^{K+1} H⁻¹b. K + 1
    terms are also what K + 1 steps of gradient descent with rate α on ½xᵀHx − bᵀx give.

    Terms that grow are reported: the norms of successive terms have ratios that never fall, so once one of them is 1 or
    more the series diverges.

    Args:
        iterations: K. There are K + 1 products with H: K for the terms, one for the residual.
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

    def solve(self, product: Product, b: Sequence[Tensor]) -> Solution:
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


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """x = (Ĥ + ρI)⁻¹ b with a low-rank approximation Ĥ of H from its products with a few random vectors.

    With Q `[M, k]` an orthonormal basis of k random normal vectors and Y = HQ, the Nyström approximation

        Ĥ = Y (QᵀHQ)⁻¹ Yᵀ = U Λ Uᵀ,   x = U (Λ + ρ)⁻¹ Uᵀb + (b − U Uᵀb)/ρ

    where Ĥ is the smallest positive semidefinite matrix that agrees with H on the columns of Q. No iteration, so no
    step size and nothing that diverges: curvature outside of the k directions counts as ρ. How far Ĥ is off is governed
    by the eigenvalues after the first k, so H should have few large ones, as the Hessians of networks do. At k = M it
    is exact.

    For H positive semidefinite. Negative curvature on the k directions is left out of Ĥ and reported; so is a residual
    above ‖b‖, which means that curvature above ρ was missed.

    Args:
        rank: k; at most M is used. There are k + 1 products with H: one for each direction, one for the residual.
        damping: ρ > 0, what stands for the curvature outside; biases the solution.
        seed: of the random vectors, which are the same in every call.

    Memory: about 5k more vectors like b, while it runs.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> Nystrom(rank=2, damping=1e-6).solve(lambda v: [matrix @ v[0]], [b]).x
    [tensor([1.0000, 1.0000], dtype=torch.float64)]

    Reference: Hataya and Yamada, AISTATS 2023, who take columns of H instead of random vectors; the stable evaluation
    is that of Frangella, Tropp and Udell, SIMAX 2023.
    """

    rank: int = 10
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        checks.whole_number(self.rank, "rank")
        checks.positive(self.damping, "damping")
        randomness.check_seed(self.seed)

    @property
    def products(self) -> int:
        return self.rank + 1

    def solve(self, product: Product, b: Sequence[Tensor]) -> Solution:
        target = trees.squared_norm(b)
        if target == 0:
            return Solution([torch.zeros_like(part) for part in b], 0.0, 0, True, "the right-hand side is zero")
        basis = _random_basis(self.rank, self.seed, b)
        images = torch.stack([_flat(product(_like(column, b))) for column in basis.T], 1).to(basis)
        spent = basis.shape[1]
        if not bool(torch.isfinite(images).all()):
            x = [torch.full_like(part, math.nan) for part in b]
            return Solution(x, math.nan, spent, False, f"Nystrom met NaN or infinity in {spent} products Hv")
        directions, curvatures, negative = _nystrom_approximation(basis, images)
        flat = _flat(b).to(basis)
        inside = directions.T @ flat
        x = _like(directions @ (inside / (curvatures + self.damping)) + (flat - directions @ inside) / self.damping, b)
        left = [r - h - self.damping * p for r, h, p in zip(b, product(x), x, strict=True)]
        relative = float((trees.squared_norm(left) / target).sqrt())
        message = f"the rank-{spent} Nyström approximation leaves a relative residual of {relative:.2g}"
        if negative:
            message += (
                ", and met negative curvature: the inner Hessian is not positive definite here; train the inner loop "
            )
            message += "longer, or take ConjugateGradient(damping=...)"
        elif not relative <= 1:
            message += f": there is curvature above damping={self.damping:g} outside of it; raise rank or damping"
        return Solution(x, relative, spent + 1, not negative and relative <= 1, message)


def _random_basis(rank: int, seed: int, like: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of random normal vectors, `[M, min(rank, M)]`, in at least single precision."""
    size = sum(part.numel() for part in like)
    draws = randomness.generator(seed).standard_normal((size, min(rank, size)))
    first = _flat(like)
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.linalg.qr(torch.from_numpy(draws).to(device=first.device, dtype=dtype))[0]


def _nystrom_approximation(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor, bool]:
    """U `[M, r]` and Λ `[r]` with UΛUᵀ = Y (QᵀY)⁺ Yᵀ on the positive part, and whether there was a negative one.

    Y is that of H + νI, with ν of the order of rounding, so that QᵀY has an inverse; ν is taken off the result again.
    """
    shift = len(basis) ** 0.5 * torch.finfo(basis.dtype).eps * torch.linalg.matrix_norm(images)
    images = images + shift * basis
    core = basis.T @ images
    curvatures, vectors = torch.linalg.eigh((core + core.T) / 2)
    positive = curvatures > 0
    root = images @ (vectors[:, positive] / curvatures[positive].sqrt())
    directions, roots, _ = torch.linalg.svd(root, full_matrices=False)
    return directions, (roots.square() - shift).clamp(min=0), not bool(positive.all())


def _flat(vector: Sequence[Tensor]) -> Tensor:
    """A list of tensors as one vector."""
    return torch.cat([part.reshape(-1) for part in vector])


def _like(flat: Tensor, like: Sequence[Tensor]) -> Vector:
    """One vector as a list of tensors."""
    parts = flat.split([part.numel() for part in like])
    return [part.reshape(other.shape).to(other.dtype) for part, other in zip(parts, like, strict=True)]
