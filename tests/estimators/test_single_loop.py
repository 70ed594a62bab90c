"""Single loops: SOBA and AmIGO written out by hand in plain PyTorch, their fixed point, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import Array, descent, tensor
from torch import Tensor

import bilevel
from bilevel import SingleLoop
from bilevel.errors import NonFiniteError
from bilevel.training.outer_loop import OuterStep

M, N, WINDOWS = 3, 2, 6
RATE, RHO, OUTER_RATE = 0.1, 0.2, 0.05


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner_loss(theta: Tensor, phi: Tensor, batch: Tensor) -> Tensor:
    """Not quadratic in θ, with another Hessian for every batch."""
    return torch.nn.functional.softplus(batch @ theta).mean() + 0.5 * (phi.exp().sum() * theta.square()).sum()


def outer_loss(theta: Tensor, phi: Tensor, batch: Tensor) -> Tensor:
    return (theta - batch).square().sum() + 0.1 * (phi * theta[:N]).sum() + 0.05 * phi.square().sum()


def problem() -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        inner_loss, outer_loss, randn(1, M), bilevel.optimizer(torch.optim.SGD, lr=RATE, momentum=0.5)
    )


PHI = tensor([0.1, -0.4])


def batch(number: int) -> Tensor:
    return randn(100 + number, 4, M)


def target(window: int) -> Tensor:
    return randn(500 + window, M)


def by_hand(T: int, K: int, simultaneous: bool, average: float) -> Tensor:
    """The outer loop with three variables, the inner one moved by torch.optim."""
    theta, v, phi = torch.nn.Parameter(randn(1, M)), torch.zeros(M, dtype=torch.float64), PHI.clone()
    optimizer, mean = torch.optim.SGD([theta], lr=RATE, momentum=0.5), None

    def step(data: Tensor) -> None:
        optimizer.zero_grad()
        inner_loss(theta, phi, data).backward()
        optimizer.step()

    def products(data: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Hv and Yᵀv."""
        there, meta = theta.detach().clone().requires_grad_(), phi.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(inner_loss(there, meta, data), there, create_graph=True)
        return torch.autograd.grad(gradient @ v, (there, meta))  # type: ignore[return-value]

    def outer(window: int) -> tuple[Tensor, Tensor]:
        there, meta = theta.detach().clone().requires_grad_(), phi.clone().requires_grad_()
        return torch.autograd.grad(outer_loss(there, meta, target(window)), (there, meta))  # type: ignore[return-value]

    for window in range(WINDOWS):
        data = [batch(T * window + t) for t in range(T)]
        direction = torch.zeros(N, dtype=torch.float64)
        if simultaneous:
            for each in data:
                d, c = outer(window)
                along, across = products(each, v)
                direction, v = c + across, v - RHO * (along + d)
                step(each)
        else:
            for each in data:
                step(each)
            d, c = outer(window)
            for k in range(K):
                v = v - RHO * (products(data[(T - K + k) % T], v)[0] + d)
            direction = c + products(data[-1], v)[1]
        mean = direction if mean is None else (1 - average) * mean + average * direction
        phi = phi - OUTER_RATE * mean
    return phi


def fit(estimator: bilevel.Estimator, T: int, out: Path | None = None, stop_at: int = 99, resume: bool = False) -> Any:
    def stop(step: OuterStep) -> None:
        if step.number > stop_at:
            raise Stop

    return bilevel.fit(
        problem(),
        PHI,
        lambda draw: [batch(T * draw + t) for t in range(T)],
        target,
        estimator=estimator,
        steps=WINDOWS,
        stream=True,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=OUTER_RATE),
        callbacks=[stop],
        out=None if out is None else bilevel.RunFolder(out, resume=resume),
        progress=False,
    )


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("average", [1.0, 0.3])
@pytest.mark.parametrize("T", [1, 3])
def test_soba_is_its_three_updates(T: int, average: float) -> None:
    found = fit(SingleLoop(RHO, order="simultaneous", average=average), T).meta
    assert found.numpy() == pytest.approx(by_hand(T, 1, True, average).numpy(), rel=1e-12)


