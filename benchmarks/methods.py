"""All methods side by side: error at one point, the outer loss after equal compute, and what truncation does.

    python benchmarks/methods.py    # about ten minutes on one core

Three measurements, one thread, written to `benchmarks/results/methods.json` and `.md` after each of them, and
`docs/pictures/methods.png`:

1. `compare` on four problems: error and cosine against the exact hypergradient, units, seconds, memory.
2. The final outer loss after the same number of units (by the formulas of the estimators) on three small problems: five
   seeds with 95 % intervals, the outer learning rate of each method chosen on another seed.
3. The claim of "The Curse of Unrolling" (arXiv 2602.19733): the error of an unrolled gradient against the gradient at
   the inner solution, with all derivative steps, with the last ones alone, and from a warm start.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from variance import learning_rates

import bilevel
from bilevel import (
    ConjugateGradient,
    EmpiricalFisher,
    Forward,
    ForwardGradient,
    HessianFree,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    PersistentES,
    Reverse,
    SingleLoop,
    TruncatedReverse,
    ZerothOrder,
)
from bilevel.comparison.compare import as_dicts
from bilevel.errors import NoDependenceError, NonFiniteError
from bilevel.estimators.names import describe
from bilevel.planning.live_memory import counting
from bilevel.report import page
from bilevel.report.files import write_bytes, write_json, write_text
from bilevel.report.progress import bar
from bilevel.tasks import image_data
from bilevel.unrolling.unroll import unroll

ROOT = Path(__file__).parent
SAMA = HessianFree(preconditioner="optimizer", mixed="difference")


@dataclass(frozen=True)
class Options:
    """All methods side by side."""

    parts: tuple[str, ...] = ("truncation", "training", "comparison")
    """What to measure; the results of other parts stay as they are."""
    problems: tuple[str, ...] = ("mixture of sources", "noisy labels", "condensation")
    """The problems of the training part."""
    points: tuple[str, ...] = ("condensation", "noisy labels", "learning rates", "mixture of sources")
    """The problems of the comparison."""
    seeds: int = 5
    """Seeds on which the methods are judged after equal compute."""
    repeats: int = 3
    """Draws of random directions in the comparison."""


# -- small problems ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A problem whose inner loop takes milliseconds, for training at equal compute."""

    make: Callable[[int], tuple[bilevel.GradientDescent, Tensor, Callable[[int], Any]]]
    """seed ↦ problem, φ, and the inner batch of step number 0, 1, 2, …"""
    rates: tuple[float, float, float]
    """The outer learning rates to choose from."""
    project: Callable[[Any], Any] | None = None


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = image_data.digits()
    return data.train_images.flatten(1), data.train_labels, data.test_images.flatten(1), data.test_labels


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(64, 10)


def ridge(model: Any) -> Tensor:
    return 0.005 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def sources(seed: int) -> tuple[bilevel.GradientDescent, Tensor, Callable[[int], Any]]:
    """The logits of five sources of digits, which have 0, 20, …, 80 % wrong labels; N = 5."""
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)[:1000].reshape(5, 200)
    wrong = torch.rand(5, 200, generator=generator) < torch.arange(5)[:, None] / 5
    noisy = torch.where(wrong, torch.randint(10, (5, 200), generator=generator), labels[order])

    def inner_loss(model: Any, meta: Tensor, chosen: Tensor) -> Tensor:
        scores = model(images[order[:, chosen].reshape(-1)])
        losses = cross_entropy(scores, noisy[:, chosen].reshape(-1), reduction="none").reshape(5, -1).mean(1)
        return (meta.softmax(0) * losses).sum() + ridge(model)

    return descent(inner_loss, seed, test_images, test_labels), torch.zeros(5), minibatches(200, 20)


def weights(seed: int) -> tuple[bilevel.GradientDescent, Tensor, Callable[[int], Any]]:
    """A weight for each of 300 digits, half of which have a wrong label; N = 300."""
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)[:300]
    wrong = torch.rand(300, generator=generator) < 0.5
    noisy = torch.where(wrong, torch.randint(10, (300,), generator=generator), labels[order])

    def inner_loss(model: Any, meta: Tensor, chosen: Tensor) -> Tensor:
        losses = cross_entropy(model(images[order[chosen]]), noisy[chosen], reduction="none")
        return (meta[chosen].sigmoid() * losses).mean() + ridge(model)

    return descent(inner_loss, seed, test_images, test_labels), torch.zeros(300), minibatches(300, 100)


