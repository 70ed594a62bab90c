"""The report of `bilevel.check`: verdicts, own loops, budget, files, precision and stability."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel.autodiff import custom_functions
from bilevel.checking import stability
from bilevel.checking.report import Report
from bilevel.report.findings import Finding, Verdict

DOUBLE = torch.float64
META = torch.tensor([0.7, 1.2], dtype=DOUBLE)


def inner(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
    return (meta * (theta - 1.0).square()).sum() + 0.1 * (theta**4).sum()


def outer(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
    return (theta + 0.5).square().sum()


def problem(rate: float = 0.1, dtype: torch.dtype = DOUBLE) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        inner, outer, torch.zeros(2, dtype=dtype), bilevel.optimizer(torch.optim.SGD, lr=rate, momentum=0.5)
    )


def own_loop(meta: Tensor, rate: float = 0.1, steps: int = 4) -> float:
    theta = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=rate, momentum=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        inner(theta, meta, None).backward()
        optimizer.step()
    return outer(theta, meta, None).item()


def rows(report: Report, part: str, tested: str = "") -> list[Finding]:
    return [f for f in report.findings if f.part == part and tested in f.tested]


def test_a_problem_that_is_right() -> None:
    report = bilevel.check(problem(), META, 4, progress=False)
    assert (report.passed, report.exit_code, report.wrong, report.unjudged) == (True, 0, [], []), str(report)
    assert {"the loop", "a step twice", "one step", "the whole loop", "operations"} <= {f.part for f in report.findings}
    assert [f.part for f in report.not_checked] == ["stability"]
    assert "right" in str(report)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_loops(steps: int) -> None:
    assert bilevel.check(problem(), META, steps, progress=False).passed


def test_your_own_loop_is_compared() -> None:
    right = bilevel.check(problem(), META, 4, plain=own_loop, progress=False)
    assert right.passed, str(right)
    assert rows(right, "the loop", "your own loop")[0].verdict is Verdict.RIGHT
    assert rows(right, "the whole loop", "your own loop")[0].verdict is Verdict.RIGHT
    wrong = bilevel.check(problem(), META, 4, plain=lambda meta: own_loop(meta, steps=5), progress=False)
    assert wrong.exit_code == 1
    assert rows(wrong, "the loop", "your own loop")[0].verdict is Verdict.WRONG
    noisy = bilevel.check(problem(), META, 4, plain=lambda meta: own_loop(meta) + float(torch.rand(1)), progress=False)
    assert noisy.exit_code == 3
    assert "randomness" in rows(noisy, "the loop", "your own loop")[0].advice


def test_a_loop_that_raises_is_not_judged() -> None:
    def fails(meta: Tensor) -> float:
        raise KeyError("labels")

    report = bilevel.check(problem(), META, 2, plain=fails, progress=False)
    assert rows(report, "the loop", "your own loop")[0].verdict is Verdict.UNJUDGED


def test_a_step_with_a_lost_derivative_is_found() -> None:
    """A step that forgets the graph of its gradient, which a stop-gradient of the user's own would explain."""

    def step(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        there = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(inner(there, meta, None), there)
        return theta - 0.1 * gradient

    wrong = bilevel.Problem(lambda meta: torch.zeros(2, dtype=DOUBLE), step, outer)
    with pytest.raises(bilevel.errors.NoDependenceError):
        bilevel.Reverse()(wrong, META, 3)
    report = bilevel.check(wrong, META, 3, estimators=[bilevel.Reverse()], progress=False)
    assert not report.passed
    places = rows(report, "stopped gradients")
    assert any("test_check.py" in f.found and "create_graph" in f.found for f in places), str(report)


class Square(torch.autograd.Function):
    """A square with another derivative in forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] * tangent


def test_modes_that_disagree_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_functions, "is_verified", lambda function: True)

    def step(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        return 0.5 * theta + 0.1 * Square.apply(meta)  # type: ignore[operator]

    described = bilevel.Problem(lambda meta: torch.ones(2, dtype=DOUBLE), step, outer)
    estimators = [bilevel.Reverse(), bilevel.ForwardGradient(1)]
    report = bilevel.check(described, META, 3, estimators=estimators, progress=False)
    reverse, forward = rows(report, "the whole loop")
    assert (reverse.verdict, forward.verdict) == (Verdict.RIGHT, Verdict.WRONG), str(report)
    (step_row,) = rows(report, "one step", "by meta")
    assert step_row.verdict is Verdict.WRONG
    assert "forward mode" in step_row.found


def test_numbers_taken_out_are_named_and_not_called_wrong() -> None:
    def scaled(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        loss = inner(theta, meta, batch)
        return loss / max(loss.item(), 1e-3)

    described = bilevel.GradientDescent(
        scaled, outer, torch.zeros(2, dtype=DOUBLE), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    report = bilevel.check(described, META, 3, progress=False)
    assert report.exit_code == 3, str(report)
    assert "item" in rows(report, "stopped gradients")[0].found


def test_biased_estimators_are_shown_and_not_judged() -> None:
    estimators = [bilevel.TruncatedReverse(1), bilevel.ZerothOrder(1, 1e-4)]
    report = bilevel.check(problem(), META, 4, estimators=estimators, progress=False)
    biased, differences = rows(report, "the whole loop")
    assert biased.verdict is Verdict.NOT_CHECKED
    assert biased.numbers["relative"] > 0.01
    assert differences.verdict is Verdict.RIGHT
    assert report.passed


def test_differences_of_solves_that_move_stopped_gradients_are_not_called_wrong() -> None:
    described = bilevel.GradientDescent(
        lambda theta, meta, batch: (meta * (0.7 * theta - theta.detach() - 1.0).square()).sum(),
        outer,
        torch.zeros(2, dtype=DOUBLE),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    estimators = [bilevel.Reverse(), bilevel.ZerothOrder(1, 1e-4), bilevel.ForwardGradient(1, tangents="difference")]
    report = bilevel.check(described, META, 4, estimators=estimators, progress=False)
    reverse, solves, gradients = rows(report, "the whole loop")
    assert reverse.verdict is Verdict.RIGHT
    assert gradients.verdict is Verdict.RIGHT, str(report)  # of gradients, in which the stopped values are held
    assert solves.verdict is Verdict.UNJUDGED, str(report)
    assert "move the stopped gradients" in solves.found


def test_parts_that_do_not_fit_the_budget_are_not_checked() -> None:
    report = bilevel.check(problem(), META, 4, budget=1e-9, progress=False)
    assert report.exit_code == 3
    assert not report.passed
    assert {"the loop", "one step", "the whole loop"} <= {f.part for f in report.not_checked}
    assert all("budget" in f.advice for f in report.not_checked if f.part == "the loop")


def test_a_report_is_written_with_versions(tmp_path: Path) -> None:
    report = bilevel.check(problem(), META, 2, progress=False)
    report.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["exit_code"] == 0
    assert {"bilevel", "torch", "python"} <= found["versions"].keys()
    assert len(found["findings"]) == len(report.findings)
    assert found["findings"][0].keys() == {"part", "tested", "verdict", "found", "advice", "numbers"}


def test_exit_codes() -> None:
    def report(*verdicts: Verdict) -> Report:
        return Report([Finding("a part", "it", verdict, "") for verdict in verdicts], 0.0, 0.0)

    assert report(Verdict.RIGHT, Verdict.NOT_CHECKED).exit_code == 0
    assert report(Verdict.RIGHT, Verdict.UNJUDGED).exit_code == 3
    assert report(Verdict.UNJUDGED, Verdict.WRONG).exit_code == 1
    assert report(Verdict.NOT_CHECKED).exit_code == 3, "not checked is not passed"


def test_the_cost_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    bilevel.check(problem(), META, 2)
    assert "inner gradients" in capsys.readouterr().err


def test_no_random_numbers_are_consumed_and_nothing_is_changed() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.3), nn.Linear(2, 1))
    x, before = torch.randn(5, 3), {k: v.clone() for k, v in net.state_dict().items()}
    described = bilevel.GradientDescent(
        lambda model, meta, batch: (meta * model(x).square().squeeze(1)).mean(),
        lambda model, meta, batch: model(-x).square().mean(),
        net,
        bilevel.optimizer(torch.optim.Adam, lr=0.01),
    )
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # type: ignore[index]
    report = bilevel.check(described, torch.ones(5), 3, progress=False)
    assert report.passed, str(report)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[arg-type, index]
    assert states[2] == random.getstate()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_lost_digits_are_reported() -> None:
    torch.manual_seed(0)
    theta, x, y = torch.ones(6), torch.randn(8, 6), torch.randn(8)

    def loss(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        return (meta * (x.to(theta.dtype) @ theta - y.to(theta.dtype)).square()).mean()

    def judge(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        return (x.to(theta.dtype).flip(0) @ theta - y.to(theta.dtype)).square().mean()

    optimizer = bilevel.optimizer(torch.optim.SGD, lr=0.0005)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        described = bilevel.GradientDescent(loss, judge, theta.to(dtype), optimizer)
        report = bilevel.check(described, torch.ones(8, dtype=dtype), 100, progress=False)
        (row,) = rows(report, "precision")
        errors[dtype] = row.numbers["relative"], row.verdict
        assert not report.wrong or report.wrong == [row], str(report)
    assert errors[torch.float32][0] < 1e-4
    assert errors[torch.float32][1] is Verdict.RIGHT
    assert errors[torch.bfloat16][0] > 0.1
    assert errors[torch.bfloat16][1] is not Verdict.RIGHT


@pytest.mark.parametrize(("rate", "grows"), [(0.3, False), (3.0, True)])
def test_stability_of_a_quadratic(rate: float, grows: bool) -> None:
    """θ ← θ − η θ is stable up to η = 2."""
    described = bilevel.GradientDescent(
        lambda theta, meta, batch: 0.5 * (theta - meta).square().sum(),
        outer,
        torch.zeros(2, dtype=DOUBLE),
        bilevel.optimizer(torch.optim.SGD, lr=rate),
    )
    report = bilevel.check(described, META, 8, stable=True, progress=False)
    growth, multiple = rows(report, "stability")
    assert (growth.verdict is Verdict.RIGHT) is not grows
    assert growth.numbers["step 7"] == pytest.approx(abs(1 - rate) ** 8, rel=1e-9)
    assert multiple.numbers["multiple"] == pytest.approx(2.0 / rate, rel=0.3)
    assert multiple.numbers["multiple"] * rate <= 2.01


def test_stability_takes_at_most_eight_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = stability.tangent_lengths
    monkeypatch.setattr(stability, "tangent_lengths", lambda run: calls.append(1) or own(run))
    bilevel.check(problem(), META, 4, stable=True, progress=False)
    assert len(calls) <= 8


def test_black_boxes_are_solved_twice() -> None:
    calls = []

    def solve(meta: Tensor) -> Tensor:
        calls.append(1)
        return meta.exp() * len(calls)

    report = bilevel.check(bilevel.BlackBox(lambda meta: meta.exp(), lambda s, m, b: s.sum()), META, progress=False)
    assert report.passed
    changing = bilevel.check(bilevel.BlackBox(solve, lambda state, meta, batch: state.sum()), META, progress=False)
    assert changing.exit_code == 1


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="directions=0"):
        bilevel.check(problem(), META, 2, directions=0)
    with pytest.raises(ValueError, match="budget=-1"):
        bilevel.check(problem(), META, 2, budget=-1)
    with pytest.raises(TypeError, match="plain is 3"):
        bilevel.check(problem(), META, 2, plain=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inner_batches"):
        bilevel.check(problem(), META, None)
