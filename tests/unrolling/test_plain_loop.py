"""The plain loop of a check is the loop of every PyTorch tutorial, and in float64 it draws the same random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import TEN_OPTIMIZERS, class_name, default_dtype, train
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from bilevel import randomness
from bilevel.unrolling.double_precision import InDouble, as_double, lowest_dtype, problem_in_double
from bilevel.unrolling.plain_copies import NoPlainLoopError, plain_copy
from bilevel.unrolling.plain_loop import PlainLoop
from bilevel.unrolling.unroll import Unroll, unroll

DOUBLE = torch.float64
X = torch.linspace(-1.0, 1.0, 12, dtype=DOUBLE).reshape(4, 3)
Y = torch.tensor([0.3, -0.7, 0.1, 0.9], dtype=DOUBLE)
META = torch.linspace(0.5, 1.5, 4, dtype=DOUBLE)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def inner(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (meta * (model(X + batch).squeeze(1) - Y).square()).mean()


def outer(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (model(-X).squeeze(1) - Y).square().mean()


BATCHES = [0.1, -0.2, 0.3, 0.0]


def plain(described: bilevel.GradientDescent, meta: Any = META, batches: Any = BATCHES, **settings: Any) -> PlainLoop:
    return PlainLoop(unroll(described, meta, batches, None, 0), meta, **settings)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("algorithm", TEN_OPTIMIZERS, ids=class_name)
def test_it_is_the_loop_of_every_tutorial(algorithm: type[torch.optim.Optimizer], scheduled: bool) -> None:
    settings, model = TEN_OPTIMIZERS[algorithm], net()

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    with default_dtype(DOUBLE):
        described = bilevel.GradientDescent(
            inner, outer, model, bilevel.optimizer(algorithm, schedule=schedule if scheduled else None, **settings)
        )
        found = plain(described).solve()
        trained = copy.deepcopy(model)
        optimizer = algorithm(trained.parameters(), **settings)  # pyright: ignore[reportCallIssue]
        train(lambda batch: inner(trained, META, batch), BATCHES, optimizer, schedule(optimizer) if scheduled else None)
    assert torch.equal(found, outer(trained, META, None).detach())
    assert all(p.grad is None for p in model.parameters())


def test_clipping_is_pytorchs() -> None:
    described = bilevel.GradientDescent(
        inner, outer, net(), bilevel.optimizer(torch.optim.SGD, lr=0.5, clip_norm=0.1, clip_value=0.05)
    )
    trained = net()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    for batch in BATCHES:
        optimizer.zero_grad()
        inner(trained, META, batch).backward()
        nn.utils.clip_grad_value_(trained.parameters(), 0.05)
        nn.utils.clip_grad_norm_(trained.parameters(), 0.1)
        optimizer.step()
    assert torch.equal(plain(described).solve(), outer(trained, META, None).detach())


def test_rates_of_parameters_and_rates_from_meta() -> None:
    def described(rate: Any, **more: Any) -> bilevel.GradientDescent:
        return bilevel.GradientDescent(inner, outer, net(), bilevel.optimizer(torch.optim.SGD, lr=rate, **more))

    rates = [0.1, 0.2, 0.3, 0.4]
    trained = net()
    groups = [{"params": [p], "lr": rate} for p, rate in zip(trained.parameters(), rates, strict=True)]
    train(lambda batch: inner(trained, META, batch), BATCHES, torch.optim.SGD(groups))
    expected = outer(trained, META, None).detach()
    names = [name for name, _ in trained.named_parameters()]
    for rate in (rates, dict(zip(names, rates, strict=True)), lambda meta: [r * meta[0] * 2 for r in rates]):
        torch.testing.assert_close(plain(described(rate)).solve(), expected)


def test_the_same_parameters_in_params_and_meta_start_at_meta() -> None:
    model = net()
    described = bilevel.GradientDescent(
        lambda model, meta, batch: (model(X).squeeze(1) - Y).square().mean(),
        lambda model, meta, batch: outer(model, META, batch),
        model,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    loop = plain(described, meta=model)
    moved = [2 * p.detach() for p in model.parameters()]
    started = loop.start(moved)
    assert all(torch.equal(a, b) for a, b in zip(started.tensors, moved, strict=True))


def test_what_cannot_be_copied_is_said() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    with pytest.raises(NoPlainLoopError, match="cannot be deep-copied"):
        plain_copy(Stubborn(2, 1), trained=True)


def test_ties_hooks_and_frozen_tensors_are_copied() -> None:
    shared = nn.Parameter(torch.ones(2))
    shared.register_hook(lambda gradient: 3 * gradient)
    tree = {
        "a": shared,
        "b": shared,
        "frozen": nn.Parameter(torch.ones(1), requires_grad=False),
        "plain": torch.ones(1),
    }
    copied = plain_copy(tree, trained=True)
    assert copied.value["a"] is copied.value["b"]
    assert copied.value["a"] is not shared
    assert copied.names == ["a"], "the others are constants"
    (copied.value["a"] * copied.value["plain"]).sum().backward()
    assert copied.value["a"].grad.tolist() == [3.0, 3.0]


# -- double precision --------------------------------------------------------------------------------------------------


def drawn(function: Callable[[], Tensor], double: bool) -> Tensor:
    with randomness.seeded(0, randomness.STEP):
        if not double:
            return function()
        with InDouble(torch.float32):
            return function()


ONES = torch.ones(50)
DRAWS: dict[str, Callable[[], Tensor]] = {
    "randn": lambda: torch.randn(50),
    "rand": lambda: torch.rand(50),
    "randn_like": lambda: torch.randn_like(ONES * 1),
    "rand_like": lambda: torch.rand_like(ONES * 1),
    "normal_": lambda: (ONES * 1).normal_(),
    "uniform_": lambda: (ONES * 1).uniform_(-1, 1),
    "dropout": lambda: functional.dropout(ONES * 1, 0.4),
    "bernoulli": lambda: torch.bernoulli(0.3 * ONES),
    "permutation": lambda: torch.randperm(50).float(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_those_of_the_users_dtype(name: str) -> None:
    plainly, in_double = drawn(DRAWS[name], False), drawn(DRAWS[name], True)
    assert in_double.dtype == DOUBLE
    torch.testing.assert_close(in_double, plainly.double(), rtol=1e-6, atol=0.0)


def with_lstm(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return nn.LSTM(3, 2).double()(x)[0]


def into_buffer(x: Tensor) -> Tensor:
    out = torch.zeros(4, 3)
    out[1:] = x[1:]
    return out.add_(1.0)


COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "float32 in a closure": lambda x: x * torch.ones(3),
    "float()": lambda x: x.float() / 3,
    "to(dtype)": lambda x: x.to(torch.bfloat16) / 3,
    "a dtype as an argument": lambda x: functional.softmax(x, 1, dtype=torch.float32),
    "a factory": lambda x: torch.full((4, 3), 1 / 3) * x,
    "a write into a new tensor": into_buffer,
    "a layer that compares dtypes": with_lstm,
    "an argument as a list": lambda x: torch.cat([x, torch.ones(1, 3)]) / 3,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_everything_is_computed_in_float64(name: str) -> None:
    x = X.clone()
    with InDouble(torch.float32):
        found = COMPUTED[name](x)
        exact = COMPUTED[name](x.double())
    assert found.dtype == DOUBLE
    assert torch.equal(found, exact)
    assert (found - found.float().double()).abs().max() > 0, "more digits than float32 has"


def test_a_problem_in_double_is_the_same_problem() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    x, y, meta = X.float(), Y.float(), META.float()
    described = bilevel.GradientDescent(
        lambda model, meta, batch: (meta * (model(x).squeeze(1) - y).square()).mean(),
        lambda model, meta, batch: (model(-x).squeeze(1) - y).square().mean(),
        model,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    run = unroll(described, meta, 4, None, 0)
    there = unroll(problem_in_double(run.problem, torch.float32), as_double(run.meta), 4, None, 0)
    assert isinstance(there, Unroll)
    value, state = there.value()
    assert lowest_dtype(state) == DOUBLE
    assert value.dtype == DOUBLE
    torch.testing.assert_close(value, run.value()[0].double(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(PlainLoop(run, meta, torch.float32).solve(), value, rtol=1e-12, atol=0.0)
    rough, fine = (bilevel.Reverse()(r.problem, r.meta, 4).grad for r in (run, there))
    torch.testing.assert_close(fine, rough.double(), rtol=1e-4, atol=1e-7)
