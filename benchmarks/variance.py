"""Relative squared error of every estimator on three problems, at about equal units, plain (FG)²U beside the others.

    python benchmarks/variance.py

Units are counted as in the docstrings: 1 + 2b inner loops for b directions, and for a control variate what it costs by
itself (1 + 4s/T for `TruncatedReverse(s)`, a little more than the 1 + 3s/T of its docstring); what is left of the
budget goes into directions. Measured units are beside them. Writes `benchmarks/results/variance.json` and `.md`, and
`docs/pictures/equal_compute_*.png`. One thread.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import ForwardGradient, HessianFree, Reverse, TruncatedReverse
from bilevel.comparison import compare, plot
from bilevel.comparison.compare import ComparisonRow
from bilevel.estimators.variates import ControlVariate
from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar
from bilevel.tasks import image_data
from bilevel.tasks.cleaning.problem import setup as cleaning_setup
from bilevel.tasks.cleaning.task import CleaningTask
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.problem import setup

ROOT = Path(__file__).parent
Point = tuple[Any, Any, Any, Any]
"""A problem, φ, inner batches and an outer batch."""


@dataclass(frozen=True)
class Options:
    """Relative squared error at equal units."""

    repeats: int = 12
    """Draws of directions for each estimator."""
    problems: tuple[str, ...] = ("condensation", "noisy_labels_digits", "learning_rates")
    """What to measure; the results of others stay as they are. There is `noisy_labels_mnist` too, with --data-dir."""
    data_dir: Path | None = None
    """Folder with the idx files of MNIST."""


def condensation() -> Point:
    """Ten synthetic digits, N = 640, T = 50."""
    made = setup(Condensation(model="mlp", width=32, inner_steps=50), image_data.digits(), 1, 0)
    return made.problem, made.meta, made.inner_batches_of(0), made.outer_batch_of(0)


def _network(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def noisy_labels(name: image_data.DataName, data_dir: Path | None) -> Point:
    """A weight for every training example of `bilevel run cleaning`: 1000 digits or 5000 of MNIST, T = 100."""
    config = CleaningTask.presets[name].config
    made = cleaning_setup(config, image_data.load(name, data_dir), 0)
    return made.problem, made.meta, made.inner_batches_of(0), None


def learning_rates() -> Point:
    """A learning rate for each of 12 tensors of a six-layer network: N = 12, T = 100, SGD on mini-batches."""
    data = image_data.digits()
    images, labels = data.train_images.flatten(1), data.train_labels
    model = _network(64, 32, 32, 32, 32, 32, 10)
    names = [name for name, _ in model.named_parameters()]

    def rates(meta: torch.Tensor) -> Any:
        return dict(zip(names, meta.exp(), strict=True))

    problem = bilevel.GradientDescent(
        lambda view, meta, chosen: cross_entropy(view(images[chosen]), labels[chosen]),
        lambda view, meta, batch: cross_entropy(view(data.test_images.flatten(1)), data.test_labels),
        model,
        bilevel.optimizer(torch.optim.SGD, lr=rates),
    )
    chosen = [torch.arange(64 * t, 64 * t + 64) % len(labels) for t in range(100)]
    return problem, torch.full((12,), 0.1).log(), chosen, None


PROBLEMS: dict[str, tuple[Callable[[Path | None], Point], int]] = {
    "condensation": (lambda _: condensation(), 41),
    "noisy_labels_digits": (lambda data_dir: noisy_labels("digits", data_dir), 41),
    "noisy_labels_mnist": (lambda data_dir: noisy_labels("mnist", data_dir), 41),
    "learning_rates": (lambda _: learning_rates(), 13),
}
"""With the budget of each, in inner loops."""


def estimators(budget: int, steps: int, meta: torch.Tensor, implicit: bool) -> list[bilevel.Estimator]:
    """Deterministic ones at their own price; random ones with as many directions as the budget allows."""
    few, many = max(1, steps // 10), steps // 2

    def random(price: float, variate: ControlVariate | None = None, **more: Any) -> ForwardGradient:
        left = max(2, min(int((budget - 1 - price) // 2), meta.numel()))
        return ForwardGradient(left, control_variate=variate, **more)

    rows: list[bilevel.Estimator] = [Reverse(), Reverse("sqrt"), TruncatedReverse(few), TruncatedReverse(many)]
    if implicit:
        rows += [HessianFree(), bilevel.Implicit(bilevel.Neumann(10, step_size=0.1))]
    rows += [
        random(0),
        random(0, distribution="orthogonal"),
        random(1 + 4 * few / steps, TruncatedReverse(few)),
        random(1 + 4 * many / steps, TruncatedReverse(many)),
        random(5 * 0.5, bilevel.CoarserProblem(steps=many)),
    ]
    if implicit:
        rows.append(random(1 + 4 * many / steps + 1.1, (TruncatedReverse(many), HessianFree())))
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    stored = ROOT / "results" / "variance.json"
    found: dict[str, Any] = json.loads(stored.read_text())["problems"] if stored.exists() else {}
    with bar("problems", len(options.problems)) as shown:
        for name in options.problems:
            make, budget = PROBLEMS[name]
            problem, meta, inner, outer = make(options.data_dir)
            wanted = estimators(budget, len(inner), meta, name != "learning_rates")
            rows = compare.compare(problem, meta, inner, outer, estimators=wanted, repeats=options.repeats)
            found[name] = {
                "sizes": f"N = {meta.numel()}, T = {len(inner)}, budget {budget} inner loops, {options.repeats} draws",
                "rows": compare.as_dicts(rows),
            }
            shown.advance(name)
    for name, content in found.items():
        rows = [ComparisonRow(**row) for row in content["rows"]]
        plot.write(ROOT.parent / "docs" / "pictures" / f"equal_compute_{name}.png", rows, name)
    write_json(stored, {"torch": torch.__version__, "problems": found})
    write_text(ROOT / "results" / "variance.md", page(found))


def page(found: dict[str, Any]) -> str:
    """All results, in markdown."""
    lines = [
        "# Relative squared error at equal units",
        "",
        "`python benchmarks/variance.py`, and for MNIST `--problems noisy_labels_mnist --data-dir FOLDER`: ± 95 % "
        f"intervals, one thread, torch {torch.__version__}, python {platform.python_version()}. Gain: over plain "
        "Rademacher directions with the whole budget; in the last column per measured unit, plain estimates getting "
        "better as 1/units.",
    ]
    for name in PROBLEMS:
        if name in found:
            rows = [ComparisonRow(**row) for row in found[name]["rows"]]
            lines += ["", f"## {name}: {found[name]['sizes']}", "", *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: list[ComparisonRow]) -> list[str]:
    """In markdown."""
    plain = next(row for row in rows if row.repeats > 1)
    lines = ["| estimator | squared error | bias² | cosine | units | gain | at measured units |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        squared = row.relative_error**2
        gain = plain.relative_error**2 / squared if row.repeats > 1 else 0.0
        gains = f"{gain:.1f} | {gain * plain.units / row.units:.1f}" if gain else "|"
        widths = {name: f" ± {value:.2g}" for name, value in row.half_widths.items()}
        lines.append(
            f"| `{row.estimator}` | {squared:.3g}{widths.get('squared_error', '')} "
            f"| {row.squared_bias:.2g}{widths.get('squared_bias', '')} | {row.cosine:.3f} | {row.units:.1f} | {gains} |"
        )
    return lines


if __name__ == "__main__":
    main()
