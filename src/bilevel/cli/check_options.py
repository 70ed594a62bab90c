"""The options of `bilevel check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CheckOptions:
    """What `bilevel check` is told besides the task's own settings."""

    estimators: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME [NAME ...]"})
    """Estimators that are compared with differences of whole solves; by default reverse and forward-gradient."""
    seed: int = 0
    """Determines every random number."""
    data_dir: Path | None = None
    """Folder with the data files, for presets that need any."""
    stable: bool = False
    """Also examine whether tangents grow from step to step, with at most eight further solves."""
    budget: float | None = field(default=None, metadata={"metavar": "SECONDS"})
    """Seconds; parts that would not fit are reported as not checked."""
    out: Path | None = None
    """Also write the report to this JSON file."""
