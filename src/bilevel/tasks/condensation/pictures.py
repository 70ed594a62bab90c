"""Pictures of condensed images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bilevel.report import page


def over_time(snapshots: Sequence[tuple[int, Tensor]], ipc: int) -> str:
    """Show the first image of every class at several outer steps, with a column per class and a row per step."""
    rows, columns = len(snapshots), len(snapshots[0][1]) // ipc
    fig, axes = page.figure(rows, columns, figsize=(0.85 * columns, 0.85 * rows + 0.2), squeeze=False)
    for row, (step, images) in enumerate(snapshots):
        for column in range(columns):
            axis = axes[row, column]
            _show(axis, images[column * ipc])
            if row == 0:
                axis.set_title(str(column), fontsize=9)
            if column == 0:
                axis.set_ylabel(f"step {step}", rotation=0, ha="right", va="center", fontsize=9)
    fig.subplots_adjust(wspace=0.08, hspace=0.08)
    return page.as_picture(fig)


def final(images: Tensor, ipc: int) -> str:
    """Show the condensed images, with a column for each class and at most `MOST_OF_A_CLASS` images of it."""
    columns, rows = len(images) // ipc, min(ipc, MOST_OF_A_CLASS)
    fig, axes = page.figure(rows, columns, figsize=(0.85 * columns, 0.85 * rows), squeeze=False)
    for row in range(rows):
        for column in range(columns):
            _show(axes[row, column], images[column * ipc + row])
            if row == 0:
                axes[row, column].set_title(str(column), fontsize=9)
    fig.subplots_adjust(wspace=0.08, hspace=0.08)
    return page.as_picture(fig)


MOST_OF_A_CLASS = 20
"""The largest number of images of one class that the report shows."""

NAMES = {
    "condensed": "condensed images",
    "random_real": "as many random real images",
    "whole_set": "the whole real set",
}


def _show(axis: Any, image: Tensor) -> None:
    pixels = np.moveaxis(image.cpu().numpy(), 0, -1)
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
