"""The arguments of an estimator's call: good ones are taken, and bad ones refused with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bad_input_cases import (
    BY_DEFINITION,
    ESTIMATORS,
    EVERY,
    IMPLICIT,
    INF,
    NAN,
    RATE,
    Row,
    call,
    descent,
    quadratic,
    refused,
    table,
)
from torch import Tensor, nn

import bilevel
from bilevel.errors import NonFiniteError


@pytest.mark.parametrize("name", EVERY)
def test_the_call_that_the_tables_spoil_is_good(name: str) -> None:
    estimate = call(name)
    # θ_T = φ + (1 − η)³ (θ_0 − φ). H = I, so implicit methods give 1, and so does HessianFree(scale=1).
    exact = 1 - (1 - RATE) ** 3
    factor = {"truncated-reverse": RATE, "hessian-free-optimizer": RATE, **dict.fromkeys(IMPLICIT[:3], 1.0)}.get(
        name, exact
    )
    if not (ESTIMATORS[name].is_random or name in BY_DEFINITION):  # random ones see one direction of the two
        torch.testing.assert_close(estimate.grad, factor * torch.tensor([1.0, 2.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(estimate.value, torch.tensor((1 - exact) * 5.0 + exact * -0.5))


class EmptyModule(nn.Module):
    """Without parameters."""


class Loader:
    """A length, and nothing but iteration."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Streamed(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def meta_row(what: str, meta: Any, exception: type[Exception], *fragments: str) -> Row:
    return Row(what, lambda name: ESTIMATORS[name](descent(), meta(), bilevel.no_batches(3)), exception, [*fragments])


def batches_row(what: str, batches: Any, exception: type[Exception], *fragments: str) -> Row:
    return Row(what, lambda name: call(name, inner_batches=batches()), exception, [*fragments])


def seed_row(seed: Any) -> Row:
    fragments = [f"seed={seed!r}", "a whole number of at least 0"]
    return Row(f"seed {seed!r}", lambda name: call(name, seed=seed), ValueError, fragments)


