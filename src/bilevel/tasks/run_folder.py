"""The folder of a run: its files, and which run may write into it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bilevel.errors import CheckpointError, DataError
from bilevel.report.files import remove_leftovers, write_json
from bilevel.tasks.options import RunOptions
from bilevel.tasks.task import Task
from bilevel.training import metrics
from bilevel.training.run_record import CHECKPOINT

CONFIG, RESULTS, REPORT, STAGES = "config.json", "results.json", "report.html", "stages"
LENGTHS = ("phases", "outer_steps")
"""The entries of `config.json` that say how long a run is. The last phase of a run can be made longer."""


def folder_of(task: Task[Any], options: RunOptions) -> Path:
    """Return the folder for the run's files."""
    return options.out or Path("runs") / task.name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file in a run's folder.

    Raises:
        DataError: the file is missing, damaged, or was not written by this library.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}; the folder of a finished run holds one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # the file is not JSON, or not text
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} was not written by bilevel: it holds a {type(content).__name__}")
    return content


@contextmanager
def claimed(folder: Path, config: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Context that writes the run's settings into its folder, and removes them if the run fails before its first step.

    The settings of a run that is made longer are replaced at the end of the context.

    Args:
        folder: the run's folder.
        config: the run's settings.
        resume: whether the folder may hold an earlier part of this run.

    Raises:
        NotADirectoryError: the folder is a file.
        FileExistsError: the folder already holds a run, or other files.
        CheckpointError: the folder holds a run with other settings.
    """
    path = folder / CONFIG
    remove_leftovers(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; --out names a folder")
    if path.exists():
        if not resume:
            raise FileExistsError(f"{folder} already holds a run; go on with it (--resume) or take another --out")
        old, new = read_json(path), json.loads(json.dumps(config))
        _require_same_config(folder, old, new)
        yield
        if old != new:
            write_json(path, config)
        return
    if _has_begun(folder):
        raise FileExistsError(
            f"{folder} holds a run without {CONFIG}, which this command did not write; take another --out"
        )
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        write_json(path, config)
        yield
    except BaseException:
        if not _has_begun(folder):
            with suppress(OSError):  # the first error is reported
                for leftover in (path, folder / metrics.FILE):
                    leftover.unlink(missing_ok=True)
                for place in missing:
                    place.rmdir()
        raise


def _require_same_config(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = (_of_any_length(each) for each in (old, new))
    differing = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    if differing:
        lines = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in differing)
        raise CheckpointError(f"{folder} holds a run of another configuration ({lines}); take another --out")


def _of_any_length(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without the number of steps of the last phase, which "reverse:200:20" has in the middle."""
    *earlier, last = config.get("phases") or [""]
    head, *counts = str(last).split(":")
    return {k: v for k, v in config.items() if k not in LENGTHS} | {"phases": [*earlier, head, counts[1:]]}


def _has_begun(folder: Path) -> bool:
    return (folder / CHECKPOINT).exists() or bool(metrics.read(folder / metrics.FILE)) or (folder / STAGES).exists()
