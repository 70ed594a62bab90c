"""The outer loss after the same compute, spent by one estimator or another, on three problems.

    python benchmarks/outer_loss.py
    python benchmarks/outer_loss.py --problems noisy_labels_mnist --data-dir FOLDER

Every estimator gets as many outer steps as the budget pays for: the budget in plain inner loops over what one estimate
costs in them, both in measured process time. Outer Adam, learning rate falling linearly to 0, started from each of the
same three values; the best of the three is reported for each estimator, by the mean over the seeds. The final outer
loss is that of fresh initialisations and batches. Writes `benchmarks/results/outer_loss.json` and `.md`, and
`docs/pictures/outer_loss_*.png`. One thread.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.optim.lr_scheduler import LinearLR
from variance import ROOT, learning_rates

import bilevel
from bilevel import CoarserProblem, ForwardGradient, HessianFree, Reverse, RunningMean, TruncatedReverse, trees
from bilevel.estimators import names, variates
from bilevel.report import page
from bilevel.report.files import write_bytes, write_json, write_text
from bilevel.report.progress import bar
from bilevel.tasks import image_data
from bilevel.tasks.cleaning.problem import setup as cleaning_setup
from bilevel.tasks.cleaning.task import CleaningTask
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.problem import setup as condensation_setup
from bilevel.tasks.task import Setup
from bilevel.unrolling.unroll import unroll

FRESH = 1_000_000
"""The number of the first draw on which results are judged."""


@dataclass(frozen=True)
class Options:
    """The outer loss after an equal budget."""

    problems: tuple[str, ...] = ("condensation", "learning_rates")
    """What to measure; the results of others stay as they are. There is `noisy_labels_mnist` too, with --data-dir."""
    seeds: int = 1
    """Runs of each estimator at each learning rate."""
    judged: int = 4
    """Draws over which the final outer loss is a mean."""
    data_dir: Path | None = None
    """Folder with the idx files of MNIST."""


@dataclass(frozen=True)
class Case:
    """A problem with its budget in plain inner loops, and the outer learning rates to try."""

    setup: Setup
    budget: int
    rates: tuple[float, float, float]
    directions: int
    implicit: bool = True


def condensation(data_dir: Path | None) -> Case:
    config = Condensation(model="mlp", width=32, inner_steps=50)
    return Case(condensation_setup(config, image_data.digits(), 1, 0), 200, (0.02, 0.06, 0.2), 8)


def noisy_labels_mnist(data_dir: Path | None) -> Case:
    config = CleaningTask.presets["mnist"].config
    return Case(cleaning_setup(config, image_data.load("mnist", data_dir), 0), 60, (0.05, 0.15, 0.5), 8)


def rates_per_layer(data_dir: Path | None) -> Case:
    problem, meta, inner, _ = learning_rates()
    setup = Setup(problem, meta, inner, None, bilevel.optimizer(torch.optim.Adam))
    return Case(setup, 60, (0.02, 0.06, 0.2), 5, implicit=False)


PROBLEMS = {
    "condensation": condensation,
    "noisy_labels_mnist": noisy_labels_mnist,
    "learning_rates": rates_per_layer,
}


def estimators(case: Case, steps: int) -> list[bilevel.Estimator]:
    few, many, b = max(1, steps // 10), steps // 2, case.directions
    rows: list[bilevel.Estimator] = [
        Reverse(),
        ForwardGradient(b),
        ForwardGradient(b, control_variate=TruncatedReverse(many)),
        TruncatedReverse(many),
    ]
    if case.implicit:
        rows += [HessianFree(), bilevel.Implicit(bilevel.Neumann(10, step_size=0.1))]
    rows += [
        TruncatedReverse(few),
        ForwardGradient(b, control_variate=CoarserProblem(steps=many)),
        ForwardGradient(b, control_variate=RunningMean()),
    ]
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    for name in options.problems:
        measure(PROBLEMS[name](options.data_dir), options, name)


def keep(name: str, measured: dict[str, Any]) -> None:
    """Write what is measured of one problem so far beside what is there of the others."""
    stored = ROOT / "results" / "outer_loss.json"
    found: dict[str, Any] = json.loads(stored.read_text())["problems"] if stored.exists() else {}
    found[name] = measured
    write_json(stored, {"torch": torch.__version__, "problems": found})
    write_text(ROOT / "results" / "outer_loss.md", as_markdown(found))
    pictures = ROOT.parent / "docs" / "pictures"
    write_bytes(pictures / f"outer_loss_{name}.png", picture(measured["rows"], name))


def measure(case: Case, options: Options, name: str) -> None:
    """All estimators on one problem, each kept as soon as it is done."""
    setup = case.setup
    steps = len(setup.inner_batches_of(0))
    run = unroll(setup.problem, setup.meta, setup.inner_batches_of(0), setup.outer_batch_of(0), 0)
    plain = _seconds(lambda: run.descend(run.start()))
    rows: list[dict[str, Any]] = []
    seeds = f"{options.seeds} seed{'s' * (options.seeds > 1)}"
    sizes = f"N = {trees.size(setup.meta)}, T = {steps}, budget {case.budget} inner loops, {seeds}"
    start = _judged(setup, setup.meta, options.judged)
    wanted = estimators(case, steps)
    with bar(name, len(wanted) * len(case.rates) * options.seeds) as shown:
        for estimator in wanted:
            units = _seconds(functools.partial(_once, setup, estimator)) / plain
            outer_steps = max(1, int(case.budget / units))
            tried = []
            for rate in case.rates:
                runs = []
                for seed in range(options.seeds):
                    runs.append(_run(setup, estimator, outer_steps, rate, seed, options.judged, plain))
                    shown.advance(f"{names.describe(estimator)}: {runs[-1]['final']:.4f}")
                tried.append({"rate": rate, "final": statistics.fmean(r["final"] for r in runs), "runs": runs})
            best = min(tried, key=lambda each: each["final"])
            rows.append(
                {
                    "estimator": names.describe(estimator),
                    "units": units,
                    "outer_steps": outer_steps,
                    "best": best,
                    "by_rate": {str(each["rate"]): each["final"] for each in tried},
                }
            )
            keep(name, {"sizes": sizes, "start": start, "rows": rows})


def _once(setup: Setup, estimator: bilevel.Estimator) -> bilevel.Estimate:
    without_past = variates.with_past(estimator, None)
    return without_past(setup.problem, setup.meta, setup.inner_batches_of(0), setup.outer_batch_of(0))


def _run(
    setup: Setup, estimator: bilevel.Estimator, outer_steps: int, rate: float, seed: int, judged: int, plain: float
) -> dict[str, Any]:
    fall = functools.partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=outer_steps)
    began = time.process_time()
    result = bilevel.fit(
        setup.problem,
        setup.meta,
        setup.inner_batches,
        setup.outer_batch,
        seed,
        phases=[bilevel.Phase(estimator, steps=outer_steps)],
        optimizer=bilevel.optimizer(torch.optim.Adam, lr=rate, schedule=fall),
        update=setup.update,
        progress=False,
    )
    spent = (time.process_time() - began) / plain
    losses = [round(row["outer_loss"], 5) for row in result.history]
    return {"final": _judged(setup, result.meta, judged), "spent": spent, "losses": losses}


def _judged(setup: Setup, meta: Any, count: int) -> float:
    values = []
    for draw in range(FRESH, FRESH + count):
        run = unroll(setup.problem, meta, setup.inner_batches_of(draw), setup.outer_batch_of(draw), draw)
        values.append(float(run.value()[0]))
    return statistics.fmean(values)


def _seconds(function: Any) -> float:
    times = []
    for _ in range(4):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return min(times)


def picture(rows: list[dict[str, Any]], name: str) -> bytes:
    """The outer loss over what was spent, each estimator at its best learning rate; a dot for the final one."""
    figure, axis = page.figure(figsize=(8, 4.5))
    for row in rows:
        run = row["best"]["runs"][0]
        losses = run["losses"]
        width = max(1, len(losses) // 20)
        means = [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
        spent = [row["units"] * (i + 1) for i in range(len(losses))]
        (line,) = axis.plot(spent, means, linewidth=1, label=row["estimator"])
        axis.plot([spent[-1] * 1.05], [row["best"]["final"]], "o", color=line.get_color())
    axis.set(xscale="log", yscale="log", title=name, ylabel="outer loss")
    axis.set_xlabel("spent, in plain inner loops; dots: final outer loss on fresh draws, mean over the seeds")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    return page.as_png(figure)


def as_markdown(found: dict[str, Any]) -> str:
    """All results, in markdown."""
    lines = [
        "# The outer loss after the same compute",
        "",
        "`python benchmarks/outer_loss.py`, and for MNIST `--problems noisy_labels_mnist --data-dir FOLDER`: outer "
        "Adam, the best of three outer learning rates for each estimator (the same three), falling linearly to 0. "
        f"Final: mean outer loss of fresh draws, mean over the seeds (each of them). One thread, torch "
        f"{torch.__version__}, python {platform.python_version()}.",
    ]
    for name in PROBLEMS:
        if name not in found:
            continue
        rows = found[name]["rows"]
        rates = list(rows[0]["by_rate"])
        lines += ["", f"## {name}: {found[name]['sizes']}; at the start {found[name]['start']:.4g}", ""]
        lines.append(f"| estimator | units | outer steps | final | {' | '.join(f'lr {rate}' for rate in rates)} |")
        lines.append("| --- " * (4 + len(rates)) + "|")
        for row in rows:
            each = ", ".join(f"{run['final']:.3g}" for run in row["best"]["runs"])
            by_rate = " | ".join(f"{row['by_rate'][rate]:.4g}" for rate in rates)
            final = f"**{row['best']['final']:.4g}** ({each})"
            lines.append(f"| `{row['estimator']}` | {row['units']:.1f} | {row['outer_steps']} | {final} | {by_rate} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
