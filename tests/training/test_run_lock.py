"""One run at a time in a folder: two are refused, and a killed one is resumed at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import pytest
from fit_cases import assert_as_undisturbed, long_run

from bilevel.training import run_lock, run_record
from bilevel.training.run_lock import LOCK, OWNER, RunLock

HERE = str(Path(__file__).parent)


def in_another_process(program: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )


HOLDS = """
import sys, time
from pathlib import Path
from bilevel.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(tmp_path: Path) -> Any:
    """A process that holds the folder."""
    with in_another_process(HOLDS, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_in_a_folder_is_refused_by_name(held: Any, tmp_path: Path) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=rf"is in use: process {held.pid} on {socket.gethostname()}, started"):
            long_run(out=tmp_path, resume=resume)
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL as POSIX has it")
def test_a_killed_run_lets_go(held: Any, tmp_path: Path) -> None:
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert (tmp_path / OWNER).exists()
    assert_as_undisturbed(long_run(out=tmp_path), tmp_path)
    assert not (tmp_path / OWNER).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_run_within_a_run_is_refused(tmp_path: Path) -> None:
    def again(_: Any) -> None:
        long_run(out=tmp_path, resume=True)

    with pytest.raises(FileExistsError, match="is in use"):
        long_run(out=tmp_path, callbacks=[again])
    assert_as_undisturbed(long_run(out=tmp_path, resume=True), tmp_path)


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    RunLock(tmp_path / "new").release()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    RunLock(tmp_path / "old").release()
    assert list((tmp_path / "old").iterdir()) == []


# -- file systems without locks ----------------------------------------------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: Any, *_: Any, **__: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_owner_is_named_and_the_user_warned(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has no locks, so a second run .* See to it that one run at a time"):
        assert_as_undisturbed(long_run(out=tmp_path), tmp_path)
    owner = {"host": "elsewhere", "process": 17, "since": "2026-01-01 00:00:00"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    with pytest.warns(UserWarning, match="process 17 on elsewhere, started on 2026-01-01 00:00:00, was"):
        long_run(out=tmp_path, resume=True)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_that_exists_here_is_the_owner(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    owner = {"host": socket.gethostname(), "process": sleeper.pid, "since": "today"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    with pytest.raises(FileExistsError, match=f"process {sleeper.pid}"):
        long_run(out=tmp_path)
    sleeper.kill()
    sleeper.wait()
    with pytest.warns(UserWarning, match="was killed while it did"):
        long_run(out=tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 3}', '{"host": 1, "process": "x", "since": null}'])
@pytest.mark.usefixtures("no_locks")
def test_a_damaged_note_of_the_owner_does_no_harm(content: str, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text(content)
    with pytest.warns(UserWarning, match="has no locks"):
        long_run(out=tmp_path)


# -- folders that can't be written -------------------------------------------------------------------------------------


def test_a_folder_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_run(out=tmp_path)

    def acquire(self: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / LOCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match=r"cannot write to .*Permission denied.*copy the run to one to resume it"):
        long_run(out=tmp_path, resume=True)


def test_metrics_that_cannot_be_written_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_run(out=tmp_path)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bilevel.training.metrics.write_bytes", refuse)
    with pytest.raises(OSError, match=r"Permission denied: cannot write to .*Once repaired, resume"):
        long_run(out=tmp_path, resume=True)
    assert not (tmp_path / OWNER).exists()


# -- kills, many times -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL as POSIX has it")
def test_kills_at_any_time_are_survived(tmp_path: Path) -> None:
    """The process dies after so many milliseconds; whoever resumes the run gets the numbers of an undisturbed one."""
    program = "import sys, fit_cases; print('on', flush=True); fit_cases.long_run(out=sys.argv[1], resume=True)"
    for milliseconds in range(0, 300, 30):
        folder = tmp_path / str(milliseconds)
        with in_another_process(program, folder) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with suppress(subprocess.TimeoutExpired):
                process.wait(milliseconds / 1000)
            process.kill()
        assert_as_undisturbed(long_run(out=folder, resume=True), folder)


def test_the_lock_is_taken_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    lock, load = run_lock.RunLock.__init__, run_record.checkpoint_files.load
    monkeypatch.setattr(run_lock.RunLock, "__init__", lambda self, folder: order.append("lock") or lock(self, folder))
    long_run(out=tmp_path)
    monkeypatch.setattr(run_record.checkpoint_files, "load", lambda path: order.append("load") or load(path))
    order.clear()
    long_run(out=tmp_path, resume=True)
    assert order[:2] == ["lock", "load"]


GROWS = """
import resource, sys, torch, bilevel
import psutil
problem = bilevel.GradientDescent(
    lambda theta, phi, batch: (theta - phi).square().sum(), lambda theta, phi, batch: theta.square().sum(),
    torch.zeros(3), bilevel.optimizer(torch.optim.SGD, lr=0.1),
)
resident = []
def look(step):
    if step.number % 1000 == 999:
        resident.append(psutil.Process().memory_info().rss)
bilevel.fit(
    problem, torch.ones(3), 2, estimator=bilevel.Reverse(), steps=4000, out=sys.argv[1], callbacks=[look],
    progress=False,
)
print(max(b - a for a, b in zip(resident[1:], resident[2:])))
"""


@pytest.mark.slow
def test_a_long_run_grows_by_less_than_a_mebibyte_in_a_thousand_steps(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    with in_another_process(GROWS, tmp_path) as process:
        printed, _ = process.communicate()
    assert int(printed) < 2**20