def images_of_classes(seed: int) -> tuple[bilevel.GradientDescent, Tensor, Callable[[int], Any]]:
    """Ten synthetic digits, one of each class; N = 640."""
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.nonzero(labels == label)[:, 0][int(torch.randint(20, (), generator=generator))]
                          for label in range(10)])  # fmt: skip

    def inner_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return cross_entropy(model(meta), torch.arange(10)) + ridge(model)

    return descent(inner_loss, seed, test_images, test_labels), images[chosen].clone(), lambda t: None


def descent(inner_loss: Any, seed: int, test_images: Tensor, test_labels: Tensor) -> bilevel.GradientDescent:
    """Half of the test digits judge while φ is trained; `judged` takes the other half."""
    half = len(test_images) // 2

    def outer_loss(model: Any, meta: Tensor, unseen: bool | None) -> Tensor:
        part = slice(half, None) if unseen else slice(half)
        return cross_entropy(model(test_images[part]), test_labels[part])

    optimizer = bilevel.optimizer(torch.optim.SGD, lr=0.3)
    return bilevel.GradientDescent(inner_loss, outer_loss, linear(seed), optimizer)


def minibatches(count: int, size: int) -> Callable[[int], Tensor]:
    return lambda t: (torch.arange(size) + t * size) % count


SMALL = {
    "mixture of sources": Small(sources, (0.03, 0.1, 0.3)),
    "noisy labels": Small(weights, (0.1, 0.3, 1.0)),
    "condensation": Small(images_of_classes, (0.01, 0.03, 0.1), lambda images: images.clamp(0, 1)),
}


# -- 1. one point ------------------------------------------------------------------------------------------------------


