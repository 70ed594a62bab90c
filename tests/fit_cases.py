"""Outer loops with known answers, and readers of what a run leaves on disk."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fit_settings import grouped
from torch import Tensor
from torch.optim import lr_scheduler

import bilevel
from bilevel import (
    FitResult,
    ForwardGradient,
    Phase,
    Problem,
    Reverse,
    TruncatedReverse,
    ZerothOrder,
    fit,
    no_batches,
)
from bilevel.optim.update_rule import Optimizer
from bilevel.training import (
    checkpoint_files,
    metrics,
    run_record,
)

FLOAT = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=FLOAT)


#
# Descent with rate η on ½ Σ a (θ − φ)² from θ = 0 ends, after T steps, at θ_T = s φ with s = 1 − (1 − ηa)^T. So with
# the outer loss ½ Σ (θ − target)² the hypergradient is s (s φ − target), and it vanishes at φ* = target / s.

CURVATURE = tensor(0.5, 1.0, 2.0)
TARGET = tensor(1.0, -2.0, 0.5)
INNER_RATE, INNER_STEPS = 0.3, 3
SHRINKAGE = 1 - (1 - INNER_RATE * CURVATURE) ** INNER_STEPS
START = tensor(3.0, 0.5, -1.0)


def inner_step(theta: Tensor, phi: Tensor, batch: Tensor | None) -> Tensor:
    shift = 0.0 if batch is None else batch
    return theta - INNER_RATE * CURVATURE * (theta - phi - shift)


def outer_loss(theta: Tensor, _: Any, batch: Tensor | None) -> Tensor:
    shift = 0.0 if batch is None else batch
    return 0.5 * ((theta - TARGET - shift) ** 2).sum()


QUADRATIC = Problem(init=torch.zeros_like, step=inner_step, outer_loss=outer_loss)
BATCHES = no_batches(INNER_STEPS)


def hypergradient(phi: Tensor) -> Tensor:
    return SHRINKAGE * (SHRINKAGE * phi - TARGET)


def exact(steps: int, **changes: Any) -> list[Phase]:
    return [Phase(Reverse("graph"), steps, **changes)]


def train(phases: Sequence[Phase], meta: Any = START, problem: Any = QUADRATIC, **changes: Any) -> FitResult:
    settings: dict[str, Any] = {
        "inner_batches": BATCHES,
        "optimizer": bilevel.optimizer(torch.optim.SGD, lr=0.5),
        "progress": False,
    }
    return fit(problem, meta, phases=phases, **grouped({**settings, **changes}))


def without_seconds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, by a parser that takes nothing beyond the standard of JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    text = (folder / metrics.FILE).read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return checkpoint_files.load(folder / run_record.CHECKPOINT)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def noisy_inner_batches(draw: int) -> list[Tensor]:
    """Other batches at every draw."""
    generator = torch.Generator().manual_seed(draw)
    return [0.1 * torch.randn(3, dtype=FLOAT, generator=generator) for _ in range(INNER_STEPS)]


def noisy_outer_batch(draw: int) -> Tensor:
    return 0.1 * torch.randn(3, dtype=FLOAT, generator=torch.Generator().manual_seed(10_000 + draw))


Optimizers = dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Any]]


OPTIMIZERS: Optimizers = {
    "SGD": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.1}, None),
    "Adam": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}, None),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}, None),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}, None),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}, None),
    "NAdam": (torch.optim.NAdam, {"lr": 0.1}, None),
    "RAdam": (torch.optim.RAdam, {"lr": 0.1}, None),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}, None),
    "Adamax": (torch.optim.Adamax, {"lr": 0.1}, None),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "t0": 2.0}, None),
    "Rprop": (torch.optim.Rprop, {"lr": 0.1}, None),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.1}, None),
}


SCHEDULES: Optimizers = {
    name: (torch.optim.Adam, {"lr": 0.1}, schedule)
    for name, schedule in {
        "cosine": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=7),
        "steps": functools.partial(lr_scheduler.MultiStepLR, milestones=[2, 5], gamma=0.5),
        "function": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k)),
        "one cycle": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=20),
        "cyclic": functools.partial(
            lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False
        ),
        "warm restarts": functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
        "warm-up, then": lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            milestones=[3],
        ),
        "product": lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        ),
    }.items()
}


ALL_OPTIMIZERS = {**OPTIMIZERS, **SCHEDULES}


def outer_optimizer(name: str) -> Optimizer:
    algorithm, settings, schedule = ALL_OPTIMIZERS[name]
    return bilevel.optimizer(algorithm, schedule=schedule, **settings)


TWO_PHASES = [Phase(TruncatedReverse(2), steps=3), Phase(ForwardGradient(directions=2), steps=4, accumulate=3)]


def train_noisily(phases: Sequence[Phase] = TWO_PHASES, name: str = "Adam", **changes: Any) -> FitResult:
    batches = {"inner_batches": noisy_inner_batches, "outer_batch": noisy_outer_batch}
    return train(phases, **{**batches, "optimizer": outer_optimizer(name), **changes})


def phases_of(result: FitResult) -> list[int]:
    return [row["phase"] for row in result.history]


# The first phase ends by its patience, after 4 of its 9 steps; the second is stochastic and accumulates.
LONG_RUN = [
    Phase(TruncatedReverse(2), steps=9, patience=2, min_improvement=0.05),
    Phase(ZerothOrder(directions=2), steps=4, accumulate=2),
]


FIRST_PHASE, STEPS = 4, 8


BEFORE_CLAMPING: list[Callable[[Tensor], Any]] = []
"""What else a test wants to happen in `clamped`, which is the projection of `long_run` and must stay the same."""


def clamped(phi: Tensor) -> Tensor:
    for function in BEFORE_CLAMPING:
        function(phi)
    return phi.clamp(-2, 2)


def long_run(**changes: Any) -> FitResult:
    """A run with everything in it that has a state."""
    settings: dict[str, Any] = {"project": clamped, "checkpoint_every": 3, "name": "cosine"}
    return train_noisily(LONG_RUN, **{**settings, **changes})


@functools.cache
def undisturbed() -> FitResult:
    return long_run()


def assert_as_undisturbed(result: FitResult, folder: Path) -> None:
    expected = undisturbed()
    assert torch.equal(result.meta, expected.meta)
    assert without_seconds(result.history) == without_seconds(expected.history)
    assert lines_of(folder) == result.history
    seconds = [row["seconds"] for row in result.history]
    assert seconds == sorted(seconds)
    stored = checkpoint_of(folder)
    assert torch.equal(stored["meta"][0], expected.meta)
    assert stored["counters"]["outer_step"] == STEPS
    others = {"tensorboard", run_record.PREVIOUS}
    assert {p.name for p in folder.iterdir()} - others == {metrics.FILE, run_record.CHECKPOINT}


class Interruption:
    """Stands in for a function of a run, and raises at one of its calls."""

    def __init__(self, error: BaseException, at: int, function: Callable[..., Any] = lambda step: None) -> None:
        self.error, self.left, self.function = error, at, function

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.function(*arguments)
