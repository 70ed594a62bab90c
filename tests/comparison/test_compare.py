"""`compare`, against what comes out by hand.

Inner steps θ ← θ − ½(θ − φ) from θ_0 = 0 give θ_2 = ¾φ. With the outer loss a·θ + c·φ, a = (1, 0) and c = (0, 1), the
exact hypergradient is ¾a + c = (¾, 1), of length 5/4. One step back gives ½a + c, and the Hessian H = I, so that
`Implicit` and `HessianFree(scale=α)` give a + c and αa + c.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.comparison import compare as comparison
from bilevel.comparison.compare import ComparisonRow


def problem(params: Any = None) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
        outer_loss=lambda theta, phi, batch: theta[0] + phi[1],
        params=torch.zeros(2, dtype=torch.float64) if params is None else params,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )


def compare(*estimators: bilevel.Estimator, **settings: Any) -> list[ComparisonRow]:
    meta = torch.tensor([0.3, -2.0], dtype=torch.float64)
    return bilevel.compare(problem(), meta, bilevel.no_batches(2), estimators=estimators, **settings)


BY_HAND = [
    (bilevel.Reverse(), "reverse", 0.0, 1.0),
    (bilevel.Forward(), "forward", 0.0, 1.0),
    # ½a + c = (½, 1): off by (¼, 0); the cosine is (⅜ + 1)/(5/4 · √5/2) = 11/(5√5).
    (bilevel.TruncatedReverse(1), "truncated-reverse", 0.2, 11 / (5 * math.sqrt(5))),
    # a + c = (1, 1): off by (¼, 0).
    (bilevel.Implicit(), "implicit", 0.2, 7 / (5 * math.sqrt(2))),
    # 3a + c = (3, 1): off by (9/4, 0).
    (bilevel.HessianFree(scale=3), "hessian-free(scale=3)", 1.8, 13 / (5 * math.sqrt(10))),
]


@pytest.mark.parametrize(("estimator", "name", "relative_error", "cosine"), BY_HAND, ids=[row[1] for row in BY_HAND])
def test_by_hand(estimator: bilevel.Estimator, name: str, relative_error: float, cosine: float) -> None:
    (row,) = compare(estimator)
    assert row.estimator == name
    assert row.relative_error == pytest.approx(relative_error, abs=1e-14)
    assert row.cosine == pytest.approx(cosine, abs=1e-14)
    assert row.standard_error is None


def test_a_random_estimate_and_its_standard_error() -> None:
    # With v = (1, ±1), w = ∇h·v = ¾ ± 1 and the estimate wv is off by (1, ±¾) or so: by the length of ∇h itself,
    # whatever v is. The standard error expected from one slope is √(w²(N − 1)/1) = |w|.
    seen = set()
    for seed in range(8):
        (row,) = compare(bilevel.ForwardGradient(1), seed=seed)
        assert row.relative_error == pytest.approx(1.0, abs=1e-14)
        assert row.standard_error is not None
        slope = 1.25 * row.standard_error
        assert slope == pytest.approx(1.75) or slope == pytest.approx(0.25)
        assert row.cosine == pytest.approx(slope / (1.25 * math.sqrt(2)))
        seen.add(round(slope, 2))
    assert seen == {1.75, 0.25}


def test_lengths_go_over_all_leaves() -> None:
    def outer_loss(theta: Any, phi: Any, _batch: Any) -> Tensor:
        return theta["x"][0] + phi["y"][0, 0]

    split = bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: 0.5 * (theta["x"] - phi["x"]).square().sum(),
        outer_loss=outer_loss,
        params={"x": torch.zeros(1, dtype=torch.float64)},
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    meta = {"x": torch.ones(1, dtype=torch.float64), "y": torch.ones(1, 1, dtype=torch.float64)}
    (row,) = bilevel.compare(split, meta, bilevel.no_batches(2), estimators=[bilevel.TruncatedReverse(1)])
    assert row.relative_error == pytest.approx(0.2, abs=1e-14)
    assert row.cosine == pytest.approx(11 / (5 * math.sqrt(5)), abs=1e-14)


def test_an_estimate_of_zero_has_no_direction() -> None:
    from_start = bilevel.Problem(
        init=lambda phi: phi.clone(),
        step=lambda theta, phi, batch: 0.5 * theta + 0 * phi,
        outer_loss=lambda theta, phi, b: theta,
    )
    meta = torch.tensor(1.0, dtype=torch.float64)
    (row,) = bilevel.compare(from_start, meta, bilevel.no_batches(3), estimators=[bilevel.TruncatedReverse(1)])
    assert (row.relative_error, row.cosine) == (1.0, 0.0)


def test_the_reference_can_be_chosen() -> None:
    (row,) = compare(bilevel.HessianFree(), exact=bilevel.Implicit())
    assert row.relative_error == pytest.approx(0.0, abs=1e-14)


@dataclass(frozen=True)
class _MustNotRun(bilevel.Estimator):
    is_random = False

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:
        raise NotImplementedError

    def _estimate(self, run: Any) -> bilevel.Estimate:  # noqa: ARG002
        raise AssertionError("the exact hypergradient should have been looked at first")


def test_an_exact_hypergradient_of_zero_is_refused_first() -> None:
    flat = bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
        outer_loss=lambda theta, phi, batch: 0 * theta,
        params=torch.tensor(0.0, dtype=torch.float64),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    with pytest.raises(ValueError, match="exact hypergradient is zero here"):
        bilevel.compare(flat, torch.tensor(1.0, dtype=torch.float64), bilevel.no_batches(2), estimators=[_MustNotRun()])


class Clock:
    """Time that passes by one for each inner step, and by a hundred more for the first of all."""

    def __init__(self) -> None:
        self.now = 0.0

    def tick(self) -> None:
        self.now += 101 if self.now == 0 else 1

    def as_time(self, resolution: float) -> SimpleNamespace:
        return SimpleNamespace(
            perf_counter=lambda: self.now * 0.01,
            process_time=lambda: self.now,
            get_clock_info=lambda name: SimpleNamespace(resolution=resolution),
        )


def test_units_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, T, s = Clock(), 5, 2

    def step(theta: Tensor, phi: Tensor, _batch: Any) -> Tensor:
        clock.tick()
        return theta - 0.5 * (theta - phi)

    slow = bilevel.Problem(
        init=lambda phi: torch.zeros_like(phi), step=step, outer_loss=lambda theta, phi, batch: theta**2
    )
    monkeypatch.setattr(comparison, "time", clock.as_time(resolution=1e-9))
    estimators = [
        bilevel.Reverse("graph"),  # T steps
        bilevel.TruncatedReverse(s),  # T steps plainly, s of them again
        bilevel.ZerothOrder(1),  # three solves
    ]
    rows = bilevel.compare(slow, torch.tensor(1.0, dtype=torch.float64), bilevel.no_batches(T), estimators=estimators)
    assert [row.units for row in rows] == pytest.approx([1, (T + s) / T, 3])
    assert [row.seconds for row in rows] == pytest.approx([0.01 * T, 0.01 * (T + s), 0.01 * 3 * T])


def test_what_torch_sets_up_once_is_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    @dataclass(frozen=True)
    class SlowAtFirst(bilevel.Estimator):
        is_random = False

        def units(self, steps: int, meta_size: int, losses: int = 1) -> float:
            raise NotImplementedError

        def _estimate(self, run: Any) -> bilevel.Estimate:
            clock.tick()
            return bilevel.Estimate(torch.zeros(()), torch.ones(2, dtype=torch.float64), run.start())

    # The plain inner loop takes no time on this clock: it is charged the least that the clock can tell.
    monkeypatch.setattr(comparison, "time", clock.as_time(resolution=0.5))
    (row,) = compare(SlowAtFirst())
    assert row.units == pytest.approx(1 / 0.5)
    assert row.seconds == pytest.approx(0.01)


def test_rows_as_json() -> None:
    rows = compare(bilevel.Reverse(), bilevel.ForwardGradient(2), repeats=4)
    content = json.loads(json.dumps(comparison.as_dicts(rows), allow_nan=False))
    assert [row["estimator"] for row in content] == ["reverse", "forward-gradient(directions=2)"]
    for row, parsed in zip(rows, content, strict=True):
        assert ComparisonRow(**parsed) == row


@pytest.mark.slow
def test_bias_and_variance_are_told_apart() -> None:
    # ∇h = (¾, 1). With one Rademacher direction the squared error is ‖∇h‖² whatever the direction, and none is bias.
    (row,) = compare(bilevel.ForwardGradient(1), repeats=400)
    assert (row.repeats, row.relative_error) == (400, pytest.approx(1.0))
    assert row.squared_bias is not None
    assert row.variance is not None
    assert row.squared_bias + row.variance == pytest.approx(1.0)
    assert abs(row.squared_bias) < 0.02  # a sum over 400 · 399 pairs of standard deviation 1: 1/400 or so
    (biased,) = compare(bilevel.TruncatedReverse(1), repeats=5)
    assert (biased.repeats, biased.squared_bias, biased.variance) == (1, pytest.approx(0.04), 0.0)
    (single,) = compare(bilevel.ForwardGradient(1))
    assert (single.squared_bias, single.variance, single.half_widths) == (None, None, {})


def test_statistics_are_those_of_the_draws() -> None:
    # Of a mean the jackknife gives the textbook's standard error, s/√R.
    count, exact = 5, torch.tensor([0.75, 1.0], dtype=torch.float64)
    (row,) = compare(bilevel.ForwardGradient(1, "gaussian"), repeats=count)
    meta = torch.tensor([0.3, -2.0], dtype=torch.float64)
    grads = [
        bilevel.ForwardGradient(1, "gaussian", draw=draw)(problem(), meta, bilevel.no_batches(2)).grad
        for draw in range(count)
    ]
    errors = torch.stack([grad - exact for grad in grads]) / exact.norm()
    squares = errors.square().sum(1)
    cosines = torch.stack([grad @ exact / (grad.norm() * exact.norm()) for grad in grads])
    variance = errors.var(0).sum().item()
    assert row.relative_error == pytest.approx(squares.mean().sqrt().item())
    assert row.variance == pytest.approx(variance)
    assert row.squared_bias == pytest.approx(errors.mean(0).square().sum().item() - variance / count)
    for name, values in (("squared_error", squares), ("cosine", cosines)):
        assert row.half_widths[name] == pytest.approx(1.96 * values.std().item() / math.sqrt(count))


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    # The cosine is ¾ ± 1 over 5/4·√2, with equal probability: E = 1/√2 · E|w|/‖∇h‖ = (1.75 + 0.25)/2/(1.25√2).
    truth, hits = 1 / (1.25 * math.sqrt(2)), 0
    for first in range(60):
        (row,) = compare(bilevel.ForwardGradient(1, draw=1000 * first), repeats=30)
        hits += abs(row.cosine - truth) <= row.half_widths["cosine"]
    assert hits >= 50  # 57 expected; 50 or fewer has probability 0.003 at 95 %


def test_memory_is_what_was_held() -> None:
    # In a process of its own: what an allocator kept from before and uses again does not count.
    code = """
import torch
from bilevel.report.peak_memory import PeakMemory
with PeakMemory() as memory:
    held = torch.ones(64 * 2**20 // 4)
print(memory.peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n" or 60 * 2**20 < int(done.stdout) < 200 * 2**20
