"""Pictures of condensed images, and of the accuracy over the outer steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bilevel.report import page

MOST_OF_A_CLASS = 20
"""The largest number of images of one class that the report shows."""
_COLUMNS = 10
"""The number of classes beside each other."""
_INCHES = 1.1
"""The width and height of an image in a report."""

_NAMES = {
    "condensed": "condensed images",
    "condensed_convnet": "condensed images, by a ConvNet",
    "condensed_mlp": "condensed images, by an MLP",
    "condensed_resnet": "condensed images, by a ResNet",
    "random_real": "as many random real images",
    "class_means": "the mean image of each class",
    "centroids": "as many centres of clusters",
    "whole_set": "the whole real set",
}


def names_of(trials: Iterable[str]) -> dict[str, str]:
    """Return the name of each kind of training in reports."""
    return {trial: _NAMES[trial] for trial in trials}


def over_time(snapshots: Sequence[tuple[int, Tensor]], ipc: int, names: Sequence[str]) -> str:
    """Show the first image of each class at several outer steps, with a column per class and a row per step.

    Of many classes, the first ten are shown.
    """
    rows, columns = len(snapshots), min(_COLUMNS, len(snapshots[0][1]) // ipc)
    fig, axes = page.figure(rows, columns, figsize=(_INCHES * columns, _INCHES * rows + 0.2), squeeze=False)
    for row, (step, images) in enumerate(snapshots):
        for column in range(columns):
            axis = axes[row, column]
            _show(axis, images[column * ipc])
            if row == 0:
                axis.set_title(names[column], fontsize=9)
            if column == 0:
                axis.set_ylabel(f"step {step}", rotation=0, ha="right", va="center", fontsize=9)
    fig.subplots_adjust(wspace=0.08, hspace=0.08)
    return page.as_picture(fig)


def final(images: Tensor, ipc: int, names: Sequence[str]) -> str:
    """Show at most `MOST_OF_A_CLASS` condensed images of each class, in blocks of ten classes beside each other."""
    shown = min(ipc, MOST_OF_A_CLASS)
    blocks = -(-len(names) // _COLUMNS)
    columns = min(_COLUMNS, len(names))
    fig, axes = page.figure(
        blocks * shown, columns, figsize=(_INCHES * columns, _INCHES * 1.15 * blocks * shown), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for label, name in enumerate(names):
        block, column = divmod(label, _COLUMNS)
        for row in range(shown):
            axis = axes[block * shown + row, column]
            axis.axis("on")
            _show(axis, images[label * ipc + row])
            if row == 0:
                axis.set_title(name, fontsize=9)
    fig.subplots_adjust(wspace=0.08, hspace=0.2 if shown == 1 else 0.08)
    return page.as_picture(fig)


def accuracy_over_steps(rows: Sequence[Mapping[str, Any]], final_accuracy: float | None = None) -> str:
    """Plot the accuracy of the evaluations during the outer loop, and that of the evaluation at the end."""
    watched = [(row["outer_step"] + 1, 100 * row["watched_accuracy"]) for row in rows if "watched_accuracy" in row]
    fig, axis = page.figure(figsize=(7, 3.2))
    axis.plot(*zip(*watched, strict=True), "o-", label="on the way, on a part of the test set")
    if final_accuracy is not None:
        axis.axhline(100 * final_accuracy, color="C1", linestyle="--", label="at the end, on the whole test set")
    axis.set(xlabel="outer step", ylabel="test accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return page.as_picture(fig)


def _show(axis: Any, image: Tensor) -> None:
    """Show an image. One whose pixels leave [0, 1] is shown from its smallest to its largest value."""
    pixels = np.moveaxis(image.cpu().numpy(), 0, -1)
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        pixels = (pixels - low) / max(high - low, 1e-12)
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
