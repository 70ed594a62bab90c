"""What is kept of a run: its metrics, and a checkpoint from which it goes on to the very same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel import checkpoints, metrics
from bilevel.errors import CheckpointError
from bilevel.files import remove_leftovers
from bilevel.metrics import MetricsLog, Row
from bilevel.outer_loop import OuterLoop

CHECKPOINT = "checkpoint.safetensors"


class RunRecord:
    """What is kept of a run: its rows; and in its folder, if it has one, the metrics and a checkpoint.

    A checkpoint holds the state after the last outer step that is complete, with its callbacks and its line in the
    metrics, wherever an interruption finds the loop itself.
    """

    def __init__(
        self, loop: OuterLoop, folder: Path | None, config: Mapping[str, Any], resume: bool, tensorboard: bool
    ) -> None:
        """Refuse a folder that holds another run; or go on with the one in it."""
        self.rows: list[Row] = []
        self._loop = loop
        self._log: MetricsLog | None = None
        if folder is None:
            return
        self._path = folder / CHECKPOINT
        self._identity = loop.identity(config)
        self._saved_step: int | None = None
        checkpoints.require_storable(self._content(loop.state()))
        if resume and self._path.exists():
            loop.restore(self._load())
            self._saved_step = loop.outer_step
        elif not resume and (self._path.exists() or metrics.exist(folder)):
            raise FileExistsError(f"{folder} already holds a run; resume it (resume=True) or take another folder")
        self._log = MetricsLog(folder, loop.outer_step, tensorboard)
        remove_leftovers(self._path)
        self.rows = self._log.rows
        self._complete = loop.state()

    def add(self, row: Row) -> None:
        """The loop's last outer step is complete."""
        if self._log is None:
            self.rows.append(row)
        else:
            self._log.append(row)
            self._complete = self._loop.state()

    def save(self) -> None:
        """Write the checkpoint, if it is not there already."""
        step = None if self._log is None else self._complete["counters"]["outer_step"]
        if self._log is None or self._saved_step == step:
            return
        self._log.sync()
        checkpoints.save(self._path, self._content(self._complete))
        self._saved_step = step

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.close()

    def _content(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {"identity": self._identity, **state}

    def _load(self) -> dict[str, Any]:
        content = checkpoints.load(self._path)
        if content.keys() != self._content(self._loop.state()).keys():
            raise CheckpointError(f"{self._path} is a checkpoint, but not one of bilevel.fit; take another folder")
        _require_same_identity(self._path, content["identity"], self._identity)
        return content


def _require_same_identity(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise with the settings that differ."""
    differing: dict[str, tuple[Any, Any]] = {}
    for old, new in (({**stored, "config": None}, {**wanted, "config": None}), (stored["config"], wanted["config"])):
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                differing.setdefault(name, (old.get(name), new.get(name)))
    if differing:
        lines = "; ".join(f"{name}: {there!r} there, {here!r} here" for name, (there, here) in differing.items())
        raise CheckpointError(f"{path} belongs to a run of another configuration ({lines}); take another folder")
