"""The truth to compare with: ordinary PyTorch training, and differences of its result. Nothing of `bilevel` is used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]

TEN_OPTIMIZERS: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"lr": 0.1, "momentum": 0.9},
    torch.optim.Adam: {"lr": 0.01},
    torch.optim.AdamW: {"lr": 0.01, "weight_decay": 0.1},
    torch.optim.RMSprop: {"lr": 0.01},
    torch.optim.Adagrad: {"lr": 0.05},
    torch.optim.NAdam: {"lr": 0.01},
    torch.optim.RAdam: {"lr": 0.01},  # plain momentum up to the fifth step
    torch.optim.Adadelta: {"lr": 1.0},
    torch.optim.Adamax: {"lr": 0.01},
    torch.optim.ASGD: {"lr": 0.1},
}
"""Every class with a derivative, at settings with which it moves in a few steps."""


def class_name(value: Any) -> str:
    """For the names of tests."""
    return value.__name__ if isinstance(value, type) else ""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default dtype; NAdam and ASGD keep numbers in it, whatever the dtype of the parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(
    loss: Callable[[Any], Tensor],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
) -> None:
    """The loop of every PyTorch tutorial."""
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def trained_tensors(
    loss: Callable[[list[Tensor], Any, Any], Tensor],
    start: Sequence[Tensor],
    meta: Any,
    batches: Iterable[Any],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    schedule: Schedule | None = None,
) -> list[Tensor]:
    """Copies of `start`, trained on `loss(params, meta, batch)`."""
    params = [p.detach().clone().requires_grad_() for p in start]
    bound = optimizer(params)
    train(lambda batch: loss(params, meta, batch), batches, bound, None if schedule is None else schedule(bound))
    return [p.detach() for p in params]


def trained_module(
    loss: Callable[[nn.Module, Any, Any], Tensor],
    module: nn.Module,
    meta: Any,
    batches: Iterable[Any],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> nn.Module:
    """A copy of the module, trained on `loss(module, meta, batch)`."""
    trained = copy.deepcopy(module)
    train(lambda batch: loss(trained, meta, batch), batches, optimizer(list(trained.parameters())))
    return trained


def central_difference(h: Callable[[Tensor], float], at: Tensor, direction: Tensor, offset: float) -> float:
    """dh/ds of h(at + s·direction) at s = 0, by the five-point formula: off by O(offset⁴) and rounding(h)/offset."""

    def pair(s: float) -> float:
        return h(at + s * direction) - h(at - s * direction)

    return (8 * pair(offset) - pair(2 * offset)) / (12 * offset)


def numerical_gradient(h: Callable[[Tensor], float], at: Tensor, offset: float = 1e-5) -> Tensor:
    """All partial derivatives by `central_difference`."""
    unit_vectors = torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)
    return torch.tensor([central_difference(h, at, v, offset) for v in unit_vectors], dtype=at.dtype).reshape(at.shape)
