"""How much the further direction of slope 0 should weigh in the fit of a control variate's scale.

    python benchmarks/scale_prior.py

The variance that is left, over that of plain Rademacher directions, for a gradient and a variate at a given angle: with
fits to the other b − 1 slopes and a further one of weight ω. Writes `benchmarks/results/scale_prior.md`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bilevel.report.files import write_text
from bilevel.report.progress import bar

N, DRAWS = 64, 4000
COUNTS, LEFT = (2, 3, 5, 8, 18), (0.0, 0.02, 0.1, 0.5, 1.0)


def left(rng: np.random.Generator, b: int, q: float, weight: float) -> float:
    """E‖estimate − ∇h‖² over (N − 1)/b ‖∇h‖², where the best scale would leave q."""
    directions = rng.choice([-1.0, 1.0], size=(DRAWS, b, N))
    gradient, other = rng.standard_normal((2, N))
    gradient /= np.linalg.norm(gradient)
    other -= (other @ gradient) * gradient
    variate = np.sqrt(1 - q) * gradient + np.sqrt(q) * other / np.linalg.norm(other)
    slopes, predicted = directions @ gradient, directions @ variate
    products, squares = slopes * predicted, predicted**2
    scales = (products.sum(1, keepdims=True) - products) / (squares.sum(1, keepdims=True) - squares + weight)
    noise = np.einsum("rb,rbn->rn", slopes - scales * predicted, directions) / b
    errors = scales.mean(1, keepdims=True) * variate + noise - gradient
    return float(np.mean(np.sum(errors**2, axis=1))) * b / (N - 1)


def main() -> None:
    rng = np.random.default_rng(0)
    lines = [
        "# The weight of the further direction in the fit of a scale",
        "",
        f"`python benchmarks/scale_prior.py`: variance left over that of plain directions, N = {N}, {DRAWS} draws; q "
        "is what the best scale would leave. The library's weight is 1/b.",
        "",
        "| b | q | weight 1 | weight 1/b | weight 0.01 |",
        "| --- | --- | --- | --- | --- |",
    ]
    with bar("fits", len(COUNTS) * len(LEFT)) as shown:
        for b in COUNTS:
            for q in LEFT:
                found = [f"{left(rng, b, q, weight):.3g}" for weight in (1.0, 1 / b, 0.01)]
                lines.append(f"| {b} | {q:g} | {' | '.join(found)} |")
                shown.advance(f"b = {b}, q = {q}")
    write_text(Path(__file__).parent / "results" / "scale_prior.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
