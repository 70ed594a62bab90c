"""Bilevel problems whose hypergradient is known in closed form, found by linear algebra in NumPy alone.

    inner loss   g_t(θ, φ) = ½ θᵀH_tθ − θᵀ(C_tφ + e_t), its data (H_t, C_t, e_t) being the batch of step t
    outer loss   f(θ, φ) = ½‖Dθ − a‖² + ½ φᵀQφ + φᵀSθ, the vector a being the outer batch

Steps of gradient descent are then affine in the inner state z (the parameters θ, and a momentum buffer where there is
one). Their Jacobians A_t = ∂z_t/∂z_{t−1} and B_t = ∂z_t/∂φ are written down by hand below, and with Z_0 = dz_0/dφ,

    ∇h = c + d (A_T ⋯ A_1 Z_0 + Σ_t A_T ⋯ A_{t+1} B_t),   d = ∂f/∂z_T,   c = ∂f/∂φ.

torch appears only in what is handed to the library: losses and steps as a user writes them. Shapes: M parameters,
N meta parameters, T steps; vectors and matrices of NumPy in capitals or Greek letters as in the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

import bilevel

Array: TypeAlias = np.ndarray
Tree: TypeAlias = Any

WEAKEST, STRONGEST = 1.0, 4.0
"""α and L: the smallest and largest eigenvalue of every H_t."""
LEARNING_RATE = 2 / (WEAKEST + STRONGEST)
"""η, the largest rate for which ‖I − ηH‖ is still 1 − ηα, as bounds on gradient descent suppose."""


@dataclass(frozen=True)
class Outer:
    """The outer loss ½‖Dθ − a‖² + ½ φᵀQφ + φᵀSθ, its value and derivatives by hand."""

    D: Array
    a: Array
    Q: Array
    S: Array

    def value(self, theta: Array, phi: Array) -> float:
        """The loss f(θ, φ)."""
        miss = self.D @ theta - self.a
        return float(0.5 * miss @ miss + 0.5 * phi @ self.Q @ phi + phi @ self.S @ theta)

    def by_theta(self, theta: Array, phi: Array) -> Array:
        """∂f/∂θ `[M]`."""
        return (self.D @ theta - self.a) @ self.D + phi @ self.S

    def by_phi(self, theta: Array, phi: Array) -> Array:
        """∂f/∂φ `[N]`, the explicit part."""
        return self.Q @ phi + self.S @ theta

    def second(self, Z: Array) -> Array:
        """∇²h `[N, N]` where θ is affine in φ with slope Z."""
        return Z.T @ self.D.T @ self.D @ Z + self.Q + self.S @ Z + Z.T @ self.S.T

    def as_torch(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The same function of (θ, φ, outer batch), for the library."""
        D, Q, S = tensor(self.D), tensor(self.Q), tensor(self.S)

        def outer_loss(theta: Tensor, phi: Tensor, batch: Tensor) -> Tensor:
            return 0.5 * (D @ theta - batch).square().sum() + 0.5 * phi @ Q @ phi + phi @ S @ theta

        return outer_loss


@dataclass(frozen=True)
class Stationarity:
    """The stationarity condition F(θ, φ) = 0 of one inner batch (∇g, weight decay included) around θ_T."""

    value: Array
    by_theta: Array
    """H `[M, M]`, the Hessian."""
    by_phi: Array
    """Y `[M, N]`, the mixed derivative."""


