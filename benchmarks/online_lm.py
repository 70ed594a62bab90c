"""What online-lm's weight model is worth, and how it is best trained at equal compute: seeds of the preset `tiny`.

    python benchmarks/online_lm.py

Of every seed (other made-up people, another base model, another weight model) the arms share the base model, begin with
uniform weights, and have the same process time: exact gradients at T = 6, at T = 24 with checkpoints, half of the time
each, (FG)²U at T = 24. All then learn the same unseen streams, beside weights that nobody learnt. The rates of the arms
were chosen on validation streams of seed 100; nothing was chosen on test streams. Seeds that are done lie in --runs and
are not computed again. Writes `benchmarks/results/online_lm.json` and `.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import t as student

import bilevel
from bilevel.estimators import Estimator
from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar
from bilevel.tasks.online_lm import data
from bilevel.tasks.online_lm.adaptation import learned
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.evaluation import MEASURES, Evaluation, methods
from bilevel.tasks.online_lm.presets import PRESETS
from bilevel.tasks.online_lm.problem import setup as make_setup
from bilevel.tasks.online_lm.stages import tuned_model
from bilevel.tasks.online_lm.weight_model import WeightModel
from bilevel.tasks.running import versions
from bilevel.training.outer_loop import OuterStep

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arm:
    """One way to train the weight model."""

    make: Callable[[], Estimator]
    parts: tuple[int, ...]
    """T, one after the other, each for the same time."""
    inner_lr: float
    outer_lr: float


EXACT_SHORT, EXACT_LONG, EXACT_BOTH, FORWARD = (
    "exact, T = 6",
    "exact, T = 24",
    "exact, T = 6, then T = 24",
    "(FG)²U, T = 24, 4 directions",
)
ARMS = {
    EXACT_SHORT: Arm(lambda: bilevel.Reverse("sqrt"), (6,), inner_lr=0.16, outer_lr=1e-3),
    EXACT_LONG: Arm(lambda: bilevel.Reverse("sqrt"), (24,), inner_lr=0.08, outer_lr=3e-4),
    EXACT_BOTH: Arm(lambda: bilevel.Reverse("sqrt"), (6, 24), inner_lr=0.08, outer_lr=3e-4),
    FORWARD: Arm(lambda: bilevel.ForwardGradient(4), (24,), inner_lr=0.08, outer_lr=3e-4),
}
CONTROLS = {
    "uniform": "uniform weights",
    "tf_idf": "TF-IDF",
    "salient_spans": "salient spans",
    "no_adaptation": "no adaptation",
}


@dataclass(frozen=True)
class Options:
    """Seeds of the preset `tiny`, each with all arms."""

    seeds: int = 5
    """Seeds, from 0."""
    budget: float = 30.0
    """Process time of each arm, in seconds."""
    runs: Path = Path("runs/online_lm")
    """Where finished seeds are kept."""
    preset: str = "tiny"
    """Of the task."""
    data_dir: Path | None = None
    """For presets that read files."""
    name: str = "online_lm"
    """Of the files in benchmarks/results."""
    seed: int | None = None
    """Compute this seed alone, into --runs (what the processes of a benchmark do)."""


def main() -> None:
    options = tyro.cli(Options)
    if options.seed is not None:
        one_seed(options, options.seed)
        return
    seeds = []
    with bar("seeds", options.seeds) as shown:
        for seed in range(options.seeds):
            path = result_of(options, seed)
            if not path.exists():
                command = [sys.executable, __file__, *sys.argv[1:], "--seed", str(seed)]
                subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
            seeds.append(json.loads(path.read_text()))
            shown.advance()
    command = "python benchmarks/online_lm.py " + " ".join(sys.argv[1:])
    summary = summarised(seeds)
    write_json(
        RESULTS / f"{options.name}.json",
        {"command": command.strip(), "versions": versions(), "methods": summary, "seeds": seeds},
    )
    text = as_markdown(summary, seeds, options, command.strip())
    write_text(RESULTS / f"{options.name}.md", text)
    Console().print(Markdown(text))


# -- one seed ----------------------------------------------------------------------------------------------------------


class OutOfTimeError(Exception):
    """An arm has used its process time."""


def one_seed(options: Options, seed: int) -> None:
    """Every arm and control of one seed."""
    torch.set_num_threads(1)
    began = time.process_time()
    config = dataclasses.replace(PRESETS[options.preset].config, short_draws=0)
    corpus = data.load(config.data, options.data_dir, seed)
    folder = result_of(options, seed).with_suffix("")
    model, tokenizer = tuned_model(config, corpus, seed, folder, progress=True)
    tuned_seconds = time.process_time() - began
    trained, details = {}, {}
    for name, arm in ARMS.items():
        trained[name], details[name] = within_budget(options.budget, arm, config, corpus, model, tokenizer, seed)
    everything = methods(config, corpus, tokenizer, next(iter(trained.values())))
    weightings = {
        **{name: learned(meta) for name, meta in trained.items()},
        **{label: everything[name] for name, label in CONTROLS.items()},
    }
    found = Evaluation(config, corpus, model, tokenizer, seed).of(weightings, progress=True)
    write_json(
        result_of(options, seed),
        {
            "seed": seed,
            "methods": found,
            "arms": details,
            "tuned_seconds": tuned_seconds,
            "seconds": time.process_time() - began,
        },
    )


def within_budget(
    seconds: float, arm: Arm, config: OnlineLM, corpus: Any, model: Any, tokenizer: Any, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The weight model after as many outer steps as fit into the process time, and how many they were."""
    meta = WeightModel.on_top_of(model)
    rows: list[dict[str, Any]] = []
    steps = []
    for part in arm.parts:
        there = dataclasses.replace(config, inner_steps=part, inner_lr=arm.inner_lr, outer_lr=arm.outer_lr)
        prepared = make_setup(there, corpus, model, tokenizer, meta, seed)
        rows += _stretch(seconds / len(arm.parts), arm.make(), prepared, meta, seed)
        steps.append(len(rows) - sum(steps))
    tail = rows[-max(1, len(rows) // 5) :]
    return meta, {
        "outer_steps": steps,
        "last_outer_loss": statistics.fmean(row["outer_loss"] for row in tail),
        "median_norm": statistics.median(row["grad_norm"] for row in rows),
        "largest_norm": max(row["grad_norm"] for row in rows),
    }


def _stretch(seconds: float, estimator: Estimator, prepared: Any, meta: Any, seed: int) -> list[dict[str, Any]]:
    """Train `meta` in place until the process time is used up; the numbers of the outer steps."""
    began = time.process_time()
    last: list[Any] = []
    rows: list[dict[str, Any]] = []

    def stop_in_time(step: OuterStep) -> None:
        last[:] = [step.meta]
        rows.append(step.row)
        if time.process_time() - began > seconds:
            raise OutOfTimeError

    with contextlib.suppress(OutOfTimeError):
        bilevel.fit(
            prepared.problem,
            meta,
            prepared.inner_batches,
            prepared.outer_batch,
            seed,
            phases=[bilevel.Phase(estimator, 100_000)],
            optimizer=prepared.optimizer,
            update=prepared.update,
            callbacks=[stop_in_time],
            progress=False,
        )
    with torch.no_grad():
        for name, tensor in last[0].named_tensors.items():
            meta.get_parameter(name).copy_(tensor)
    return rows


# -- what the numbers say ----------------------------------------------------------------------------------------------


def result_of(options: Options, seed: int) -> Path:
    return options.runs / options.name / f"seed-{seed}.json"


def summarised(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every method, each measure over the seeds: its mean over the streams of a seed counts as one number."""
    found: dict[str, Any] = {}
    for method in seeds[0]["methods"]:
        found[method] = {}
        for measure in MEASURES:
            runs = [seed["methods"][method][measure]["mean"] for seed in seeds]
            found[method][measure] = {"mean": statistics.fmean(runs), "half_width": half_width(runs), "runs": runs}
    return found


def half_width(runs: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean (Student's t)."""
    if len(runs) < 2:
        return None
    return float(student.ppf(0.975, len(runs) - 1)) * statistics.stdev(runs) / math.sqrt(len(runs))


def as_markdown(summary: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]], options: Options, command: str) -> str:
    """The table, the paired differences, and how it was measured."""
    labels = {"exact_match": "exact match, %", "f1": "F1, %", "qa_loss": "QA loss"}
    streams = len(seeds[0]["methods"]["no adaptation"]["f1"]["runs"])
    lines = [
        "# Meta-learned online adaptation",
        "",
        f"`{command}`, {len(seeds)} seeds of the preset `{options.preset}`.",
        "Mean over the seeds ± half the 95 % interval (Student's t). A seed has other documents and another base",
        f"model; each is judged on {streams} streams of unseen documents, which no weights were trained on.",
        "Every method chose its learning rate on validation streams, and takes one step per document. The last columns",
        "say how many outer steps an arm took in the same process time, and how long its hypergradients were before",
        "clipping: the median and the largest over the steps of a seed, of each the median over the seeds.",
        "",
        "| weights | " + " | ".join(labels.values()) + " | outer steps | ‖∇h‖, median | ‖∇h‖, largest |",
        "| --- | " + "--- | " * (len(labels) + 2) + "--- |",
    ]
    for method, scores in summary.items():
        cells = [shown(scores[measure], measure) for measure in labels]
        lines.append(f"| {method} | {' | '.join([*cells, *training_of(method, seeds)])} |")
    lines += [
        "",
        "Differences within a seed, mean ± half the 95 % interval:",
        "",
        "| pair | F1, points | QA loss |",
        "| --- | --- | --- |",
    ]
    pairs = [(arm, control) for arm in ARMS for control in ("uniform weights", "no adaptation")]
    pairs += [(EXACT_LONG, EXACT_SHORT), (EXACT_BOTH, EXACT_SHORT), (EXACT_LONG, FORWARD)]
    for left, right in pairs:
        cells = [shown(difference(summary, left, right, measure), measure, True) for measure in ("f1", "qa_loss")]
        lines.append(f"| {left} − {right} | {' | '.join(cells)} |")
    seconds = statistics.fmean(seed["seconds"] for seed in seeds)
    tuned = statistics.fmean(seed["tuned_seconds"] for seed in seeds)
    lines += [
        "",
        f"Process time on one core: {seconds:.0f} s a seed, {tuned:.0f} s of it for the base model, "
        f"{options.budget:.0f} s for each arm.",
    ]
    return "\n".join(lines) + "\n"


def training_of(method: str, seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Outer steps and norms of an arm; a dash for what was not trained."""
    arms = [seed["arms"][method] for seed in seeds if method in seed["arms"]]
    if not arms:
        return ["–"] * 3
    norms = [statistics.median(arm[name] for arm in arms) for name in ("median_norm", "largest_norm")]
    steps = [statistics.fmean(counts) for counts in zip(*(arm["outer_steps"] for arm in arms), strict=True)]
    return [" + ".join(f"{count:.0f}" for count in steps), *(f"{norm:.2g}" for norm in norms)]


def difference(summary: Mapping[str, Any], left: str, right: str, measure: str) -> dict[str, Any]:
    """Of two methods, seed by seed."""
    runs = [a - b for a, b in zip(summary[left][measure]["runs"], summary[right][measure]["runs"], strict=True)]
    return {"mean": statistics.fmean(runs), "half_width": half_width(runs)}


def shown(found: Mapping[str, Any], measure: str, signed: bool = False) -> str:
    factor, digits = (1, 3) if measure == "qa_loss" else (100, 1)
    sign = "+" if signed else ""
    spread = "" if found["half_width"] is None else f" ± {factor * found['half_width']:.{digits}f}"
    return f"{factor * found['mean']:{sign}.{digits}f}{spread}"


if __name__ == "__main__":
    main()
