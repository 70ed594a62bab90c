"""PDE discovery beside the paper's Figure 2: errors, solves and seconds, for three equations and three inner solvers.

    python benchmarks/pde.py --data-dir FOLDER

FOLDER holds the reference solutions `burgers_shock.mat`, `Allen_Cahn.mat` and `KdV.mat`; observations are then taken
from these, made by others. Each part runs `bilevel run pde` in processes of its own on one thread, and replaces its
rows in `benchmarks/results/pde.json` and `.md`: `--parts numerical noise` runs two of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar

RESULTS = Path(__file__).parent / "results"
EQUATIONS = ("burgers", "allen-cahn", "kdv")

PAPER = {
    ("burgers", "numerical"): ("0.97e-2 ± 0.45e-2", "0.63e-3 ± 0.33e-3"),
    ("allen-cahn", "numerical"): ("2.34e-2 ± 0.64e-2", "0.97e-3 ± 0.54e-3"),
    ("kdv", "numerical"): ("0.72e-2 ± 0.57e-2", "2.72e-3 ± 1.55e-3"),
    ("burgers", "pinn"): ("21.4 ± 8.6", "0.336 ± 0.047"),
    ("allen-cahn", "pinn"): ("4.38 ± 1.02", "0.134 ± 0.036"),
    ("kdv", "pinn"): ("0.944 ± 0.043", "0.833 ± 0.067"),
}
"""Figure 2, right: relative errors of coefficient and field (Shen et al., NeurIPS 2024)."""


@dataclass(frozen=True)
class Options:
    """PDE discovery beside the paper's Figure 2."""

    data_dir: Path | None = None
    """Folder with the reference solutions; without it, observations come from the program's own finer solve."""
    parts: tuple[str, ...] = ("numerical", "differentiable", "noise", "pinn", "unknowns")
    """Which parts to run."""
    starts: int = 10
    """Starts of the numerical and the differentiable solver."""
    network_starts: int = 1
    """Starts of the network."""
    seeds: int = 5
    """Draws of the noise, each with a start of its own."""


def main() -> None:
    options = tyro.cli(Options)
    path = RESULTS / "pde.json"
    command = "python benchmarks/pde.py " + " ".join(sys.argv[1:])
    for part in options.parts:
        jobs = list(PARTS[part](options))
        rows = []
        with bar(part, len(jobs)) as shown:
            for label, flags in jobs:
                rows.append({"label": label, "flags": flags, **one_run(flags, options.data_dir)})
                shown.advance(" ".join(label))
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
        content["parts"][part] = {"command": command.replace(str(options.data_dir), "FOLDER").strip(), "rows": rows}
        write_json(path, content)
        write_text(RESULTS / "pde.md", as_markdown(content["parts"]))


# -- the parts: (label, flags) of each run -----------------------------------------------------------------------------


def numerical(options: Options) -> Iterator[tuple[list[str], list[str]]]:
    for name in EQUATIONS:
        yield [name, "numerical"], ["--equation", name, "--starts", str(options.starts)]


def differentiable(options: Options) -> Iterator[tuple[list[str], list[str]]]:
    for name in EQUATIONS:
        flags = ["--equation", name, "--solver", "differentiable", "--starts", str(options.starts)]
        yield [name, "differentiable"], flags


def noise(options: Options) -> Iterator[tuple[list[str], list[str]]]:
    for name in EQUATIONS:
        for level in (0.01, 0.05, 0.1):
            for seed in range(options.seeds):
                flags = ["--equation", name, "--noise", str(level), "--seed", str(seed), "--starts", "1"]
                yield [name, f"{level:.0%}"], flags


def pinn(options: Options) -> Iterator[tuple[list[str], list[str]]]:
    for name in EQUATIONS:
        for inner, dtype in (("adam", "float64"), ("sgd", "float32")):
            flags = ["--equation", name, "--solver", "pinn", "--inner-optimizer", inner, "--dtype", dtype]
            flags += ["--starts", str(options.network_starts)]
            yield [name, "pinn", inner, dtype], flags


def unknown_fields(options: Options) -> Iterator[tuple[list[str], list[str]]]:
    for preset, name in (
        *(("coefficients", name) for name in EQUATIONS),
        ("initial-condition", "kdv"),
        ("source", "allen-cahn"),
        ("library", "kdv"),
        ("library", "burgers"),
    ):
        starts = options.starts if preset == "coefficients" else 1
        yield [name, preset], ["--preset", preset, "--equation", name, "--starts", str(starts)]


PARTS = {
    "numerical": numerical,
    "differentiable": differentiable,
    "noise": noise,
    "pinn": pinn,
    "unknowns": unknown_fields,
}


