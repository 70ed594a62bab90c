"""The outer loop: against closed forms, against a loop written out by hand to the last bit, and against itself
interrupted wherever that is possible.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from fit_settings import grouped
from torch import Tensor, nn
from torch.optim import lr_scheduler

import bilevel
from bilevel import (
    BlackBox,
    Estimate,
    Estimator,
    FitResult,
    ForwardGradient,
    GradientDescent,
    Phase,
    Problem,
    Reverse,
    TruncatedReverse,
    ZerothOrder,
    fit,
    no_batches,
    randomness,
    trees,
)
from bilevel.errors import CheckpointError, NonFiniteError
from bilevel.optim.update_rule import Optimizer
from bilevel.report import files
from bilevel.training import (
    accumulation,
    checkpoint_files,
    metrics,
    outer_loop,
    outer_state,
    phases,
    run_record,
    running_mean,
)
from bilevel.training import fit as fit_module
from bilevel.training.outer_loop import OuterStep
from bilevel.unrolling.unroll import Unroll

FLOAT = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=FLOAT)


# -- a problem with a closed form ----------------------------------------------------------------------------------
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


# -- against the closed form ---------------------------------------------------------------------------------------


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


# -- against a loop written out by hand, to the last bit -----------------------------------------------------------


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


@dataclass
class ByHand:
    """An outer loop as one would write it down without this library's."""

    name: str
    seed: int = 0
    project: Callable[[Tensor], Tensor] | None = None

    def run(self, phases: Sequence[Phase]) -> tuple[Tensor, list[dict[str, Any]]]:
        algorithm, settings, schedule = ALL_OPTIMIZERS[self.name]
        parameter = nn.Parameter(START.clone())
        optimizer = algorithm([parameter], **settings)  # pyright: ignore[reportCallIssue]
        scheduler = schedule(optimizer) if schedule else None
        draw, rows = 0, []
        for number, phase in enumerate(phases):
            for _ in range(phase.steps):
                estimates = []
                for k in range(phase.accumulate):
                    seed = randomness.derive(self.seed, randomness.DRAW, len(rows), k)
                    batches = noisy_inner_batches(draw), noisy_outer_batch(draw)
                    estimates.append(phase.estimator(QUADRATIC, parameter.detach(), *batches, seed))
                    draw += 1
                total, loss, squared_errors = torch.zeros_like(START), 0.0, 0.0
                for estimate in estimates:
                    total = total + estimate.grad
                    loss += estimate.value.item()
                    squared_errors += (estimate.standard_error or 0.0) ** 2
                count = len(estimates)
                parameter.grad = total / count
                optimizer.step()
                if self.project is not None:
                    parameter.data.copy_(self.project(parameter.detach()))
                if scheduler is not None:
                    scheduler.step()
                stochastic = isinstance(phase.estimator, ForwardGradient)
                row = {"outer_step": len(rows), "phase": number, "outer_loss": loss / count}
                row["grad_norm"] = (total / count).square().sum().sqrt().item()
                row["standard_error"] = squared_errors**0.5 / count if stochastic else None
                squared, error = (total / count).square().sum().item(), row["standard_error"]
                row["signal_to_noise"] = max(squared - error**2, 0.0) ** 0.5 / error if error else None
                rows.append(row)
        return parameter.detach(), rows


def train_noisily(phases: Sequence[Phase] = TWO_PHASES, name: str = "Adam", **changes: Any) -> FitResult:
    batches = {"inner_batches": noisy_inner_batches, "outer_batch": noisy_outer_batch}
    return train(phases, **{**batches, "optimizer": outer_optimizer(name), **changes})


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_every_update_is_that_of_a_loop_written_out(name: str) -> None:
    """Which includes: seeds and batches of each draw, means, pooled standard errors, one outer optimiser for all."""
    expected, rows = ByHand(name, seed=7).run(TWO_PHASES)
    result = train_noisily(name=name, seed=7)
    assert torch.equal(result.meta, expected)
    assert without_seconds(result.history) == rows
    assert not torch.equal(result.meta, train_noisily(name=name, seed=8).meta)


def test_project_is_applied_after_each_step() -> None:
    def project(phi: Tensor) -> Tensor:
        return phi.clamp(-0.5, 0.5)

    expected, _ = ByHand("Adam", project=project).run(TWO_PHASES)
    seen: list[Tensor] = []
    result = train_noisily(project=project, callbacks=[lambda step: seen.append(step.meta)])
    assert torch.equal(result.meta, expected)
    assert all(phi.abs().max() <= 0.5 for phi in seen)
    assert torch.equal(train_noisily(project=lambda phi: phi.clamp_(-0.5, 0.5)).meta, expected)  # in place will do


def test_batches_may_be_fixed() -> None:
    inner, outer = noisy_inner_batches(3), noisy_outer_batch(3)
    fixed = train_noisily(inner_batches=inner, outer_batch=outer)
    as_functions = train_noisily(inner_batches=lambda draw: inner, outer_batch=lambda draw: outer)
    assert torch.equal(fixed.meta, as_functions.meta)
    assert not torch.equal(fixed.meta, train_noisily().meta)


def test_draws_are_numbered_without_gaps_over_steps_and_phases() -> None:
    inner: list[int] = []
    outer: list[int] = []

    def note(numbers: list[int], batches: Callable[[int], Any]) -> Callable[[int], Any]:
        return lambda draw: (numbers.append(draw), batches(draw))[1]

    train_noisily(inner_batches=note(inner, noisy_inner_batches), outer_batch=note(outer, noisy_outer_batch))
    assert inner == outer == list(range(3 + 4 * 3))


