"""Metrics: a line for each outer step, never lost, doubled or invalid; TensorBoard shows the same numbers."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel.errors import CheckpointError
from bilevel.report import progress
from bilevel.training import metrics
from bilevel.training.metrics import MetricsLog


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"outer_step": step, "phase": 0, "outer_loss": 1 / (step + 3), "standard_error": None, **more}


def write(folder: Path, count: int, keep: int = 0, tensorboard: bool = False) -> MetricsLog:
    """A log that goes on from `keep` lines to `count`."""
    log = MetricsLog(folder, keep, tensorboard)
    for step in range(keep, count):
        log.append(row(step))
    log.close()
    return log


def strictly_parsed(path: Path) -> list[Any]:
    """The lines, by a parser that takes nothing beyond the standard of JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_for_each_row(tmp_path: Path) -> None:
    log = write(tmp_path, 4)
    assert strictly_parsed(tmp_path / metrics.FILE) == log.rows == metrics.read(tmp_path / metrics.FILE)
    assert log.rows == [row(step) for step in range(4)]


def test_a_line_has_left_the_process_when_append_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in range(3):
        log.append(row(step))
        assert metrics.read(tmp_path / metrics.FILE) == [row(s) for s in range(step + 1)]
    log.close()


def test_nothing_is_created_before_the_first_row(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    log = MetricsLog(folder, 0, tensorboard=True)
    log.sync()
    log.close()
    assert not folder.exists()
    assert not metrics.exist(folder)
    write(folder, 1)
    assert metrics.exist(folder)


@pytest.mark.parametrize("keep", [0, 2, 5])
@pytest.mark.parametrize("cut", ["", '{"outer_step": 5, "outer_lo', "\x00\x00\n\x00", "[" * 10 + "\n"])
def test_going_on_keeps_so_many_lines_and_drops_the_rest(keep: int, cut: str, tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    write(tmp_path, 5)
    with path.open("a", encoding="utf-8") as file:
        file.write(cut)
    (tmp_path / f".{metrics.FILE}.123").write_text("left by a killed process")
    log = write(tmp_path, 7, keep)
    assert strictly_parsed(path) == log.rows == [row(step) for step in range(7)]
    assert [p.name for p in tmp_path.iterdir()] == [metrics.FILE]


@pytest.mark.parametrize("lines", [0, 2])
@pytest.mark.parametrize("rest", ["", '{"outer_step": 2, "outer_loss": 0.'])
def test_fewer_lines_than_the_checkpoint_says(lines: int, rest: str, tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    write(tmp_path, lines)
    with path.open("a", encoding="utf-8") as file:
        file.write(rest)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"after 3 outer steps.*holds {lines} lines"):
        MetricsLog(tmp_path, 3, tensorboard=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"\x00" * 20, b'{"outer_step": 1, "outer', b"\xff\xfe", b""])
def test_a_damaged_line_among_those_kept(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    write(tmp_path, 4)
    lines = path.read_bytes().split(b"\n")
    damaged = b"\n".join([lines[0], damage, *lines[2:]])
    path.write_bytes(damaged)
    for read in (lambda: MetricsLog(tmp_path, 3, tensorboard=False), lambda: metrics.read(path)):
        with pytest.raises(CheckpointError, match=r"line 2 of .* is damaged"):
            read()
    assert path.read_bytes() == damaged
    assert metrics.read(path, at_most=1) == [row(0)]


def test_there_are_no_rows_without_a_file(tmp_path: Path) -> None:
    assert metrics.read(tmp_path / metrics.FILE) == []


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.append(row(0, loss=math.nan, deep={"x": [math.inf, (-math.inf, 1.5)]}, word="NaN", flag=True))
    log.close()
    (found,) = strictly_parsed(tmp_path / metrics.FILE)
    assert found == row(0, loss=None, deep={"x": [None, [None, 1.5]]}, word="NaN", flag=True)


@pytest.mark.parametrize("value", [torch.tensor(1.0), {1, 2}, object()])
def test_a_value_that_is_no_number_is_refused_and_leaves_no_line(value: Any, tmp_path: Path) -> None:
    log = write(tmp_path, 2)
    log = MetricsLog(tmp_path, 2, tensorboard=False)
    with pytest.raises(TypeError, match=r"metrics hold numbers.*write float\(\.\.\.\).*'accuracy'"):
        log.append(row(2, accuracy=value))
    log.append(row(2, accuracy=0.5))
    log.close()
    assert strictly_parsed(tmp_path / metrics.FILE) == log.rows == [row(0), row(1), row(2, accuracy=0.5)]


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: for each name its (step, value)."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def rounded(value: float) -> float:
    """To float32, in which TensorBoard keeps scalars."""
    return torch.tensor(value, dtype=torch.float32).item()


def expected_events(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    names = [n for n in rows[0] if n != "outer_step" and any(isinstance(r[n], int | float) for r in rows)]
    return {n: [(r["outer_step"], rounded(r[n])) for r in rows if r[n] is not None] for n in names}


def test_tensorboard_shows_the_rows(tmp_path: Path) -> None:
    log = write(tmp_path, 5, tensorboard=True)
    assert events(tmp_path) == expected_events(log.rows)
    assert set(events(tmp_path)) == {"phase", "outer_loss"}


def test_tensorboard_shows_no_step_twice_after_going_on(tmp_path: Path) -> None:
    write(tmp_path, 5, tensorboard=True)
    write(tmp_path, 8, keep=3, tensorboard=True)
    log = write(tmp_path, 9, keep=8, tensorboard=True)
    assert events(tmp_path) == expected_events(log.rows)
    assert len(log.rows) == 9


def test_tensorboard_is_on_disk_after_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are written by a thread, which is held up here."""
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    write = writer.write
    monkeypatch.setattr(writer, "write", lambda self, data: (time.sleep(0.03), write(self, data))[1])
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for step in range(3):
        log.append(row(step))
    log.sync()
    assert events(tmp_path) == expected_events(log.rows)
    log.close()


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[tasks\]'"):
        MetricsLog(tmp_path, 0, tensorboard=True)
    assert not any(tmp_path.iterdir())


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, as wide as a terminal usually is."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("narrow")
def test_in_a_file_the_last_line_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("outer steps", 1200, done=1000) as shown:
        for step in range(200):
            shown.advance(f"outer loss {-1.5e-10 * step:.4g}", "phase 1 of 2")
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert "phase 1 of 2" in line
    assert "1200/1200" in line
    assert line.endswith("left 0:00:00 outer loss -2.985e-08")


@pytest.mark.usefixtures("narrow")
def test_in_a_file_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr("bilevel.report.progress.time.monotonic", lambda: clock)
    with progress.bar("outer steps", 10) as shown:
        for step in range(10):
            clock += 11.0
            shown.advance(f"outer loss {step}")
    counts = [line.split()[3] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["3/10", "6/10", "9/10", "10/10"]


@pytest.mark.usefixtures("narrow")
def test_a_total_that_shrinks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("outer steps", 100) as shown:
        for step in range(5):
            shown.advance(total=100 if step < 3 else 5)
    assert "5/5" in capsys.readouterr().err


def test_no_bar_where_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("outer steps", 2, show=False) as shown:
        shown.advance("outer loss 1")
    assert capsys.readouterr() == ("", "")
