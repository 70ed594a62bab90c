"""(FG)²U: unbiased hypergradients from random directions pushed forward through the inner loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel import checks
from bilevel import directions as random_directions
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.unroll import Slopes, Unroll


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """Unbiased hypergradient from random directions, in memory that does not grow with T or N. The paper's (FG)²U.

    For directions v_1 … v_b `[N]` with E[v vᵀ] = I, tangents y `[M]` follow the inner loop,

        y_0 = B_0 v,   y_t = A_t y_{t−1} + B_t v,   w = d y_T + c v = ∇h · v,   ∇h ≈ (1/b) Σ_i w_i v_i,

    with A_t = ∂θ_t/∂θ_{t−1}, B_t = ∂θ_t/∂φ, d = ∂outer/∂θ_T, c = ∂outer/∂φ.

    Args:
        directions: b, at most the number of meta parameters N (at N, `Forward` is exact for the same price).
        distribution: `"rademacher"` (the paper's choice), `"gaussian"`, or `"coordinate"` (√N e_j, the j distinct).
        chunk_size: directions carried at once; `None` for all. Each chunk runs the inner loop again. 1 also avoids
            `torch.vmap`, for models that it does not take.

    Cost: (1 + 2b)·T units, and T more for every further chunk; up to twice that where layers are large and batches
    small, so that moving the tangents costs more than computing them. Memory: 1 + chunk_size states and the activations
    of as many tangents, about 4 states for each. Bias: none. Relative variance E‖grad − ∇h‖²/‖∇h‖²: (N − 1)/b for
    Rademacher, (N + 1)/b for Gaussian, (N − b)/b for coordinate directions. `standard_error` estimates its root times
    ‖∇h‖ from the spread of w.

    Departures from the paper: coordinates are drawn without replacement, which makes them exact at b = N; direction i
    is a function of (seed, i) alone.

    Reference: Shen et al., NeurIPS 2024, eq. 7 to 10, Algorithm 1, Lemma 3.1; Baydin et al., 2022.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
    ...     outer_loss=lambda theta, phi, batch: theta[0],
    ...     params=torch.zeros(3),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> estimate = bilevel.ForwardGradient(directions=2)(problem, torch.ones(3), bilevel.no_batches(1))
    >>> estimate.grad[0], estimate.standard_error  # exact: (0.5, 0, 0); √(2/2) · 0.5
    (tensor(0.5000), 0.5)
    """

    directions: int = 1
    distribution: str = "rademacher"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        checks.whole_number(self.directions, "directions")
        random_directions.distribution(self.distribution)
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")

    def _estimate(self, run: Unroll) -> Estimate:
        size, count = run.meta_size, self.directions
        random_directions.require_count(count, size, "Forward() gives the exact gradient")
        chunk = self.chunk_size or count
        grad: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        pushed: Slopes | None = None
        moved = False
        for start in range(0, count, chunk):
            numbers = range(start, min(start + chunk, count))
            vectors = random_directions.draw(self.distribution, run.seed, numbers, run.meta)
            pushed = run.push_forward(vectors)
            slopes.append(pushed.slopes)
            moved = moved or pushed.moved
            parts = [torch.einsum("k,k...->...", pushed.slopes.to(v.dtype), v) / count for v in vectors]
            grad = [old + new for old, new in zip(grad, parts, strict=True)] if grad else parts
        assert pushed is not None
        run.require_connections(moved, torch.cat(slopes), pushed.state)
        error = random_directions.standard_error(torch.cat(slopes), self.distribution, size)
        return Estimate(pushed.value, like_meta(run, grad), pushed.state, error)
