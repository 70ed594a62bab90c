"""Parameters joined into buckets: the same numbers in the same places, and only for optimisers that allow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.optim.buckets import Buckets


def some_tensors() -> list[Tensor]:
    shapes = [(2, 3), (), (4,), (5, 1), (0,), (3,)]
    kinds = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float64, torch.float64]
    return [torch.randn(shape).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]


@pytest.mark.parametrize(
    ("limit", "members"),
    [
        (0, ((0,), (1,), (2,), (3,), (4,), (5,))),
        (4, ((0,), (1, 4, 5), (2,), (3,))),
        (10, ((0, 2), (1, 4, 5), (3,))),
        (100, ((0, 2, 3), (1, 4, 5))),
    ],
)
def test_every_tensor_comes_back_to_its_place(limit: int, members: Any) -> None:
    tensors = some_tensors()
    buckets = Buckets.of(tensors, limit)
    assert sorted(buckets.members) == sorted(members)
    back = buckets.parted(buckets.joined(tensors))
    for i, before in enumerate(tensors):
        after = back[i]
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


@pytest.mark.parametrize("limit", [0, 100])
def test_fresh_buckets_are_copies(limit: int) -> None:
    tensors = [torch.zeros(2), torch.zeros(3)]
    buckets = Buckets.of(tensors, limit)
    for joined in buckets.joined(tensors, fresh=True):
        joined += 1
    assert not any(tensor.any() for tensor in tensors)


class Normalised(torch.optim.SGD):
    """Divides the gradient of every parameter by its own norm, so parameters must not be joined."""

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad / p.grad.norm(), alpha=-group["lr"])


def test_an_optimizer_of_the_users_sees_every_parameter_by_itself() -> None:
    params = [torch.tensor([3.0, 4.0]), torch.tensor([12.0, 5.0])]
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: meta * sum(t.square().sum() for t in theta) / 2,
        lambda theta, meta, batch: sum((t.sum() for t in theta), torch.tensor(0.0)),
        params,
        bilevel.optimizer(Normalised, lr=1.0),
    )
    state = problem.step(problem.init(torch.tensor(1.0)), torch.tensor(1.0), None)
    for before, after in zip(params, state.params, strict=True):
        torch.testing.assert_close(after, before - before / before.norm())


def test_large_and_small_parameters_and_two_dtypes_in_one_problem() -> None:
    """The joined update is that of PyTorch's optimiser over all of them."""
    torch.manual_seed(0)
    params = [torch.randn(40_000), torch.randn(3, 2), torch.randn(2, dtype=torch.float64), torch.randn(5)]
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: sum((t.double() ** 4).sum() for t in theta) * meta,
        lambda theta, meta, batch: sum(t.double().sum() for t in theta),  # type: ignore[return-value]
        params,
        bilevel.optimizer(torch.optim.Adam, lr=0.1),
    )
    meta = torch.tensor(1.0, dtype=torch.float64)
    state = problem.init(meta)
    plain = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adam(plain, lr=0.1)
    for _ in range(3):
        state = problem.step(state, meta, None)
        optimizer.zero_grad()
        sum((t.double() ** 4).sum() for t in plain).backward()  # type: ignore[union-attr]
        optimizer.step()
    for ours, theirs in zip(state.params, plain, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
