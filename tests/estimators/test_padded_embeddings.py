"""The row of padding in an embedding gets no gradient, also where the table depends on the meta parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel

WORDS = torch.tensor([[0, 1, 2], [2, 0, 0], [3, 1, 0]])
DOUBLE = torch.float64
RATE, STEPS = 0.2, 3


def loss(table: Tensor, factor: Tensor) -> Tensor:
    return (functional.embedding(WORDS, table, padding_idx=0) * factor).sum(1).tanh().square().mean()


def start(scale: Tensor) -> Tensor:
    return scale.unsqueeze(1) * torch.linspace(-1, 1, 8, dtype=DOUBLE).reshape(4, 2)


def by_hand(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The whole loop in one graph, as PyTorch differentiates it."""
    scale = scale.clone().requires_grad_()
    table = start(scale)
    for _ in range(STEPS):
        (slope,) = torch.autograd.grad(loss(table, scale.sum()), table, create_graph=True)
        table = table - RATE * slope
    value = loss(table, scale.new_ones(()) * 2)
    return value.detach(), torch.autograd.grad(value, scale)[0]


@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.Reverse(),
        bilevel.Reverse("graph"),
        bilevel.Forward(),
        bilevel.ForwardGradient(4, distribution="coordinate"),
        bilevel.ForwardGradient(4, distribution="coordinate", tangents="shared"),
    ],
    ids=repr,
)
def test_the_row_of_padding_is_a_constant_in_every_method(estimator: Any) -> None:
    problem = bilevel.GradientDescent(
        inner_loss=lambda table, scale, batch: loss(table, scale.sum()),
        outer_loss=lambda table, scale, batch: loss(table, table.new_ones(()) * 2),
        params=start,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=RATE),
    )
    scale = torch.tensor([0.7, -0.4, 1.1, 0.3], dtype=DOUBLE)
    value, gradient = by_hand(scale)
    assert gradient.abs().min() > 1e-4  # the row of padding depends on scale[0], and so do the other rows
    found = estimator(problem, scale, STEPS)
    torch.testing.assert_close(found.value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.grad, gradient, rtol=1e-10, atol=1e-12)


def test_modules_look_up_the_same() -> None:
    table = nn.Embedding(4, 2, padding_idx=0, dtype=DOUBLE)
    problem = bilevel.GradientDescent(
        inner_loss=lambda model, weight, batch: (model(WORDS).sum(1).tanh() * weight).square().mean(),
        outer_loss=lambda model, weight, batch: model(WORDS).exp().mean(),
        params=table,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=RATE),
    )
    weight = torch.tensor([0.5, 1.5], dtype=DOUBLE)
    exact, forward = bilevel.Reverse()(problem, weight, STEPS).grad, bilevel.Forward()(problem, weight, STEPS).grad
    torch.testing.assert_close(forward, exact, rtol=1e-10, atol=1e-12)
