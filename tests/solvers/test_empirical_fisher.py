"""The empirical Fisher matrix as a solver: its formula, Fisher's identity, and the gradients it gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import descent, tensor
from torch import Tensor

import bilevel
from bilevel import EmpiricalFisher, Implicit


def parts(flat: np.ndarray) -> list[Tensor]:
    return [tensor(flat[:2]), tensor(flat[2:]).reshape(2, 1)]


@pytest.mark.parametrize(("damping", "scale"), [(0.1, 1.0), (2.0, 7.0)])
def test_it_solves_with_the_matrix_of_its_formula(damping: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    gradients, b = rng.standard_normal((6, 4)), rng.standard_normal(4)
    F = scale / 6 * gradients.T @ gradients + damping * np.eye(4)
    solver = EmpiricalFisher(6, damping, scale).with_gradients([parts(g) for g in gradients])
    solution = solver.solve(lambda v: [2.0 * part for part in v], parts(b))
    found = torch.cat([part.reshape(-1) for part in solution.x]).numpy()
    assert found == pytest.approx(np.linalg.solve(F, b), rel=1e-10)
    residual = np.linalg.norm(b - 2 * found) / np.linalg.norm(b)
    assert solution.residual == pytest.approx(residual, rel=1e-10)
    assert solution.converged == (residual <= 1)


@pytest.mark.parametrize("batch", [1, 8])
def test_for_a_right_likelihood_it_is_the_inverse_hessian(batch: int) -> None:
    """Least squares with unit noise: E[g gᵀ] = H/B. With k gradients each entry is off by O(1/√k)."""
    rng, count, M = np.random.default_rng(batch), 4000, 3
    root = np.diag([1.0, 0.7, 0.5])
    x = rng.standard_normal((count, batch, M)) @ root
    gradients = (x * rng.standard_normal((count, batch, 1))).mean(1)
    H, b = root @ root, np.ones(M)
    solver = EmpiricalFisher(count, 1e-6, float(batch)).with_gradients([[tensor(g)] for g in gradients])
    found = solver.solve(lambda v: [tensor(H) @ v[0]], [tensor(b)]).x[0].numpy()
    # The relative spread of a sample second moment is √(2/k) for normal entries, at most √(8/k) for products of two.
    bound = 4 * np.sqrt(8 * M / count)
    assert np.linalg.norm(found - np.linalg.solve(H, b)) < bound * np.linalg.norm(np.linalg.solve(H, b))
    assert bound < 0.35


@pytest.mark.parametrize("rank", [2, 4, 9])
def test_implicit_gives_it_the_gradients_of_the_last_steps(rank: int) -> None:
    case = descent("", T=5, periods=5, explicit=True)
    found = case(Implicit(EmpiricalFisher(rank, damping=4.0)))
    theta, gradients = torch.nn.Parameter(case.problem.init(case.meta).params.clone()), []  # type: ignore[union-attr]
    optimizer, made = torch.optim.SGD([theta], lr=0.4), case.problem
    for batch in case.inner_batches or []:
        optimizer.zero_grad()
        made.inner_loss(theta, case.meta, batch).backward()  # type: ignore[union-attr]
        gradients.append(theta.grad.clone().numpy())  # type: ignore[union-attr]
        optimizer.step()
    kept = np.stack(gradients[-rank:])
    F = kept.T @ kept / len(kept) + 4.0 * np.eye(5)
    assert case.error(found, case.c - case.d @ np.linalg.inv(F) @ case.stationarity[-1].by_phi) < 1e-9
    again = case(Implicit(EmpiricalFisher(rank, damping=4.0)))  # nothing is left over from the call before
    assert torch.equal(found.grad, again.grad)


def test_parameters_without_a_gradient_count_as_zero() -> None:
    def inner_loss(theta: Any, phi: Tensor, batch: int) -> Tensor:
        used = theta["a"] if batch else theta["b"]
        return 0.5 * (used - phi).square().sum()

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda theta, phi, batch: theta["a"].sum() + theta["b"].sum(),
        {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)},
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    found = Implicit(EmpiricalFisher(4, 1.0))(problem, tensor([1.0, 2.0]), [0, 1, 0, 1])
    assert bool(torch.isfinite(found.grad).all())


def test_alone_it_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="solves by the gradients of the inner loop"):
        EmpiricalFisher().solve(lambda v: list(v), [torch.ones(2)])
    with pytest.raises(ValueError, match="no inner gradients"):
        EmpiricalFisher().with_gradients([]).solve(lambda v: list(v), [torch.ones(2)])
    for settings in ({"rank": 0}, {"damping": 0.0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            EmpiricalFisher(**settings)  # type: ignore[arg-type]
