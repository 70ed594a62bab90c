"""Theorem 3.4's rate with a control variate: outer steps needed with ρ, and with ρ/q in its place.

    python benchmarks/rate.py

Label correction: 64 labels are the meta parameters of a linear regression trained by 40 steps of gradient descent, the
outer loss is that of clean data. Everything is affine, so h, its Lipschitz constant L and its minimum are known, and
slopes and truncated gradients are computed in closed form (checked against the library's estimators first); directions,
fitted scales and estimates are the library's own. Step size ρ'/((ρ' + 1)L) with ρ' = b/(N − 1)/q, and q the observed
Σ E‖grad − ∇h‖²/Σ ‖∇h‖² over that of plain directions, from a pilot run. Writes `benchmarks/results/rate.json` and `.md`
and `docs/pictures/rate.png`. One thread.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import bilevel
from bilevel import randomness
from bilevel.directions.control_variates import combine
from bilevel.directions.distributions import Directions
from bilevel.report import page
from bilevel.report.files import write_bytes, write_json, write_text
from bilevel.report.progress import bar

ROOT = Path(__file__).parent
N, M, T, B = 64, 8, 40, 4
RATE = 0.05
"""Of the inner gradient descent."""
RHO = B / (N - 1)
TARGET = 0.01
"""Of h(φ_0) − min h, at which outer steps are counted."""


@dataclass(frozen=True)
class Options:
    """Outer steps needed with and without a control variate."""

    seeds: int = 10
    """Runs of each method."""
    outer_steps: int = 4000
    """At most, of each run."""


class Regression:
    """h(φ) = ½ mean (X' θ_T(φ) − y')², θ_T = Z φ."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.inputs, self.clean = rng.standard_normal((N, M)), rng.standard_normal((200, M))
        self.clean *= np.linspace(1, 0.3, M)
        self.targets = self.clean @ rng.standard_normal(M)
        inside = np.eye(M) - RATE * self.inputs.T @ self.inputs / N
        powers = [np.eye(M)]
        for _ in range(T - 1):
            powers.append(powers[-1] @ inside)
        self.last = np.cumsum([power @ self.inputs.T * RATE / N for power in powers], axis=0)
        """Z of the last 1, 2, … T steps."""
        hessian = self.last[-1].T @ self.clean.T @ self.clean @ self.last[-1] / 200
        self.lipschitz = float(np.linalg.eigvalsh(hessian).max())

    def residual(self, phi: np.ndarray) -> np.ndarray:
        return self.clean @ (self.last[-1] @ phi) - self.targets

    def value(self, phi: np.ndarray) -> float:  # its minimum is 0: Z has full rank, and the targets are linear
        return float(np.mean(self.residual(phi) ** 2)) / 2

    def gradient(self, phi: np.ndarray, steps: int = T) -> np.ndarray:
        """∇h, or with fewer steps what truncation makes of it."""
        return self.last[steps - 1].T @ (self.clean.T @ self.residual(phi)) / 200

    def require_agreement(self) -> None:
        """The library's estimators find the same."""
        inputs, clean, targets = (torch.from_numpy(a) for a in (self.inputs, self.clean, self.targets))
        problem = bilevel.GradientDescent(
            lambda theta, phi, batch: (inputs @ theta - phi).square().mean() / 2,
            lambda theta, phi, batch: (clean @ theta - targets).square().mean() / 2,
            torch.zeros(M, dtype=torch.float64),
            bilevel.optimizer(torch.optim.SGD, lr=RATE),
        )
        phi = torch.linspace(-1, 1, N, dtype=torch.float64)
        for steps in (T, T // 4):
            found = bilevel.TruncatedReverse(steps)(problem, phi, bilevel.no_batches(T)).grad.numpy()
            np.testing.assert_allclose(found, self.gradient(phi.numpy(), steps), rtol=1e-9, atol=1e-12)


def descend(problem: Regression, steps: int | None, ratio: float, outer_steps: int, seed: int) -> dict[str, Any]:
    """Gradient descent on estimates whose relative variance is taken to be 1/ratio; `steps` of truncation, if any."""
    phi, size = np.zeros(N), ratio / ((ratio + 1) * problem.lipschitz)
    values, signal, noise = [], [], []
    like = [torch.zeros(N, dtype=torch.float64)]
    for k in range(outer_steps):
        gradient = problem.gradient(phi)
        values.append(problem.value(phi))
        signal.append(float(gradient @ gradient))
        if values[-1] < TARGET / 10 * values[0]:
            break
        variate = torch.zeros(0, N, dtype=torch.float64)
        if steps is not None:
            c = problem.gradient(phi, steps)
            variate = torch.from_numpy(c / np.linalg.norm(c)).reshape(1, N)
        directions = Directions("rademacher", randomness.derive(seed, k), B, like)
        slopes: Tensor = directions.draw(range(B))[0] @ torch.from_numpy(gradient)
        estimate = combine(directions, slopes, [variate]).grad[0].numpy()
        noise.append(float(np.sum((estimate - gradient) ** 2)))
        phi = phi - size * estimate
    return {"values": values, "signal": signal, "noise": noise}


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    problem = Regression()
    problem.require_agreement()
    methods = {
        "plain directions": None,
        "variate: last tenth of the steps": T // 10,
        "variate: last quarter": T // 4,
        "variate: last half": T // 2,
    }
    rows: list[dict[str, Any]] = []
    with bar("runs", len(methods) * options.seeds) as shown:
        for name, steps in methods.items():
            q = 1.0
            if steps is not None:
                pilot = descend(problem, steps, RHO, options.outer_steps, 10**6)
                q = sum(pilot["noise"]) / sum(pilot["signal"][: len(pilot["noise"])]) * RHO
            runs = []
            for seed in range(options.seeds):
                runs.append(descend(problem, steps, RHO / q, options.outer_steps, seed))
                shown.advance(name)
            rows.append(summary(problem, name, q, runs))
    for row in rows:
        row["fewer"] = rows[0]["needed"] / row["needed"]
        row["predicted"] = (1 + 1 / RHO) / (1 + row["q"] / RHO)
    versions = {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()}
    write_json(ROOT / "results" / "rate.json", {"versions": versions, "rows": rows})
    write_text(ROOT / "results" / "rate.md", as_markdown(rows, options, versions))
    write_bytes(ROOT.parent / "docs" / "pictures" / "rate.png", picture(rows))


def summary(problem: Regression, name: str, q: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the runs."""
    start = runs[0]["values"][0]
    needed = [next(k for k, value in enumerate(run["values"]) if value < TARGET * start) for run in runs]
    count = min(len(run["noise"]) for run in runs)
    mean_values = np.mean([run["values"][:count] for run in runs], axis=0)
    mean_signal = float(np.mean([run["signal"][:count] for run in runs]))
    noise = sum(sum(run["noise"]) for run in runs) / sum(sum(run["signal"][: len(run["noise"])]) for run in runs)
    ratio = RHO / q
    bound = (4 if ratio <= 1 else 2 * (1 + 1 / ratio) * ratio) * problem.lipschitz * start / (ratio * count)
    return {
        "method": name,
        "q": q,
        "observed_q": noise * RHO,
        "needed": float(np.mean(needed)),
        "needed_each": needed,
        "steps": count,
        "mean_squared_gradient": mean_signal,
        "bound": bound,
        "values": [float(v) for v in mean_values[:: max(1, count // 200)]],
        "stride": max(1, count // 200),
    }


def picture(rows: list[dict[str, Any]]) -> bytes:
    """H over the outer steps, and over the outer steps divided by (1 + q/ρ), where all should fall together."""
    figure, axes = page.figure(1, 2, figsize=(10, 3.8), sharey=True)
    for row in rows:
        steps = row["stride"] * np.arange(len(row["values"]))
        for axis, unit in zip(axes, (1.0, 1 + row["q"] / RHO), strict=True):
            axis.plot(steps / unit, row["values"], label=f"{row['method']}, q = {row['q']:.3f}")
    axes[0].set(xlabel="outer steps", ylabel="h, mean over the runs", yscale="log")
    axes[1].set(xlabel="outer steps over (1 + q/ρ)")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return page.as_png(figure)


def as_markdown(rows: list[dict[str, Any]], options: Options, versions: dict[str, str]) -> str:
    """The table with the command that made it."""
    lines = [
        "# The rate with a control variate",
        "",
        f"`python benchmarks/rate.py`: N = {N} labels, T = {T}, b = {B}, ρ = b/(N − 1) = {RHO:.4f}; {options.seeds} "
        f"runs each. Needed: outer steps until h is {TARGET:.0%} of h(φ_0). Predicted: (1 + 1/ρ)/(1 + q/ρ) times "
        f"fewer. {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "",
        "| method | q of the pilot run | q observed | outer steps needed | times fewer | predicted | mean ‖∇h‖² "
        "| its bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['q']:.3f} | {row['observed_q']:.3f} | {row['needed']:.0f} | "
            f"{row['fewer']:.1f} | {row['predicted']:.1f} | {row['mean_squared_gradient']:.2e} | {row['bound']:.2e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
