"""The Nyström approximation of a Hessian, and the solution of a linear system with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import checks, philox, randomness, trees
from bilevel.solvers.linear_solver import LinearSolver, MatrixProduct, Solution, Vector


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """The solution of (Ĥ + ρI) x = b, where Ĥ approximates H from its products with a few random vectors.

    With Q `[M, k]` an orthonormal basis of k random normal vectors and Y = HQ, the Nyström approximation

        Ĥ = Y (QᵀHQ)⁻¹ Yᵀ = U Λ Uᵀ,   x = U (Λ + ρ)⁻¹ Uᵀb + (b − U Uᵀb)/ρ

    is the smallest positive semidefinite matrix that agrees with H on the columns of Q. The method does not iterate, so
    it has no step size and cannot diverge. It takes ρ for the curvature outside of the k directions. The error of Ĥ is
    governed by the eigenvalues of H after the first k, so the method suits an H with few large eigenvalues, such as the
    Hessian of a network. At k = M the approximation is exact.

    H must be positive semidefinite. Negative curvature on the k directions is left out of Ĥ and reported. A residual
    above ‖b‖ is reported as well, because it shows that curvature above ρ was missed.

    Args:
        rank: k; at most M of the random vectors are used. The solver takes k + 1 products with H: one for each vector
            and one for the residual.
        damping: ρ > 0, the curvature assumed outside of the k directions. It biases the solution.
        seed: the seed of the random vectors, which are the same in every call.

    Memory: about 5k vectors of the size of b while the solver runs.

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

    def solve(self, product: MatrixProduct, b: Sequence[Tensor]) -> Solution:
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
    """Return an orthonormal basis of random normal vectors, `[M, min(rank, M)]`, in at least single precision."""
    size = sum(part.numel() for part in like)
    first = _flat(like)
    dtype = torch.promote_types(first.dtype, torch.float32)
    key, rows = randomness.derive(seed), range(min(rank, size))
    return torch.linalg.qr(philox.normals(key, rows, 0, size, dtype=dtype, device=first.device).T)[0]


def _nystrom_approximation(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Compute U `[M, r]` and Λ `[r]` with UΛUᵀ = Y (QᵀY)⁺ Yᵀ on the positive part.

    Y is computed for H + νI, with ν of the order of rounding errors, so that QᵀY has an inverse. ν is subtracted from
    the result.

    Returns:
        U, Λ, and whether there was a negative part.
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
    """Return a list of tensors as one vector."""
    return torch.cat([part.reshape(-1) for part in vector])


def _like(flat: Tensor, like: Sequence[Tensor]) -> Vector:
    """Return one vector as a list of tensors."""
    parts = flat.split([part.numel() for part in like])
    return [part.reshape(other.shape).to(other.dtype) for part, other in zip(parts, like, strict=True)]
