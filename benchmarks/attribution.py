"""How well scores of training examples predict retrainings: python benchmarks/attribution.py

Writes benchmarks/results/attribution.md. scikit-learn's digits: 1,000 training examples, 50 queries, 100 subsets.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.attribution import Recipe, WeightedTraining, baselines, metasmoothness

SUBSETS, QUERIES, EXAMPLES = 100, 50, 1000
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
RESULTS = Path(__file__).parent / "results" / "attribution.md"


def run(seed: int = 0, activation: type[nn.Module] = nn.GELU, **settings: Any) -> tuple[WeightedTraining, Any, float]:
    """Return the training, its queries and its accuracy on the other examples."""
    pixels, targets = load_digits(return_X_y=True)  # pyright: ignore[reportArgumentType]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(targets)[order]
    training = WeightedTraining.of(
        lambda: nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 10)),
        (x[:EXAMPLES], y[:EXAMPLES]),
        lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        Recipe(**settings),
        seed=seed,
    )
    rest = slice(EXAMPLES + QUERIES, None)
    accuracy = (training.train().params(x[rest]).argmax(1) == y[rest]).double().mean().item()
    asked = slice(EXAMPLES, EXAMPLES + QUERIES)
    return training, (x[asked], y[asked]), accuracy


def methods() -> dict[str, Callable[[WeightedTraining, Any], Tensor]]:
    named = {
        f"influence functions, damping {damping:g}": (
            lambda training, queries, damping=damping: baselines.influence_functions(training, queries, damping)
        )
        for damping in DAMPINGS
    }
    return {
        "attribute": lambda training, queries: bilevel.attribute(training, queries).scores,
        "gradient cosine": baselines.gradient_cosine,
        "truncated unrolling, one epoch": baselines.truncated_unrolling,
        **named,
    }


def timed(training: WeightedTraining, queries: Any) -> dict[str, tuple[Tensor, float]]:
    """Return the scores of every method with the seconds they took."""
    made: dict[str, tuple[Tensor, float]] = {}
    for name, method in methods().items():
        began = time.process_time()
        made[name] = method(training, queries), time.process_time() - began
    return made


def adam(eps: float, lr: float = 0.003) -> dict[str, Any]:
    return {"optimizer": bilevel.optimizer(torch.optim.Adam, lr=lr, eps=eps)}


def main() -> None:
    lines = [
        "# Which examples made the model so",
        "",
        f"`python benchmarks/attribution.py`, torch {torch.__version__}, {platform.machine()}, one thread,",
        f"process time. Digits of scikit-learn, {EXAMPLES} training examples, {QUERIES} queries, {SUBSETS} random",
        "subsets, an MLP 64-64-10, batches of 100, 10 epochs. The linear datamodeling score (LDS) is the mean over the",
        "queries of Spearman's rank correlation. Brackets hold the 95 % bootstrap interval over the queries; it",
        "leaves out the chance in the subsets.",
        "",
        "## Methods, by the part of the examples that a subset keeps",
        "",
        "The recipe is `Recipe()` with GELU: Adam with a learning rate of 0.003 and an epsilon of 1e-4. The exact",
        "derivative leads in every column. Its score falls where half of the examples are left out, because the losses",
        "are not linear over such a distance. The default of `lds` is to keep 90 %; it was chosen after a smaller run",
        "had shown this. For influence functions every damping that was tried is shown; the best of them was found on",
        "these same queries.",
        "",
        "| method | keeps 95 % | keeps 90 % | keeps 50 % | seconds for all queries |",
        "| --- | --- | --- | --- | --- |",
    ]
    training, queries, _ = run()
    made = timed(training, queries)
    columns = [
        bilevel.attribute(training, queries).lds(
            SUBSETS, fraction, baselines={name: scores for name, (scores, _) in made.items()}, progress=False
        )
        for fraction in (0.95, 0.9, 0.5)
    ]
    lines += [
        f"| {name} | {' | '.join(str(column[name]) for column in columns)} | {seconds:.1f} |"
        for name, (_, seconds) in made.items()
    ]
    lines += [
        "",
        "## Recipes",
        "",
        "Subsets keep 90 %. Metasmoothness says whether the trained parameters follow the weights smoothly; accuracy",
        "is that of the model on the other examples. The activation and the learning rate decide here. An epsilon of",
        "1e-4 raises metasmoothness and leaves the score as it is.",
        "",
        "| recipe | seed | metasmoothness | LDS of `attribute` | accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    recipes: list[tuple[str, int, dict[str, Any]]] = [
        *(("recommended: GELU, Adam, epsilon 1e-4", seed, {}) for seed in range(3)),
        *(("GELU, Adam, epsilon 1e-3", seed, adam(1e-3)) for seed in range(3)),
        *(("GELU, Adam, epsilon 1e-8", seed, adam(1e-8)) for seed in range(3)),
        ("ReLU, Adam, epsilon 1e-4", 0, {"activation": nn.ReLU}),
        ("ReLU, Adam, epsilon 1e-8", 0, {"activation": nn.ReLU, **adam(1e-8)}),
        ("GELU, Adam, epsilon 1e-4, learning rate 0.01", 0, adam(1e-4, 0.01)),
    ]
    for name, seed, settings in recipes:
        training, queries, accuracy = run(seed, **settings)
        score = bilevel.attribute(training, queries).lds(SUBSETS, 0.9, progress=False)["attribute"]
        lines.append(f"| {name} | {seed} | {metasmoothness(training):.2f} | {score} | {accuracy:.3f} |")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
