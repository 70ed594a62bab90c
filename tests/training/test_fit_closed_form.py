"""The outer loop against closed forms and updates computed by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fit_cases import SHRINKAGE, START, TARGET, exact, hypergradient, train
from torch import Tensor
from torch.optim import lr_scheduler

import bilevel


def test_plain_descent_follows_its_closed_form_all_the_way() -> None:
    """φ_k − φ* = (1 − ηs²)^k (φ_0 − φ*), and h falls accordingly."""
    rate, optimum = 0.5, TARGET / SHRINKAGE
    seen: list[Tensor] = []
    result = train(exact(60), callbacks=[lambda step: seen.append(step.meta)])
    for k, phi in enumerate(seen, start=1):
        expected = optimum + (1 - rate * SHRINKAGE**2) ** k * (START - optimum)
        torch.testing.assert_close(phi, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.meta, seen[-1], rtol=0, atol=0)
    for row, phi in zip(result.history, [START, *seen], strict=False):
        expected_loss = 0.5 * (SHRINKAGE * phi - TARGET).square().sum().item()
        assert row["outer_loss"] == pytest.approx(expected_loss, rel=1e-12, abs=1e-13)
        assert row["grad_norm"] == pytest.approx(hypergradient(phi).norm().item(), rel=1e-12, abs=1e-13)
        assert row["standard_error"] is None
    assert [row["outer_step"] for row in result.history] == list(range(60))


# With the factor by which a schedule shrinks the learning rate at each step.
CONVERGING: dict[str, tuple[Any, dict[str, Any], float]] = {
    "SGD": (torch.optim.SGD, {"lr": 1.0}, 1.0),
    "momentum": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.5, "nesterov": True}, 1.0),
    "Adam": (torch.optim.Adam, {"lr": 0.3}, 1.0),
    "AdamW": (torch.optim.AdamW, {"lr": 0.3, "weight_decay": 0.0}, 1.0),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1.0}, 0.92),
    "Adagrad": (torch.optim.Adagrad, {"lr": 2.0}, 1.0),
    "Rprop": (torch.optim.Rprop, {"lr": 0.3}, 1.0),
}


@pytest.mark.parametrize("name", CONVERGING)
def test_every_optimizer_finds_the_optimum(name: str) -> None:
    """RMSprop's steps are of the order of its learning rate, which falls to 0.92^200 = 6e-8; Adam is a heavy ball in
    the end, whose error falls by √0.9 a step, to 0.949^200 = 3e-5 times what it was when that began.
    """
    algorithm, settings, factor = CONVERGING[name]
    schedule = functools.partial(lr_scheduler.ExponentialLR, gamma=factor)
    result = train(exact(200), optimizer=bilevel.optimizer(algorithm, schedule=schedule, **settings))
    torch.testing.assert_close(result.meta, TARGET / SHRINKAGE, rtol=0, atol=1e-3)


def momentum_by_hand(phi: Tensor) -> list[Tensor]:
    first = hypergradient(phi)
    one = phi - 0.1 * first
    return [one, one - 0.1 * (0.9 * first + hypergradient(one))]


def decay_by_hand(phi: Tensor) -> list[Tensor]:
    one = phi - 0.1 * (hypergradient(phi) + 0.2 * phi)
    return [one, one - 0.1 * (hypergradient(one) + 0.2 * one)]


def schedule_by_hand(phi: Tensor) -> list[Tensor]:
    one = phi - 0.1 * hypergradient(phi)
    return [one, one - 0.05 * hypergradient(one)]


def adam_by_hand(phi: Tensor) -> list[Tensor]:
    g = hypergradient(phi)
    one = phi - 0.1 * g / (g.abs() + 1e-8)
    h = hypergradient(one)
    mean, square = (0.9 * 0.1 * g + 0.1 * h) / (1 - 0.81), (0.99 * 0.01 * g**2 + 0.01 * h**2) / (1 - 0.9801)
    return [one, one - 0.1 * mean / (square.sqrt() + 1e-8)]


BY_HAND: dict[str, tuple[Any, Callable[[Tensor], list[Tensor]]]] = {
    "momentum": (bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9), momentum_by_hand),
    "weight decay": (bilevel.optimizer(torch.optim.SGD, lr=0.1, weight_decay=0.2), decay_by_hand),
    "schedule": (
        bilevel.optimizer(
            torch.optim.SGD, lr=0.1, schedule=functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)
        ),
        schedule_by_hand,
    ),
    "Adam": (bilevel.optimizer(torch.optim.Adam, lr=0.1, betas=(0.9, 0.99)), adam_by_hand),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_first_two_updates_by_hand(name: str) -> None:
    optimizer, by_hand = BY_HAND[name]
    for steps, expected in enumerate(by_hand(START), start=1):
        torch.testing.assert_close(train(exact(steps), optimizer=optimizer).meta, expected, rtol=1e-12, atol=1e-12)


def test_adam_is_the_default_optimizer() -> None:
    by_default = train(exact(3), optimizer=None).meta
    assert torch.equal(by_default, train(exact(3), optimizer=bilevel.optimizer(torch.optim.Adam, lr=1e-2)).meta)
