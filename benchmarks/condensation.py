"""Condense digits with every estimator at equal outer steps: test accuracy, process time, and how it was reached.

    python benchmarks/condensation.py

Runs the preset `digits` of the task `condensation`, a process for each run, with several seeds, and writes
`benchmarks/results/condensation.json` and `.md`. Nothing is tuned per estimator: all have the preset's settings. Rows
that are not run this time are kept from the last time: `--estimators` names those to run.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar

RESULTS = Path(__file__).parent / "results"

ESTIMATORS = (
    "reverse",
    "forward-gradient(directions=16)",
    "truncated-reverse(steps=5)",
    "hessian-free",
    "implicit(solver=neumann)",
    "implicit(solver=conjugate-gradient(damping=1.0))",
    "zeroth-order(directions=8, step_size=0.01)",
    "forward-gradient(directions=16, control_variate=truncated-reverse(steps=10))",
    "hessian-free:100 then forward-gradient(directions=16):100",
    "forward-gradient(directions=16) --start real",
    "forward-gradient(directions=16, control_variate=truncated-reverse(steps=10)) --start real",
)


@dataclass(frozen=True)
class Options:
    """Condense digits with every estimator at equal outer steps."""

    outer_steps: int = 200
    """Outer steps of each run."""
    seeds: int = 3
    """Runs of each estimator."""
    estimators: tuple[str, ...] = ESTIMATORS
    """What to run: an estimator, or phases with `then` between them; further flags of the run may follow."""
    name: str = "condensation"
    """Of the files in benchmarks/results."""


def main() -> None:
    options = tyro.cli(Options)
    command = "python benchmarks/condensation.py " + shlex.join(sys.argv[1:])
    rows = kept_rows(options)
    with bar("runs", len(options.estimators) * options.seeds) as shown:
        for estimator in options.estimators:
            runs = []
            for seed in range(options.seeds):
                runs.append(one_run(estimator, options.outer_steps, seed))
                shown.advance(f"{estimator}: {runs[-1]['accuracy']['condensed']['mean']:.1%}")
            rows[estimator] = {**summary(estimator, runs), "command": command.strip()}
            write(list(rows.values()), options)
    table = Table("estimator", "condensed, %", "process time, s")
    for row in rows.values():
        table.add_row(row["estimator"], percent(row["condensed"]), f"{row['process_seconds']:.0f}")
    Console().print(table)


def kept_rows(options: Options) -> dict[str, dict[str, Any]]:
    """What earlier calls found with as many outer steps."""
    path = RESULTS / f"{options.name}.json"
    found = json.loads(path.read_text()) if path.exists() else {"outer_steps": options.outer_steps, "rows": []}
    if found["outer_steps"] != options.outer_steps:
        raise SystemExit(f"{path} has rows with {found['outer_steps']} outer steps; give this table another --name")
    return {row["estimator"]: row for row in found["rows"]}


def write(rows: list[dict[str, Any]], options: Options) -> None:
    """Both files."""
    write_json(RESULTS / f"{options.name}.json", {"outer_steps": options.outer_steps, "rows": rows})
    write_text(RESULTS / f"{options.name}.md", as_markdown(rows, options))


def flags(estimator: str, outer_steps: int) -> list[str]:
    """The flags of a run that a row of the table stands for."""
    method, *others = estimator.split(" --")
    phases = method.split(" then ")
    further = [word for other in others for word in f"--{other}".split()]
    if len(phases) > 1:
        return ["--phases", *phases, *further]
    return ["--estimator", method, "--outer-steps", str(outer_steps), *further]


def one_run(estimator: str, outer_steps: int, seed: int) -> dict[str, Any]:
    """The results of one run, in a process of its own on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "bilevel", "run", "condensation", *flags(estimator, outer_steps)]
        command += ["--seed", str(seed), "--out", str(out)]
        before = child_seconds()
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        return {**json.loads((out / "results.json").read_text()), "process_seconds": child_seconds() - before}


def child_seconds() -> float:
    """Process time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(estimator: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One estimator's runs: accuracies over the seeds, each the mean over its evaluation networks."""

    def over_seeds(name: str) -> dict[str, Any]:
        means = [run["accuracy"][name]["mean"] for run in runs]
        return {
            "mean": statistics.fmean(means),
            "std": statistics.stdev(means) if len(means) > 1 else 0.0,
            "runs": means,
        }

    return {
        "estimator": estimator,
        **{name: over_seeds(name) for name in runs[0]["accuracy"]},
        "process_seconds": statistics.median(run["process_seconds"] for run in runs),
        "versions": runs[0]["versions"],
    }


def percent(found: dict[str, Any]) -> str:
    """Mean ± standard deviation in percent."""
    return f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"


def as_markdown(rows: list[dict[str, Any]], options: Options) -> str:
    """The table with the commands that made it."""
    commands = dict.fromkeys(row["command"] for row in rows)
    seeds = " or ".join(str(n) for n in sorted({len(row["condensed"]["runs"]) for row in rows}))
    lines = [
        "# Condensing digits with every estimator",
        "",
        *(f"    {command}" for command in commands),
        "",
        f"{options.outer_steps} outer steps, {seeds} seeds, one image per class; test accuracy "
        "in %, mean ± standard deviation over seeds (each the mean of 5 fresh networks); median process time of a run "
        f"with its evaluation, one thread. torch {rows[0]['versions']['torch']}, bilevel "
        f"{rows[0]['versions']['bilevel']}.",
        "",
        "| run | condensed images | as many random real images | the whole real set | process time, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"`{row['estimator']}`", *(percent(row[n]) for n in ("condensed", "random_real", "whole_set"))]
        lines.append(f"| {' | '.join(cells)} | {row['process_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
