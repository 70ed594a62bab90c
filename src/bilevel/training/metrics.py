"""The metrics of a run: one line of JSON for each outer step and, optionally, TensorBoard events."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from bilevel.errors import CheckpointError
from bilevel.report.files import remove_leftovers, write_bytes

FILE = "metrics.jsonl"

Row = dict[str, Any]
"""The numbers of one outer step by name."""


class MetricsLog:
    """The file `metrics.jsonl` in a run's folder, with one line for each outer step, and optional TensorBoard events.

    No file is created before the first line.
    """

    def __init__(self, folder: Path, keep: int, tensorboard: bool) -> None:
        """Read the first `keep` lines of an earlier part of the run, and remove all later lines.

        Raises:
            CheckpointError: the file has fewer lines, or a damaged one.
            OSError: the file cannot be written.
        """
        self._path = folder / FILE
        self._file: FileIO | None = None
        self._writer: Any = None
        self._make_writer = _tensorboard_writer(folder / "tensorboard", keep) if tensorboard else None
        self.rows = read(self._path, keep)
        if len(self.rows) < keep:
            raise CheckpointError(
                f"the checkpoint was written after {keep} outer steps, but {self._path} holds {len(self.rows)} lines; "
                "start again in another folder"
            )
        remove_leftovers(self._path)
        self._hash, self._bytes = hashlib.sha256(), 0
        if self._path.exists():
            kept = b"".join(line + b"\n" for line in self._path.read_bytes().split(b"\n")[:keep])
            self._count(kept)
            write_bytes(self._path, kept)

    def append(self, row: Row) -> None:
        """Add the numbers of one outer step. They are passed to the operating system before this function returns."""
        line = _line(row).encode()
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        _write_whole(self._file, line)
        self._count(line)
        if self._writer is None and self._make_writer is not None:
            self._writer = self._make_writer()
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "outer_step":
                    self._writer.add_scalar(name, value, row["outer_step"])
        self.rows.append(row)

    @property
    def prefix(self) -> dict[str, Any]:
        """The number of bytes of all lines so far, and their SHA-256 hash."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def _count(self, content: bytes) -> None:
        self._hash.update(content)
        self._bytes += len(content)

    def sync(self) -> None:
        """Wait until all lines are on disk, so that a checkpoint never refers to a line that is lost in a crash."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _write_whole(file: FileIO, line: bytes) -> None:
    """Write a line completely, or remove the part that was written, such as the first part when the disk is full."""
    before, written = file.seek(0, os.SEEK_END), 0
    try:
        while written < len(line):
            written += file.write(line[written:])
    except BaseException:
        with suppress(OSError):
            file.truncate(before)
        raise


def exist(folder: Path) -> bool:
    """Whether the folder holds metrics of a run."""
    path = folder / FILE
    return path.is_file() and path.stat().st_size > 0


def require_prefix(folder: Path, prefix: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless the metrics begin with the lines that a checkpoint was written after.

    Args:
        folder: the folder of the run.
        prefix: `MetricsLog.prefix` as it was then.
    """
    path = folder / FILE
    count = prefix["bytes"]
    with path.open("rb") if path.is_file() else nullcontext() as file:
        there = b"" if file is None else file.read(count)
    if len(there) < count:
        raise CheckpointError(
            f"{path} is damaged: it has {len(there)} bytes, and {count} when the checkpoint was written; restore it, "
            "or start again in another folder"
        )
    if hashlib.sha256(there).hexdigest() != prefix["sha256"]:
        raise CheckpointError(
            f"{path} is damaged: its first {count} bytes are not those after which the checkpoint was written; restore "
            "it, or start again in another folder"
        )


def read(path: Path, at_most: int | None = None) -> list[Row]:
    """Read the rows of a `metrics.jsonl`. An incomplete last line is ignored.

    Args:
        path: the file.
        at_most: the largest number of rows to read; by default all.

    Raises:
        CheckpointError: a line is damaged.
    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    for line in path.read_bytes().split(b"\n")[:-1][:at_most]:
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # errors of JSON and of Unicode are ValueErrors
            raise CheckpointError(f"line {len(rows) + 1} of {path} is damaged ({error})") from error
    return rows


def _line(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_without_non_finite(row), allow_nan=False) + "\n"
    except TypeError as error:
        raise TypeError(
            f"metrics hold numbers, strings, lists and dicts ({error}); write float(...) around a tensor: {row!r}"
        ) from error


def _without_non_finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by `None`."""
    if isinstance(value, Mapping):
        return {k: _without_non_finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard_writer(folder: Path, purge_step: int) -> Callable[[], Any]:
    """Return a function that makes a TensorBoard writer.

    Raises:
        ImportError: the package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs the package tensorboard: pip install 'bilevel[tasks]'") from error
    return lambda: SummaryWriter(str(folder), purge_step=purge_step)
