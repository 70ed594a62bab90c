"""A page that shows several runs side by side: their results, the settings that differ, and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.errors import DataError
from bilevel.report import page
from bilevel.report.page import Section
from bilevel.tasks.run_folder import CONFIG, RESULTS, read_json
from bilevel.tasks.task import Task
from bilevel.training import metrics

_CURVES = {"outer_loss": "outer loss", "watched_accuracy": "accuracy on the way"}
"""The numbers of `metrics.jsonl` that are drawn, if a run has them."""


def write(path: Path, tasks: Mapping[str, Task[Any]], folders: Sequence[Path]) -> Path:
    """Write the page, and return its path.

    Args:
        path: the HTML file.
        tasks: the tasks by name.
        folders: the folders of finished runs of one task.

    Raises:
        DataError: a folder holds no finished run, or the runs are of different tasks.
    """
    configs = [read_json(folder / CONFIG) for folder in folders]
    kinds = {str(config.get("task")) for config in configs}
    if len(kinds) > 1 or not kinds <= tasks.keys():
        raise DataError(f"runs of one task can be compared, and these are of {', '.join(sorted(kinds))}")
    task, names = tasks[kinds.pop()], _short_names(folders)
    results = [read_json(folder / RESULTS) for folder in folders]
    rows = [metrics.read(folder / metrics.FILE) for folder in folders]
    page.write(
        path,
        f"bilevel: {len(folders)} runs of {task.name}",
        f"Task: {task.summary}.",
        [],
        [
            _results(task, names, results),
            _differing_settings(names, configs),
            *(
                _curve(key, label, names, rows)
                for key, label in _CURVES.items()
                if any(_has(each, key) for each in rows)
            ),
        ],
    )
    return path


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, or their paths if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _results(task: Task[Any], names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> Section:
    """Return the table of the headline numbers, with a column for each run."""
    found = [dict(task.headline(each)) for each in results]
    for each, result in zip(found, results, strict=True):
        each["outer loop"] = f"{result['outer_loop_seconds']:.0f} s"
        each["peak memory of the process"] = f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"
    labels = dict.fromkeys(label for each in found for label in each)
    return Section(
        "Results",
        "A dash marks a number that a run does not have.",
        header=("", *names),
        rows=[(label, *(each.get(label, "–") for each in found)) for label in labels],
    )


def _differing_settings(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> Section:
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    return Section(
        "Settings that differ",
        "All other settings are equal." if differing else "All settings are equal.",
        header=("", *names) if differing else (),
        rows=[(key, *(_as_text(config.get(key)) for config in configs)) for key in differing],
    )


def _as_text(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _curve(key: str, label: str, names: Sequence[str], runs: Sequence[Sequence[Mapping[str, Any]]]) -> Section:
    fig, (left, right) = page.figure(1, 2, figsize=(11, 3.6), sharey=True)
    for name, rows in zip(names, runs, strict=True):
        points = [(row["outer_step"] + 1, row["seconds"], row[key]) for row in rows if row.get(key) is not None]
        if not points:
            continue
        steps, seconds, values = zip(*points, strict=True)
        width = max(1, len(values) // 30) if key == "outer_loss" else 1
        smooth = page.running_mean(values, width)
        marker = "." if len(values) < 30 else ""
        left.plot(steps, smooth, marker=marker, label=name)
        right.plot(seconds, smooth, marker=marker, label=name)
    left.set(xlabel="outer step", ylabel=label)
    right.set(xlabel="seconds of the outer loop")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    words = "Running means." if key == "outer_loss" else "Evaluations during the outer loop."
    return Section(label[:1].upper() + label[1:], words, page.as_picture(fig))
