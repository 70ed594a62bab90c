"""Functions that write a file whole or not at all."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file whole or not at all.

    The content goes into a temporary file in the same folder, which is then renamed in one step.

    Args:
        path: the file to write. Missing folders are made.
        content: the bytes of the file.
        previous: the new name of the file that was at `path` before; `None` to replace it. A process that is killed
            between the two renames leaves the old file at `previous` and no file at `path`.

    Raises:
        OSError: the file cannot be written. The temporary file is removed, and the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file, whole or not at all.

    Raises:
        ValueError: the content holds NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        leftover.unlink(missing_ok=True)
