"""Exact hypergradients by forward-mode unrolling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel import checks, trees
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.unrolling.tangents import Slopes, push_forward
from bilevel.unrolling.unroll import Unroll


@dataclass(frozen=True)
class Forward(Estimator):
    """Exact hypergradient by carrying the whole tangent matrix forward. The literature's FGU and RTRL.

    With Z_t = dθ_t/dφ `[M, N]`, A_t = ∂θ_t/∂θ_{t−1} `[M, M]`, B_t = ∂θ_t/∂φ `[M, N]`,

        Z_0 = dθ_0/dφ,   Z_t = A_t Z_{t−1} + B_t,   ∇h = d Z_T + c,

    with d = ∂outer/∂θ_T `[M]` and c = ∂outer/∂φ `[N]`; one column of Z_t for every meta parameter.

    Args:
        chunk_size: columns carried at once; `None` for all N. Each chunk runs the inner loop again.

    Cost: (1 + 2N)·T units in one chunk, (2N + ⌈N/chunk_size⌉)·T in several. Memory: 1 + N states (1 + chunk_size),
    whatever T. A vector of m outer losses costs no more. Bias: none. For a handful of meta
    parameters (learning rates, coefficients of an equation).

    Reference: Franceschi et al., ICML 2017; Shen et al., NeurIPS 2024, eq. 4.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, log_lr, batch: 0.5 * theta**2,
    ...     outer_loss=lambda theta, log_lr, batch: theta,
    ...     params=torch.tensor(1.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=lambda log_lr: log_lr.exp()),
    ... )
    >>> bilevel.Forward()(problem, torch.tensor(0.5).log(), bilevel.no_batches(2)).grad  # −2 (1 − η) η
    tensor(-0.5000)
    """

    chunk_size: int | None = None
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return (math.ceil(meta_size / (self.chunk_size or meta_size)) + 2.0 * meta_size) * steps

    def _estimate(self, run: Unroll) -> Estimate:
        size, chunk = run.meta_size, self.chunk_size or run.meta_size
        leaves = trees.leaves(run.meta)
        slopes: list[Tensor] = []
        pushed: Slopes | None = None
        moved = False
        for start in range(0, size, chunk):
            pushed = push_forward(run, _unit_vectors(range(start, min(start + chunk, size)), leaves))
            slopes.append(pushed.slopes)
            moved = moved or pushed.moved
        assert pushed is not None
        found = torch.cat(slopes)  # in the dtype of the outer loss, and rounded once, to that of each leaf
        run.require_connections(moved, found, pushed.state)
        parts = found.movedim(0, -1).split([leaf.numel() for leaf in leaves], -1)
        lead = found.shape[1:]
        grad = [part.reshape((*lead, *leaf.shape)).to(leaf) for part, leaf in zip(parts, leaves, strict=True)]
        return Estimate(pushed.value, like_meta(run, grad), pushed.state)


def _unit_vectors(numbers: range, leaves: list[Tensor]) -> list[Tensor]:
    """The unit vectors of R^N of those numbers, `[k, *leaf.shape]` for each leaf, in its own dtype."""
    result, first = [], 0
    for leaf in leaves:
        rows = leaf.new_zeros(len(numbers), leaf.numel())
        for row, number in enumerate(numbers):
            if first <= number < first + leaf.numel():
                rows[row, number - first] = 1
        result.append(rows.reshape(len(numbers), *leaf.shape))
        first += leaf.numel()
    return result
