"""Plots of a mixture run: the proportions over the outer steps, and the target loss after each choice of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.report import page

NAMES = {
    "found": "the proportions found",
    "known": "the known best proportions",
    "uniform": "uniform proportions",
    "proportional": "proportional to the sizes",
    "alignment": "by alignment of gradients, online",
    "random_search": "random search",
    "regression": "regression over trainings",
    "target_alone": "the target examples alone",
}


def path_figure(paths: Sequence[Sequence[float]], names: Sequence[str], known: Mapping[str, float] | None) -> Any:
    """Plot the proportions `[outer steps, S]`, with a dotted line at each known one."""
    fig, axis = page.figure(figsize=(6.5, 3.4))
    for number, name in enumerate(names):
        axis.plot(range(len(paths)), [row[number] for row in paths], color=f"C{number}", label=name)
        if known is not None:
            axis.axhline(known[name], color=f"C{number}", linestyle=":", linewidth=1)
    axis.set(xlabel="outer step", ylabel="proportion", ylim=(-0.02, 1.02))
    axis.legend(frameon=False, loc="upper right", ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    return fig


def path(paths: Sequence[Sequence[float]], names: Sequence[str], known: Mapping[str, float] | None) -> str:
    """Return the plot of `path_figure` as a picture of a page."""
    return page.as_picture(path_figure(paths, names, known))


def target_losses(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot a point for every run of each choice of proportions."""
    fig, axis = page.figure(figsize=(6, 0.8 + 0.4 * len(results)))
    for position, found in enumerate(results.values()):
        axis.plot(found["runs"], [position] * len(found["runs"]), "o", alpha=0.7, color="C0")
    axis.set_yticks(range(len(results)), [NAMES[name] for name in results])
    axis.invert_yaxis()
    axis.set(xlabel="loss on test examples of the target")
    axis.spines[["top", "right"]].set_visible(False)
    return page.as_picture(fig)