@dataclass(frozen=True)
class ClosedForm:
    """A problem, and its hypergradient by the product rule on matrices."""

    name: str
    problem: bilevel.Problem | bilevel.GradientDescent | bilevel.BlackBox
    meta: Tree
    inner_batches: Sequence[Any] | None
    outer: Outer
    phi: Array
    theta: Array
    """θ_T."""
    Z_0: Array
    jacobians: list[tuple[Array, Array]]
    """(A_t, B_t) for t = 1..T, on the whole inner state."""
    stationarity: list[Stationarity] = field(default_factory=list)
    """For every inner batch, at θ_T; empty for a problem that has no inner loss."""
    last_rate: float = 1.0
    """−∂θ_T/∂(gradient of the last step), one number for SGD."""
    h_is_quadratic: bool = True
    """Whether θ_T is affine in φ, so that h is quadratic and central differences of it are exact."""
    flat: Callable[[Tree], Tensor] = lambda tree: tree
    """Meta (or anything shaped like it) as one vector, in the order of φ."""

    @property
    def N(self) -> int:  # noqa: N802
        return len(self.phi)

    @property
    def T(self) -> int:  # noqa: N802
        return len(self.jacobians)

    @property
    def value(self) -> float:
        """The outer loss h(φ)."""
        return self.outer.value(self.theta, self.phi)

    @property
    def d(self) -> Array:
        """∂f/∂θ_T `[M]`."""
        return self.outer.by_theta(self.theta, self.phi)

    @property
    def c(self) -> Array:
        """∂f/∂φ `[N]`."""
        return self.outer.by_phi(self.theta, self.phi)

    def Z(self, last_steps: int | None = None) -> Array:  # noqa: N802
        """dθ_T/dφ `[M, N]`; with `last_steps` = s < T only what the last s steps contribute to it."""
        first = self.T if last_steps is None else last_steps
        size = len(self.Z_0)
        total = product([A for A, _ in self.jacobians], size) @ self.Z_0 * (first == self.T)
        for t in range(self.T - first, self.T):
            total = total + product([A for A, _ in self.jacobians[t + 1 :]], size) @ self.jacobians[t][1]
        return total[: len(self.theta)]

    def truncated(self, last_steps: int) -> Array:
        """∇h `[N]` as the last s steps see it; at s = T the initial state counts as well."""
        return self.c + self.d @ self.Z(last_steps)

    @property
    def gradient(self) -> Array:
        """∇h `[N]`."""
        return self.truncated(self.T)

    def implicit(self, batches: int = 1, inverse: Callable[[Array], Array] = np.linalg.inv) -> Array:
        """The formula c − d H⁻¹ Y at θ_T, H and Y averaged over the last batches, any matrix in place of H⁻¹."""
        last = self.stationarity[-batches:]
        H, Y = np.mean([s.by_theta for s in last], axis=0), np.mean([s.by_phi for s in last], axis=0)
        return self.c - self.d @ inverse(H) @ Y

    def __call__(self, estimator: bilevel.Estimator, seed: int = 0) -> bilevel.Estimate:
        """What an estimator makes of the problem."""
        return estimator(self.problem, self.meta, self.inner_batches, tensor(self.outer.a), seed=seed)

    def error(self, estimate: bilevel.Estimate, truth: Array | None = None) -> float:
        """‖grad − truth‖/‖truth‖, the truth being ∇h unless given."""
        truth = self.gradient if truth is None else truth
        return float(np.linalg.norm(self.flat(estimate.grad).numpy() - truth) / np.linalg.norm(truth))


def product(matrices: Sequence[Array], size: int) -> Array:
    """A_k ⋯ A_1 of matrices A_1, …, A_k; the identity of that size for none."""
    return functools.reduce(lambda total, A: A @ total, matrices, np.eye(size))


def tensor(array: Array | Sequence[float] | float) -> Tensor:
    """A copy for torch, in float64."""
    return torch.tensor(array, dtype=torch.float64)


def positive_definite(rng: np.random.Generator, size: int) -> Array:
    """A random symmetric matrix with eigenvalues from `WEAKEST` to `STRONGEST`, evenly spread on a log scale."""
    Q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return Q @ np.diag(np.geomspace(WEAKEST, STRONGEST, size)) @ Q.T


def random_outer(rng: np.random.Generator, M: int, N: int, explicit: bool = False) -> Outer:
    """Random data of an outer loss; f depends on φ explicitly only if asked to."""
    D, a = rng.standard_normal((M + 1, M)), rng.standard_normal(M + 1)
    Q, S = rng.standard_normal((N, N)), rng.standard_normal((N, M))
    return Outer(D, a, (Q + Q.T) * explicit, S * explicit)


# -- gradient descent on a quadratic inner loss --------------------------------------------------------------------


