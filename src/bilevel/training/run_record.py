"""The record of a run: its metrics, and checkpoints from which it resumes with the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilevel.distributed.workers import Workers
from bilevel.errors import CheckpointError
from bilevel.report.files import remove_leftovers
from bilevel.training import checkpoint_files, metrics, outer_state
from bilevel.training.metrics import MetricsLog, Row
from bilevel.training.outer_loop import OuterLoop
from bilevel.training.run_lock import RunLock
from bilevel.training.settings import RunFolder

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"


class RunRecord:
    """The record of a run: its rows and, if it has a folder, the metrics and the last two checkpoint files in it.

    A checkpoint file holds the state after the last complete outer step, also if the loop is interrupted within a later
    step. A step is complete after its callbacks have run and its line is in the metrics. If the newest checkpoint file
    is damaged, the run continues from the one before it, and later lines are removed from the metrics.
    """

    def __init__(self, loop: OuterLoop, settings: RunFolder | None, resume: bool) -> None:
        """Open the folder, and with `resume` continue the run in it.

        Raises:
            FileExistsError: the folder already holds a run, and `resume` is false; or another process is writing one.
            CheckpointError: the checkpoint files or the metrics are damaged, or belong to another configuration.
            OSError: the folder cannot be written to.
        """
        self.rows: list[Row] = []
        self._loop = loop
        self._log: MetricsLog | None = None
        self._lock: RunLock | None = None
        self._restored: dict[str, Any] | None = None
        if settings is None:
            return
        folder = Path(settings.path)
        self._path, self._previous = folder / CHECKPOINT, folder / PREVIOUS
        self._lock = _locked(folder)
        try:
            self._open(loop, settings, resume)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, loop: OuterLoop, settings: RunFolder, resume: bool) -> None:
        folder = self._path.parent
        self._identity = outer_state.identity(loop, settings.config)
        self._saved_step: int | None = None
        self._newest_is_whole = True
        checkpoint_files.require_storable(self._content(outer_state.state(loop)))
        there = self._path.exists() or self._previous.exists()
        if resume and there:
            self._restored = self._load()
            outer_state.restore(loop, self._restored)
            self._saved_step = loop.progress.outer_step
        elif not resume and (there or metrics.exist(folder)):
            raise FileExistsError(
                f"{folder} already holds a run; resume it (out=bilevel.RunFolder(path, resume=True)) "
                "or take another folder"
            )
        with self._saying_where_to_go_on():
            self._log = MetricsLog(folder, loop.progress.outer_step, settings.tensorboard)
            remove_leftovers(self._path)
        self.rows = self._log.rows
        self._complete = outer_state.state(loop)

    def share(self, workers: Workers) -> None:
        """Restore the other workers from the checkpoint that the first worker has loaded."""
        content, rows = workers.broadcast("the checkpoint", (self._restored, self.rows))
        self._restored = None
        if content is not None and not workers.first:
            outer_state.restore(self._loop, content)
            self.rows = rows

    def add(self, row: Row) -> None:
        """Record the row of a complete outer step."""
        if self._log is None:
            self.rows.append(row)
            return
        with self._saying_where_to_go_on():
            self._log.append(row)
        self._complete = outer_state.state(self._loop)

    def save(self) -> None:
        """Write a checkpoint file of the last complete outer step, unless it exists already."""
        step = None if self._log is None else self._complete["counters"]["outer_step"]
        if self._log is None or self._saved_step == step:
            return
        with self._saying_where_to_go_on():
            self._log.sync()
            previous = self._previous if self._newest_is_whole else None
            checkpoint_files.save(self._path, self._content(self._complete), previous)
        self._saved_step, self._newest_is_whole = step, True

    def close(self) -> None:
        """Close the files, and let others use the folder."""
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _saying_where_to_go_on(self) -> Iterator[None]:
        """Context manager that adds advice on how to resume the run to errors of the file system."""
        try:
            yield
        except OSError as error:
            kept = "there is no checkpoint yet"
            if self._saved_step is not None:
                kept = f"the checkpoint of outer step {self._saved_step} is whole"
            advice = f"cannot write to {self._path.parent}; {kept}. Once repaired, resume (resume=True, --resume)"
            raise OSError(error.errno, f"{error.strerror or error}: {advice}") from error

    def _content(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {"identity": self._identity, "metrics": {} if self._log is None else self._log.prefix, **state}

    def _load(self) -> dict[str, Any]:
        """Return the content of the newest checkpoint file that is not damaged, and whose metrics are not."""
        if not self._path.exists():  # the process was killed between two moves of `files.write_bytes`
            return self._whole(self._previous)
        try:
            return self._whole(self._path)
        except _DamagedError as newest:
            try:
                content = self._whole(self._previous)
            except _DamagedError:
                raise CheckpointError(str(newest)) from None
            self._newest_is_whole = False
            warnings.warn(
                f"{newest}. Going on from the checkpoint before it instead, of outer step "
                f"{content['counters']['outer_step']}",
                stacklevel=2,
            )
            return content

    def _whole(self, path: Path) -> dict[str, Any]:
        """Return the content of a checkpoint file.

        Raises:
            _DamagedError: the file is damaged, or the metrics up to it are.
            CheckpointError: it is of another run.
        """
        try:
            content = checkpoint_files.load(path)
        except CheckpointError as error:
            raise _DamagedError(str(error)) from error
        if content.keys() != self._content(outer_state.state(self._loop)).keys():
            raise CheckpointError(f"{path} is a checkpoint, but not one of bilevel.fit; take another folder")
        _require_same_identity(path, content["identity"], self._identity)
        try:
            metrics.require_prefix(path.parent, content["metrics"])
        except CheckpointError as error:
            raise _DamagedError(str(error)) from error
        return content


class _DamagedError(CheckpointError):
    """A checkpoint file, or the metrics that belong to it, is damaged. The one before it may be whole."""


def _locked(folder: Path) -> RunLock:
    try:
        return RunLock(folder)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to {folder} ({error.strerror or error}); a run writes its metrics and checkpoints there. "
            "Take a folder in which you may write, or copy the run to one to resume it",
        ) from error


def _require_same_identity(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a CheckpointError with the settings that differ, if there are any."""
    differing: dict[str, tuple[Any, Any]] = {}
    for old, new in (({**stored, "config": None}, {**wanted, "config": None}), (stored["config"], wanted["config"])):
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                differing.setdefault(name, (old.get(name), new.get(name)))
    if differing:
        lines = "; ".join(f"{name}: {there!r} there, {here!r} here" for name, (there, here) in differing.items())
        raise CheckpointError(f"{path} belongs to a run of another configuration ({lines}); take another folder")
