"""Outer steps after which the inner loop fails: they are halved and counted, and are the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fit_settings import grouped
from torch import Tensor

import bilevel
from bilevel import Phase, ZerothOrder
from bilevel.errors import SolverError
from bilevel.training import metrics
from bilevel.training.outer_loop import OuterStep


def box(lowest: float, fails: str = "raises") -> bilevel.BlackBox:
    """The problem h = φ², with a solver that fails below `lowest`."""

    def solve(phi: Tensor) -> Tensor:
        if float(phi) >= lowest:
            return phi
        if fails == "raises":
            raise SolverError(f"no solution at {float(phi):.3g}")
        return phi * torch.nan

    return bilevel.BlackBox(solve, lambda state, phi, batch: state**2)


def fit(problem: Any, lr: float, max_backtracks: int, steps: int = 4, **settings: Any) -> bilevel.FitResult:
    return bilevel.fit(
        problem,
        torch.tensor(1.0, dtype=torch.float64),
        phases=[Phase(ZerothOrder(1, step_size=1e-3), steps)],
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=lr),
        progress=False,
        **grouped({"max_backtracks": max_backtracks, **settings}),
    )


@pytest.mark.parametrize("fails", ["raises", "nan"])
def test_a_step_that_leads_to_failure_is_halved_until_it_does_not(fails: str) -> None:
    # From 1 by 4 · 2 = 8 to −7, back to −3 and −1: all fail; 0 is the first that does not.
    result = fit(box(-0.5, fails), lr=4.0, max_backtracks=5, steps=2)
    assert [row["backtracks"] for row in result.history] == [0, 3]
    assert result.history[1]["outer_loss"] == pytest.approx(0.0, abs=1e-12)


def test_without_backtracks_the_error_says_where(tmp_path: Path) -> None:
    with pytest.raises(SolverError, match=r"outer step 1: no solution at -7"):
        fit(box(-0.5), lr=4.0, max_backtracks=0, out=tmp_path)
    assert metrics.read(tmp_path / "metrics.jsonl")[0]["outer_step"] == 0  # what came before is kept


def test_no_more_backtracks_than_allowed() -> None:
    with pytest.raises(SolverError, match=r"outer step 1: no solution at -1"):
        fit(box(-0.5), lr=4.0, max_backtracks=2)


def test_a_first_estimate_has_nowhere_to_go_back_to() -> None:
    with pytest.raises(SolverError, match=r"outer step 0"):
        fit(box(2.0), lr=4.0, max_backtracks=5)


def test_a_resumed_run_backtracks_to_the_same_point(tmp_path: Path) -> None:
    whole = fit(box(-0.5), lr=1.8, max_backtracks=5, steps=4)
    assert sum(row["backtracks"] for row in whole.history) > 0
    calls: list[int] = []

    def interrupt(step: OuterStep) -> None:
        calls.append(step.number)
        if len(calls) == 2:
            raise KeyboardInterrupt

    out = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        fit(box(-0.5), lr=1.8, max_backtracks=5, out=out, callbacks=[interrupt])
    resumed = fit(box(-0.5), lr=1.8, max_backtracks=5, out=out, resume=True)
    assert [row["outer_loss"] for row in resumed.history] == [row["outer_loss"] for row in whole.history]
    assert [row["backtracks"] for row in resumed.history] == [row["backtracks"] for row in whole.history]


def test_max_backtracks_is_a_whole_number() -> None:
    with pytest.raises(ValueError, match=r"max_backtracks=-1"):
        fit(box(0.0), lr=0.1, max_backtracks=-1)


def test_lbfgs_as_outer_optimizer() -> None:
    """One evaluation a step, the gradients being there already: on a quadratic, N steps or so are enough."""
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    problem = bilevel.Problem(
        init=lambda meta: meta, step=lambda s, meta, b: s, outer_loss=lambda s, meta, b: (weights * s**2).sum()
    )
    result = bilevel.fit(
        problem,
        torch.ones(3, dtype=torch.float64),
        bilevel.no_batches(1),
        phases=[Phase(bilevel.Reverse(), 25)],
        optimizer=bilevel.optimizer(torch.optim.LBFGS, lr=1.0, max_iter=1, tolerance_grad=1e-12, tolerance_change=0),
        progress=False,
    )
    assert result.history[-1]["outer_loss"] < 1e-12 * result.history[0]["outer_loss"]
