"""The plots of a PDE run: fields, the coefficients over the outer steps, and the result beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bilevel.report import page
from bilevel.report.page import Section
from bilevel.training.metrics import Row


def sections(results: Mapping[str, Any], rows: Sequence[Sequence[Row]], stored: Mapping[str, Any]) -> list[Section]:
    """Return the task's part of the report."""
    made = [_table(results)]
    if "found" in stored:
        made.append(_fields(results, stored))
    if results["names"]:
        made.append(_paths(results, rows))
    if "values" in stored and results["unknown"] in ("initial-condition", "source", "library"):
        made.append(_values(results, stored["values"].numpy()))
    return made


def _table(results: Mapping[str, Any]) -> Section:
    words = (
        f"{results['equation']}, from {results['observations']} observations of {results['reference']}. "
        f"{results['starts']} start{'s' * (results['starts'] > 1)}, {results['failures']['raised']} ended by the "
        f"solver, {results['failures']['far_off']} more than 10 % off; an outer step was halved "
        f"{results['backtracks']} times because the solver failed at the point that it led to."
    )
    if results["noise"]:
        words += f" Noise of standard deviation {results['noise']:.3g} was added to the observations."
    rows = []
    for name in ("coefficient_error", "field_error", "solves"):
        cells = [results[name][key] for key in ("mean", "std", "median")]
        runs = [_short(run) for run in results[name]["runs"]]
        rows.append((name.replace("_", " "), *map(_short, cells), ", ".join(runs)))
    words += " " + " ".join(results["reasons"])
    return Section("Relative errors", words, header=("", "mean", "std", "median", "each start"), rows=rows)


def _fields(results: Mapping[str, Any], stored: Mapping[str, Any]) -> Section:
    x, t, found, true = (stored[name].numpy() for name in ("x", "t", "found", "reference"))
    fig, axes = page.figure(1, 3, figsize=(12, 3.4), sharey=True)
    limit = float(np.abs(true).max())
    difference = found - true
    largest = float(np.abs(difference).max()) or 1.0
    titles = ("found", "reference", "found − reference")
    for axis, field, bound, title in zip(axes, (found, true, difference), (limit, limit, largest), titles, strict=True):
        image = axis.pcolormesh(t, x, field, cmap="RdBu_r", vmin=-bound, vmax=bound, shading="nearest")
        fig.colorbar(image, ax=axis)
        axis.set(title=title, xlabel="t")
    axes[0].set_ylabel("x")
    axes[1].plot(stored["observed_t"].numpy(), stored["observed_x"].numpy(), "k.", markersize=3)
    best = results["best_start"]
    words = f"u of start {best}, the one with the lowest outer loss. Dots: where it was observed."
    return Section("The field", words, page.as_picture(fig))


def _paths(results: Mapping[str, Any], rows: Sequence[Sequence[Row]]) -> Section:
    names, truth = results["names"], results["truth"]
    fig, axes = page.figure(1, len(names) + 1, figsize=(4.2 * len(names) + 4.2, 3.4), squeeze=False)
    if len(names) > 3:
        fig, axes = page.figure(1, 2, figsize=(11, 3.8), squeeze=False)
    for i in range(axes.shape[1] - 1):
        axis = axes[0, i]
        for k in range(len(names)) if len(names) > 3 else (i,):
            for start in rows:
                axis.plot(
                    [r["outer_step"] for r in start], [r["found"][k] for r in start], color=f"C{k}", linewidth=0.8
                )
            axis.axhline(truth[k], color="k" if len(names) <= 3 else f"C{k}", linestyle=":", linewidth=1)
        axis.set(xlabel="outer step", title=names[i] if len(names) <= 3 else "coefficients of the terms")
        if len(names) <= 3:
            axis.set(yscale="log")
            _error_bars(axis, results["path"], i)
    size = float(np.linalg.norm(truth))
    for start in rows:
        errors = [np.linalg.norm(np.subtract(r["found"], truth)) / size for r in start]
        axes[0, -1].plot(np.cumsum([r["solves"] for r in start]), errors, marker=".", linewidth=0.8)
    axes[0, -1].set(yscale="log", xlabel="solves", title="relative error of each start")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    words = "One line for each start; dotted: the truth."
    if any(point["standard_error"] for point in results["path"]):
        words += (
            " Bars: the standard error that the observations leave the coefficient on the first start's way, from the "
            "misfit there and the solution's derivative; cut off where it is larger than the coefficient."
        )
    return Section("The way of the coefficients", words, page.as_picture(fig))


def _error_bars(axis: Any, path: Sequence[Mapping[str, Any]], i: int) -> None:
    known = [point for point in path if point["standard_error"]]
    if not known:
        return
    values = np.array([point["found"][i] for point in known])
    errors = np.minimum([point["standard_error"][i] for point in known], 0.9 * values)
    axis.errorbar([p["outer_step"] for p in known], values, yerr=errors, fmt=".", color="C3", capsize=2, zorder=3)


def _values(results: Mapping[str, Any], found: np.ndarray) -> Section:
    truth, names = np.array(results["truth"]), results["names"]
    fig, axis = page.figure(figsize=(8, 3.2))
    if names:
        places = np.arange(len(names))
        axis.bar(places - 0.2, truth, 0.4, label="truth", color="0.75")
        axis.bar(places + 0.2, found, 0.4, label="found", color="C0")
        axis.set_xticks(places, names)
    else:
        x = np.linspace(-1, 1, len(truth))
        axis.plot(x, truth, color="0.6", linewidth=3, label="truth")
        axis.plot(x, found, color="C0", label="found")
        axis.set(xlabel="x")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    rows = [(n, f"{a:.5g}", f"{b:.5g}") for n, a, b in zip(names, truth, found, strict=True)] if names else []
    title = f"The {results['unknown']}".replace("-", " ")
    return Section(title, picture=page.as_picture(fig), header=("term", "truth", "found"), rows=rows)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
