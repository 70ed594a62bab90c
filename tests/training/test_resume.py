"""Interrupted runs go on to the same numbers."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from fit_cases import (
    ALL_OPTIMIZERS,
    BEFORE_CLAMPING,
    FIRST_PHASE,
    LONG_RUN,
    START,
    STEPS,
    Interruption,
    assert_as_undisturbed,
    checkpoint_of,
    contents,
    exact,
    lines_of,
    long_run,
    noisy_inner_batches,
    phases_of,
    train,
    train_noisily,
    undisturbed,
    without_seconds,
)

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


def test_the_long_run_has_what_the_tests_below_need(tmp_path: Path) -> None:
    assert phases_of(undisturbed()) == [0] * FIRST_PHASE + [1] * (STEPS - FIRST_PHASE)
    assert LONG_RUN[0].steps > FIRST_PHASE
    assert_as_undisturbed(long_run(out=tmp_path), tmp_path)


# Where the interruption strikes: at the start of an estimate, in the update, or when the step is done.
PLACES: dict[str, Callable[[BaseException, int], dict[str, Any]]] = {
    "batches": lambda error, at: {"inner_batches": Interruption(error, at, noisy_inner_batches)},
    "project": lambda error, at: BEFORE_CLAMPING.append(Interruption(error, at)) or {},
    "callback": lambda error, at: {"callbacks": [Interruption(error, at)]},
}


@pytest.mark.sampled(every=3)
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
        BEFORE_CLAMPING.clear()
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


@pytest.mark.sampled(every=5)
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


@pytest.mark.sampled(every=2)
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
    program = f"import test_resume; test_resume.run_until_killed({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
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

    again = long_run(out=tmp_path, resume=True, inner_batches=never, callbacks=[never])
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
