"""Exact hypergradients by forward-mode unrolling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel import checks, trees
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.unrolling.unroll import Slopes, Unroll


@dataclass(frozen=True)
class Forward(Estimator):
    """Exact hypergradient by carrying the whole tangent matrix forward. The literature's FGU, RTRL.

    With Z_t = dθ_t/dφ `[M, N]`, A_t = ∂θ_t/∂θ_{t−1} `[M, M]`, B_t = ∂θ_t/∂φ `[M, N]`,

        Z_0 = dθ_0/dφ,   Z_t = A_t Z_{t−1} + B_t,   ∇h = d Z_T + c,

    with d = ∂outer/∂θ_T `[M]` and c = ∂outer/∂φ `[N]`; one column of Z_t for every meta parameter.

    Args:
        chunk_size: columns carried at once; `None` for all N. Each chunk runs the inner loop again.

    Cost: (1 + 2N)·T units in one chunk, (2N + ⌈N/chunk_size⌉)·T in several. Memory: 1 + N states (1 + chunk_size),
    whatever T.
    Bias: none. For a handful of meta parameters (learning rates, coefficients of an equation).

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

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")

    def _estimate(self, run: Unroll) -> Estimate:
        size, chunk = run.meta_size, self.chunk_size or run.meta_size
        shapes = trees.leaves(run.meta)
        grad = torch.zeros(size, dtype=shapes[0].dtype, device=shapes[0].device)
        pushed: Slopes | None = None
        moved = False
        for start in range(0, size, chunk):
            stop = min(start + chunk, size)
            columns = torch.zeros(stop - start, size, dtype=grad.dtype, device=grad.device)
            columns[torch.arange(stop - start), torch.arange(start, stop)] = 1
            pushed = run.push_forward(_as_leaves(columns, shapes))
            grad[start:stop] = pushed.slopes
            moved = moved or pushed.moved
        assert pushed is not None
        run.require_connections(moved, grad, pushed.state)
        parts = [part[0] for part in _as_leaves(grad.unsqueeze(0), shapes)]
        return Estimate(pushed.value, like_meta(run, parts), pushed.state)


def _as_leaves(rows: torch.Tensor, shapes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Rows `[k, N]` cut into one tensor `[k, *shape]` for each leaf."""
    parts = rows.split([leaf.numel() for leaf in shapes], dim=1)
    return [part.reshape(len(rows), *leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, shapes, strict=True)]
