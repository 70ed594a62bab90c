"""Plot of the error of each method against its cost in units, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bilevel.comparison.compare import ComparisonRow
from bilevel.report import page
from bilevel.report.files import write_bytes


def write(path: Path, rows: Sequence[ComparisonRow], title: str) -> None:
    """Write a PNG file with a point for each row.

    Random estimates are round points with their intervals, and biased ones are squares. An error of 0 is a triangle at
    the bottom.

    Args:
        path: the file to write.
        rows: the rows of a comparison.
        title: the title of the plot.
    """
    write_bytes(path, as_png(rows, title))


def as_png(rows: Sequence[ComparisonRow], title: str) -> bytes:
    """Return the plot as the content of a PNG file."""
    figure, axis = page.figure(figsize=(7.5, 4.5))
    squared = [row.relative_error**2 for row in rows]
    floor = min([value for value in squared if value > 1e-12], default=1e-2) / 10
    for number, (row, value) in enumerate(zip(rows, squared, strict=True)):
        shown, width = max(value, floor), row.half_widths.get("squared_error", 0.0)
        bars = [[min(width, 0.9 * shown)], [width]] if width else None
        exact = value < floor
        marker = "v" if exact else "s" if row.standard_error is None else "o"
        label = f"{row.estimator}: exact" if exact else row.estimator
        axis.errorbar(
            [row.units],
            [shown],
            bars,
            fmt=marker,
            color=f"C{number % 10}",
            label=label,
            markerfacecolor="none" if number >= 10 else None,
            capsize=2,
        )
    axis.set(xscale="log", yscale="log", xlabel="units: time over that of the plain inner loop", title=title)
    axis.set_ylabel("relative squared error")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    return page.as_png(figure)