def descent(
    name: str,
    *,
    T: int = 5,
    M: int = 5,
    N: int = 4,
    periods: int = 1,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    gamma: float = 1.0,
    maximize: bool = False,
    start_from_meta: bool = False,
    explicit: bool = False,
    learned_rate: bool = False,
    learned_decay: bool = False,
    shared_solution: bool = False,
    as_trees: bool = False,
    seed: int = 0,
) -> ClosedForm:
    """`torch.optim.SGD`, with its settings, on the quadratic inner loss.

    There are `periods` different batches, which take turns; with `shared_solution` they have one minimiser at this φ
    (not at others), so that minibatch descent converges. The learning rate of step t is ηγᵗ. With `maximize` the
    library gets −g as inner loss and an optimiser that ascends. θ_0 = Eφ + k, where E = 0 unless `start_from_meta`; f
    depends on φ only if `explicit`. N counts the meta parameters in the inner loss; `learned_rate` and `learned_decay`
    add log η and log λ to them. With `as_trees`, params and meta have several leaves, whose order in a vector is not
    the alphabetical one.
    """
    rng = np.random.default_rng([seed, M, N, periods])
    H = [positive_definite(rng, M) for _ in range(periods)]
    C = [rng.standard_normal((M, N)) for _ in range(periods)]
    e = [rng.standard_normal(M) for _ in range(periods)]
    E, k, linear_phi = rng.standard_normal((M, N)) * start_from_meta, rng.standard_normal(M), rng.standard_normal(N)
    if shared_solution:
        solution = rng.standard_normal(M)
        e = [H[i] @ solution + weight_decay * solution - C[i] @ linear_phi for i in range(periods)]
    logs = ([np.log(LEARNING_RATE)] if learned_rate else []) + ([np.log(weight_decay)] if learned_decay else [])
    phi = np.concatenate([linear_phi, logs])
    outer = random_outer(rng, M, len(phi), explicit)

    # The recursion: u = g without momentum, else m ← μm + κg (κ = 1 in the first step), u = m, or g + μm (Nesterov).
    theta, buffer, rate, on_g = E @ linear_phi + k, np.zeros(M), 0.0, 0.0
    eye, more = np.eye(M), len(logs)
    jacobians = []

    def stationarity(theta: Array, t: int) -> Stationarity:
        G = H[t % periods] + weight_decay * eye
        columns = [np.zeros((M, 1))] * learned_rate + [weight_decay * theta[:, None]] * learned_decay
        Y = np.hstack([-C[t % periods], *columns])
        return Stationarity(G @ theta - C[t % periods] @ linear_phi - e[t % periods], G, Y)

    for t in range(T):
        here, rate = stationarity(theta, t), LEARNING_RATE * gamma**t
        g, G, Y = here.value, here.by_theta, here.by_phi
        kappa = 1.0 if t == 0 else 1.0 - dampening
        on_g, on_m = (1.0, 0.0) if momentum == 0 else (1 + momentum, momentum**2) if nesterov else (kappa, momentum)
        u = on_g * g + on_m * buffer
        A = np.block([[eye - rate * on_g * G, -rate * on_m * eye], [kappa * G, momentum * eye]])
        B = np.vstack([-rate * on_g * Y, kappa * Y])
        if learned_rate:
            B[:M, N] -= rate * u
        if momentum == 0:
            A[M:], B[M:] = 0, 0
        jacobians.append((A, B))
        theta, buffer = theta - rate * u, momentum * buffer + kappa * g

    # The same for the library.
    def flat_meta(meta: Tree) -> Tensor:
        if isinstance(meta, Tensor):
            return meta
        return torch.cat([meta["slopes"].reshape(-1), meta["offset"].reshape(1), *meta.get("logs", [])])

    def flat_params(params: Tree) -> Tensor:
        return torch.cat([params["w"].reshape(-1), params["b"].reshape(1)]) if as_trees else params

    def inner_loss(params: Tree, meta: Tree, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        H, C, e = batch
        theta = flat_params(params)
        loss = 0.5 * theta @ H @ theta - theta @ (C @ flat_meta(meta)[:N] + e)
        return -loss if maximize else loss

    def params(meta: Tree) -> Tree:
        start = tensor(E) @ flat_meta(meta)[:N] + tensor(k) if start_from_meta else tensor(k)
        return {"w": start[:-1].reshape(2, -1), "b": start[-1]} if as_trees else start

    outer_loss = outer.as_torch()
    settings = {
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": dampening,
        "maximize": maximize,
        "lr": (lambda meta: meta["logs"][0][0].exp()) if learned_rate else LEARNING_RATE,
        "weight_decay": (lambda meta: meta["logs"][-1][0].exp()) if learned_decay else weight_decay,
    }
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=gamma) if gamma != 1 else None
    problem = bilevel.GradientDescent(
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, batch: outer_loss(flat_params(params), flat_meta(meta), batch),
        params=params,
        optimizer=bilevel.optimizer(torch.optim.SGD, schedule=schedule, **settings),
    )
    split: Tree = {"slopes": tensor(linear_phi[:-1]).reshape(1, -1), "offset": tensor(linear_phi[-1])}
    if logs:
        split["logs"] = [tensor([log]) for log in logs]
    data = [(tensor(H[i]), tensor(C[i]), tensor(e[i])) for i in range(periods)]
    return ClosedForm(
        name=name,
        problem=problem,
        meta=split if as_trees or more else tensor(phi),
        inner_batches=bilevel.batches(lambda t: data[t % periods], T),
        outer=outer,
        phi=phi,
        theta=theta,
        Z_0=np.vstack([np.hstack([E, np.zeros((M, more))]), np.zeros((M, N + more))]),
        jacobians=jacobians,
        stationarity=[stationarity(theta, t) for t in range(T)],
        last_rate=rate * on_g,
        h_is_quadratic=not logs,
        flat=flat_meta,
    )


