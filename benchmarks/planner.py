"""The planner's predictions against what is measured, for every estimator and three models.

    python benchmarks/planner.py                    # every model; about twenty minutes
    python benchmarks/planner.py --models mlp-adam  # measured anew, the others kept

Memory: bytes of live tensors at the peak, predicted from one step and counted in the whole call. Time: process time on
one thread, which is the wall time of a machine without other work, predicted and measured by turns, medians of 5 (of 2
for GPT-2). Writes `benchmarks/results/planner.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import torch
from models import MODELS

import bilevel
from bilevel.estimators.names import describe
from bilevel.planning import step_costs
from bilevel.planning.live_memory import counting
from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar

RESULTS = Path(__file__).parent / "results"
STEPS = {"mlp-adam": 100, "convnet-momentum": 50, "gpt2-sgd": 10, "gpt2-adam": 10}
DIRECTIONS = 4
REPEATS = 5
MEMORY_TARGET, TIME_TARGET = 0.2, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    wanted = parser.parse_args().models
    torch.set_num_threads(1)
    step_costs._clock = time.process_time
    warnings.simplefilter("ignore")  # conjugate gradients on untrained networks meet negative curvature
    path = RESULTS / "planner.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["model"] not in wanted]
    with bar("models", len(wanted)) as shown:
        for name in wanted:
            rows += measured(name)
            shown.advance(name)
    rows.sort(key=lambda row: list(MODELS).index(row["model"]))
    versions = {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {"command": "python benchmarks/planner.py", "versions": versions, "rows": rows}
    write_json(path, content)
    write_text(RESULTS / "planner.md", "\n".join(as_markdown(rows, versions)) + "\n")
    print((RESULTS / "planner.md").read_text())


def measured(name: str) -> Iterator[dict[str, Any]]:
    """Every estimator on one model."""
    subject = MODELS[name]()
    problem, batches = subject.problem(), bilevel.no_batches(STEPS[name])
    repeats = 2 if name.startswith("gpt2") else REPEATS
    plans = [bilevel.plan(problem, subject.meta, batches, memory="64GB", directions=DIRECTIONS) for _ in range(repeats)]
    for i, row in enumerate(plans[0].rows):
        row.estimator(problem, subject.meta, bilevel.no_batches(2 if row.relative_variance is not None else 10))
        with counting() as live:
            row.estimator(problem, subject.meta, batches)
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            row.estimator(problem, subject.meta, batches)
            seconds.append(time.process_time() - start)
        yield {
            "model": name,
            "steps": STEPS[name],
            "estimator": describe(row.estimator),
            "predicted_mib": row.bytes / 2**20,
            "measured_mib": live.peak / 2**20,
            "predicted_seconds": statistics.median(plan.rows[i].seconds for plan in plans),
            "measured_seconds": statistics.median(seconds),
        }


def as_markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> Iterator[str]:
    """The table with the command that made it."""
    yield "# Predictions of the planner"
    yield ""
    yield (
        "`python benchmarks/planner.py`: predicted / measured; peak of live tensors in MiB, process time in seconds, "
        f"one thread, medians. {', '.join(f'{k} {v}' for k, v in versions.items())}, one of two cores, others at work."
    )
    yield ""
    yield "| model | T | estimator | memory | ratio | time | ratio |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    ratios = {"mib": [], "seconds": []}
    for row in rows:
        memory, seconds = (row[f"predicted_{k}"] / row[f"measured_{k}"] for k in ratios)
        ratios["mib"].append(memory)
        ratios["seconds"].append(seconds)
        yield (
            f"| {row['model']} | {row['steps']} | `{row['estimator']}` | "
            f"{row['predicted_mib']:.1f} / {row['measured_mib']:.1f} | {memory:.2f} | "
            f"{row['predicted_seconds']:.2f} / {row['measured_seconds']:.2f} | {seconds:.2f} |"
        )
    yield ""
    for what, key, target in (("memory", "mib", MEMORY_TARGET), ("time", "seconds", TIME_TARGET)):
        within = sum(abs(ratio - 1) <= target for ratio in ratios[key])
        worst = max(ratios[key], key=lambda ratio: abs(ratio - 1))
        yield f"- {what}: {within} of {len(rows)} within {target:.0%}; the furthest is {worst:.2f}"
    yield ""
    yield (
        "`implicit` is planned with the twenty iterations it may take; conjugate gradients stop early on the negative "
        "curvature of untrained networks, and their four vectors are not in the prediction."
    )


if __name__ == "__main__":
    main()
