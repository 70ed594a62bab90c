"""Plots of the results of cleaning."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bilevel.report import page


def histograms(weights: Mapping[str, Sequence[float]]) -> str:
    """Plot a histogram of the weights, separately for wrong and right labels."""
    fig, axis = page.figure(figsize=(6, 3))
    edges = np.linspace(0, 1, 31)
    for name, colour in (("right", "C0"), ("wrong", "C3"), ("all", "C0")):
        if name in weights:
            what = "all rows" if name == "all" else f"{name} label"
            axis.hist(weights[name], edges, color=colour, alpha=0.6, label=f"{what} ({len(weights[name])})")
    axis.set(xlabel="weight", ylabel="examples", xlim=(0, 1))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return page.as_picture(fig)


def roc(curve: Mapping[str, Sequence[float]], auc: float) -> str:
    """Plot the share of wrong labels found against the share of right labels suspected, for every threshold."""
    fig, axis = page.figure(figsize=(3.6, 3.6))
    axis.plot(curve["false_positives"], curve["true_positives"], color="C0", label=f"area {auc:.3f}")
    axis.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="guessing: 0.5")
    axis.set(xlabel="right labels suspected, fraction", ylabel="wrong labels found, fraction", aspect="equal")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    return page.as_picture(fig)


def suspects(examples: Sequence[Mapping[str, Any]]) -> str:
    """Show the images with the smallest weights, each with its given label and its true label."""
    columns = min(10, len(examples))
    rows = -(-len(examples) // columns)
    fig, axes = page.figure(rows, columns, figsize=(1.0 * columns, 1.35 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, example in zip(axes.flat, examples, strict=False):
        flat = np.frombuffer(base64.b64decode(example["pixels"]), np.uint8)
        axis.imshow(flat.reshape(example["shape"]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        wrong = example["label"] != example["true_label"]
        title = f"“{example['label']}”, is {example['true_label']}" if wrong else f"“{example['label']}”: right"
        axis.set_title(title, fontsize=8, color="C3" if wrong else "C0")
    fig.subplots_adjust(wspace=0.1, hspace=0.35)
    return page.as_picture(fig)


NAMES = {
    "cleaned": "all, with the weights found",
    "everything": "all, weighted alike",
    "clean_part": "the rightly labelled alone",
    "trusted_alone": "the trusted examples alone",
}
