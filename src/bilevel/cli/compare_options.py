"""The options of the command `bilevel compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bilevel.planning import registry

NOT_COMPARED = ("forward", "first-order")
"""Estimators that are compared if they are named: the first costs N units for N meta parameters, and the second is the
derivative by the initial parameters alone."""


@dataclass(frozen=True)
class CompareOptions:
    """Options of `bilevel compare`, besides the settings of the task."""

    estimators: tuple[str, ...] = field(
        default=tuple(name for name in registry.by_name() if name not in NOT_COMPARED),
        metadata={"metavar": "NAME [NAME ...]"},
    )
    """Estimators, such as reverse or "forward-gradient(directions=32)"."""
    seed: int = 0
    """Determines every random number."""
    data_dir: Path | None = None
    """Folder with the data files, for presets that need any."""
    repeats: int = 1
    """Draws of random directions for each estimator that has any; with more than one, bias and variance are shown."""
    compile: str | None = field(default=None, metadata={"metavar": "BACKEND"})
    """Compile the inner gradient and its derivatives with a backend of torch.compile, such as inductor."""
    out: Path | None = None
    """Also write the table to this JSON file, and a plot of error against units beside it (.png)."""
