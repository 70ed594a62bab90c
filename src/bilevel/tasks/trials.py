"""Test accuracies after several kinds of training, each repeated with new networks, and a plot of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from bilevel.report import page
from bilevel.report.progress import bar


def accuracies_of(
    trials: Mapping[str, Callable[[int], float]], names: Mapping[str, str], runs: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Return the mean, the standard deviation and every run of each trial.

    Args:
        trials: for each kind of training, a function from the number of a run to the accuracy of the run.
        names: the name of each trial in the progress bar.
        runs: the number of runs of each trial.
        progress: whether to show a progress bar.
    """
    results = {}
    with bar("evaluation", len(trials) * runs, show=progress) as shown:
        for name, trial in trials.items():
            found = []
            for number in range(runs):
                found.append(trial(number))
                shown.advance(f"{names[name]}: {found[-1]:.1%}")
            results[name] = {
                "mean": statistics.fmean(found),
                "std": statistics.stdev(found) if len(found) > 1 else 0.0,
                "runs": found,
            }
    return results


def percent(found: Mapping[str, Any]) -> str:
    """Return the mean of an accuracy in percent, with the standard deviation if there are several runs."""
    spread = f" ± {100 * found['std']:.1f}" if len(found["runs"]) > 1 else ""
    return f"{100 * found['mean']:.1f}{spread}"


def accuracy_rows(results: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return a row of a report's table for each kind of training: its name, its accuracy, and every run."""
    return [
        (names[name], percent(found), ", ".join(f"{100 * run:.1f}" for run in found["runs"]))
        for name, found in results.items()
    ]


def picture_of_accuracies(results: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Return a plot with a bar for the mean accuracy of each kind of training, and a point for every run."""
    fig, axis = page.figure(figsize=(6, 0.8 + 0.4 * len(results)))
    for position, found in enumerate(results.values()):
        axis.barh(position, 100 * found["mean"], color="0.88")
        axis.plot([100 * run for run in found["runs"]], [position] * len(found["runs"]), "o", alpha=0.7, color="C0")
    axis.set_yticks(range(len(results)), [names[name] for name in results])
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), xlabel="test accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    return page.as_picture(fig)
