"""Plans: predicted bytes against counted ones, what is recommended, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.cli import plan_command
from bilevel.planning import planner
from bilevel.planning.live_memory import counting

T = 30


def problem(optimizer: Any = None, width: int = 40) -> tuple[bilevel.GradientDescent, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(20, 12), torch.randint(3, (20,))
    network = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return bilevel.GradientDescent(
        lambda model, meta, batch: (meta.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean(),
        lambda model, meta, batch: cross_entropy(model(x), y),
        network,
        optimizer or bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    ), torch.zeros(20)


@pytest.mark.parametrize("algorithm", [torch.optim.SGD, torch.optim.Adam])
def test_predicted_bytes_are_those_counted(algorithm: Any) -> None:
    found, meta = problem(bilevel.optimizer(algorithm, lr=0.01))
    plan = bilevel.plan(found, meta, bilevel.no_batches(T), memory="1GB", directions=4)
    kinds = {type(row.estimator) for row in plan.rows}
    assert kinds == {
        bilevel.Reverse,
        bilevel.TruncatedReverse,
        bilevel.ForwardGradient,
        bilevel.ZerothOrder,
        bilevel.Implicit,
        bilevel.HessianFree,
    }
    for row in plan.rows:
        if isinstance(row.estimator, bilevel.Implicit):
            continue  # the same as HessianFree's and a few vectors; it would have to converge
        with counting() as live:
            row.estimator(found, meta, bilevel.no_batches(T))
        assert row.bytes == pytest.approx(live.peak, rel=0.2), row.estimator


@pytest.mark.parametrize(
    ("memory", "recommended"),
    [
        ("1GB", bilevel.Reverse("graph")),
        ("800kB", bilevel.Reverse("all")),
        ("260kB", bilevel.Reverse("sqrt")),
        ("220kB", bilevel.Reverse("log")),
        ("150kB", bilevel.Reverse("all", offload="disk")),
        ("1kB", None),
    ],
)
def test_the_exact_method_of_the_fewest_units_that_fits(memory: str, recommended: Any) -> None:
    found, meta = problem()
    plan = bilevel.plan(found, meta, bilevel.no_batches(T), memory=memory, directions=16)
    assert plan.recommended == recommended, [(row.estimator, row.bytes) for row in plan.rows]
    auto = bilevel.Auto(memory)
    if recommended is None:
        assert "nothing fits into 1 kB; the least is" in plan.reason
        with pytest.raises(bilevel.MemoryBudgetError, match="nothing fits into 1 kB"):
            auto(found, meta, bilevel.no_batches(T))
    else:
        expected = recommended(found, meta, bilevel.no_batches(T)).grad
        assert torch.equal(auto(found, meta, bilevel.no_batches(T)).grad, expected)


def test_auto_measures_a_problem_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, meta = problem()
    auto = bilevel.Auto("1GB")
    auto(found, meta, bilevel.no_batches(3))
    monkeypatch.setattr(planner, "plan_of", None)
    auto(found, meta, bilevel.no_batches(3))


def test_a_black_box_is_differenced() -> None:
    box = bilevel.BlackBox(solve=lambda phi: phi.sin(), outer_loss=lambda state, phi, batch: state.square().sum())
    plan = bilevel.plan(box, torch.ones(5, dtype=torch.float64), memory="1MB", directions=16)
    assert plan.recommended == bilevel.ZerothOrder(5)
    estimate = bilevel.Auto("1MB")(box, torch.ones(5, dtype=torch.float64))
    assert estimate.standard_error is not None


def test_a_model_without_forward_mode_has_no_forward_methods() -> None:
    def inner(theta: Tensor, phi: Tensor, batch: None) -> Tensor:
        return nn.functional.huber_loss(theta, phi) + (theta * phi).square().sum()

    descent = bilevel.GradientDescent(
        inner, lambda theta, phi, batch: theta.sum(), torch.ones(3), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    plan = bilevel.plan(descent, torch.ones(3), bilevel.no_batches(4), memory="1MB")
    assert {type(row.estimator) for row in plan.rows}.isdisjoint({bilevel.Forward, bilevel.ForwardGradient})
    assert plan.recommended == bilevel.Reverse("graph")


def test_workers_share_the_directions() -> None:
    found, meta = problem()
    alone, together = (
        next(row for row in plan.rows if isinstance(row.estimator, bilevel.ForwardGradient))
        for plan in (
            bilevel.plan(found, meta, bilevel.no_batches(T), memory="1GB", directions=16, workers=w) for w in (1, 8)
        )
    )
    assert (alone.units, together.units) == ((1 + 2 * 16) * T, (1 + 2 * 2) * T)
    assert together.bytes < alone.bytes / 4
    assert together.relative_variance == alone.relative_variance == 19 / 16


def test_on_paper() -> None:
    """GPT-2 XL, 48 steps of SGD, a weight model of 80 million parameters, 64 workers: states of 6 GB."""
    plan = bilevel.on_paper(
        1.5e9, 8e7, 48, memory="80GB", directions=64, workers=64, optimizer_memory=0, activation_bytes=4e9
    )
    rows = {repr(row.estimator): row for row in plan.rows}
    everything = rows[repr(bilevel.Reverse("all"))]
    assert everything.bytes > 48 * 6e9
    assert not everything.fits
    assert plan.recommended == bilevel.Reverse("all", offload="disk")
    roomier = bilevel.on_paper(1.5e9, 8e7, 48, memory="100GB", optimizer_memory=0, activation_bytes=4e9)
    assert roomier.recommended == bilevel.Reverse("log")  # 6 states
    assert rows[repr(bilevel.ForwardGradient(64))].units == 3 * 48
    assert bilevel.on_paper(1.5e9, 8e7, 48, memory="1GB").recommended is None


@pytest.mark.parametrize("memory", ["", "much", "8XB", "-1GB", "0", float("nan"), -3, "1e999GB"])
def test_memory_that_is_no_size(memory: Any) -> None:
    with pytest.raises(ValueError, match="write a size such as 8GB"):
        planner.parse_bytes(memory)
    with pytest.raises(ValueError, match="write a size such as 8GB"):
        bilevel.Auto(memory)


def test_differences_are_never_called_exact() -> None:
    """With one meta parameter they have no variance, and are cheap, but leave O(step²)."""
    found, _ = problem()
    one = bilevel.GradientDescent(
        lambda model, meta, batch: meta.exp() * found.inner_loss(model, torch.zeros(20), batch),
        lambda model, meta, batch: found.inner_loss(model, torch.zeros(20), batch),
        nn.Linear(12, 3),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    plan = bilevel.plan(one, torch.tensor(0.0), bilevel.no_batches(T), memory="1GB")
    differences = next(row for row in plan.rows if isinstance(row.estimator, bilevel.ZerothOrder))
    assert differences.relative_variance == 0
    assert not differences.exact
    assert "O(step²)" in plan_command.error_text(differences)
    assert not isinstance(plan.recommended, bilevel.ZerothOrder)
