"""Noisy labels: the weight of every training example is a meta parameter, learnt through the training itself.

The outer loss is the loss on a few trusted examples after T inner steps on the weighted examples. The weight of an
example falls if the example makes the network worse on the trusted ones. The examples that end with the smallest
weights are suspected of wrong labels. The result is evaluated by how well the weights separate wrong labels from right
ones, and by newly initialised networks that are trained with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bilevel.estimators import Reverse
from bilevel.report.files import write_text
from bilevel.report.page import Section
from bilevel.tasks.cleaning import pictures
from bilevel.tasks.cleaning.config import Cleaning
from bilevel.tasks.cleaning.evaluation import SHOWN, evaluate
from bilevel.tasks.cleaning.problem import loaded, setup
from bilevel.tasks.task import Preset, Setup, Task, Trained
from bilevel.tasks.trials import accuracy_rows, percent, picture_of_accuracies
from bilevel.training.outer_loop import OuterStep


class CleaningTask(Task[Cleaning]):
    """Find wrong labels."""

    name = "cleaning"
    summary = "find the wrong labels of a training set with the help of a few that can be trusted"
    presets: Mapping[str, Preset[Cleaning]] = {
        "digits": Preset(
            Cleaning(),
            estimator=Reverse(),
            outer_steps=100,
            summary="1000 of scikit-learn's 8x8 handwritten digits, half of them with a wrong label; needs no files",
        ),
        "mnist": Preset(
            Cleaning(data="mnist", examples=5000, trusted=500, width=64, wrong=0.4, inner_batch=250, inner_lr=0.1),
            estimator=Reverse(),
            outer_steps=100,
            summary="5000 images of MNIST from --data-dir, 40 % of them with a wrong label",
        ),
    }

    def setup(self, config: Cleaning, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:  # noqa: ARG002
        data, noisy = loaded(config, data_dir, seed)
        return setup(config, data, seed, noisy)

    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:  # noqa: ARG002
        return []

    def evaluate(self, config: Cleaning, data_dir: Path | None, meta: Any, seed: int, progress: bool) -> dict[str, Any]:
        data, noisy = loaded(config, data_dir, seed)
        return evaluate(config, data, noisy, meta, seed, progress)

    def judge(self, run: Trained[Cleaning]) -> dict[str, Any]:
        """Evaluate, and write the weights of a file's rows to `weights.csv`, the smallest first."""
        results = super().judge(run)
        if "auc" in results:
            return results
        lines = [f"{each['row']},{each['weight']}" for each in results["suspects"]]
        write_text(run.folder / "weights.csv", "\n".join(["row,weight", *lines]) + "\n")
        return {**results, "suspects": results["suspects"][:SHOWN]}

    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [
            *([("area under the ROC curve", f"{results['auc']:.3f}")] if "auc" in results else []),
            *(
                (f"test accuracy, trained on {pictures.NAMES[name]}", f"{percent(found)} %")
                for name, found in results["test_accuracy"].items()
            ),
        ]

    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:  # noqa: ARG002
        accuracy = results["test_accuracy"]
        if "auc" not in results:
            return _sections_of_file(results)
        count = len(results["weights"]["wrong"])
        return [
            Section(
                "Weights of wrong and right labels",
                f"Of the {count} examples with the smallest weights (as many as there are wrong labels) "
                f"{100 * results['found_among_as_many']:.1f} % have a wrong label.",
                pictures.histograms(results["weights"]),
            ),
            Section(
                "Wrong labels found",
                "For every threshold below which a weight is suspicious.",
                pictures.roc(results["roc"], results["auc"]),
            ),
            Section(
                "The most suspicious examples",
                "In quotation marks the label that the example came with. Smallest weight first.",
                pictures.suspects(results["suspects"]),
            ),
            _accuracies(accuracy, "test images with right labels"),
        ]


def _sections_of_file(results: Mapping[str, Any]) -> list[Section]:
    rows = [(str(each["row"]), each["label"], f"{each['weight']:.4f}") for each in results["suspects"]]
    return [
        Section(
            "Weights",
            "Rows with a small weight made the network worse on the trusted rows.",
            pictures.histograms(results["weights"]),
        ),
        Section(
            "The most suspicious rows",
            "Smallest weight first. Rows are counted from 0, without the header. The file weights.csv has all of them.",
            header=("row", "label", "weight"),
            rows=rows,
        ),
        _accuracies(results["test_accuracy"], "a fifth of the trusted rows, which took no part in the training"),
    ]


def _accuracies(accuracy: Mapping[str, Mapping[str, Any]], on: str) -> Section:
    return Section(
        "Test accuracy",
        f"Fresh networks, trained alike, judged on {on}. Mean ± standard deviation.",
        picture_of_accuracies(accuracy, pictures.NAMES),
        ("trained on", "test accuracy, %", "each run"),
        accuracy_rows(accuracy, pictures.NAMES),
    )
