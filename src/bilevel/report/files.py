"""Writing files so that nothing half-written is ever found under its name."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file whole or not at all: into a temporary neighbour first, then under its name in one move.

    What had the name before gets that of `previous`, if there is one: a process that is killed between the two moves
    leaves the old file under that name, and none under its own.
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
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """As `write_text`, indented. NaN and infinity, which JSON does not have, are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def remove_leftovers(path: Path) -> None:
    """Remove the temporary neighbours left by processes that were killed while they wrote this file."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        leftover.unlink(missing_ok=True)