def test_accumulation_averages_away_the_variance() -> None:
    """The pooled standard error is what theory says: of n estimates with b directions as of one with n·b."""
    wide = Problem(
        init=lambda phi: torch.zeros((), dtype=FLOAT),
        step=lambda state, phi, batch: phi.sum(),
        outer_loss=lambda state, phi, batch: state,
    )
    size = 50
    meta = torch.zeros(size, dtype=FLOAT)
    (row,) = train([Phase(ForwardGradient(4), 1, accumulate=25)], meta, wide, inner_batches=no_batches(1)).history
    # ∇h is all ones: w = Σ v has E w² = N, and the relative variance of 100 directions is (N − 1)/100. The mean of
    # w² over them has a relative standard deviation of √2/10 (w is close to normal), so its root half of that.
    theory = (size * (size - 1) / 100) ** 0.5
    assert row["standard_error"] == pytest.approx(theory, rel=4 * 2**0.5 / 20)
    # And the error itself: ‖ĝ‖² = ‖∇h‖² + ‖error‖² + 2⟨∇h, error⟩, where ‖∇h‖² = N.
    assert row["grad_norm"] ** 2 == pytest.approx(size + theory**2, rel=0.5)


def test_of_accumulated_estimates_one_at_a_time_is_kept() -> None:
    class Token:
        """Lives as long as the state that it is in."""

    tokens: list[weakref.ref[Token]] = []
    alive: list[int] = []

    def solve(phi: Tensor) -> Any:
        token = Token()
        tokens.append(weakref.ref(token))
        return {"state": 2 * phi, "token": token}

    def outer(state: Any, *_: Any) -> Tensor:
        alive.append(sum(token() is not None for token in tokens))
        return (state["state"] ** 2).sum()

    phases = [Phase(ZerothOrder(1, scheme="forward"), 1, accumulate=6)]
    train(phases, tensor(1.0), BlackBox(solve, outer), inner_batches=None)
    assert len(alive) == 12
    assert max(alive) <= 3  # the last estimate's, the one of this, and the one that this is compared with


# -- phases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scripted(Estimator):
    """An estimator whose outer losses are prescribed, draw by draw; its gradient is all ones."""

    losses: tuple[float, ...]
    is_random = False

    def units(self, steps: int, meta_size: int) -> float:
        raise NotImplementedError

    def _estimate(self, run: Unroll) -> Estimate:
        ones = trees.map_leaves(torch.ones_like, run.meta)
        return Estimate(tensor(self.losses[run.outer_batch])[0], ones, run.start())


def phases_of(result: FitResult) -> list[int]:
    return [row["phase"] for row in result.history]


def train_scripted(phases: Sequence[Phase], **changes: Any) -> FitResult:
    return train(phases, outer_batch=lambda draw: draw, **changes)


def test_phases_switch_at_the_step_count() -> None:
    result = train([Phase(Reverse(), 3), Phase(TruncatedReverse(1), 1), Phase(Reverse(), 2)])
    assert phases_of(result) == [0, 0, 0, 1, 2, 2]


# (losses, patience, least improvement, steps until the phase ends)
PATIENCE: dict[str, tuple[tuple[float, ...], int, float, int]] = {
    "always better": ((9, 8, 7, 6, 5, 4, 3, 2), 1, 0.0, 8),
    "stalls at once": ((5, 5, 4, 3, 2, 1, 0, 0), 1, 0.0, 2),
    "equal is no improvement": ((5, 4, 4, 4, 3, 2, 1, 0), 2, 0.0, 4),
    "an improvement starts the count again": ((5, 6, 4, 5, 5, 5, 9, 9), 3, 0.0, 6),
    "measured from the best, not from the last": ((5, 9, 8, 7, 6, 1, 1, 1), 3, 0.0, 4),
    "too small an improvement": ((100, 95, 89, 85, 82, 81, 79, 70), 2, 0.1, 5),
    "exactly the least improvement is too small": ((64, 48, 36, 27, 1, 1, 1, 1), 1, 0.25, 2),
    "relative to the size of a negative loss": ((-10, -10.5, -10.9, -12, -12.5, -13, -14, -14), 2, 0.1, 3),
    "a negative loss that improves": ((-10, -12, -14, -16, -18, -20, -23, -26), 1, 0.1, 8),
    "never within the steps": ((5, 5, 5, 5, 5, 5, 5, 5), 8, 0.0, 8),
    "at the very last step": ((5, 5, 5, 5, 5, 5, 5, 5), 7, 0.0, 8),
}


@pytest.mark.parametrize("name", PATIENCE)
def test_phases_switch_when_progress_stalls(name: str) -> None:
    losses, patience, min_improvement, expected = PATIENCE[name]
    after = tuple(float(i) for i in range(3))
    estimator = Scripted(losses[:expected] + after)
    phases = [
        Phase(estimator, 8, patience=patience, min_improvement=min_improvement),
        Phase(estimator, 3),
    ]
    result = train_scripted(phases)
    assert phases_of(result) == [0] * expected + [1] * 3
    assert [row["outer_loss"] for row in result.history] == [float(x) for x in losses[:expected] + after]


def test_each_phase_starts_to_count_anew() -> None:
    """The second starts with a worse loss than the first ended with, and after a count that had begun."""
    estimator = Scripted((1, 2, 2, 9, 8, 7, 7, 7, 5, 5))
    phases = [
        Phase(estimator, 3, patience=3),  # ends by its steps, with two stalled
        Phase(estimator, 9, patience=2),
        Phase(estimator, 2, patience=1),
    ]
    assert phases_of(train_scripted(phases)) == [0] * 3 + [1] * 5 + [2] * 2


