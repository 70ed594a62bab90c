"""Clipping of the gradient inside an inner step: PyTorch's own functions in the plain loop are the truth."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import numerical_gradient
from test_unreached_parameters import ESTIMATORS, HEADS, META, PARAMETERS, TOLERANCE, head_loss, outer_loss
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam

import bilevel

Clip = Callable[[list[Tensor]], Any]


def clipped_training(meta: Any, clip: Clip, optimizer: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
    """The loop of every tutorial, with clipping between `backward` and `step`."""
    parameters = [p.clone().requires_grad_() for p in PARAMETERS]
    bound = optimizer(parameters)
    for head in HEADS:
        bound.zero_grad()
        head_loss(parameters, meta, head).backward()
        clip(parameters)
        bound.step()
    return [p.detach() for p in parameters]


def by_value_and_norm(parameters: list[Tensor]) -> None:
    clip_grad_value_(parameters, 0.2)
    clip_grad_norm_(parameters, 0.3)


CLIPPINGS: dict[str, tuple[dict[str, Any], Clip]] = {
    "norm": ({"clip_norm": 0.3}, lambda p: clip_grad_norm_(p, 0.3)),
    "norm that seldom binds": ({"clip_norm": 3.0}, lambda p: clip_grad_norm_(p, 3.0)),
    "1-norm": ({"clip_norm": 0.5, "clip_norm_type": 1}, lambda p: clip_grad_norm_(p, 0.5, norm_type=1)),
    "3-norm": ({"clip_norm": 0.2, "clip_norm_type": 3.0}, lambda p: clip_grad_norm_(p, 0.2, norm_type=3.0)),
    "largest entry": (
        {"clip_norm": 0.2, "clip_norm_type": math.inf},
        lambda p: clip_grad_norm_(p, 0.2, norm_type=math.inf),
    ),
    "value": ({"clip_value": 0.1}, lambda p: clip_grad_value_(p, 0.1)),
    "value, then norm": ({"clip_norm": 0.3, "clip_value": 0.2}, by_value_and_norm),
}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.1}),
    "Adam": (Adam, {"lr": 0.1, "eps": 1e-2}),
}


@functools.cache
def truth(clipping: str, optimizer: str) -> tuple[list[Tensor], Tensor]:
    algorithm, settings = OPTIMIZERS[optimizer]

    def trained(meta: Tensor) -> list[Tensor]:
        return clipped_training(meta, CLIPPINGS[clipping][1], lambda p: algorithm(p, **settings))

    return trained(META), numerical_gradient(lambda meta: float(outer_loss(trained(meta), meta, None)), META, 1e-5)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_hypergradient_is_that_of_the_plain_loop(clipping: str, optimizer: str, name: str) -> None:
    parameters, gradient = truth(clipping, optimizer)
    algorithm, settings = OPTIMIZERS[optimizer]
    problem = bilevel.GradientDescent(
        head_loss, outer_loss, PARAMETERS, bilevel.optimizer(algorithm, **settings, **CLIPPINGS[clipping][0])
    )
    estimate = ESTIMATORS[name](problem, META, list(HEADS))
    for ours, theirs in zip(estimate.state.params, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (estimate.grad - gradient).norm() <= TOLERANCE.get(name, 1e-7) * gradient.norm()


def test_every_clipping_binds_and_the_seldom_one_not_at_every_step() -> None:
    """The tests above would say nothing about a bound that no gradient meets."""
    norms: list[float] = []
    clipped_training(META, lambda p: norms.append(float(clip_grad_norm_(p, 3.0))), lambda p: SGD(p, lr=0.3))
    assert min(norms) < 3.0 < max(norms)
    for clipping in CLIPPINGS.values():
        free, bound = (clipped_training(META, clip, lambda p: SGD(p, lr=0.3)) for clip in (lambda p: None, clipping[1]))
        assert not torch.allclose(free[3], bound[3])


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward()], ids=lambda e: type(e).__name__)
def test_bounds_may_be_meta_parameters(estimator: bilevel.Estimator) -> None:
    weights, point = torch.ones(5, dtype=torch.float64), torch.tensor([0.3, 0.2], dtype=torch.float64)

    def h(meta: Tensor) -> float:
        def clip(parameters: list[Tensor]) -> None:
            clip_grad_value_(parameters, float(meta[1]))
            clip_grad_norm_(parameters, float(meta[0]))

        return float(outer_loss(clipped_training(weights, clip, lambda p: SGD(p, lr=0.3)), weights, None))

    problem = bilevel.GradientDescent(
        lambda parameters, meta, head: head_loss(parameters, weights, head),
        outer_loss,
        PARAMETERS,
        bilevel.optimizer(SGD, lr=0.3, clip_norm=lambda meta: meta[0], clip_value=lambda meta: meta[1]),
    )
    gradient = numerical_gradient(h, point)
    assert (estimator(problem, point, list(HEADS)).grad - gradient).norm() <= 1e-7 * gradient.norm()


def test_compiled_gradients_are_clipped() -> None:
    problem = bilevel.GradientDescent(
        head_loss, outer_loss, PARAMETERS, bilevel.optimizer(SGD, lr=0.3, clip_norm=0.3), compile="aot_eager"
    )
    expected = bilevel.Reverse()(problem.eager, META, list("abba"))
    torch.testing.assert_close(bilevel.Reverse()(problem, META, list("abba")).grad, expected.grad)


def test_a_gradient_of_zero_is_clipped_to_zero_with_its_derivative() -> None:
    """At ‖g‖ = 0 the factor is 1, and the derivative of the clipped gradient that of the gradient."""
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: 0.5 * (theta - meta).square().sum(),
        lambda theta, meta, batch: theta.sum(),
        torch.ones(2, dtype=torch.float64),
        bilevel.optimizer(SGD, lr=0.5, clip_norm=1.0),
    )
    meta = torch.ones(2, dtype=torch.float64)
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        assert estimator(problem, meta, bilevel.no_batches(1)).grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": -1.0}, "clip_norm=-1.0: a number of at least 0"),
        ({"clip_value": "much"}, "clip_value='much': a number of at least 0"),
        ({"clip_norm": 1.0, "clip_norm_type": 0.5}, "clip_norm_type=0.5: a number of at least 1"),
        ({"clip_norm_type": 1.0}, "has no effect without clip_norm"),
    ],
)
def test_bounds_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bilevel.optimizer(SGD, lr=0.1, **settings)


def test_bounds_that_are_vectors() -> None:
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: (meta * theta).sum(),
        lambda theta, meta, batch: theta.sum(),
        torch.ones(2),
        bilevel.optimizer(SGD, lr=0.5, clip_norm=lambda meta: meta),
    )
    with pytest.raises(ValueError, match=r"clip_norm gave a tensor of shape \(2,\); a scalar is needed"):
        bilevel.Reverse()(problem, torch.ones(2), bilevel.no_batches(1))


def test_outer_optimisers_are_told_where_to_ask_for_clipping() -> None:
    with pytest.raises(
        ValueError, match=r"clip_norm=1.0: .* the hypergradient is clipped by fit\(..., clip_norm=...\)"
    ):
        bilevel.optimizer(SGD, lr=0.1, clip_norm=1.0).bind([torch.zeros(1)])
