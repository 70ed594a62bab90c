"""First-order MAML against its definition, with networks as people write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel.errors import NoDependenceError

torch.manual_seed(0)
BATCHES = [(torch.randn(6, 2).double(), torch.randn(6, 1).double()) for _ in range(3)]
OUTER = (torch.randn(6, 2).double(), torch.randn(6, 1).double())


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    middle: list[nn.Module] = [nn.BatchNorm1d(4)] if norm else []
    return nn.Sequential(nn.Linear(2, 4), *middle, nn.Tanh(), nn.Linear(4, 1)).double()


def loss(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("algorithm", [torch.optim.SGD, torch.optim.Adam])
def test_it_is_the_gradient_at_the_adapted_parameters(algorithm: Any) -> None:
    """The definition, as MAML is written by hand: adapt a copy, take the gradient there, use it for the start."""
    model = network()
    problem = bilevel.GradientDescent(
        lambda params, meta, batch: loss(params, batch),
        lambda params, meta, batch: loss(params, batch) + sum(p.square().sum() for p in meta.parameters()),
        model,
        bilevel.optimizer(algorithm, lr=0.1),
    )
    estimate = bilevel.FirstOrder()(problem, model, BATCHES, OUTER)
    adapted = copy.deepcopy(model)
    optimizer = algorithm(adapted.parameters(), lr=0.1)
    for batch in BATCHES:
        optimizer.zero_grad()
        loss(adapted, batch).backward()
        optimizer.step()
    adapted.zero_grad()
    value = loss(adapted, OUTER)
    value.backward()
    assert set(estimate.grad) == {name for name, _ in model.named_parameters()}
    for (name, p), start in zip(adapted.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(estimate.grad[name], p.grad + 2 * start.detach(), rtol=1e-10, atol=1e-12)
    explicit = sum(p.square().sum() for p in model.parameters())
    torch.testing.assert_close(estimate.value, (value + explicit).detach())
    assert estimate.standard_error is None


def test_running_statistics_of_the_adapted_model_are_used() -> None:
    """The outer loss is computed in evaluation mode, with the statistics of the inner loop."""
    model = network(norm=True)

    def outer(params: Any, meta: Any, batch: Any) -> Tensor:
        return loss(params.eval(), batch)

    problem = bilevel.GradientDescent(
        lambda params, meta, batch: loss(params.train(), batch),
        outer,
        model,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    meta = nn.ParameterList(model.parameters())  # the same parameters, in a module without BatchNorm
    estimate = bilevel.FirstOrder()(problem, meta, BATCHES, OUTER)
    adapted = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    for batch in BATCHES:
        optimizer.zero_grad()
        loss(adapted, batch).backward()
        optimizer.step()
    adapted.zero_grad()
    loss(adapted.eval(), OUTER).backward()
    for found, p in zip(estimate.grad.values(), adapted.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-9, atol=1e-12)


def test_it_takes_a_problem_with_steps_of_its_own() -> None:
    problem = bilevel.Problem(
        init=lambda phi: {"w": phi**2, "n": torch.tensor(0)},
        step=lambda state, phi, batch: {"w": 0.5 * state["w"], "n": state["n"] + 1},
        outer_loss=lambda state, phi, batch: state["w"].square().sum() + phi.sum(),
    )
    phi = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = bilevel.FirstOrder()(problem, phi, 2)
    torch.testing.assert_close(found.grad, 2 * 0.25 * phi**2 * 2 * phi + 1)


def test_it_is_a_control_variate() -> None:
    model = network()
    problem = bilevel.GradientDescent(
        lambda params, meta, batch: loss(params, batch),
        lambda params, meta, batch: loss(params, batch),
        model,
        bilevel.optimizer(torch.optim.SGD, lr=0.01),
    )
    with_variate = bilevel.ForwardGradient(16, control_variate=bilevel.FirstOrder())(problem, model, BATCHES, OUTER)
    assert with_variate.diagnostics["variance_left"] < 0.01


def test_a_start_without_meta_parameters_is_refused() -> None:
    problem = bilevel.GradientDescent(
        lambda theta, phi, batch: (theta - phi).square().sum(),
        lambda theta, phi, batch: theta.sum() + phi.sum(),
        torch.zeros(2),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(NoDependenceError, match="take Reverse"):
        bilevel.FirstOrder()(problem, torch.ones(2), 2)


def test_an_outer_loss_without_the_state_is_refused() -> None:
    problem = bilevel.GradientDescent(
        lambda theta, phi, batch: theta.square().sum(),
        lambda theta, phi, batch: phi.sum(),
        lambda phi: phi,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(NoDependenceError, match="outer_loss does not depend on the inner state"):
        bilevel.FirstOrder()(problem, torch.ones(2), 2)