def test_patience_goes_by_the_mean_of_accumulated_losses() -> None:
    estimator = Scripted((4, 6, 1, 9, 0, 10, 3, 3))  # means 5, 5, 5, 3
    assert len(train_scripted([Phase(estimator, 4, accumulate=2, patience=2)]).history) == 3


def test_the_outer_optimizer_goes_on_through_a_switch() -> None:
    """With one estimator in all of them, phases make no difference; with Adam's memory lost they would."""
    whole = train(exact(9), optimizer=outer_optimizer("one cycle"))
    parts = train([*exact(4), *exact(2), *exact(3)], optimizer=outer_optimizer("one cycle"))
    assert torch.equal(whole.meta, parts.meta)
    fresh = train(exact(5), train(exact(4), optimizer=outer_optimizer("Adam")).meta, optimizer=outer_optimizer("Adam"))
    assert not torch.equal(fresh.meta, train(exact(9), optimizer=outer_optimizer("Adam")).meta)


# -- meta parameters in all their forms ----------------------------------------------------------------------------


class Shift(nn.Module):
    """A module as meta parameters; `fixed` is not trained."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())
        self.fixed = nn.Parameter(torch.ones(1, dtype=FLOAT), requires_grad=False)

    def forward(self) -> Tensor:
        return self.value * self.fixed


class Parts(nn.Module):
    """Parameters of equal shapes whose names are not in alphabetical order: a mistaken order would go unnoticed."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(value[:1].clone())
        self.m = nn.Parameter(value[1:2].clone())
        self.a = nn.Parameter(value[2:].clone())

    def forward(self) -> Tensor:
        return torch.cat([self.z, self.m, self.a])


