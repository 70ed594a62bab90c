"""The page of a run that `fit` wrote in somebody's own script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bilevel.errors import DataError
from bilevel.report import page
from bilevel.training import checkpoint_files, metrics
from bilevel.training.run_record import CHECKPOINT

PAGE = "report.html"


def write_run_page(folder: Path) -> Path:
    """Write `report.html` into the folder of a `fit`, from its metrics and its checkpoint, and return the path.

    Raises:
        DataError: the folder holds no outer step.
        CheckpointError: a file in it is damaged.
    """
    rows = metrics.read(folder / metrics.FILE)
    if not rows:
        raise DataError(f"{folder} holds no run: there is no outer step in {metrics.FILE}")
    settings: dict[str, Any] = {}
    if (folder / CHECKPOINT).is_file():
        settings = checkpoint_files.load(folder / CHECKPOINT)["identity"]
    losses = [row["outer_loss"] for row in rows if row["outer_loss"] is not None]
    headline = [("outer steps", str(len(rows))), ("outer loop", f"{rows[-1]['seconds']:.0f} s")]
    if losses:
        shown = {"first outer loss": losses[0], "last": losses[-1], "least": min(losses)}
        headline += [(name, f"{loss:.4g}") for name, loss in shown.items()]
    phases = [str(phase) for phase in settings.get("phases", [])]
    sections = [page.curves(rows, phases or ["unknown, since there is no checkpoint"]), page.settings(settings)]
    page.write(folder / PAGE, f"bilevel: {folder.name}", f"{len(rows)} outer steps", headline, sections)
    return folder / PAGE
