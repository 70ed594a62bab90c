"""Progress bars with elapsed and remaining time, on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0
"""The time between two printed lines if standard error is a file, in which a bar cannot be redrawn."""


class Bar:
    """A progress bar that counts steps."""

    def __init__(self, progress: Progress, description: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, completed=done, note="")
        self._printed = time.monotonic()

    def advance(self, note: str = "", description: str | None = None, total: int | None = None) -> None:
        """Count one more step.

        Args:
            note: a text at the end of the line.
            description: a new text at the start of the line; `None` leaves it.
            total: a new number of steps; `None` leaves it.
        """
        self._progress.update(self._task, advance=1, note=note, description=description, total=total)
        console = self._progress.console
        if console.is_terminal or self._progress.disable or self._progress.finished:
            return
        if time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            console.print(self._progress.get_renderable())


@contextmanager
def bar(description: str, total: int, done: int = 0, show: bool = True) -> Iterator[Bar]:
    """Show a progress bar while the block runs; its last state stays on the screen.

    Args:
        description: the text at the start of the line.
        total: the number of steps.
        done: the number of steps that are done already.
        show: whether anything is shown at all.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not show,
    )
    with progress:
        yield Bar(progress, description, total, done)
