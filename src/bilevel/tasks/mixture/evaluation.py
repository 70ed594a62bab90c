"""Evaluation of proportions by newly initialised models that are trained with them."""

from __future__ import annotations

import statistics
from typing import Any

from torch import Tensor

from bilevel import randomness
from bilevel.report.progress import bar
from bilevel.tasks.mixture import baselines
from bilevel.tasks.mixture.config import Mixture
from bilevel.tasks.mixture.problem import proportions, trained
from bilevel.tasks.mixture.sources import Sources


def evaluate(config: Mixture, data: Sources, phi: Tensor, seed: int, progress: bool) -> dict[str, Any]:
    """Return the entries of `results.json`: `proportions`, `target_loss` and others."""
    found = proportions(phi.detach())
    chosen: dict[str, Tensor] = {"found": found}
    if data.known is not None:
        chosen["known"] = found.new_tensor([data.known[name] for name in data.names])
    others = baselines.searches(config, data, seed)
    values: dict[str, list[float]] = {}
    total = (len(chosen) + len(others) + 1) * config.evaluation_runs
    with bar("evaluation", total, show=progress) as shown:
        for name, search in others.items():
            chosen[name] = search()
        for name in [*chosen, "target_alone"]:
            values[name] = []
            for number in range(config.evaluation_runs):
                steps = config.evaluation_steps
                model = (
                    trained(
                        config,
                        data,
                        chosen[name],
                        steps,
                        seed,
                        number,
                        (randomness.MIXTURE_NETWORK, randomness.MIXTURE_ORDER),
                    )
                    if name in chosen
                    else baselines.on_target_alone(config, data, steps, seed, number)
                )
                values[name].append(baselines.target_loss(model, data.test))
                shown.advance(f"{name}: {values[name][-1]:.4f}")
    return {
        "proportions": {name: summary([float(p)]) for name, p in zip(data.names, found, strict=True)},
        "target_loss": {name: summary(runs) for name, runs in values.items()},
        "chosen": {name: [round(float(x), 4) for x in p] for name, p in chosen.items()},
        "sources": data.names,
        "known": None if data.known is None else dict(data.known),
    }


def summary(runs: list[float]) -> dict[str, Any]:
    """Return the mean, the standard deviation and every run."""
    return {"mean": statistics.fmean(runs), "std": statistics.stdev(runs) if len(runs) > 1 else 0.0, "runs": runs}
