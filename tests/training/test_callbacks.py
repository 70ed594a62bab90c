"""Callbacks, TensorBoard and the progress bar."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fit_cases import (
    FIRST_PHASE,
    SHRINKAGE,
    START,
    STEPS,
    TARGET,
    Interruption,
    assert_as_undisturbed,
    checkpoint_of,
    exact,
    lines_of,
    long_run,
    train,
)

from bilevel import (
    ForwardGradient,
    Phase,
    Reverse,
)
from bilevel.training.outer_loop import OuterStep


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
