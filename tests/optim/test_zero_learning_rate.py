"""A learning rate of 0, with which every warmup starts: finite and right, whatever the optimiser divides by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import class_name, default_dtype, numerical_gradient, trained_tensors
from test_unreached_parameters import (
    DTYPE_OF_COUNTERS,
    ESTIMATORS,
    HEADS,
    META,
    PARAMETERS,
    head_loss,
    outer_loss,
    warmup,
)
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

import bilevel


class OwnAdamW(AdamW):
    """A subclass that changes nothing."""


SETTINGS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (Adam, {"foreach": False}),
    (Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (Adam, {"amsgrad": True, "maximize": True, "foreach": True}),
    (Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (AdamW, {"foreach": False, "weight_decay": 0.1}),
    (AdamW, {"amsgrad": True, "foreach": False, "weight_decay": 0.1}),
    (AdamW, {"fused": True, "maximize": True}),
    (OwnAdamW, {"amsgrad": True, "foreach": False}),
    (NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (RAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1, "foreach": True}),
    (Adamax, {"foreach": False}),
    (Adagrad, {"lr_decay": 0.1, "fused": True}),
    (RMSprop, {"centered": True, "momentum": 0.9}),
    (Adadelta, {"foreach": True}),
    (SGD, {"momentum": 0.9, "dampening": 0.5, "foreach": True}),
    (ASGD, {"lambd": 0.1, "t0": 1}),
]
EVERY_SETTING = pytest.mark.parametrize(("algorithm", "settings"), SETTINGS, ids=class_name)
RATE = 0.05


def loss_for(settings: dict[str, Any]) -> Callable[..., Tensor]:
    """The inner loss, turned over for an optimiser that maximises."""
    return (lambda *arguments: -head_loss(*arguments)) if settings.get("maximize") else head_loss


@pytest.mark.sampled(every=2)
@EVERY_SETTING
def test_warmup(algorithm: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    """The settings of speed (`foreach`, `fused`) are those of the plain loop too, and change nothing here."""
    loss = loss_for(settings)

    complete = {"lr": RATE, **settings}

    def trained(meta: Tensor) -> list[Tensor]:
        return trained_tensors(loss, PARAMETERS, meta, HEADS, lambda p: algorithm(p, **complete), warmup)

    problem = bilevel.GradientDescent(
        loss, outer_loss, PARAMETERS, bilevel.optimizer(algorithm, lr=RATE, schedule=warmup, **settings)
    )
    with default_dtype(DTYPE_OF_COUNTERS.get(algorithm, torch.float32)):
        truth = numerical_gradient(lambda meta: float(outer_loss(trained(meta), meta, None)), META, 1e-4)
        plain = trained(META)
    for name in ("Reverse", "Reverse(graph)", "exact", "shared"):
        estimate = ESTIMATORS[name](problem, META, list(HEADS))
        for ours, theirs in zip(estimate.state.params, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert (estimate.grad - truth).norm() <= 1e-7 * truth.norm(), name


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("decay", [0.1, 0.0])
@pytest.mark.parametrize("at", [0.0, RATE])
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [row for row in SETTINGS if row[0] is not ASGD and not row[1].get("maximize")],
    ids=class_name,
)
def test_rate_and_decay_as_meta_parameters_at_zero(
    algorithm: type[torch.optim.Optimizer], settings: dict[str, Any], at: float, decay: float
) -> None:
    """One-sided differences of the plain loop, extrapolated: PyTorch takes no rate or decay below 0."""
    constants = {name: value for name, value in settings.items() if name != "weight_decay"}
    weights = torch.ones(5, dtype=torch.float64)

    def h(rate: float, decay: float) -> float:
        trained = trained_tensors(
            head_loss,
            PARAMETERS,
            weights,
            HEADS[:4],
            lambda p: algorithm(p, lr=rate, weight_decay=decay, **constants),  # pyright: ignore[reportCallIssue]
        )
        return float(outer_loss(trained, weights, None))

    problem = bilevel.GradientDescent(
        lambda parameters, meta, head: head_loss(parameters, weights, head),
        outer_loss,
        PARAMETERS,
        bilevel.optimizer(algorithm, lr=lambda meta: meta[0], weight_decay=lambda meta: meta[1], **constants),
    )
    point = torch.tensor([at, decay], dtype=torch.float64)
    with default_dtype(DTYPE_OF_COUNTERS.get(algorithm, torch.float32)):
        truth = torch.tensor(
            [ahead(lambda s: h(at + s, decay)), ahead(lambda s: h(at, decay + s))], dtype=torch.float64
        )
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        torch.testing.assert_close(estimator(problem, point, list(HEADS[:4])).grad, truth, rtol=1e-4, atol=1e-8)


def ahead(h: Callable[[float], float], step: float = 1e-5) -> float:
    """dh/ds at 0 from values ahead of it, with an error of O(step³)."""
    return (-11 * h(0) + 18 * h(step) - 9 * h(2 * step) + 2 * h(3 * step)) / (6 * step)


def test_settings_inside_the_step_at_a_rate_of_zero() -> None:
    """Adam divides by its rate where a setting is a tensor."""
    weights, point = torch.ones(5, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    problem = bilevel.GradientDescent(
        lambda parameters, meta, head: head_loss(parameters, weights, head),
        outer_loss,
        PARAMETERS,
        bilevel.optimizer(Adam, lr=RATE, schedule=warmup, amsgrad=True, eps=lambda meta: meta[0]),
    )

    def h(meta: Tensor) -> float:
        trained = trained_tensors(
            head_loss,
            PARAMETERS,
            weights,
            HEADS,
            lambda p: Adam(p, lr=RATE, amsgrad=True, eps=float(meta[0])),
            warmup,
        )
        return float(outer_loss(trained, weights, None))

    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        torch.testing.assert_close(
            estimator(problem, point, list(HEADS)).grad, numerical_gradient(h, point), rtol=1e-7, atol=0
        )
