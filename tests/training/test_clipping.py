"""Hypergradients shortened before the outer optimiser sees them: what it sees, what is recorded, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fit_settings import grouped
from torch import Tensor

import bilevel
from bilevel import Phase
from bilevel.errors import CheckpointError

START = torch.tensor([3.0, 4.0], dtype=torch.float64)


def problem() -> bilevel.GradientDescent:
    """One step of rate 1 from 0 on ½‖θ − φ‖² leads to φ, so h = ‖φ‖² and ∇h = 2φ."""

    def inner_loss(theta: Tensor, phi: Tensor, _batch: Any) -> Tensor:
        return 0.5 * (theta - phi).square().sum()

    def outer_loss(theta: Tensor, _phi: Tensor, _batch: Any) -> Tensor:
        return theta.square().sum()

    start = torch.zeros(2, dtype=torch.float64)
    return bilevel.GradientDescent(inner_loss, outer_loss, start, bilevel.optimizer(torch.optim.SGD, lr=1.0))


def fit(steps: int, **settings: Any) -> bilevel.FitResult:
    given = {"optimizer": bilevel.optimizer(torch.optim.SGD, lr=0.5), "progress": False, **settings}
    phases = [Phase(bilevel.Reverse(), steps)]
    return bilevel.fit(problem(), START.clone(), bilevel.no_batches(1), phases=phases, **grouped(given))


def test_a_long_hypergradient_is_shortened_and_keeps_its_direction() -> None:
    result = fit(1, clip_norm=2.0)  # ∇h = (6, 8), ‖∇h‖ = 10
    torch.testing.assert_close(result.meta, START - 0.5 * 2.0 * START / 5, rtol=1e-12, atol=0)
    assert result.history[0]["grad_norm"] == pytest.approx(10)
    assert result.history[0]["clipped_to"] == pytest.approx(0.2)


def test_as_torch_clips() -> None:
    """Ten steps with momentum against `clip_grad_norm_` in a plain loop; the last ones are short enough."""
    result = fit(10, clip_norm=4.0, optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.5))
    phi = torch.nn.Parameter(START.clone())
    plain = torch.optim.SGD([phi], lr=0.1, momentum=0.5)
    for _ in range(10):
        plain.zero_grad()
        phi.square().sum().backward()
        torch.nn.utils.clip_grad_norm_([phi], 4.0)
        plain.step()
    torch.testing.assert_close(result.meta, phi.detach(), rtol=1e-5, atol=1e-6)  # torch divides by norm + 1e-6
    factors = [row["clipped_to"] for row in result.history]
    assert factors[0] == pytest.approx(0.4)
    assert factors[-1] == 1.0


def test_what_is_short_enough_is_not_touched() -> None:
    free, bound = fit(3), fit(3, clip_norm=10.0)
    assert torch.equal(free.meta, bound.meta)
    assert [row["clipped_to"] for row in bound.history] == [1.0, 1.0, 1.0]
    assert "clipped_to" not in free.history[0]


def test_too_long_for_float32_to_square() -> None:
    """‖∇h‖² = 1e40 is infinite in float32; the direction is kept all the same."""
    start = torch.full((1,), 1e20)
    box = bilevel.GradientDescent(
        lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
        lambda theta, phi, batch: theta.sum() * 1e20,
        torch.zeros(1),
        bilevel.optimizer(torch.optim.SGD, lr=1.0),
    )
    result = bilevel.fit(
        box,
        torch.zeros_like(start),
        bilevel.no_batches(1),
        phases=[Phase(bilevel.Reverse(), 1)],
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
        update=bilevel.OuterUpdate(clip_norm=2.0),
        progress=False,
    )
    assert float(result.meta) == pytest.approx(-1.0)


def test_a_resumed_run_clips_the_same(tmp_path: Path) -> None:
    whole = fit(4, clip_norm=1.0)

    def interrupt(step: Any) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(4, clip_norm=1.0, out=tmp_path, callbacks=[interrupt])
    with pytest.raises(CheckpointError):
        fit(4, clip_norm=2.0, out=tmp_path, resume=True)
    resumed = fit(4, clip_norm=1.0, out=tmp_path, resume=True)
    assert torch.equal(resumed.meta, whole.meta)
    assert [row["clipped_to"] for row in resumed.history] == [row["clipped_to"] for row in whole.history]


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_norm_is_a_positive_number(wrong: Any) -> None:
    with pytest.raises(ValueError, match="clip_norm="):
        fit(1, clip_norm=wrong)
