"""Known proportions, by hypergradients and by other methods at equal compute: python benchmarks/mixture.py

Writes benchmarks/results/mixture.md.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import numpy as np
import torch

import bilevel
from bilevel import randomness
from bilevel.tasks.mixture import baselines
from bilevel.tasks.mixture.config import Mixture
from bilevel.tasks.mixture.problem import proportions, setup, trained
from bilevel.tasks.mixture.sources import Sources, load

SEEDS = range(1, 6)  # the settings were chosen at seed 0
STEPS = 400
"""The steps of the training that judges proportions, and of each trial."""
TRAININGS = 12
"""What a method may spend on its search, in such trainings."""
RESULTS = Path(__file__).parent / "results" / "mixture.md"
CONFIG = Mixture(evaluation_steps=STEPS, trial_trainings=TRAININGS, device="cpu")
WINDOW = replace(CONFIG, stream=True, inner_steps=10, outer_lr=0.3)

Search = Callable[[Sources, int], torch.Tensor]


def by_hypergradients(config: Mixture, estimator: Any, units: int) -> Search:
    """Return a search by `fit`. One estimate costs `units` gradients of a mixed batch, and 3 for the outer loss."""
    outer_steps = STEPS * TRAININGS // (units + 3)

    def search(data: Sources, seed: int) -> torch.Tensor:
        made = setup(config, data, outer_steps, seed)
        found = bilevel.fit(
            made.problem,
            made.meta,
            made.inner_batches,
            made.outer_batch,
            seed,
            estimator=estimator,
            steps=outer_steps,
            optimizer=made.optimizer,
            stream=made.stream,
            progress=False,
        )
        return proportions(found.meta)

    return search


def by_trials(choose: Callable[[Any, int], torch.Tensor]) -> Search:
    def search(data: Sources, seed: int) -> torch.Tensor:
        return choose(baselines.trials(CONFIG, data, TRAININGS, seed), seed)

    return search


OURS: dict[str, Search] = {
    "exact, in a stream (10 steps)": by_hypergradients(WINDOW, bilevel.Reverse(), 40),
    "exact, in a stream, by sampling": by_hypergradients(replace(WINDOW, act_as="sampling"), bilevel.Reverse(), 40),
    "exact, through 100 steps": by_hypergradients(replace(CONFIG, outer_lr=0.6), bilevel.Reverse(), 400),
    "one step (`HessianFree`), in a stream": by_hypergradients(WINDOW, bilevel.HessianFree(), 13),
    "penalty, in a stream": by_hypergradients(WINDOW, bilevel.Penalty(100.0), 32),
}
OTHERS: dict[str, Search] = {
    "uniform": lambda data, seed: torch.full((len(data.train),), 1 / len(data.train)),
    "proportional": lambda data, seed: data.proportional(),
    # each update takes a gradient of every source, together one mixed batch, and 3 units for the target
    "online alignment": lambda data, seed: baselines.by_alignment(CONFIG, data, STEPS * TRAININGS * 10 // 14, seed),
    "random search": by_trials(lambda tried, seed: baselines.best_of(tried)),
    "regression over mixtures": by_trials(baselines.by_regression),
    "known": lambda data, seed: torch.tensor([data.known[name] for name in data.names] if data.known else []),
}
WITHOUT_SEARCH = ("uniform", "proportional")


def main() -> None:
    lines, means = [], {}
    sources = [load(CONFIG, None, seed) for seed in SEEDS]
    known = np.array([sources[0].known[name] for name in sources[0].names]) if sources[0].known else np.array([])
    for name, search in {**OURS, **OTHERS}.items():
        found, values, seconds = [], [], []
        for seed, data in zip(SEEDS, sources, strict=True):
            began = time.process_time()
            p = search(data, seed)
            seconds.append(time.process_time() - began)
            steps = STEPS * (1 + TRAININGS) if name in WITHOUT_SEARCH else STEPS
            model = trained(CONFIG, data, p, steps, seed, 0, (randomness.MIXTURE_NETWORK, randomness.MIXTURE_ORDER))
            found.append(p.numpy())
            values.append(baselines.target_loss(model, data.test))
        errors = np.abs(np.array(found) - known).max(1)
        means[name] = np.array(values)
        cells = [f"{p:.3f} ± {s:.3f}" for p, s in zip(np.mean(found, 0), np.std(found, 0, ddof=1), strict=True)]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {errors.mean():.3f} | {errors.max():.3f} | "
            f"{means[name].mean():.4f} | {(means[name] - reference_of(means)).mean():+.4f} | {np.mean(seconds):.1f} |"
        )
        print(lines[-1], flush=True)
    write(lines, means, sources[0].names)


def reference_of(means: dict[str, np.ndarray]) -> np.ndarray:
    """Return the target losses of the first method, with which the others are compared seed by seed."""
    return next(iter(means.values()))


def write(lines: list[str], means: dict[str, np.ndarray], names: list[str]) -> None:
    first, *_ = means
    worse = {name: int((means[name] > means[first]).sum()) for name in OTHERS}
    lower = ", ".join(f"{n} of {len(SEEDS)} seeds against {name}" for name, n in worse.items())
    text = [
        "# Proportions of sources",
        "",
        f"`python benchmarks/mixture.py`, torch {torch.__version__}, {platform.machine()}, one thread, process time.",
        f"{len(SEEDS)} seeds, each with rules of its own; mean ± standard deviation of the proportions. The known best",
        "proportions are 0.6 own, 0.4 half useful and nothing else. The largest error is that of the proportion that",
        "is furthest off: its mean over the seeds, and in the worst seed.",
        "",
        f"Every method may spend {TRAININGS} trainings of {STEPS} steps on its search, counted in gradients of a mixed",
        f"batch; a new model is then trained for {STEPS} steps with what it found. Uniform and proportional weights",
        f"need no search, so their model is trained for {STEPS * (1 + TRAININGS)} steps. The difference is that of the",
        "target loss to the first row, seed by seed; a positive one is worse than the first row.",
        "",
        f"The first row has the lower target loss in {lower}.",
        "",
        f"| method | {' | '.join(names)} | largest error, mean | worst seed | target loss | difference | seconds |",
        f"| {' | '.join(['---'] * (len(names) + 6))} |",
        *lines,
    ]
    RESULTS.write_text("\n".join(line.rstrip() for line in text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