def one_run(flags: list[str], data_dir: Path | None) -> dict[str, Any]:
    """What `results.json` says, without lists of hundreds of numbers; a run that ended in an error is a row too."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "bilevel", "run", "pde", "--out", str(out), *flags]
        own_data = any(word in flags for word in ("source", "coefficients", "initial-condition", "library"))
        if data_dir is not None and not own_data:
            command += ["--data-dir", str(data_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1]}
        results = json.loads((out / "results.json").read_text())
        rows = [line for line in (out / "metrics.jsonl").read_text().splitlines() if line]
        dropped = ("path", "seconds_of_starts", *(("truth",) if len(results["truth"]) > 8 else ()))
        return {**{k: v for k, v in results.items() if k not in dropped}, "outer_steps": len(rows)}


# -- the page ----------------------------------------------------------------------------------------------------------


def as_markdown(parts: dict[str, Any]) -> str:
    """All parts that there are."""
    lines = ["# PDE discovery", ""]
    for name in ("numerical", "differentiable", "pinn"):
        if name in parts:
            lines += [
                f"## Solver: {name}",
                "",
                f"`{parts[name]['command']}`",
                "",
                *_beside_the_paper(parts[name]["rows"]),
                "",
            ]
    if "noise" in parts:
        lines += ["## Noise", "", f"`{parts['noise']['command']}`", "", *_noise(parts["noise"]["rows"]), ""]
    if "unknowns" in parts:
        lines += ["## More than one unknown", "", f"`{parts['unknowns']['command']}`", ""]
        lines += [*_unknowns(parts["unknowns"]["rows"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _beside_the_paper(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| equation | starts (failed) | coefficient: mean ± std | median | paper | field: mean ± std | paper | "
        "solves of a start | seconds of a start | observations from |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        equation, solver, *details = row["label"]
        if "error" in row:
            lines.append(f"| {' '.join(row['label'])} | {row['error']} |" + " |" * 8)
            continue
        paper = PAPER.get((equation, solver), ("–", "–"))
        failed = row["failures"]["raised"] + row["failures"]["far_off"]
        cells = [
            " ".join([equation, *details]),
            f"{row['starts']} ({failed})",
            spread(row["coefficient_error"]),
            short(row["coefficient_error"]["median"]),
            paper[0],
            spread(row["field_error"]),
            paper[1],
            f"{row['solves']['mean']:.0f}",
            f"{row['seconds'] / row['starts']:.0f}",
            row["reference"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _noise(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| equation | noise | draws (failed) | coefficient error: median | mean ± std | field error: median | "
        "standard error / coefficient, median |",
        "| --- " * 7 + "|",
    ]
    labels = list(dict.fromkeys(tuple(row["label"]) for row in rows))
    for label in labels:
        same = [row for row in rows if tuple(row["label"]) == label]
        good = [row for row in same if "error" not in row]
        failed = len(same) - len(good) + sum(row["failures"]["far_off"] for row in good)
        errors = [row["coefficient_error"]["mean"] for row in good]
        fields = [row["field_error"]["mean"] for row in good if row["field_error"]["mean"] is not None]
        relative = [
            row["standard_errors"][0][0] / row["found"][0][0] for row in good if row["standard_errors"][0] is not None
        ]
        cells = [
            *label,
            f"{len(same)} ({failed})",
            short(statistics.median(errors)),
            f"{short(statistics.fmean(errors))} ± {short(statistics.stdev(errors) if len(errors) > 1 else 0.0)}",
            short(statistics.median(fields)) if fields else "–",
            short(statistics.median(relative)) if relative else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _unknowns(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| equation | unknown | estimator | starts (failed) | error of what was looked for: mean ± std | median | "
        "field error, median | solves of a start | seconds of a start |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        equation, preset = row["label"]
        if "error" in row:
            lines.append(f"| {equation} | {preset} | {row['error']} |" + " |" * 6)
            continue
        cells = [
            equation,
            preset,
            row["phases"][0].split(":")[0],
            f"{row['starts']} ({row['failures']['raised'] + row['failures']['far_off']})",
            spread(row["coefficient_error"]),
            short(row["coefficient_error"]["median"]),
            short(row["field_error"]["median"]),
            f"{row['solves']['mean']:.0f}",
            f"{row['seconds'] / row['starts']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        best = row["best_start"]
        if row["names"] and best is not None:
            pairs = ", ".join(f"{n}: {v:.4g}" for n, v in zip(row["names"], row["found"][best], strict=True))
            lines.append(f"| | | lowest outer loss: {pairs} |" + " |" * 6)
    return lines


def spread(found: dict[str, Any]) -> str:
    """Mean ± standard deviation."""
    return f"{short(found['mean'])} ± {short(found['std'])}"


def short(value: float | None) -> str:
    """Three digits."""
    return "–" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