ARGUMENTS = [
    meta_row("meta None", lambda: None, ValueError, "meta is None", "a floating-point tensor"),
    meta_row("meta an empty dict", dict, ValueError, "meta is {}", "nn.Module"),
    meta_row("meta an empty tensor", lambda: torch.zeros(0, 3), ValueError, "size=(0, 3)", "without a single number"),
    meta_row("meta a module without parameters", EmptyModule, ValueError, "EmptyModule", "requires_grad=True"),
    meta_row("meta a number", lambda: 5, TypeError, "meta is 5 (int)", "write 1.0 instead of 1"),
    meta_row("meta an array", lambda: np.ones(2, int), TypeError, "meta is array([1, 1]) (ndarray)", ".astype(float)"),
    meta_row(
        "meta with a number", lambda: {"w": torch.ones(2), "lr": 1}, TypeError, "meta['lr'] is 1 (int)", "write 1.0"
    ),
    meta_row("meta with a word", lambda: [torch.ones(2), "lr"], TypeError, "meta[1] is 'lr' (str)", "leave everything"),
    meta_row("meta whole numbers", lambda: torch.ones(2).long(), TypeError, "meta has dtype torch.int64", ".float()"),
    meta_row("meta booleans", lambda: {"m": torch.ones(2).bool()}, TypeError, "meta['m'] has dtype torch.bool"),
    meta_row("meta complex", lambda: torch.ones(2) * 1j, TypeError, "torch.complex128", "torch.view_as_real"),
    meta_row("meta without values", lambda: torch.ones(2, device="meta"), ValueError, "on the meta device", "cpu"),
    meta_row("meta a generator", lambda: nn.Linear(2, 2).parameters(), TypeError, "(generator)", "tensors"),
    meta_row(
        "meta with NaN",
        lambda: {"a": torch.ones(2), "b": torch.tensor([1.0, NAN])},
        NonFiniteError,
        "meta['b'] holds NaN",
        "no hypergradient can be computed there",
        "outer learning rate",
    ),
    meta_row("meta infinite", lambda: torch.tensor(INF), NonFiniteError, "meta holds NaN or infinity"),
    batches_row("batches a generator", lambda: (b for b in range(3)), TypeError, "(generator)", "list(...)"),
    batches_row("batches a function", lambda: lambda t: t, TypeError, "is a function", "bilevel.batches(function"),
    batches_row("batches empty", list, ValueError, "is empty", "the whole number T"),
    batches_row("batches None", lambda: None, TypeError, "inner_batches is None", "the whole number T"),
    batches_row("batches a fraction", lambda: 3.0, TypeError, "inner_batches is 3.0 (float)", "the whole number T"),
    batches_row("batches too few", lambda: 0, ValueError, "inner_batches=0: a whole number of at least 1"),
    batches_row("batches one batch", lambda: {"x": torch.ones(3)}, TypeError, "is a dict", "one batch", "[batch] * T"),
    batches_row("batches a tensor of no dimension", lambda: torch.tensor(1.0), TypeError, "(Tensor)", "a list"),
    batches_row("batches a loader", Loader, TypeError, "(Loader)", "list(...)"),
    batches_row("batches a stream", Streamed, TypeError, "(Streamed)", "list(...)"),
    batches_row("batches a DataLoader", lambda: torch.utils.data.DataLoader([1, 2, 3]), TypeError, "(DataLoader)"),  # type: ignore[arg-type]
    batches_row("batches a set", lambda: {1, 2}, TypeError, "(set)", "random access"),
    *[seed_row(seed) for seed in (-1, 1.5, True, "0", None)],
    Row("problem None", lambda name: ESTIMATORS[name](None, torch.ones(2)), TypeError, ["NoneType", "bilevel.Problem"]),  # type: ignore[arg-type]
    Row("problem a class", lambda name: call(name, bilevel.GradientDescent), TypeError, ["the class GradientDescent"]),
    Row("problem a module", lambda name: call(name, nn.Linear(2, 2)), TypeError, ["a Linear", "an instance of"]),
    Row(
        "arguments swapped",
        lambda name: ESTIMATORS[name](torch.ones(2), descent(), bilevel.no_batches(3)),  # type: ignore[arg-type]
        TypeError,
        ["problem is a Tensor", "estimator(problem, meta, inner_batches, outer_batch)"],
    ),
]


@table(ARGUMENTS)
def test_arguments_of_the_call(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode_is_refused_and_no_grad_is_not(name: str) -> None:
    with torch.inference_mode():
        refused(RuntimeError, "torch.inference_mode()", "outside of it", by=lambda: call(name))
    with torch.no_grad():
        silent = call(name)
    assert torch.equal(silent.grad, call(name).grad)


class Numbers(torch.utils.data.Dataset[float]):
    """A map-style dataset."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> float:
        return [1.0, 2.0, 3.0][index]


@pytest.mark.parametrize("name", EVERY)
def test_batches_of_every_good_kind(name: str) -> None:
    def weighted(theta: Any, phi: Any, batch: Any) -> Tensor:
        return batch * quadratic(theta, phi, batch)

    def grad(batches: Any, seed: Any = 0) -> Tensor:
        return call(name, descent(weighted), inner_batches=batches, seed=seed).grad

    expected = grad([1.0, 2.0, 3.0])
    good = [
        (1.0, 2.0, 3.0),
        range(1, 4),
        np.array([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0]),
        Numbers(),
        bilevel.batches(lambda t: t + 1.0, steps=3),
        bilevel.batches(lambda t: t + 1.0, steps=np.int64(3)),  # type: ignore[arg-type]
    ]
    for batches in good:
        torch.testing.assert_close(grad(batches), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad([1.0, 2.0, 3.0], seed=np.int64(0)), expected, rtol=1e-12, atol=0)
