"""(FG)²U: unbiased hypergradients from random directions pushed forward through the inner loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from bilevel import autodiff, checks, distributed
from bilevel.directions.distributed_slopes import spread_slopes
from bilevel.directions.distributions import Directions
from bilevel.directions.support import reached
from bilevel.distributed.communication import Exchange
from bilevel.distributed.work_assignment import assign
from bilevel.estimators import directional, variates
from bilevel.estimators.base import Estimate, Estimator
from bilevel.estimators.variates import ControlVariate
from bilevel.models.module_view import modules_in
from bilevel.unrolling.finite_differences import FiniteDifferences
from bilevel.unrolling.hessian_vector_products import SharedSteps
from bilevel.unrolling.tangents import FORWARD_MODE, Slopes, push_forward
from bilevel.unrolling.unroll import Unroll


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """Unbiased hypergradient from random directions, in memory that does not grow with T or N. The paper's (FG)²U.

    For directions v_1 … v_b `[N]` with E[v vᵀ] = I, tangents y `[M]` follow the inner loop,

        y_0 = B_0 v,   y_t = A_t y_{t−1} + B_t v,   w = d y_T + c v = ∇h · v,   ∇h ≈ (1/b) Σ_i w_i v_i,

    with A_t = ∂θ_t/∂θ_{t−1}, B_t = ∂θ_t/∂φ, d = ∂outer/∂θ_T, c = ∂outer/∂φ.

    Args:
        directions: b, at most the number of meta parameters N (at N, `Forward` is exact for the same price).
        distribution: `"rademacher"` (the paper's choice), `"gaussian"`, `"coordinate"` (√N e_j, the j distinct),
            `"orthogonal"` (rows of a random orthogonal basis), `"low-rank"` (outer products for matrices) or `"block"`
            (one leaf of φ at a time); see `bilevel.directions.distributions` for what each is good for.
        chunk_size: directions carried at once; `None` for all. Each chunk runs the inner loop again, unless
            `tangents="shared"`. 1 also avoids `torch.vmap`, for models that it does not take.
        control_variate: a cheap biased gradient that takes variance away and adds no bias: a deterministic estimator
            such as `TruncatedReverse(5)`, `CoarserProblem`, `RunningMean` (of past estimates, in `fit`) or `Constant`;
            or a tuple of several. Its scale is fitted (see `bilevel.directions.control_variates`); needs b >= 2.
        tangents: `"exact"`, in forward mode; `"shared"`, exact as well, by backward passes through one graph of each
            inner step that all chunks share, with the tangents of all directions in memory (often the faster and the
            smaller one, see benchmarks/results/shared_steps.md); or `"difference"` for central differences of
            first-order gradients: for fused attention and activation checkpointing, with relative errors of about 1e-10
            in float64 and 1e-4 in float32. What an inner loss takes from `detach()` or under `torch.no_grad()` is held
            while differences are taken. `"exact"` takes Hessian-vector products at the same cost where an operation of
            the inner loss has no forward-mode derivative; `diagnostics["hessian_product_steps"]` counts the steps.
        support: `"reached"` restricts the directions to the entries of φ on which the inner loop or the outer loss
            depends (for instance the weights of examples that occur in a mini-batch). Finding them costs about 3T
            units, and N is then their number.
        draw: another number gives other directions for the same seed, so for the same initialisation and dropout.
        exchange: what several workers send each other: `"slopes"`, one number for each direction, from which each of
            them adds up the gradient, or also the `"gradient"`, by an all-reduce; `"auto"` takes what costs less time.
            With `"slopes"`, the estimate is the same to the last bit on any number of workers up to b/chunk_size.

    Cost: (1 + 2b)·T units in one chunk or with shared steps, (2b + ⌈b/chunk_size⌉)·T in several chunks. The time is up
    to twice that where layers are large and batches small, so that moving the tangents costs more than computing them.
    Memory: 1 + chunk_size states and the activations of as many tangents, about 4 states for each; with shared steps
    1 + b states, one graph of a step, and chunk_size backward passes. Bias: none. Relative variance
    E‖grad − ∇h‖²/‖∇h‖²: (N − 1)/b for Rademacher, (N + 1)/b for Gaussian, (N − b)/b for coordinate and orthogonal
    directions; with a control variate c, that times ‖∇h − s·c‖²/‖∇h‖². `standard_error` estimates the root of the
    variance from the spread of w, and `diagnostics["variance_left"]` what of the variance the control variate left.
    A vector of m outer losses costs no more. Each entry has its own scales of the control variates, and its own
    standard error; `variance_left` is then that of all entries together.

    Departures from the paper: coordinates are drawn without replacement, which makes them exact at b = N; direction i
    is a function of (seed, i) alone.

    Workers share the control variates and the directions, chunk by chunk, by what they cost (see
    `bilevel.distributed.work_assignment`). Each worker finds the `support` for itself.

    In a stream (`carried=`), it sees the steps of its own window alone; `StreamingForwardGradient` looks back further.

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
    control_variate: ControlVariate | None = None
    tangents: Literal["exact", "shared", "difference"] = "exact"
    support: Literal["all", "reached"] = "all"
    draw: int = 0
    exchange: Exchange = "auto"
    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        directional.check_settings(self)
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")
        checks.one_of(self.tangents, "tangents", ("exact", "shared", "difference"))
        checks.one_of(self.support, "support", ("all", "reached"))

    def redrawn(self, number: int) -> ForwardGradient:
        return replace(self, draw=self.draw + number)

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        chunk = self.directions if self.tangents == "shared" else self.chunk_size or self.directions
        return (math.ceil(self.directions / chunk) + 2.0 * self.directions) * steps

    @property
    def first_order(self) -> bool:
        """Whether the inner loop itself is differentiated once only, so that any kernel will do."""
        return self.tangents == "difference"

    def _estimate(self, run: Unroll) -> Estimate:
        several = variates.as_tuple(self.control_variate)
        support = None
        if self.support == "reached":
            with autodiff.differentiable_kernels(modules_in([run.meta, run.start()])):
                support = reached(run)
        directions = directional.directions_of(self, run, "Forward() gives the exact gradient", support=support)
        workers = distributed.current()
        assigned = assign(self.directions, workers.size, self.chunk_size, variates.costs(self.control_variate, run))
        pushed, gradients = spread_slopes(
            run,
            assigned,
            lambda chunks: self._push(run, directions, chunks),
            lambda number: variates.gradient_of(several[number], run),
            workers,
        )
        run.require_connections(pushed.moved, pushed.slopes, pushed.state)
        return directional.estimate_from_slopes(
            self, run, directions, pushed.value, pushed.state, pushed.slopes, gradients, assigned.longest_chunk
        )

    def _push(self, run: Unroll, directions: Directions, chunks: Sequence[range]) -> Slopes:
        """Return the slopes along some of the directions, chunk by chunk."""
        if self.tangents == "shared":
            numbers = [number for chunk in chunks for number in chunk]
            return push_forward(run, directions.draw(numbers), SharedSteps([len(chunk) for chunk in chunks]))
        rule = FiniteDifferences() if self.tangents == "difference" else FORWARD_MODE
        pushed = push_forward(run, directions.draw(chunks[0]), rule)
        slopes, moved = [pushed.slopes], pushed.moved
        for numbers in chunks[1:]:  # only one chunk's state is held at a time
            pushed = push_forward(run, directions.draw(numbers), rule)
            slopes.append(pushed.slopes)
            moved = moved or pushed.moved
        return pushed._replace(slopes=torch.cat(slopes), moved=moved)