# How to build meta parameters from START, how a loss reads φ out of them, and how a result holds it.
FORMS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "tensor": (START.clone, lambda meta: meta),
    "requires grad": (lambda: START.clone().requires_grad_(), lambda meta: meta),
    "dict": (
        lambda: {"b": START[:1].clone(), "a": {"x": START[1].clone(), "y": [START[2:].clone()]}},
        lambda meta: torch.cat([meta["b"], meta["a"]["x"].reshape(1), meta["a"]["y"][0]]),
    ),
    "tuple": (lambda: (START[:2].clone(), START[2:].clone()), torch.cat),
    "module": (lambda: Shift(START), lambda meta: meta()),
    "module of several parameters": (lambda: Parts(START), lambda meta: meta()),
    "tree with a module": (
        lambda: {"net": Shift(START[:2]), "rest": START[2:].clone()},
        lambda meta: torch.cat([meta["net"](), meta["rest"]]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_meta_parameters_in_every_form(form: str, tmp_path: Path) -> None:
    make, read = FORMS[form]
    problem = GradientDescent(
        inner_loss=lambda theta, meta, batch: 0.5 * (CURVATURE * (theta - read(meta)) ** 2).sum(),
        outer_loss=outer_loss,
        params=torch.zeros(3, dtype=FLOAT),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=INNER_RATE),
    )
    meta, seen = make(), []
    before = read(meta).detach().clone()

    def look(step: OuterStep) -> None:
        seen.append(read(step.meta))
        assert torch.equal(read(meta), before)  # what the user holds changes only at the end, and only a module

    adam = {"optimizer": outer_optimizer("Adam")}
    result = train(exact(4), meta, problem, callbacks=[look], out=tmp_path, **adam)
    expected: list[Tensor] = []
    train(exact(4), callbacks=[lambda step: expected.append(step.meta)], **adam)
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(read(result.meta), seen[-1])
    assert not any(t.requires_grad for t in seen)

    if "module" in form:
        module, trained = (meta["net"], result.meta["net"]) if isinstance(meta, dict) else (meta, result.meta)
        assert trained is module
        if isinstance(module, Shift):
            assert torch.equal(module.fixed, torch.ones(1, dtype=FLOAT))
            assert module.value.requires_grad
    else:
        assert torch.equal(read(meta), before)

    again = train(exact(4), make(), problem, out=tmp_path, resume=True, **adam)
    assert torch.equal(read(again.meta), seen[-1])


def test_a_module_is_projected_as_a_callable_view() -> None:
    start = torch.zeros(3, dtype=FLOAT)
    problem = Problem(lambda meta: start, lambda theta, meta, batch: inner_step(theta, meta(), batch), outer_loss)

    def project(view: Any) -> Any:
        assert torch.equal(view(), view.value)
        view.named_tensors["value"].clamp_(max=0.5)
        return view

    result = train(exact(3), Shift(START), problem, project=project)
    assert torch.equal(result.meta.value, train(exact(3), project=lambda phi: phi.clamp(max=0.5)).meta)


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_what_a_callback_sees() -> None:
    steps: list[OuterStep] = []
    result = train([Phase(Reverse(), 2), Phase(ForwardGradient(2), 2, accumulate=2)], callbacks=[steps.append])
    before = START
    assert [step.number for step in steps] == [1, 2, 3, 4]
    for step, row in zip(steps, result.history, strict=True):
        assert step.row == row
        assert row["outer_step"] == step.number - 1
        expected = 0.5 * (SHRINKAGE * before - TARGET).square().sum()  # the loss is judged before the step
        torch.testing.assert_close(step.estimate.value, expected)
        torch.testing.assert_close(step.estimate.state, SHRINKAGE * before)
        if row["phase"] == 0:
            assert torch.equal(step.meta, before - 0.5 * step.estimate.grad)
        before = step.meta
    assert torch.equal(result.meta, before)
    seconds = [row["seconds"] for row in result.history]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_what_callbacks_add_to_a_row_reaches_the_metrics(tmp_path: Path) -> None:
    def add(step: OuterStep) -> None:
        step.row["accuracy"] = 0.1 * step.number
        step.row["undefined"] = float("nan")

    def double(step: OuterStep) -> None:
        step.row["twice"] = 2 * step.row["accuracy"]

    result = train(exact(3), callbacks=[add, double], out=tmp_path, tensorboard=True)
    assert [row["twice"] for row in lines_of(tmp_path)] == [0.2, 0.4, 2 * (0.1 * 3)]
    assert [row["twice"] for row in result.history] == [0.2, 0.4, 2 * (0.1 * 3)]
    assert all(row["undefined"] is None for row in lines_of(tmp_path))


def test_changing_what_a_callback_sees_does_not_change_the_run() -> None:
    result = train(exact(3), callbacks=[lambda step: step.meta.zero_()])
    assert torch.equal(result.meta, train(exact(3)).meta)


def test_tensors_that_a_callback_adds_are_refused(tmp_path: Path) -> None:
    def add(step: OuterStep) -> None:
        if step.number == 3:
            step.row["accuracy"] = torch.tensor(0.5)

    with pytest.raises(TypeError, match=r"write float\(\.\.\.\)"):
        train(exact(4), callbacks=[add], out=tmp_path)
    assert len(lines_of(tmp_path)) == checkpoint_of(tmp_path)["counters"]["outer_step"] == 2


# -- exact resume --------------------------------------------------------------------------------------------------

# The first phase ends by its patience, after 4 of its 9 steps; the second is stochastic and accumulates.
LONG_RUN = [
    Phase(TruncatedReverse(2), steps=9, patience=2, min_improvement=0.05),
    Phase(ZerothOrder(directions=2), steps=4, accumulate=2),
]
FIRST_PHASE, STEPS = 4, 8


def long_run(**changes: Any) -> FitResult:
    """A run with everything in it that has a state."""
    settings: dict[str, Any] = {"project": lambda phi: phi.clamp(-2, 2), "checkpoint_every": 3, "name": "cosine"}
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


def test_the_long_run_has_what_the_tests_below_need(tmp_path: Path) -> None:
    assert phases_of(undisturbed()) == [0] * FIRST_PHASE + [1] * (STEPS - FIRST_PHASE)
    assert LONG_RUN[0].steps > FIRST_PHASE
    assert_as_undisturbed(long_run(out=tmp_path), tmp_path)


class Interruption:
    """Stands in for a function of a run, and raises at one of its calls."""

    def __init__(self, error: BaseException, at: int, function: Callable[..., Any] = lambda step: None) -> None:
        self.error, self.left, self.function = error, at, function

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.function(*arguments)


# Where the interruption strikes: at the start of an estimate, in the update, or when the step is done.
PLACES: dict[str, Callable[[BaseException, int], dict[str, Any]]] = {
    "batches": lambda error, at: {"inner_batches": Interruption(error, at, noisy_inner_batches)},
    "project": lambda error, at: {"project": Interruption(error, at, lambda phi: phi.clamp(-2, 2))},
    "callback": lambda error, at: {"callbacks": [Interruption(error, at)]},
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no space left")], ids=["Ctrl-C", "error"])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_interrupted_anywhere_goes_on_to_the_same_numbers(
    place: str, error: BaseException, tmp_path: Path
) -> None:
    draws = FIRST_PHASE + 2 * (STEPS - FIRST_PHASE)
    for at in range(draws if place == "batches" else STEPS):
        folder = tmp_path / str(at)
        done = at if place != "batches" or at < FIRST_PHASE else FIRST_PHASE + (at - FIRST_PHASE) // 2
        with pytest.raises(type(error)):
            long_run(out=folder, **PLACES[place](error, at))
        if done == 0 and isinstance(error, RuntimeError):
            assert not folder.exists()  # most likely a wrong argument; nothing stays behind
        else:  # nothing that was complete is lost, wherever the last regular checkpoint was
            assert checkpoint_of(folder)["counters"]["outer_step"] == done
        assert_as_undisturbed(long_run(out=folder, resume=True), folder)


def test_a_run_interrupted_at_every_step_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    for _ in range(STEPS - 1):
        with pytest.raises(KeyboardInterrupt):
            long_run(out=tmp_path, resume=True, callbacks=[Interruption(KeyboardInterrupt(), 1)])
    assert checkpoint_of(tmp_path)["counters"]["outer_step"] == STEPS - 1
    assert_as_undisturbed(long_run(out=tmp_path, resume=True), tmp_path)


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_every_optimizer_and_schedule_goes_on_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_noisily(name=name, out=tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 4)])
    result = train_noisily(name=name, out=tmp_path, resume=True)
    expected = train_noisily(name=name)
    assert torch.equal(result.meta, expected.meta)
    assert without_seconds(lines_of(tmp_path)) == without_seconds(expected.history)


SOURCES = {
    str(Path(module.__file__ or ""))
    for module in (
        fit_module,
        outer_loop,
        outer_state,
        accumulation,
        phases,
        running_mean,
        run_record,
        checkpoint_files,
        metrics,
        files,
    )
}


