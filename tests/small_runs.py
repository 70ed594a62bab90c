"""Runs of the command `bilevel` that take a second: settings, and what is in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bilevel import cli
from bilevel.training import checkpoint_files, metrics
from bilevel.training.run_record import CHECKPOINT

SMALL = [
    *("--model", "mlp", "--width", "16", "--inner-steps", "3", "--outer-batch", "64"),
    *("--evaluation-runs", "2", "--whole-set-epochs", "1"),
]


def run(out: Path, *flags: str, small: bool = True) -> None:
    """`bilevel run condensation`, in this process."""
    cli.main(["run", "condensation", *(SMALL if small else []), "--out", str(out), *flags])


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return metrics.read(folder / metrics.FILE)


def numbers_of(folder: Path) -> dict[str, Any]:
    """Everything that a run with the same settings must give again, tensors as lists; times are left out."""
    checkpoint = checkpoint_files.load(folder / CHECKPOINT)
    del checkpoint["counters"]["seconds"], checkpoint["metrics"]  # of lines with seconds
    images = {path.name: _with_lists(checkpoint_files.load(path)) for path in sorted((folder / "images").iterdir())}
    return {
        "config": config_of(folder),
        "metrics": [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(folder)],
        "checkpoint": _with_lists(checkpoint),
        "images": images,
        "accuracy": results_of(folder)["accuracy"],
    }


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_lists(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_lists(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
