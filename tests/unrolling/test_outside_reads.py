"""What a loss reads from outside of its arguments is a constant; where that loses a derivative, a warning says so."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel

D = torch.float64
X = torch.linspace(-1, 1, 24, dtype=D).reshape(8, 3).sin()
Y = torch.linspace(1, 2, 8, dtype=D).cos()
META = torch.linspace(0.5, 1.5, 8, dtype=D)
ELSEWHERE = torch.ones(3, dtype=D, requires_grad=True)
TEACHER = nn.Linear(3, 1).double()

ESTIMATORS = {
    "reverse": bilevel.Reverse(),
    "graph": bilevel.Reverse("graph"),
    "truncated": bilevel.TruncatedReverse(2),
    "forward": bilevel.Forward(),
    "shared": bilevel.ForwardGradient(2, tangents="shared"),
    "difference": bilevel.ForwardGradient(2, tangents="difference"),
    "zeroth-order": bilevel.ZerothOrder(2, 1e-3),
    "implicit": bilevel.Implicit(),
    "hessian-free": bilevel.HessianFree(),
}


def outer(theta: Any, meta: Any, batch: Any) -> Tensor:
    return ((X @ theta - Y) ** 2).mean()


def weighted(theta: Tensor, meta: Tensor) -> Tensor:
    return (meta * (X @ theta - Y) ** 2).mean()


def descent(inner_loss: Any, outer_loss: Any = outer, params: Any = None) -> bilevel.GradientDescent:
    start = torch.zeros(3, dtype=D) if params is None else params
    return bilevel.GradientDescent(inner_loss, outer_loss, start, bilevel.optimizer(torch.optim.SGD, lr=0.1))


def teacher_without_gradients(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
    with torch.no_grad():
        target = TEACHER(X).squeeze(1)
    return (meta * (X @ theta - target) ** 2).mean()


LOSING: dict[str, tuple[Callable[[], bilevel.GradientDescent], str]] = {
    "meta": (lambda: descent(lambda theta, meta, batch: weighted(theta, META) + (meta * theta.sum()).sum()), "meta"),
    "a view of meta": (
        lambda: descent(lambda theta, meta, batch: weighted(theta, meta) * META[2:4].sum()),
        "the meta parameter meta",
    ),
    "a leaf": (
        lambda: descent(lambda theta, meta, batch: weighted(theta, meta) + (theta * ELSEWHERE).sum()),
        r"shape \(3,\) that requires gradients",
    ),
    "a tensor with a graph": (
        lambda: descent(lambda theta, meta, batch, made=2 * ELSEWHERE: weighted(theta, meta) + (theta * made).sum()),
        r"shape \(3,\) that requires gradients",
    ),
    "a module": (
        lambda: descent(lambda theta, meta, batch: (meta * (X @ theta - TEACHER(X).squeeze(1)) ** 2).mean()),
        r"and 1 more",
    ),
    "meta in the outer loss": (
        lambda: descent(
            lambda theta, meta, batch: weighted(theta, meta),
            lambda theta, meta, batch: outer(theta, meta, batch) + META.square().sum() * theta.sum(),
        ),
        "outer_loss reads the meta parameter meta",
    ),
    "meta in params": (
        lambda: descent(lambda theta, meta, batch: weighted(theta, meta), params=lambda meta: 2 * META[:3]),
        "init or params reads the meta parameter meta",
    ),
}
HARMLESS: dict[str, Callable[[], bilevel.GradientDescent]] = {
    "data": lambda: descent(lambda theta, meta, batch: weighted(theta, meta)),
    "a starting point, detached": lambda: descent(
        lambda theta, meta, batch: weighted(theta, meta) + (meta - META.detach()).square().sum() * theta.sum()
    ),
    "a teacher under no_grad": lambda: descent(teacher_without_gradients),
    "its size": lambda: descent(lambda theta, meta, batch: weighted(theta, meta) * META.numel() / META.shape[0]),
    "parameters that start as meta": lambda: descent(
        lambda theta, meta, batch: weighted(theta, meta), params=lambda meta: meta[:3]
    ),
    "a module": lambda: descent(
        lambda model, meta, batch: (meta * (model(X).squeeze(1) - Y) ** 2).mean(),
        lambda model, meta, batch: model(X).square().mean(),
        nn.Sequential(bilevel.experimental.Recomputed(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).double(),
    ),
}


@contextlib.contextmanager
def warned() -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield (messages := [])
    messages += [str(each.message) for each in caught if "from outside of its arguments" in str(each.message)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("what", LOSING)
@pytest.mark.filterwarnings("ignore:Implicit")
def test_a_derivative_that_is_lost_is_named_once(what: str, estimator: str) -> None:
    make, words = LOSING[what]
    problem = make()
    with pytest.warns(UserWarning, match=words) as caught:
        ESTIMATORS[estimator](problem, META, [None] * 3)
    assert sum("from outside of its arguments" in str(each.message) for each in caught) == 1
    with warned() as again:
        ESTIMATORS[estimator](problem, META, [None] * 3)
    assert again == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("what", HARMLESS)
def test_what_loses_nothing_is_not_warned_of(what: str, estimator: str) -> None:
    with warned() as messages:
        ESTIMATORS[estimator](HARMLESS[what](), META, [None] * 3)
    assert messages == []


def test_another_part_of_the_same_memory_is_not_meta() -> None:
    flat = torch.linspace(0.5, 1.5, 12, dtype=D)
    problem = descent(lambda theta, meta, batch: weighted(theta, meta) + (theta * flat[9:]).sum())
    with warned() as messages:
        bilevel.Reverse()(problem, flat[:8], [None] * 3)
    assert messages == []


def test_a_batch_with_a_graph_is_named() -> None:
    meta = META.clone().requires_grad_()
    problem = descent(lambda theta, meta, batch: weighted(theta, batch) + meta.sum() * theta.sum())
    with pytest.warns(UserWarning, match="requires gradients from outside"):
        bilevel.Reverse()(problem, meta, [2 * meta] * 3)


def test_a_module_that_init_makes_may_be_converted() -> None:
    """Parameters are exchanged by `.to(...)`, which a reference to them from the watch must not forbid."""
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta * (model(X).squeeze(1) - Y) ** 2).mean(),
        lambda model, meta, batch: ((model(X).squeeze(1) + Y) ** 2).mean(),
        lambda meta: nn.Sequential(nn.Linear(3, 1)).to("cpu").double(),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    assert bilevel.Reverse()(problem, META, 2).grad.abs().max() > 0


def test_data_that_a_loss_makes_require_gradients_are_no_outside_read() -> None:
    """Some modules do so with their inputs, for checkpointing."""

    def inner(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        x = X[:, :]
        x.requires_grad = True
        return (meta * (x @ theta - Y) ** 2).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bilevel.Reverse()(descent(inner), META, 2)