# -- other inner loops ---------------------------------------------------------------------------------------------


def affine(name: str, *, T: int = 5, M: int = 3, N: int = 4, column_scale: float = 1.0, seed: int = 0) -> ClosedForm:
    """A `Problem` with the step θ ← Aθ + Bφ + batch, where A alternates between two matrices that are not symmetric.

    The inner state holds an integer as well, which counts the steps and chooses the matrix. With `column_scale` < 1 the
    first entry of φ matters by that much more than the others.
    """
    rng = np.random.default_rng([seed, M, N])
    A = [rng.standard_normal((M, M)) / 2 for _ in range(2)]
    scales = np.where(np.arange(N) > 0, column_scale, 1.0)
    B, E = rng.standard_normal((M, N)) * scales, rng.standard_normal((M, N)) * scales
    e, phi, outer = rng.standard_normal((T, M)), rng.standard_normal(N), random_outer(rng, M, N)
    theta = E @ phi
    for t in range(T):
        theta = A[t % 2] @ theta + B @ phi + e[t]

    even, odd, across, start, outer_loss = tensor(A[0]), tensor(A[1]), tensor(B), tensor(E), outer.as_torch()

    def step(state: Tree, meta: Tensor, batch: Tensor) -> Tree:
        matrix = torch.where(state["count"] % 2 == 0, even, odd)
        return {"count": state["count"] + 1, "theta": matrix @ state["theta"] + across @ meta + batch}

    return ClosedForm(
        name=name,
        problem=bilevel.Problem(
            init=lambda meta: {"count": torch.tensor(0), "theta": start @ meta},
            step=step,
            outer_loss=lambda state, meta, batch: outer_loss(state["theta"], meta, batch),
        ),
        meta=tensor(phi),
        inner_batches=[tensor(row) for row in e],
        outer=outer,
        phi=phi,
        theta=theta,
        Z_0=E,
        jacobians=[(A[t % 2], B) for t in range(T)],
    )


def black_box(name: str, *, M: int = 4, N: int = 5, seed: int = 0) -> ClosedForm:
    """A `BlackBox` that solves Hθ = Cφ + e outside of torch, so that no derivative can pass."""
    rng = np.random.default_rng([seed, M, N])
    H, C, e, phi = (
        positive_definite(rng, M),
        rng.standard_normal((M, N)),
        rng.standard_normal(M),
        rng.standard_normal(N),
    )
    outer = random_outer(rng, M, N, explicit=True)
    return ClosedForm(
        name=name,
        problem=bilevel.BlackBox(
            solve=lambda meta: tensor(np.linalg.solve(H, C @ meta.numpy() + e)), outer_loss=outer.as_torch()
        ),
        meta=tensor(phi),
        inner_batches=None,
        outer=outer,
        phi=phi,
        theta=np.linalg.solve(H, C @ phi + e),
        Z_0=np.linalg.solve(H, C),
        jacobians=[],
    )


UNROLLED = [
    descent("plain"),
    descent("one step", T=1, start_from_meta=True),
    descent("φ in θ_0", start_from_meta=True),
    descent("explicit ∂f/∂φ", explicit=True),
    descent("momentum", momentum=0.8, periods=5, start_from_meta=True),
    descent("momentum with dampening", momentum=0.8, dampening=0.3),
    descent("nesterov", momentum=0.8, nesterov=True, explicit=True),
    descent("weight decay", weight_decay=0.3, momentum=0.5),
    descent("schedule", gamma=0.8),
    descent("a batch for each step", T=10, periods=10, explicit=True),
    descent("trees", as_trees=True, periods=3, start_from_meta=True),
    descent("learned rate", learned_rate=True, explicit=True),
    descent("learned rate, momentum, schedule", learned_rate=True, momentum=0.6, gamma=0.9, periods=5),
    descent("ascent", maximize=True, weight_decay=0.3),
    descent("ascent, learned decay", maximize=True, learned_decay=True, weight_decay=0.4),
    descent("learned decay", learned_decay=True, weight_decay=0.4, start_from_meta=True),
    affine("affine steps"),
]
"""A problem joins with a row."""

BLACK_BOX = black_box("black box")