@pytest.mark.parametrize("average", [1.0, 0.3])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (3, 2), (4, 1), (2, 5)])
def test_amigo_is_its_inner_loops(T: int, K: int, average: float) -> None:
    found = fit(SingleLoop(RHO, solver_steps=K, average=average), T).meta
    assert found.numpy() == pytest.approx(by_hand(T, K, False, average).numpy(), rel=1e-12)


@pytest.mark.parametrize(
    "estimator", [SingleLoop(RHO, order="simultaneous", average=0.3), SingleLoop(RHO, solver_steps=2, average=0.3)]
)
def test_a_stream_resumes_exactly(estimator: SingleLoop, tmp_path: Path) -> None:
    straight = fit(estimator, 2)
    with pytest.raises(Stop):
        fit(estimator, 2, tmp_path, stop_at=3)
    resumed = fit(estimator, 2, tmp_path, resume=True)
    assert torch.equal(straight.meta, resumed.meta)
    assert [row["outer_loss"] for row in straight.history] == [row["outer_loss"] for row in resumed.history]


# -- where it ends -----------------------------------------------------------------------------------------------------

EVERY = [
    SingleLoop(0.3),
    SingleLoop(0.3, solver_steps=3),
    SingleLoop(0.3, order="simultaneous"),
    SingleLoop(0.3, average=0.2),
]
CASE = descent("", T=2, N=1, explicit=True)


def affine_gradient(meta: Tensor) -> float:
    long = bilevel.batches(lambda t: CASE.inner_batches[0], 200)  # type: ignore[index]
    return float(bilevel.Reverse("log")(CASE.problem, meta, long, tensor(CASE.outer.a)).grad)


@pytest.mark.parametrize("estimator", EVERY, ids=str)
def test_at_fixed_meta_it_ends_at_the_implicit_gradient(estimator: SingleLoop) -> None:
    """The slowest mode falls by 1 − ρλ_min = 0.7 (v) or 0.6 a step (θ): 0.7¹⁵⁰ is below rounding."""
    carried, found = None, None
    for _ in range(150):
        found = estimator(CASE.problem, CASE.meta, CASE.inner_batches, tensor(CASE.outer.a), carried=carried)
        carried = found.carried
    assert found is not None
    truth: Array = at_rest()
    assert found.grad.numpy() == pytest.approx(truth, rel=1e-9)
    assert found.diagnostics["residual"] < 1e-9


def at_rest() -> Array:
    g, outer = CASE.stationarity[-1], CASE.outer
    theta = CASE.theta - np.linalg.solve(g.by_theta, g.value)
    return outer.by_phi(theta, CASE.phi) - outer.by_theta(theta, CASE.phi) @ np.linalg.solve(g.by_theta, g.by_phi)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("estimator", EVERY, ids=str)
def test_all_three_together_end_where_the_hypergradient_vanishes(estimator: SingleLoop) -> None:
    case = descent("", T=2, N=1)  # h is then convex in φ
    long = bilevel.batches(lambda t: case.inner_batches[0], 200)  # type: ignore[index]

    def slope(meta: Tensor) -> float:
        return abs(float(bilevel.Reverse("log")(case.problem, meta, long, tensor(case.outer.a)).grad))

    found = bilevel.fit(
        case.problem,
        case.meta,
        case.inner_batches,
        tensor(case.outer.a),
        estimator=estimator,
        steps=250,
        stream=True,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.03),
        progress=False,
    )
    # An average makes the outer loop a damped oscillation, which takes longer to rest.
    assert slope(found.meta) < (1e-6 if estimator.average == 1 else 1e-3) * slope(case.meta)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match='solver_steps=3 with order="simultaneous"'):
        SingleLoop(solver_steps=3, order="simultaneous")
    for average in (0.0, 1.5):
        with pytest.raises(ValueError, match="average="):
            SingleLoop(average=average)
    other = bilevel.Penalty()(problem(), PHI, [batch(0)], target(0))
    with pytest.raises(ValueError, match="not the linear system"):
        SingleLoop()(problem(), PHI, [batch(0)], target(0), carried=other.carried)
    with pytest.raises(NonFiniteError, match=r"not finite, because v, which is to solve.*step_size=1e\+200"):
        SingleLoop(1e200, solver_steps=3)(problem(), PHI, [batch(0)], target(0))
