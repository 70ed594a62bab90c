"""The empirical Fisher matrix of the inner gradients in place of the Hessian, inverted exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import checks, trees
from bilevel.solvers.linear_solver import LinearSolver, MatrixProduct, Solution, Vector


@dataclass(frozen=True)
class EmpiricalFisher(LinearSolver):
    """The solution of (F + ρI) x = b, where F is the mean outer product of the last inner gradients.

    With g_1 … g_k `[M]` the gradients of the last k inner steps, kept while the inner loop runs, and the rows of
    G `[k, M]`,

        F = (s/k) Gᵀ G,   x = (b − Gᵀ (ρk/s I + G Gᵀ)⁻¹ G b)/ρ.

    For a negative log-likelihood whose model is right, E[g gᵀ] of single examples is the Hessian (Fisher's identity).
    The gradient of a batch of B independent examples has 1/B of that, so s = B. F costs no product with H.

    F says nothing where gradients do not scatter: for full-batch gradients of a loop at rest, F = 0 and x = b/ρ, which
    is `HessianFree`. Where the model is wrong, F differs from H by an amount that does not shrink with k.

    Args:
        rank: k, the number of gradients that are kept; at most T of them are there.
        damping: ρ > 0, the curvature assumed where gradients do not scatter. It biases the solution.
        scale: s > 0, the number of examples in a batch, if inner losses are means over examples.

    Cost: one product with H, which measures the residual. Memory: k vectors of the size of b.

    >>> gradients = [[torch.tensor([2.0, 0.0])], [torch.tensor([0.0, 2.0])]]  # F = 2I
    >>> solver = EmpiricalFisher(rank=2, damping=1.0).with_gradients(gradients)
    >>> solver.solve(lambda v: [2.0 * v[0]], [torch.tensor([3.0, 6.0])]).x
    [tensor([1., 2.])]

    Reference: Amari, 1998; natural hypergradient descent (arXiv 2602.10905); Kunstner et al., NeurIPS 2019, on where
    the empirical Fisher matrix is no approximation of the Hessian.
    """

    rank: int = 20
    damping: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        checks.whole_number(self.rank, "rank")
        checks.positive(self.damping, "damping")
        checks.positive(self.scale, "scale")

    @property
    def products(self) -> int:
        return 1

    @property
    def gradients_wanted(self) -> int:
        return self.rank

    def with_gradients(self, gradients: Sequence[Vector]) -> LinearSolver:
        return _Fitted(self, [list(gradient) for gradient in gradients])

    def solve(self, product: MatrixProduct, b: Sequence[Tensor]) -> Solution:  # noqa: ARG002
        raise ValueError(
            "EmpiricalFisher solves by the gradients of the inner loop, which Implicit(solver=EmpiricalFisher(...)) "
            "gives it; elsewhere write EmpiricalFisher(...).with_gradients(gradients).solve(product, b)"
        )


@dataclass(frozen=True)
class _Fitted(LinearSolver):
    settings: EmpiricalFisher
    gradients: list[Vector]

    @property
    def products(self) -> int:
        return 1

    def solve(self, product: MatrixProduct, b: Sequence[Tensor]) -> Solution:
        target = trees.squared_norm(b)
        if target == 0:
            return Solution([torch.zeros_like(part) for part in b], 0.0, 0, True, "the right-hand side is zero")
        if not self.gradients:
            raise ValueError("EmpiricalFisher was given no inner gradients; it needs at least one")
        damping, count = self.settings.damping, len(self.gradients)
        stacks = [torch.stack(parts) for parts in zip(*self.gradients, strict=True)]
        inner = sum((_rows(stack) @ _rows(stack).T for stack in stacks[1:]), _rows(stacks[0]) @ _rows(stacks[0]).T)
        eye = torch.eye(count, dtype=inner.dtype, device=inner.device)
        weights = torch.linalg.solve(
            inner + damping * count / self.settings.scale * eye, trees.dots(b, stacks).to(inner)
        )
        x = [
            ((part - torch.tensordot(weights, stack.to(weights), 1)) / damping).to(part.dtype)
            for part, stack in zip(b, stacks, strict=True)
        ]
        left = [part - h for part, h in zip(b, product(x), strict=True)]
        relative = float((trees.squared_norm(left) / target).sqrt())
        message = f"the empirical Fisher matrix of {count} inner gradients leaves a relative residual of {relative:.2g}"
        if math.isnan(relative) or relative > 1:
            message += (
                f": there is curvature above damping={damping:g} that the gradients do not show; raise damping, set "
                "scale to the number of examples in a batch, or take ConjugateGradient"
            )
        return Solution(x, relative, 1, relative <= 1, message)


def _rows(stack: Tensor) -> Tensor:
    """A stack of tensors as the rows of a matrix, in at least single precision."""
    return stack.reshape(len(stack), -1).to(torch.promote_types(stack.dtype, torch.float32))
