"""Mixtures: the proportions of several sources are meta parameters, learnt through the training itself.

The outer loss is the loss on examples of the target after T inner steps on the mixed sources. The result is evaluated
by newly initialised models that are trained with the proportions, beside other ways to choose them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bilevel.estimators import HessianFree, Reverse
from bilevel.report.page import Section
from bilevel.tasks.mixture import pictures
from bilevel.tasks.mixture.config import Mixture
from bilevel.tasks.mixture.evaluation import evaluate
from bilevel.tasks.mixture.problem import proportions, setup
from bilevel.tasks.mixture.sources import load
from bilevel.tasks.task import Preset, Setup, Task, Trained
from bilevel.training import metrics
from bilevel.training.outer_loop import OuterStep


class MixtureTask(Task[Mixture]):
    """Find the best proportions of sources."""

    name = "mixture"
    summary = "find the proportions of sources of training data for which a model does best on a target"
    presets: Mapping[str, Preset[Mixture]] = {
        "rules": Preset(
            Mixture(),
            estimator=Reverse(),
            outer_steps=40,
            summary="sources made of rules, with a known answer, by exact gradients through 100 steps; needs no files",
        ),
        "rules-stream": Preset(
            Mixture(stream=True, inner_steps=10, outer_lr=0.3),
            estimator=Reverse(),
            outer_steps=120,
            summary="the same in one long training, by gradients through ten steps at a time",
        ),
        "rules-one-step": Preset(
            Mixture(stream=True, inner_steps=10, outer_lr=0.3),
            estimator=HessianFree(),
            outer_steps=120,
            summary="the same by the alignment of gradients: no inner Hessian, so the result is only roughly right",
        ),
        "text": Preset(
            Mixture(
                data="text",
                stream=True,
                inner_steps=5,
                batch=16,
                target_examples=200,
                outer_batch=64,
                optimizer="adam",
                inner_lr=0.003,
                outer_lr=0.05,
                evaluation_steps=500,
                evaluation_runs=1,
            ),
            estimator=Reverse(),
            outer_steps=100,
            summary="a small transformer on bytes; text files from --data-dir, one for each source and for --target",
        ),
    }

    def setup(self, config: Mixture, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:
        return setup(config, load(config, data_dir, seed), outer_steps, seed)

    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:  # noqa: ARG002
        return [_record]

    def evaluate(self, config: Mixture, data_dir: Path | None, meta: Any, seed: int, progress: bool) -> dict[str, Any]:
        return evaluate(config, load(config, data_dir, seed), meta, seed, progress)

    def judge(self, run: Trained[Mixture]) -> dict[str, Any]:
        rows = metrics.read(run.folder / metrics.FILE)
        path = [row["proportions"] for row in rows]
        return {**super().judge(run), "path": path}

    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        known = results["known"]
        return [
            *(
                (
                    f"proportion of {name}",
                    f"{found['mean']:.3f}" + ("" if known is None else f" (known: {known[name]:.2f})"),
                )
                for name, found in results["proportions"].items()
            ),
            *(
                (f"target loss, trained with {pictures.NAMES[name]}", f"{found['mean']:.4f}")
                for name, found in results["target_loss"].items()
            ),
        ]

    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:  # noqa: ARG002
        names, known = results["sources"], results["known"]
        losses = results["target_loss"]
        words = "After each outer step, from uniform proportions on."
        if known is not None:
            words += " Dotted: the mixture that has exactly the distribution of the target."
        rows = [
            (
                pictures.NAMES[name],
                ", ".join(f"{p:.3f}" for p in results["chosen"].get(name, [])) or "–",
                f"{found['mean']:.4f}",
                f"{found['std']:.4f}",
            )
            for name, found in losses.items()
        ]
        return [
            Section("Proportions", words, pictures.path(results["path"], names, known)),
            Section(
                "Target loss",
                "Fresh models, trained alike with each choice of proportions, judged on test examples of the target.",
                pictures.target_losses(losses),
                ("trained with", ", ".join(names), "target loss", "std over models"),
                rows,
            ),
        ]


def _record(step: OuterStep) -> None:
    step.row["proportions"] = [round(float(p), 5) for p in proportions(step.meta)]