def at_start(small: Small) -> tuple[Any, ...]:
    """A small problem with a network of two layers in place of the linear model, and 50 inner steps."""
    problem, meta, batch = small.make(0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    problem = bilevel.GradientDescent(problem.inner_loss, problem._outer_loss, network, problem.optimizer)
    return problem, meta, [batch(t) for t in range(50)], None


def comparison(name: str, options: Options) -> dict[str, Any]:
    problem, meta, inner, outer = learning_rates() if name == "learning rates" else at_start(SMALL[name])
    seen, unseen = [], []
    for estimator in one_point_methods(len(inner), meta.numel()):
        try:
            estimator(problem, meta, inner, outer)
            seen.append(estimator)
        except NoDependenceError:
            unseen.append(describe(estimator))
        except NonFiniteError:
            unseen.append(describe(estimator) + " (diverged)")
    rows = bilevel.compare(
        problem, meta, inner, outer, estimators=seen, exact=Reverse(), repeats=options.repeats, progress=True
    )
    dicts = as_dicts(rows)
    for estimator, row in zip(seen, dicts, strict=True):
        row["formula"] = estimator.units(len(inner), meta.numel()) / len(inner)
        with counting() as live:
            estimator(problem, meta, inner, outer)
        row["live_bytes"] = live.peak
    return {"sizes": f"N = {meta.numel():,}, T = {len(inner)}", "rows": dicts, "unseen": unseen}


def one_point_methods(steps: int, meta_size: int) -> list[bilevel.Estimator]:
    exact: list[bilevel.Estimator] = [Reverse(), Reverse("sqrt")]
    if meta_size <= 16:
        exact.append(Forward())
    directions = min(8, meta_size)
    return [
        *exact,
        TruncatedReverse(max(1, steps // 10)),
        TruncatedReverse(steps // 2),
        ForwardGradient(directions),
        ZerothOrder(directions, step_size=1e-2),
        PersistentES(directions, step_size=1e-2),
        Implicit(ConjugateGradient(10, damping=0.01)),
        Implicit(Neumann(10, step_size=0.1)),
        Implicit(Nystrom(10, damping=0.1)),
        Implicit(EmpiricalFisher(20, damping=0.1)),
        HessianFree(),
        SAMA,
        replace(SAMA, lookahead=True),
        Penalty(10.0),
        Penalty(1000.0),
        SingleLoop(0.1, solver_steps=10),
    ]


# -- 2. equal compute --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """A method, with the inner steps of one estimate."""

    estimator: bilevel.Estimator
    steps: int
    stream: bool | int = False
    name: str = ""

    @property
    def label(self) -> str:
        how = (
            "" if self.stream is False else ", stream" if self.stream is True else f", stream of {self.stream} windows"
        )
        return f"{describe(self.estimator)}, T = {self.steps}{how}"


T, UNITS, JUDGED_STEPS = 10, 240, 50
TRAINERS = [
    Trainer(Reverse(), T),
    Trainer(TruncatedReverse(3), T),
    Trainer(ForwardGradient(4), T),
    Trainer(Implicit(Neumann(5, step_size=0.3)), T),
    Trainer(Implicit(EmpiricalFisher(10, damping=0.3)), T),
    Trainer(HessianFree(), T),
    Trainer(SAMA, T),
    Trainer(Penalty(10.0), T),
    Trainer(Penalty(10.0), 2, stream=True),
    Trainer(SingleLoop(0.3), 2, stream=True),
    Trainer(SingleLoop(0.3, order="simultaneous", average=0.3), 1, stream=True),
    Trainer(PersistentES(4, step_size=1e-2), 2, stream=5),
]


def training(name: str, small: Small, options: Options) -> dict[str, Any]:
    tuning, rows = range(100, 101), []
    with bar(name, len(TRAINERS)) as shown:
        for trainer in TRAINERS:
            began = time.process_time()
            tried = {
                rate: statistics.fmean(train(small, trainer, rate, seed)["long"] for seed in tuning)
                for rate in small.rates
            }
            best = min(tried, key=lambda rate: tried[rate])
            runs = [train(small, trainer, best, seed) for seed in range(options.seeds)]
            rows.append(
                {
                    "method": trainer.label,
                    "rate": best,
                    "edge": best in (min(small.rates), max(small.rates)),
                    "outer_steps": outer_steps(small, trainer),
                    "long": interval([run["long"] for run in runs]),
                    "short": interval([run["short"] for run in runs]),
                    "seconds": time.process_time() - began,
                }
            )
            shown.advance(trainer.label)
    start = [judged(problem, meta, batch, seed) for seed in range(options.seeds)
             for problem, meta, batch in [small.make(seed)]]  # fmt: skip
    return {"start": {key: interval([each[key] for each in start]) for key in ("long", "short")}, "rows": rows}


def outer_steps(small: Small, trainer: Trainer) -> int:
    _, meta, _ = small.make(0)
    return max(1, int(UNITS / trainer.estimator.units(trainer.steps, meta.numel())))


def train(small: Small, trainer: Trainer, rate: float, seed: int) -> dict[str, float]:
    problem, meta, batch = small.make(seed)
    try:
        result = bilevel.fit(
            problem,
            meta,
            lambda draw: [batch(draw * trainer.steps + t) for t in range(trainer.steps)],
            None,
            seed,
            estimator=trainer.estimator,
            steps=outer_steps(small, trainer),
            stream=trainer.stream,
            optimizer=bilevel.optimizer(torch.optim.Adam, lr=rate),
            update=bilevel.OuterUpdate(project=small.project),
            progress=False,
        )
    except NonFiniteError:
        return {"long": math.inf, "short": math.inf}
    return judged(problem, result.meta, batch, seed)


def judged(problem: Any, meta: Tensor, batch: Callable[[int], Any], seed: int) -> dict[str, float]:
    """The loss on the unseen half after a new inner loop, of T steps and of more."""
    losses = {}
    for name, steps in (("short", T), ("long", JUDGED_STEPS)):
        run = unroll(problem, meta, [batch(10_000 + t) for t in range(steps)], True, seed)
        losses[name] = float(run.value()[0])
    return losses


def interval(values: list[float]) -> dict[str, float]:
    """The mean and half the width of its 95 % interval, by Student's t."""
    if not all(map(math.isfinite, values)):
        return {"mean": math.inf, "half_width": math.inf}
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.776}.get(len(values), 2.0)
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": statistics.fmean(values), "half_width": quantile * spread}


# -- 3. truncation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ill:
    """A problem with a known gradient at the inner solution."""

    problem: bilevel.GradientDescent
    meta: Tensor
    rest: int
    """Steps after which the inner loop is at rest, to float64."""
    horizons: tuple[int, ...] = field(default=(5, 10, 20, 50, 100, 200))


def quadratic() -> Ill:
    """½ (θ − Rφ)ᵀ H(φ₀) (θ − Rφ) with curvature scaled by exp φ₀; condition number 100."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.logspace(-2, 0, 30, dtype=torch.float64)
    shift = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(30, generator=generator, dtype=torch.float64)

    def inner_loss(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        curvature = eigenvalues * (phi[0] * torch.linspace(-1, 1, 30, dtype=torch.float64)).exp()
        return 0.5 * (curvature * theta.square()).sum() - theta @ (shift @ phi)

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda theta, phi, batch: 0.5 * (theta - target).square().sum() / 30,
        torch.full((30,), 10.0, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=0.7),
    )
    return Ill(problem, torch.tensor([0.1, 0.2, -0.1], dtype=torch.float64), 4000)


def logistic() -> Ill:
    """A weight for each of 60 digits, and a linear model with a ridge, trained on all of them."""
    images, labels, test_images, test_labels = digits()
    images, labels, test_images = images[:60].double(), labels[:60], test_images.double()

    def inner_loss(model: Any, phi: Tensor, batch: Any) -> Tensor:
        return (phi.sigmoid() * cross_entropy(model(images), labels, reduction="none")).mean() + 2 * ridge(model)

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda model, phi, batch: cross_entropy(model(test_images), test_labels),
        linear(0).double(),
        bilevel.optimizer(torch.optim.SGD, lr=0.3),
    )
    return Ill(problem, torch.zeros(60, dtype=torch.float64), 3000)


def truncation() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, made in {"quadratic": quadratic(), "logistic regression": logistic()}.items():
        solver = ConjugateGradient(400, tolerance=1e-11)
        truth = Implicit(solver)(made.problem, made.meta, made.rest).grad
        # A warm start: where the inner loop rested at the φ of a step before.
        before = made.meta + 0.02 * torch.randn(made.meta.shape, generator=torch.Generator().manual_seed(1)).double()
        warm = Reverse("sqrt")(made.problem, before, 500).carried
        rows = []
        for steps in made.horizons:
            row: dict[str, Any] = {"steps": steps}
            for label, estimator in {
                "all": Reverse(),
                "half": TruncatedReverse(max(1, steps // 2)),
                "quarter": TruncatedReverse(max(1, steps // 4)),
            }.items():
                for start, carried in {"cold": None, "warm": warm}.items():
                    grad = estimator(made.problem, made.meta, steps, carried=carried).grad
                    row[f"{label}, {start}"] = float((grad - truth).norm() / truth.norm())
            rows.append(row)
        found[name] = rows
    return found


# -- what is written ---------------------------------------------------------------------------------------------------


def as_markdown(found: dict[str, Any]) -> str:
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    text = f"`python benchmarks/methods.py`; one thread, {versions}. The benchmark describes the problems."
    lines = ["# All methods side by side", "", text]
    if "comparison" in found:
        lines += comparison_lines(found["comparison"])
    if "training" in found:
        lines += training_lines(found["training"])
    if "truncation" in found:
        lines += truncation_lines(found["truncation"])
    return "\n".join(lines) + "\n"


def comparison_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        *("", "## Error at one point", ""),
        "Error and cosine are those to the exact hypergradient of the unrolled inner loop, at the first φ and from the "
        "first θ. Methods for streams begin there without a past. The error of random methods is the root mean square "
        "over their draws. *Units* are by the formulas, and *measured* is process time, both over those of the plain "
        "inner loop; the machine was busy, so measured times may be off by a factor of two. *MB* are those of live "
        "tensors at the peak.",
    ]
    for name, part in found.items():
        lines += ["", f"### {name}: {part['sizes']}", ""]
        lines += ["| method | error | cosine | units | measured | seconds | MB |", "| --- " * 7 + "|"]
        for row in part["rows"]:
            cells = [f"{row['relative_error']:.2g}", f"{row['cosine']:.3f}", f"{row['formula']:.1f}"]
            memory = f"{row['live_bytes'] / 1e6:.1f}" if "live_bytes" in row else "–"
            cells += [f"{row['units']:.1f}", f"{row['seconds']:.2f}", memory]
            lines.append(f"| `{row['estimator']}` | {' | '.join(cells)} |")
        if part["unseen"]:
            names = ", ".join(f"`{name}`" for name in part["unseen"])
            lines += ["", f"These methods see no dependence on φ here, or diverge: {names}."]
    return lines


def training_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        *("", "## The outer loss after equal compute", ""),
        f"Every method gets {UNITS} units by its own formula. Outer Adam; the learning rate is chosen among three on "
        f"another seed, and (edge) marks the smallest or largest of them. *{JUDGED_STEPS} steps* is the loss on unseen "
        f"digits after a new inner loop of {JUDGED_STEPS} steps, by which the rate is chosen; *{T} steps* is that "
        f"after {T}. Means over five seeds with 95 % intervals.",
    ]
    for name, part in found.items():
        start = part["start"]
        before = f"{cell(start['long'])}, and {cell(start['short'])} after {T} steps"
        lines += ["", f"### {name}: at the start {before}", ""]
        lines += [
            f"| method | outer steps | rate | {JUDGED_STEPS} steps | {T} steps |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in part["rows"]:
            rate = f"{row['rate']:g}{' (edge)' if row['edge'] else ''}"
            cells = [str(row["outer_steps"]), rate, cell(row["long"]), cell(row["short"])]
            lines.append(f"| `{row['method']}` | {' | '.join(cells)} |")
    return lines


def truncation_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        *("", "## Truncation", ""),
        "The relative error against the gradient at the inner solution, with all derivative steps, with the last half "
        "and with the last quarter of them. *Warm* loops begin where 500 steps at a φ close by ended.",
    ]
    for name, rows in found.items():
        keys = list(rows[0])[1:]
        lines += ["", f"### {name}", "", f"| T | {' | '.join(keys)} |", "| --- " * (1 + len(keys)) + "|"]
        lines += [f"| {row['steps']} | {' | '.join(f'{row[key]:.2g}' for key in keys)} |" for row in rows]
    return lines


def cell(value: dict[str, float]) -> str:
    return f"{value['mean']:.4f} ± {value['half_width']:.4f}" if math.isfinite(value["mean"]) else "diverged"


def picture(found: dict[str, Any]) -> bytes:
    """Error over units, one panel for each problem."""
    figure, _ = page.figure(figsize=(11, 9))
    figure.clear()
    axes = figure.subplots(2, 2).flatten()
    names = list(dict.fromkeys(row["estimator"] for part in found.values() for row in part["rows"]))
    for axis, (name, part) in zip(axes, found.items(), strict=False):
        for row in part["rows"]:
            number, error = names.index(row["estimator"]), max(row["relative_error"], 1e-4)
            look = {"marker": "osv^DP*X"[number % 8], "color": f"C{number % 10}", "linestyle": ""}
            axis.plot([row["formula"]], [error], label=row["estimator"], **look)
        axis.set(xscale="log", yscale="log", title=f"{name}: {part['sizes']}")
        axis.set(
            xlabel="units by the formulas, over those of the inner loop",
            ylabel="relative error; at most 1e-4 at the bottom",
        )
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=7, loc="lower center", ncol=3)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    return page.as_png(figure)


def keep(part: str, measured: dict[str, Any]) -> None:
    """Write what is measured beside what is there of the other parts."""
    stored = ROOT / "results" / "methods.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    found[part] = {**found.get(part, {}), **measured}
    write_json(stored, found)


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    if "truncation" in options.parts:
        keep("truncation", truncation())
    if "training" in options.parts:
        for name in options.problems:
            keep("training", {name: training(name, SMALL[name], options)})
    if "comparison" in options.parts:
        for name in options.points:
            keep("comparison", {name: comparison(name, options)})
    found = json.loads((ROOT / "results" / "methods.json").read_text())
    write_text(ROOT / "results" / "methods.md", as_markdown(found))
    if "comparison" in found:
        write_bytes(ROOT.parent / "docs" / "pictures" / "methods.png", picture(found["comparison"]))


if __name__ == "__main__":
    main()
