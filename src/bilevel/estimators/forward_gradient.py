"""(FG)²U: unbiased hypergradients from random directions pushed forward through the inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bilevel import autodiff, checks, distributed, trees
from bilevel.directions import distributions as random_directions
from bilevel.directions.distributed_slopes import spread_slopes
from bilevel.directions.distributions import Directions
from bilevel.directions.support import touched
from bilevel.distributed import communication
from bilevel.distributed.communication import EXCHANGES, Exchange
from bilevel.distributed.work_assignment import Assignment, assign
from bilevel.estimators import control_variates, uoro
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.estimators.control_variates import ControlVariate
from bilevel.models.module_view import modules_in
from bilevel.unrolling.finite_differences import push_forward_by_differences
from bilevel.unrolling.hessian_vector_products import push_forward_sharing_steps
from bilevel.unrolling.unroll import Slopes, Unroll


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
            or a tuple of several. Its scale is fitted (see `bilevel.estimators.control_variates`); needs b >= 2.
        tangents: `"exact"`, in forward mode; `"shared"`, exact as well, by backward passes through one graph of each
            inner step that all chunks share, with the tangents of all directions in memory (often the faster and the
            smaller one, see benchmarks/results/shared_steps.md); or `"difference"` for central differences of
            first-order gradients: for fused attention and activation checkpointing, with relative errors of about 1e-10
            in float64 and 1e-4 in float32.
        support: `"touched"` restricts the directions to entries that the inner loop depends on at all (weights of
            examples that came up in a mini-batch), found with at most 3T units; N is then their number.
        draw: another number gives other directions for the same seed, so for the same initialisation and dropout.
        carry: for streams (`fit(..., stream=True)`, or `carried=` in a call): `"tangents"` go on from one window of
            inner steps to the next along the same directions, or `"fresh"` directions join them in each window. See
            `bilevel.estimators.uoro` for what is unbiased then. The tangents of all b directions are kept, in
            whatever chunks they are pushed.
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

    Departures from the paper: coordinates are drawn without replacement, which makes them exact at b = N; direction i
    is a function of (seed, i) alone.

    Workers share the control variates and the directions, chunk by chunk, by what they cost (see
    `bilevel.distributed.work_assignment`);
    `support` each works out for itself.

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
    support: Literal["all", "touched"] = "all"
    draw: int = 0
    carry: Literal["nothing", "tangents", "fresh"] = "nothing"
    exchange: Exchange = "auto"

    def __post_init__(self) -> None:
        checks.whole_number(self.directions, "directions")
        random_directions.distribution(self.distribution)
        checks.whole_number(self.draw, "draw", at_least=0)
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")
        checks.one_of(self.tangents, "tangents", ("exact", "shared", "difference"))
        checks.one_of(self.support, "support", ("all", "touched"))
        checks.one_of(self.carry, "carry", ("nothing", "tangents", "fresh"))
        self._require_carriable()
        checks.one_of(self.exchange, "exchange", EXCHANGES)
        if control_variates.as_tuple(self.control_variate) and self.directions == 1:
            raise ValueError("control_variate with directions=1: its scale is fitted to the other directions; take two")

    def _require_carriable(self) -> None:
        if self.carry != "nothing" and self.support != "all":
            raise ValueError(f"carry={self.carry!r} keeps the tangents of all entries: leave support='all'")
        if self.carry != "nothing" and self.tangents == "shared":
            raise ValueError(f'carry={self.carry!r} with tangents="shared": take tangents="exact" or "difference"')
        if self.carry == "tangents" and control_variates.running_mean_of(self) is not None:
            raise ValueError(
                'carry="tangents" keeps its directions, and RunningMean() is made of estimates along them: '
                "as a control variate it would bring a bias; take another one"
            )
        if self.carry == "fresh" and (self.control_variate is not None or self.distribution not in uoro.SYMMETRIC):
            raise ValueError(
                f'carry="fresh" takes no control_variate, and independent directions ({", ".join(uoro.SYMMETRIC)}); '
                'carry="tangents" takes any'
            )

    @property
    def first_order(self) -> bool:
        """Whether the inner loop itself is differentiated once only, so that any kernel will do."""
        return self.tangents == "difference"

    def _estimate(self, run: Unroll) -> Estimate:
        if self.carry != "nothing":
            return uoro.estimate(self, run)
        workers = distributed.current()
        variates = control_variates.as_tuple(self.control_variate)
        support = None
        if self.support == "touched":
            with autodiff.differentiable_kernels(modules_in([run.meta, run.start()])):
                support = touched(run)
        directions = Directions(
            self.distribution,
            random_directions.seed_of_draw(run.seed, self.draw),
            self.directions,
            trees.leaves(run.meta),
            support,
        )
        directions.require_count("Forward() gives the exact gradient")
        pushed, found = spread_slopes(
            run,
            self._deal(run),
            partial(self._push, run, directions),
            lambda number: control_variates.gradient_of(variates[number], run),
            workers,
        )
        run.require_connections(pushed.moved, pushed.slopes, pushed.state)
        scaled = control_variates.scaled(found, run, support)
        return self._combined(run, directions, pushed, scaled)

    def _deal(self, run: Unroll) -> Assignment:
        """Which worker pushes which directions, and computes which control variates."""
        costs = control_variates.costs(self.control_variate, run)
        return assign(self.directions, distributed.current().size, self.chunk_size, costs)

    def _combined(self, run: Unroll, directions: Directions, pushed: Slopes, variates: list[Tensor]) -> Estimate:
        """The estimate from all slopes and all control variates."""
        workers = distributed.current()
        share = -(-self.directions // workers.size)
        among = communication.partners(
            self.exchange, directions.count, directions.size, directions.bytes_per_number, workers
        )
        chunk = min(self.chunk_size or share, share)
        found = control_variates.combine(directions, pushed.slopes, variates, chunk, among)
        left = {} if found.variance_left is None else {"variance_left": found.variance_left}
        return Estimate(pushed.value, like_meta(run, found.grad), pushed.state, found.standard_error, left)

    def _push(self, run: Unroll, directions: Directions, chunks: Sequence[range]) -> Slopes:
        """The slopes along some of the directions, chunk by chunk."""
        if self.tangents == "shared":
            return push_forward_sharing_steps(run, [directions.draw(numbers) for numbers in chunks])
        push = partial(push_forward_by_differences, run) if self.first_order else run.push_forward
        pushed = push(directions.draw(chunks[0]))
        slopes, moved = [pushed.slopes], pushed.moved
        for numbers in chunks[1:]:  # no more than one chunk's state is held
            pushed = push(directions.draw(numbers))
            slopes.append(pushed.slopes)
            moved = moved or pushed.moved
        return pushed._replace(slopes=torch.cat(slopes), moved=moved)