class Tracer:
    """Raises KeyboardInterrupt before the n-th line that is executed in the files under test, as a signal would."""

    def __init__(self, at: float) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> Tracer:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, *_: Any) -> Any:
        return self._line if frame.f_code.co_filename in SOURCES else None

    def _line(self, _: FrameType, event: str, *__: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._line


def lines_executed(run: Callable[[], object]) -> int:
    with Tracer(at=float("inf")) as tracer:
        run()
    return tracer.count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C before close() itself
@pytest.mark.parametrize("resume", [False, True])
def test_ctrl_c_before_any_line_of_the_loop(resume: bool, tmp_path: Path) -> None:
    """Also while a checkpoint or a line of the metrics is written, and while a run is being resumed."""

    def begin(folder: Path) -> None:
        if resume:
            with pytest.raises(RuntimeError):
                long_run(out=folder, callbacks=[Interruption(RuntimeError(), 3)])

    begin(tmp_path / "count")
    total = lines_executed(lambda: long_run(out=tmp_path / "count", resume=resume))
    assert total > 500
    for number, at in enumerate(range(1, total + 1, max(1, total // 20))):
        folder = tmp_path / str(number)
        begin(folder)
        with pytest.raises(KeyboardInterrupt), Tracer(at):
            long_run(out=folder, resume=resume)
        assert_as_undisturbed(long_run(out=folder, resume=True), folder)
    gc.collect()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_ctrl_c_while_a_checkpoint_is_written(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(os, function)
    for at in range(6):
        folder = tmp_path / str(at)
        monkeypatch.setattr(os, function, Interruption(KeyboardInterrupt(), at, original))
        try:
            long_run(out=folder)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, function, original)
            left = {p.name for p in folder.iterdir()}
            assert left <= {metrics.FILE, run_record.CHECKPOINT, run_record.PREVIOUS}
        else:
            assert at >= 3  # as many checkpoints are written
        monkeypatch.setattr(os, function, original)
        assert_as_undisturbed(long_run(out=folder, resume=True), folder)


def run_until_killed(folder: str) -> None:
    """The long run, ended by SIGKILL in the middle of its second checkpoint: as a power cut would do."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace, left = os.replace, 1

    def replace_or_die(source: Any, destination: Any) -> None:
        nonlocal left
        left -= 1
        replace(source, destination) if left >= 0 else die()

    os.replace = replace_or_die
    long_run(out=Path(folder))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL as POSIX has it")
def test_a_killed_process_is_resumed_by_another(tmp_path: Path) -> None:
    program = f"import test_fit; test_fit.run_until_killed({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert checkpoint_of(tmp_path)["counters"]["outer_step"] == 3
    assert len(lines_of(tmp_path)) == 6
    assert any(p.name.startswith(f".{run_record.CHECKPOINT}") for p in tmp_path.iterdir())  # half a checkpoint
    with (tmp_path / metrics.FILE).open("rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 20)  # what the disk had not taken in yet
    assert_as_undisturbed(long_run(out=tmp_path, resume=True), tmp_path)


def test_resuming_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    finished = long_run(out=tmp_path)
    before = contents(tmp_path)

    def never(*_: Any) -> Any:
        raise AssertionError("there is nothing left to do")

    again = long_run(out=tmp_path, resume=True, inner_batches=never, callbacks=[never], project=never)
    assert torch.equal(again.meta, finished.meta)
    assert again.history == finished.history
    assert contents(tmp_path) == before


def test_resuming_without_a_checkpoint_starts_from_scratch(tmp_path: Path) -> None:
    assert_as_undisturbed(long_run(out=tmp_path / "new", resume=True), tmp_path / "new")
    # Killed before its first checkpoint:
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / metrics.FILE).write_text('{"outer_step": 0, "outer_loss": 123}\n{"outer_step": 1, "ou')
    assert_as_undisturbed(long_run(out=killed, resume=True), killed)


def test_the_users_start_does_not_matter_on_resuming(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        long_run(out=tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 5)])
    assert_as_undisturbed(long_run(out=tmp_path, resume=True, meta=START + 1), tmp_path)


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_checkpoints_are_written_every_so_many_steps(every: int, tmp_path: Path) -> None:
    path = tmp_path / run_record.CHECKPOINT
    stored: list[int] = []

    def look(_: OuterStep) -> None:
        stored.append(checkpoint_of(tmp_path)["counters"]["outer_step"] if path.exists() else 0)

    train(exact(7), out=tmp_path, checkpoint_every=every, callbacks=[look])
    assert stored == [k // every * every for k in range(7)]
    assert checkpoint_of(tmp_path)["counters"]["outer_step"] == 7


def test_lines_are_on_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", watched)
    train(exact(2), out=tmp_path)
    assert [name.split(".")[0 if name[0] != "." else 1] for name in synced] == ["metrics", "checkpoint"]


# -- TensorBoard and progress --------------------------------------------------------------------------------------


def test_tensorboard_shows_the_rows_once_also_after_resuming(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for at in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            long_run(out=tmp_path, resume=True, tensorboard=True, callbacks=[Interruption(KeyboardInterrupt(), at)])
    result = long_run(out=tmp_path, resume=True, tensorboard=True)
    assert_as_undisturbed(result, tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "phase",
        "outer_loss",
        "grad_norm",
        "standard_error",
        "signal_to_noise",
        "seconds",
    }
    for name in events.Tags()["scalars"]:
        expected = [(row["outer_step"], row[name]) for row in result.history if row[name] is not None]
        in_float32 = [(step, torch.tensor(value, dtype=torch.float32).item()) for step, value in expected]
        assert [(event.step, event.value) for event in events.Scalars(name)] == in_float32


def test_progress_shows_loss_and_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("bilevel.report.progress._SECONDS_BETWEEN_LINES", 0.0)
    result = long_run(progress=True)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == STEPS
    for line, row in zip(lines, result.history, strict=True):
        assert f"outer loss {row['outer_loss']:.4g}" in line
        assert f"phase {row['phase'] + 1} of 2" in line
        total = 13 if row["outer_step"] < FIRST_PHASE - 1 else STEPS  # the first phase is cut short
        assert f"{row['outer_step'] + 1}/{total}" in line
        assert re.search(r"left (\d+:\d\d:\d\d|-:--:--) ", line)
    assert re.search(r"left \d+:\d\d:\d\d ", lines[-2])  # at first nobody knows
    with pytest.raises(KeyboardInterrupt):
        long_run(out=tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 5)])
    assert capsys.readouterr() == ("", "")
    long_run(out=tmp_path, resume=True, progress=True)
    assert [line.split()[5] for line in capsys.readouterr().err.splitlines()] == [f"{k}/{STEPS}" for k in (6, 7, 8)]


# -- another run in the folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [{metrics.FILE, run_record.CHECKPOINT}, {metrics.FILE}, {run_record.CHECKPOINT}])
def test_a_folder_that_holds_a_run_is_left_alone(kept: set[str], tmp_path: Path) -> None:
    train(exact(2), out=tmp_path)
    for path in list(tmp_path.iterdir()):
        if path.name not in kept:
            path.unlink()
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run; resume it"):
        train(exact(2), out=tmp_path)
    assert contents(tmp_path) == before


def test_other_files_in_the_folder_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    train(exact(2), out=tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def interrupted(folder: Path, **changes: Any) -> None:
    settings = {"config": {"width": 8, "note": "a"}, "callbacks": [Interruption(KeyboardInterrupt(), 5)]}
    with pytest.raises(KeyboardInterrupt):
        long_run(out=folder, **{**settings, **changes})


# What is changed; and under which names the message reports it, with what words.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "seed": ({"seed": 1}, {"seed": "0 there, 1 here"}),
    "steps": ({"phases": [LONG_RUN[0], Phase(ZerothOrder(2), 6, accumulate=3)]}, {"phases": "accumulate=3"}),
    "estimator": ({"phases": [LONG_RUN[0], Phase(ZerothOrder(3), 4, accumulate=2)]}, {"phases": "directions=3"}),
    "accumulate": ({"phases": [LONG_RUN[0], Phase(ZerothOrder(2), 4)]}, {"phases": "accumulate=1"}),
    "patience": ({"phases": [Phase(TruncatedReverse(2), 9), LONG_RUN[1]]}, {"phases": "patience=None"}),
    "order": ({"phases": LONG_RUN[::-1]}, {"phases": 'there, ["Phase(estimator=ZerothOrder'}),
    "optimizer": ({"name": "SGD"}, {"optimizer": "optimizer(torch.optim.SGD, lr=0.2"}),
    "schedule": ({"name": "one cycle"}, {"optimizer": "OneCycleLR"}),
    "shape": ({"meta": tensor(0.0)}, {"meta": "['meta: (3,) torch.float64'] there, ['meta: (1,) torch.float64'] here"}),
    "dtype": ({"meta": START.float()}, {"meta": "['meta: (3,) torch.float32'] here"}),
    "structure": ({"meta": {"x": START}}, {"meta": "meta['x']: (3,)"}),
    "config": ({"config": {"width": 9, "note": "a"}}, {"width": "8 there, 9 here"}),
    "less config": ({"config": {"width": 8}}, {"note": "'a' there, None here"}),
    "more config": ({"config": {"width": 8, "note": "a", "depth": 3}}, {"depth": "None there, 3 here"}),
    "two things": ({"seed": 2, "config": {"width": 9, "note": "a"}}, {"seed": "0 there, 2", "width": "8 there, 9"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_another_configuration_is_refused(name: str, tmp_path: Path) -> None:
    changes, expected = CHANGES[name]
    interrupted(tmp_path)
    before = contents(tmp_path)
    settings = {"phases": LONG_RUN, "name": "cosine", "config": {"width": 8, "note": "a"}}
    with pytest.raises(CheckpointError, match="belongs to a run of another configuration") as caught:
        train_noisily(**{**settings, **changes}, out=tmp_path, resume=True)
    message = str(caught.value)
    assert set(re.findall(r"(?:configuration \(|; )(\w+): ", message)) == set(expected)
    assert all(word in message for word in expected.values())
    assert contents(tmp_path) == before


def test_a_name_in_config_does_not_hide_a_difference(tmp_path: Path) -> None:
    config = {"seed": 5, "optimizer": "mine"}
    interrupted(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=r"\(seed: 0 there, 1 here\)"):
        long_run(out=tmp_path, resume=True, config=config, seed=1)
    assert_as_undisturbed(long_run(out=tmp_path, resume=True, config=config), tmp_path)


def test_functions_in_settings_are_no_difference(tmp_path: Path) -> None:
    """Their `repr` has an address in it, which changes from process to process."""

    def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k)

    def make() -> Optimizer:
        return bilevel.optimizer(torch.optim.SGD, lr=0.1, schedule=lambda optimizer: schedule(optimizer))

    with pytest.raises(KeyboardInterrupt):
        train(exact(4), optimizer=make(), out=tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 2)])
    result = train(exact(4), optimizer=make(), out=tmp_path, resume=True)
    assert torch.equal(result.meta, train(exact(4), optimizer=make()).meta)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "altered": lambda whole: whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
    "junk": lambda whole: b"\x80\x04}\x94." * 50,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_without_another_is_refused_and_left(name: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    path = tmp_path / run_record.CHECKPOINT
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    for previous in (None, path.read_bytes()):
        (tmp_path / run_record.PREVIOUS).unlink(missing_ok=True)
        if previous is not None:
            (tmp_path / run_record.PREVIOUS).write_bytes(previous)
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            long_run(out=tmp_path, resume=True)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", DAMAGE)
def test_after_a_damaged_checkpoint_the_run_goes_on_from_the_one_before(name: str, tmp_path: Path) -> None:
    """Also if it is interrupted again before the next one; the good one is never replaced by the damaged one."""
    interrupted(tmp_path, config={})
    path = tmp_path / run_record.CHECKPOINT
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    previous = (tmp_path / run_record.PREVIOUS).read_bytes()
    assert len(lines_of(tmp_path)) == 5
    seen: list[OuterStep] = []
    with (
        pytest.warns(UserWarning, match=r"Going on from the checkpoint before it instead, of outer step 3"),
        suppress(KeyboardInterrupt),
    ):
        long_run(out=tmp_path, resume=True, callbacks=[seen.append, Interruption(KeyboardInterrupt(), 1)])
    assert [step.number for step in seen] == [4, 5]
    assert (tmp_path / run_record.PREVIOUS).read_bytes() == previous
    assert_as_undisturbed(long_run(out=tmp_path, resume=True), tmp_path)


def test_a_run_goes_on_from_the_previous_checkpoint_if_there_is_no_newer_one(tmp_path: Path) -> None:
    """A process killed between the two moves of a new checkpoint leaves it so."""
    interrupted(tmp_path, config={})
    (tmp_path / run_record.CHECKPOINT).unlink()
    with pytest.raises(FileExistsError):
        long_run(out=tmp_path)
    assert_as_undisturbed(long_run(out=tmp_path, resume=True), tmp_path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoint_files.save(tmp_path / run_record.CHECKPOINT, {"step": 3, "images": torch.zeros(2)})
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"not one of bilevel\.fit"):
        long_run(out=tmp_path, resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("lines", [0, 3, 5])
def test_metrics_that_are_shorter_than_the_checkpoint_says(lines: int, tmp_path: Path) -> None:
    interrupted(tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 6)])
    path = tmp_path / metrics.FILE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"after 6 outer steps.*holds {lines} lines"):
        long_run(out=tmp_path, resume=True, config={"width": 8, "note": "a"})
    assert contents(tmp_path) == before


# -- numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("step", [0, 4])
def test_an_inner_loop_that_blows_up(step: int, accumulate: int, tmp_path: Path) -> None:
    """The checkpoint holds the last finite meta parameters; with the fault gone, the run goes on from there."""
    bad_draw, bad_inner_step = step * accumulate + accumulate - 1, 2

    def batches(draw: int) -> list[Tensor]:
        found = noisy_inner_batches(draw)
        return [b * float("inf") if (draw, t) == (bad_draw, bad_inner_step) else b for t, b in enumerate(found)]

    phases = [Phase(ForwardGradient(2), 6, accumulate=accumulate)]
    with pytest.raises(NonFiniteError, match=rf"outer step {step}\b.*inner step {bad_inner_step}\b") as caught:
        train_noisily(phases, inner_batches=batches, out=tmp_path)
    reached = train_noisily([Phase(phases[0].estimator, step, accumulate=accumulate)]) if step else None
    meta = START if reached is None else reached.meta

    assert caught.value.inner_step == bad_inner_step
    state = torch.zeros(3, dtype=FLOAT)
    for batch in batches(bad_draw)[:bad_inner_step]:
        state = state - INNER_RATE * CURVATURE * (state - meta - batch)
    torch.testing.assert_close(caught.value.last_finite_state, state)

    stored = checkpoint_of(tmp_path)
    assert torch.equal(stored["meta"][0], meta)
    assert stored["counters"]["outer_step"] == step
    assert len(lines_of(tmp_path)) == step if step else not (tmp_path / metrics.FILE).exists()
    before = contents(tmp_path)
    with pytest.raises(NonFiniteError, match=f"outer step {step}"):
        train_noisily(phases, inner_batches=batches, out=tmp_path, resume=True)
    assert contents(tmp_path) == before
    assert torch.equal(train_noisily(phases, out=tmp_path, resume=True).meta, train_noisily(phases).meta)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_an_outer_optimizer_that_blows_up(name: str, tmp_path: Path) -> None:
    """The checkpoint has its memory as it was before that step, too."""
    algorithm, settings, _ = OPTIMIZERS[name]

    def optimizer(factor: float) -> Optimizer:
        def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
            return lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 3 else factor)

        return bilevel.optimizer(algorithm, schedule=schedule, **settings)

    with pytest.raises(NonFiniteError, match=r"outer step 3\b.*smaller outer learning rate") as caught:
        train_noisily(optimizer=optimizer(float("inf")), out=tmp_path)
    assert caught.value.inner_step is None
    stored = checkpoint_of(tmp_path)
    clean = train_noisily([Phase(TruncatedReverse(2), 3)], optimizer=optimizer(1.0), out=tmp_path / "clean")
    assert torch.equal(stored["meta"][0], clean.meta)
    for name, value in checkpoint_of(tmp_path / "clean")["optimizer"]["state"][0].items():
        assert torch.equal(stored["optimizer"]["state"][0][name], value)
    assert without_seconds(lines_of(tmp_path)) == without_seconds(clean.history)
    # The schedule itself is not part of the configuration, so the fault can be put right.
    result = train_noisily(optimizer=bilevel.optimizer(algorithm, schedule=optimizer(1.0).schedule, **settings))
    assert torch.isfinite(result.meta).all()


def test_a_projection_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"outer step 0\b.*project"):
        train(exact(2), project=lambda phi: phi / 0, out=tmp_path)
    assert torch.equal(checkpoint_of(tmp_path)["meta"][0], START)


def test_meta_parameters_that_are_not_finite_to_start_with(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"meta\['b'\] holds NaN or infinity"):
        train(exact(2), {"a": START, "b": tensor(1.0, float("nan"))}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- wrong arguments -----------------------------------------------------------------------------------------------

LBFGS = "LBFGS evaluates the loss several times in a step"

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no phases": ({"phases": []}, ValueError, r"phases=\[\]: write phases=\[bilevel.Phase\("),
    "an estimator as phase": ({"phases": [Reverse()]}, ValueError, r"phases=\[Reverse.*write phases=\[bilevel.Phase\("),
    "a phase without a list": ({"phases": Phase(Reverse(), 3)}, ValueError, r"write phases=\[bilevel.Phase\("),
    "checkpoints never": ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0: a whole number of at least 1"),
    "half a step": ({"checkpoint_every": 1.5}, ValueError, r"checkpoint_every=1\.5: a whole number of at least 1"),
    "negative seed": ({"seed": -1}, ValueError, "seed=-1: a whole number of at least 0"),
    "LBFGS": ({"optimizer": bilevel.optimizer(torch.optim.LBFGS)}, ValueError, LBFGS),
    "an optimiser's class": ({"optimizer": torch.optim.Adam}, TypeError, r"write optimizer=bilevel.optimizer\("),
    "an optimiser": (
        {"optimizer": torch.optim.SGD([nn.Parameter(START.clone())])},
        TypeError,
        r"write optimizer=bilevel.optimizer\(",
    ),
    "settings from meta": (
        {"optimizer": bilevel.optimizer(torch.optim.SGD, lr=lambda meta: meta)},
        ValueError,
        "lr: only an inner optimiser can take settings that are functions of meta",
    ),
    "whole numbers": ({"meta": {"x": torch.tensor([1, 2])}}, TypeError, r"meta\['x'\] has dtype torch.int64"),
    "complex numbers": ({"meta": torch.tensor([1j])}, TypeError, "meta has dtype torch.complex64"),
    "a number": ({"meta": {"lr": 1, "x": START}}, TypeError, r"meta\['lr'\] is 1 \(int\)"),
    "no tensor": ({"meta": {}}, ValueError, "meta is {}, without a single number"),
    "nothing": ({"meta": None}, ValueError, "meta is None"),
    "a path in config": (
        {"config": {"where": Path("a")}},
        TypeError,
        "a checkpoint holds .* not PosixPath|WindowsPath",
    ),
    "no gradient": ({"problem": replace(QUADRATIC, outer_loss=lambda *_: torch.ones(2))}, ValueError, "scalar"),
    "no steps": ({"inner_batches": []}, ValueError, "inner_batches is empty"),
    "a shape that differs": ({"project": lambda phi: phi[:2]}, ValueError, r"project returned .*\(2,\).*\(3,\)"),
    "a projection of nothing": ({"project": lambda phi: None}, ValueError, "project returned None"),
    "a projection that broadcasts": ({"project": torch.sum}, ValueError, r"project returned {'meta': \(\)}"),
    "a projection to a number": ({"project": lambda phi: 3.0}, ValueError, "project returned .*meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    changes, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        train(**{"phases": exact(2), "out": tmp_path / "out", **changes})
    assert not any(tmp_path.iterdir())


WRONG_PHASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **{
        f"{name}={value}": ({name: value}, ValueError, f"{name}={value}: a whole number of at least 1 is needed")
        for name in ("steps", "accumulate", "patience")
        for value in (0, -3, 2.5, True)
    },
    "no steps": ({"steps": None}, ValueError, "steps=None: a whole number"),
    "an estimator's class": ({"estimator": Reverse}, TypeError, r"write Phase\(bilevel.Reverse\(\), steps=100\)"),
    "a name": ({"estimator": "reverse"}, TypeError, r"write Phase\(bilevel.Reverse\(\), steps=100\)"),
    **{
        f"min_improvement={value}": ({"min_improvement": value}, ValueError, rf"min_improvement={value}: a number in")
        for value in (-0.1, 1, 1.5, float("nan"))
    },
}


@pytest.mark.parametrize("name", WRONG_PHASES)
def test_a_wrong_phase(name: str) -> None:
    changes, error, message = WRONG_PHASES[name]
    with pytest.raises(error, match=message):
        Phase(**{"estimator": Reverse(), "steps": 3, **changes})


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """The tests' own precision is float64 throughout, and torch's default stays what users have."""
    assert torch.get_default_dtype() == torch.float32
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def ctrl_c_heeded() -> Iterator[None]:
    """A program that a shell has put into the background is started with SIGINT ignored, and tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_heeded")
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, bilevel.errors.Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_being_stopped_inside_of_torchs_own_code_is_reported_as_such(
    number: int, expected: type[BaseException], tmp_path: Path
) -> None:
    """What a signal raises in a function that PyTorch calls from C++ comes out of it as a RuntimeError."""
    calls: list[int] = []

    def outer_loss(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            try:
                os.kill(os.getpid(), number)
            except BaseException as error:
                raise RuntimeError(f"an operation failed: {error!r}") from None
        return (theta - 3.0) ** 2

    problem = bilevel.GradientDescent(
        lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
        outer_loss,
        torch.tensor(0.0),
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    phases = [bilevel.Phase(bilevel.Reverse(), steps=10)]
    with pytest.raises(expected):
        bilevel.fit(problem, torch.tensor(0.0), bilevel.no_batches(2), phases=phases, out=tmp_path, progress=False)
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    kept = len(metrics.read(tmp_path / metrics.FILE))
    assert 0 < kept < 10
    result = bilevel.fit(
        problem,
        torch.tensor(0.0),
        bilevel.no_batches(2),
        phases=phases,
        out=bilevel.RunFolder(tmp_path, resume=True),
        progress=False,
    )
    assert [row["outer_step"] for row in result.history] == list(range(10))
