"""Condense with exact hypergradients by several recipes: test accuracy with its controls, inner gradients, and time.

    python benchmarks/condensation_recipes.py digits
    python benchmarks/condensation_recipes.py mnist-1 --data-dir FOLDER

Each recipe is a `bilevel run condensation`, in a process of its own on one thread, and a `bilevel evaluate` of its
result by networks of width 128. Rows that are not run this time are kept from the last time. The results go to
`benchmarks/results/condensation_recipes.json` and `.md`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bilevel.report.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
PAPERS_UNITS = 10_000 * 100 * 4
"""Inner gradients of the paper's reverse unrolling of MNIST with one image per class: 10,000 outer steps, T = 100."""


@dataclass(frozen=True)
class Recipe:
    """Options of `bilevel run condensation`, and what the row is to be compared with."""

    flags: Sequence[str]
    units_per_step: int
    """Inner gradients for each outer step: 4 T for exact hypergradients."""
    goal: str


RECIPES: Mapping[str, Recipe] = {
    "digits": Recipe(["--preset", "digits-learned"], 200, "above 90"),
    "mnist-1": Recipe(
        ["--preset", "mnist-1-small", "--outer-steps", "1200", "--evaluation-runs", "5"],
        120,
        "92.3 (paper, reverse unrolling)",
    ),
    "mnist-1-squared": Recipe(
        [
            *("--preset", "mnist-1-small", "--inner-loss", "squared", "--inner-schedule", "cosine"),
            *("--inner-lr", "0.003", "--momentum", "0.9", "--inner-steps", "40", "--outer-steps", "1800"),
            *("--evaluation-runs", "5"),
        ],
        160,
        "92.3 (paper, reverse unrolling)",
    ),
    "fashion-mnist-1": Recipe(["--preset", "mnist-1-small", "--data", "fashion-mnist"], 120, "–"),
    "mnist-1-paper-protocol": Recipe(
        [
            *("--preset", "mnist-1", "--width", "32", "--estimator", "reverse(checkpoints=graph)", "--accumulate", "1"),
            *("--outer-steps", "1000", "--evaluation-steps", "100", "--whole-set-epochs", "1"),
        ],
        400,
        "92.3 (paper, reverse unrolling)",
    ),
    "mnist-10": Recipe(["--preset", "mnist-10-small"], 80, "96.8 (paper, reverse unrolling)"),
    "cifar10-1": Recipe(["--preset", "cifar10-1-small", "--data", "npz"], 120, "34.1 (paper, reverse unrolling)"),
    "cifar10-10": Recipe(["--preset", "cifar10-10-small", "--data", "npz"], 80, "53.2 (paper, reverse unrolling)"),
}


@dataclass(frozen=True)
class Options:
    """Condense by one recipe, and add its row to the table."""

    recipe: Annotated[str, tyro.conf.Positional]
    """Name of the recipe."""
    data_dir: Path | None = None
    """Folder or file with the data."""
    seed: int = 0
    """Seed of the run."""
    out: Path = Path("runs")
    """Folder for the run's files."""
    flags: tuple[str, ...] = ()
    """Further options of the run."""


def main() -> None:
    options = tyro.cli(Options)
    if options.recipe not in RECIPES:
        raise SystemExit(f"there is no recipe {options.recipe!r}; there are {', '.join(RECIPES)}")
    recipe, folder = RECIPES[options.recipe], options.out / f"{options.recipe}-{options.seed}"
    data = [] if options.data_dir is None else ["--data-dir", str(options.data_dir)]
    flags = [*recipe.flags, "--seed", str(options.seed), *options.flags]
    if not (folder / "results.json").exists():
        bilevel("run", "condensation", *flags, *data, "--out", str(folder), "--resume")
    results, config = (json.loads((folder / name).read_text()) for name in ("results.json", "config.json"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row: dict[str, Any] = {
        "recipe": options.recipe,
        "command": f"bilevel run condensation {' '.join(flags)}" + (" --data-dir FOLDER" if data else ""),
        "seed": options.seed,
        "outer_steps": len(rows),
        "units": len(rows) * recipe.units_per_step,
        "seconds": results["outer_loop_seconds"],
        "accuracy": results["accuracy"],
        "curve": [[r["outer_step"] + 1, r["watched_accuracy"]] for r in rows if "watched_accuracy" in r],
        "goal": recipe.goal,
        "versions": results["versions"],
    }
    if config["model"] == "convnet":
        bilevel("evaluate", str(folder), *data, "--width", "128", "--whole-set-epochs", "0")
        row["accuracy_128"] = json.loads((folder / "evaluation.json").read_text())["accuracy"]["condensed"]
    write(row)


def bilevel(*arguments: str) -> None:
    """Run the command on one thread."""
    subprocess.run(
        [sys.executable, "-m", "bilevel", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )


def write(row: dict[str, Any]) -> None:
    """Add a row to both files."""
    path = RESULTS / "condensation_recipes.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [each for each in rows if (each["recipe"], each["seed"]) != (row["recipe"], row["seed"])] + [row]
    rows.sort(key=lambda each: (list(RECIPES).index(each["recipe"]), each["seed"]))
    write_json(path, {"rows": rows})
    write_text(RESULTS / "condensation_recipes.md", as_markdown(rows))


def percent(found: dict[str, Any] | None) -> str:
    """Mean ± standard deviation in percent."""
    return "–" if found is None else f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table with the commands that made it, and the accuracy over the outer steps."""
    versions = rows[0]["versions"]
    lines = [
        "# Condensing by several recipes",
        "",
        "`python benchmarks/condensation_recipes.py RECIPE --data-dir FOLDER`, one thread. Test accuracy in %, mean ± "
        "standard deviation over the networks of the evaluation, on the whole test set. Inner gradients count 4 T for "
        f"each exact hypergradient; the paper's reverse unrolling of MNIST-1 takes {PAPERS_UNITS:,}. "
        f"torch {versions['torch']}, bilevel {versions['bilevel']}.",
        "",
        "| recipe | seed | condensed | the same, width 128 | class means | random real | whole set | goal | "
        "outer steps | inner gradients | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = row["accuracy"]
        cells = [
            row["recipe"],
            str(row["seed"]),
            percent(found["condensed"]),
            percent(row.get("accuracy_128")),
            *(percent(found.get(name)) for name in ("class_means", "random_real", "whole_set")),
            row["goal"],
            f"{row['outer_steps']:,}",
            f"{row['units']:,}",
            f"{row['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The commands:", "", *(f"    {row['command']}" for row in rows), ""]
    lines += ["Accuracy on the way, of two networks on at most 2,000 test images:", ""]
    for row in rows:
        if row["curve"]:
            points = ", ".join(f"{step}: {100 * value:.1f}" for step, value in row["curve"])
            lines.append(f"- {row['recipe']}, seed {row['seed']}: {points}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
