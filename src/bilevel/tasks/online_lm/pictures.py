"""Plots of the scores of each method, and of the weights of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.report import page

NAMES = {
    "meta_learned": "meta-learned weights",
    "uniform": "uniform weights",
    "tf_idf": "TF-IDF weights",
    "salient_spans": "salient spans",
    "no_adaptation": "no adaptation",
}
_MEASURES = {"f1": ("token F1, %", 100), "exact_match": ("exact match, %", 100), "qa_loss": ("QA loss, nats", 1)}
_PER_LINE = 92


def methods(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the scores, with a bar for the mean of each method and a point for every stream."""
    fig, axes = page.figure(1, len(_MEASURES), figsize=(11, 2.4), sharey=True)
    for axis, (measure, (label, factor)) in zip(axes, _MEASURES.items(), strict=True):
        for position, scores in enumerate(found.values()):
            axis.barh(position, factor * scores[measure]["mean"], color="0.88")
            runs = [factor * run for run in scores[measure]["runs"]]
            axis.plot(runs, [position] * len(runs), "o", alpha=0.7, color="C0", markersize=4)
        axis.set(xlabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(found)), [NAMES[name] for name in found])
    axes[0].invert_yaxis()
    return page.as_picture(fig)


def token_weights(examples: Sequence[Mapping[str, Sequence[Any]]]) -> str:
    """Show documents as text, in which a darker token has a larger weight."""
    placed = [_lines(example["tokens"], example["weights"]) for example in examples]
    height = sum(len(lines) + 1 for lines in placed)
    fig, axis = page.figure(figsize=(11, 0.24 * height + 0.2))
    row = 0
    for example, lines in zip(examples, placed, strict=True):
        largest = max(example["weights"])
        for line in lines:
            column = 0
            for token, weight in line:
                shade = weight / largest
                axis.text(
                    column / _PER_LINE,
                    -row,
                    token,
                    family="monospace",
                    fontsize=9,
                    va="center",
                    color="white" if shade > 0.6 else "black",
                    bbox={"facecolor": (1 - shade, 1 - 0.7 * shade, 1 - 0.25 * shade), "edgecolor": "none", "pad": 1.2},
                )
                column += len(token)
            row += 1
        row += 1
    axis.set(xlim=(0, 1.05), ylim=(-row + 0.4, 0.8))
    axis.axis("off")
    return page.as_picture(fig)


def _lines(tokens: Sequence[str], weights: Sequence[float]) -> list[list[tuple[str, float]]]:
    lines: list[list[tuple[str, float]]] = [[]]
    used = 0
    for token, weight in zip(tokens, weights, strict=True):
        shown = token.replace("\n", " ")
        if used + len(shown) > _PER_LINE:
            lines.append([])
            used = 0
        lines[-1].append((shown, weight))
        used += len(shown)
    return lines
