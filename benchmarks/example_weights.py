"""`ExampleWeights` beside cleanlab on wrong labels: python benchmarks/example_weights.py

Needs `pip install cleanlab`. Writes benchmarks/results/example_weights.md.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import numpy as np
import sklearn
import torch
from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.integrations.example_weights import ExampleWeights

SEEDS = range(1, 4)  # the defaults of ExampleWeights were chosen at seed 0
DATA: dict[str, tuple[Callable[..., Any], int, int]] = {
    "breast cancer": (load_breast_cancer, 350, 60),
    "digits": (load_digits, 1000, 200),
}
RESULTS = Path(__file__).parent / "results" / "example_weights.md"


def setting(name: str, noise: float, kind: str, seed: int) -> tuple[Any, ...]:
    """Return inputs, given labels, a mask of wrong labels, and trusted inputs and labels."""
    load, count, trusted = DATA[name]
    x, y = load(return_X_y=True)
    generator = np.random.default_rng([seed, 7])
    order = generator.permutation(len(y))
    x, y = x[order], y[order]
    classes = y.max() + 1
    wrong = generator.random(count) < noise
    shift = 1 if kind == "class-dependent" else generator.integers(1, classes, count)
    given = np.where(wrong, (y[:count] + shift) % classes, y[:count])
    clean = slice(count, count + trusted)
    return x[:count], given, wrong, x[clean], y[clean]


def pipeline(model: Any) -> Any:
    return make_pipeline(StandardScaler(), model)


def by_weights(x: Any, y: Any, x_clean: Any, y_clean: Any, seed: int) -> np.ndarray:
    return ExampleWeights(random_state=seed).fit(x, y, X_clean=x_clean, y_clean=y_clean).weights_


def by_cleanlab(x: Any, y: Any, x_clean: Any, y_clean: Any, seed: int) -> np.ndarray:
    """Return cleanlab's quality of each label, from five-fold probabilities; the trusted examples join the data."""
    everything, labels = np.concatenate([x, x_clean]), np.concatenate([y, y_clean])
    model = pipeline(LogisticRegression(max_iter=1000))
    found = cross_val_predict(model, everything, labels, cv=5, method="predict_proba")
    return get_label_quality_scores(labels, found)[: len(y)]


def by_cleanlab_mlp(x: Any, y: Any, x_clean: Any, y_clean: Any, seed: int) -> np.ndarray:
    everything, labels = np.concatenate([x, x_clean]), np.concatenate([y, y_clean])
    model = pipeline(MLPClassifier((32,), random_state=seed))
    found = cross_val_predict(model, everything, labels, cv=5, method="predict_proba")
    return get_label_quality_scores(labels, found)[: len(y)]


def by_trusted(x: Any, y: Any, x_clean: Any, y_clean: Any, seed: int) -> np.ndarray:
    """Return the probability of each given label in a model that was trained on the trusted examples alone."""
    model = pipeline(LogisticRegression(max_iter=1000)).fit(x_clean, y_clean)
    return model.predict_proba(x)[np.arange(len(y)), np.searchsorted(model.classes_, y)]


METHODS = {
    "ExampleWeights": by_weights,
    "cleanlab, logistic regression": by_cleanlab,
    "cleanlab, network": by_cleanlab_mlp,
    "trusted examples alone": by_trusted,
}


def main() -> None:
    import cleanlab  # pyright: ignore[reportMissingImports]

    warnings.simplefilter("ignore")
    lines = [
        "# Wrong labels",
        "",
        f"`python benchmarks/example_weights.py`, torch {torch.__version__}, scikit-learn {sklearn.__version__},",
        f"cleanlab {cleanlab.__version__}, {platform.machine()}, one thread, process time.",
        f"Mean ± standard deviation of {len(SEEDS)} seeds. Every method has the trusted examples: 60 of breast cancer,",
        "200 of the digits. The last method uses nothing else, and ranks wrong labels best in every setting.",
        "`ExampleWeights` has a higher average precision than cleanlab in two settings of six, both with 40 % wrong",
        "labels, and a lower one with 20 %.",
        "",
        "| data | wrong labels | method | average precision | area under ROC | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in DATA:
        for kind in ("symmetric", "class-dependent"):
            if kind == "class-dependent" and name == "breast cancer":
                continue  # with two classes both kinds are the same
            for noise in (0.2, 0.4):
                for method, rank in METHODS.items():
                    rows = []
                    for seed in SEEDS:
                        x, y, wrong, x_clean, y_clean = setting(name, noise, kind, seed)
                        began = time.process_time()
                        quality = rank(x, y, x_clean, y_clean, seed)
                        seconds = time.process_time() - began
                        rows.append((average_precision_score(wrong, -quality), roc_auc_score(wrong, -quality), seconds))
                    mean, spread = np.mean(rows, 0), np.std(rows, 0, ddof=1)
                    cells = f"{mean[0]:.3f} ± {spread[0]:.3f} | {mean[1]:.3f} ± {spread[1]:.3f} | {mean[2]:.1f}"
                    lines.append(f"| {name} | {noise:.0%}, {kind} | {method} | {cells} |")
                    print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
