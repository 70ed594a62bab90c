"""Data condensation: a whole training set in a handful of synthetic images (paper §4, Table 1).

The outer loss is "performance matching": the loss on real images after T inner steps on the condensed images. As in the
paper, the result is evaluated by newly initialised networks that are trained only on the condensed images.

Differences from the paper and its released code: every outer step starts from a newly initialised random network. A
full inner batch holds each condensed image once. The two controls (random real images, the whole set) are computed in
the same run with the same trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bilevel.estimators import Reverse
from bilevel.report.page import Section
from bilevel.tasks import image_data
from bilevel.tasks.condensation import pictures
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.evaluation import accuracies
from bilevel.tasks.condensation.problem import setup
from bilevel.tasks.run_folder import CONFIG, read_json
from bilevel.tasks.task import Preset, Setup, Task
from bilevel.tasks.trials import accuracy_rows, percent, picture_of_accuracies
from bilevel.training import checkpoint_files, metrics
from bilevel.training.outer_loop import OuterStep
from bilevel.training.run_record import CHECKPOINT

_SNAPSHOTS = 8


class CondensationTask(Task[Condensation]):
    """Condense labelled images."""

    name = "condensation"
    summary = "learn a few synthetic images per class on which a network trains as well as on the real set"
    presets: Mapping[str, Preset[Condensation]] = {
        "digits": Preset(
            Condensation(),
            estimator=Reverse(),
            outer_steps=200,
            summary="scikit-learn's 8x8 handwritten digits, one image per class; needs no files",
        ),
        "mnist": Preset(
            Condensation(data="mnist", blocks=3, width=32, inner_lr=0.01, whole_set_epochs=1),
            estimator=Reverse("sqrt"),
            outer_steps=200,
            summary="MNIST from --data-dir, the paper's 3-block network at width 32, one image per class",
        ),
    }

    def setup(self, config: Condensation, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:
        return setup(config, image_data.load(config.data, data_dir, config.device), outer_steps, seed)

    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:
        wanted = {round(outer_steps * i / _SNAPSHOTS) for i in range(1, _SNAPSHOTS + 1)}

        def keep(number: int, images: torch.Tensor) -> None:
            checkpoint_files.save(
                folder / "images" / f"step-{number:06d}.safetensors", {"step": number, "images": images}
            )

        def keep_if_wanted(step: OuterStep) -> None:
            if step.number == 1:  # only now, so that a run whose first step fails leaves no files
                keep(0, start)
            if step.number in wanted:
                keep(step.number, step.meta)

        return [keep_if_wanted]

    def evaluate(
        self, config: Condensation, data_dir: Path | None, meta: Any, seed: int, progress: bool
    ) -> dict[str, Any]:
        data = image_data.load(config.data, data_dir, config.device)
        return {"accuracy": accuracies(config, data, meta, seed, progress)}

    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [
            (f"test accuracy, {pictures.NAMES[name]}", f"{percent(found)} %")
            for name, found in results["accuracy"].items()
        ]

    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:
        ipc = read_json(folder / CONFIG)["ipc"]
        stored = (checkpoint_files.load(path) for path in sorted((folder / "images").glob("step-*.safetensors")))
        snapshots = {content["step"]: content["images"] for content in stored}
        snapshots[len(metrics.read(folder / metrics.FILE))] = load_images(folder)  # a phase may have ended early
        accuracy = results["accuracy"]
        sections = [
            Section(
                "Test accuracy",
                "Fresh networks trained on these images alone, judged on real test images. Mean ± standard deviation. "
                + _verdict(accuracy),
                picture_of_accuracies(accuracy, pictures.NAMES),
                ("trained on", "test accuracy, %", "each run"),
                accuracy_rows(accuracy, pictures.NAMES),
            ),
            Section(
                "Condensed images over the outer steps",
                "One column per class. They are made to train a network well, not to look like real images.",
                pictures.over_time(sorted(snapshots.items()), ipc),
            ),
        ]
        if ipc > 1:
            sections.append(_all_images(load_images(folder), ipc))
        return sections


def _verdict(accuracy: Mapping[str, Any]) -> str:
    """Return a sentence that compares the condensed images with random real images."""
    gain = 100 * (accuracy["condensed"]["mean"] - accuracy["random_real"]["mean"])
    if gain > 0:
        return f"Condensed images are {gain:.1f} points better than as many random real ones."
    return (
        f"Condensed images are {-gain:.1f} points worse than as many random real ones: this estimator has not found "
        "better images in these outer steps. The curves below tell whether it was still descending, and, where random "
        "directions were drawn, how much of its estimates was noise."
    )


def _all_images(images: torch.Tensor, ipc: int) -> Section:
    shown = min(ipc, pictures.MOST_OF_A_CLASS)
    words = "One column per class." if shown == ipc else f"One column per class, the first {shown} of {ipc}."
    return Section("All condensed images", words, pictures.final(images, ipc))


def load_images(folder: Path) -> torch.Tensor:
    """Return the condensed images at a run's last checkpoint, `[classes · ipc, channels, height, width]`."""
    return checkpoint_files.load(folder / CHECKPOINT)["meta"][0]
