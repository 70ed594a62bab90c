"""Data condensation: a whole training set in a handful of synthetic images (paper §4, Table 1).

The outer loss is "performance matching": the loss on real images after T inner steps on the condensed images. As in the
paper, the result is evaluated by newly initialised networks that are trained only on the condensed images.

Differences from the paper and its released code: every outer step starts from a newly initialised random network. A
full inner batch holds each condensed image once. The controls (random real images, the whole set and others) are
computed in the same run with the same trainings.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.report.files import write_bytes
from bilevel.report.page import Section
from bilevel.tasks import image_data
from bilevel.tasks.condensation import condensed, pictures
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.evaluation import WATCHED, accuracies, watched_accuracy
from bilevel.tasks.condensation.presets import PRESETS
from bilevel.tasks.condensation.problem import setup
from bilevel.tasks.condensation.whitening import Whitening, whitened
from bilevel.tasks.images.labelled import LabelledImages
from bilevel.tasks.run_folder import CONFIG, read_json
from bilevel.tasks.task import Preset, Setup, Task, Trained
from bilevel.tasks.trials import accuracy_rows, percent, picture_of_accuracies
from bilevel.training import checkpoint_files, metrics
from bilevel.training.outer_loop import OuterStep

IMAGES = "condensed.npz"
"""The file with the result of a run: images, labels and inner learning rates as NumPy arrays."""
_SNAPSHOTS = 8
_WATCHES = 20


class CondensationTask(Task[Condensation]):
    """Condense labelled images."""

    name = "condensation"
    summary = "learn a few synthetic images per class on which a network trains as well as on the real set"
    presets: Mapping[str, Preset[Condensation]] = PRESETS

    def setup(self, config: Condensation, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:
        data, whitening = prepared(config, data_dir)
        made = setup(config, data, outer_steps, seed)
        return dataclasses.replace(
            made,
            callbacks=[_watch(config, data, outer_steps, seed)] if config.watch else [],
            recorders=[lambda folder: _snapshots(folder, outer_steps, made.meta, whitening)],
        )

    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:  # noqa: ARG002
        return []

    def evaluate(
        self, config: Condensation, data_dir: Path | None, meta: Any, seed: int, progress: bool
    ) -> dict[str, Any]:
        data, _ = prepared(config, data_dir)
        return {"accuracy": accuracies(config, data, meta, seed, progress)}

    def judge(self, run: Trained[Condensation]) -> dict[str, Any]:
        data, whitening = prepared(run.config, run.data_dir)
        _write_images(run.folder / IMAGES, run.config, data, run.meta, whitening)
        return {"accuracy": accuracies(run.config, data, run.meta, run.seed, run.progress)}

    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        names = pictures.names_of(results["accuracy"])
        return [(f"test accuracy, {names[name]}", f"{percent(found)} %") for name, found in results["accuracy"].items()]

    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:
        ipc = read_json(folder / CONFIG)["ipc"]
        rows = metrics.read(folder / metrics.FILE)
        stored = (checkpoint_files.load(path) for path in sorted((folder / "images").glob("step-*.safetensors")))
        snapshots = {content["step"]: content["images"] for content in stored}
        found = load_images(folder)
        images, names = torch.from_numpy(found["images"]), [str(name) for name in found["class_names"]]
        snapshots[len(rows)] = images  # a phase may have ended early
        accuracy = results["accuracy"]
        sections = [
            Section(
                "Test accuracy",
                "Fresh networks trained on these images alone, judged on real test images. Mean ± standard deviation. "
                + _verdict(accuracy),
                picture_of_accuracies(accuracy, pictures.names_of(accuracy)),
                ("trained on", "test accuracy, %", "each run"),
                accuracy_rows(accuracy, pictures.names_of(accuracy)),
            ),
            _all_images(images, ipc, names),
            Section(
                "Condensed images over the outer steps",
                "One column per class. They are made to train a network well, not to look like real images.",
                pictures.over_time(sorted(snapshots.items()), ipc, names),
            ),
        ]
        if any("watched_accuracy" in row for row in rows):
            sections.insert(1, _accuracy_over_steps(rows, accuracy["condensed"]["mean"]))
        if "labels" in found:
            sections.append(_labels(found["labels"], ipc, names))
        return sections


def prepared(config: Condensation, data_dir: Path | None) -> tuple[LabelledImages, Whitening | None]:
    """Return the real images, whitened if the settings say so, and the whitening."""
    data = image_data.load(config.data, data_dir, config.device)
    return whitened(data) if config.whiten else (data, None)


def load_images(folder: Path) -> dict[str, np.ndarray]:
    """Return the result of a finished run.

    Returns:
        "images" `[classes · ipc, channels, height, width]`, class by class, as they are shown; "training_images", the
        same as networks are trained on them (whitened, if the run whitens); "classes" `[classes · ipc]`; "class_names";
        "labels", the learned targets `[classes · ipc, classes]`, if any; and "rates", the learned inner learning
        rates `[T]` or `[1]`, if any.
    """
    with (folder / IMAGES).open("rb") as stream, np.load(stream, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def _write_images(
    path: Path, config: Condensation, data: LabelledImages, meta: condensed.Meta, whitening: Whitening | None
) -> None:
    arrays = {
        "images": _shown(meta, whitening).cpu().numpy(),
        "training_images": meta["images"].detach().cpu().numpy(),
        "classes": condensed.classes_of(config, data).cpu().numpy(),
        "class_names": np.array(data.names),
    }
    if "labels" in meta:
        arrays["labels"] = condensed.targets(config, meta, torch.empty(0)).detach().cpu().numpy()
    if "log_rates" in meta:
        arrays["rates"] = config.inner_lr * meta["log_rates"].detach().exp().cpu().numpy()
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    write_bytes(path, stream.getvalue())


def _shown(meta: condensed.Meta, whitening: Whitening | None) -> Tensor:
    """Return the images as people look at them, without whitening."""
    images = meta["images"].detach()
    return images if whitening is None else whitening.undo(images)


def _watch(config: Condensation, data: LabelledImages, outer_steps: int, seed: int) -> Callable[[OuterStep], None]:
    """Return a callback that records the accuracy of the condensed images at 20 outer steps."""
    wanted = {round(outer_steps * i / _WATCHES) for i in range(1, _WATCHES + 1)}

    def watch(step: OuterStep) -> None:
        if step.number in wanted:
            step.row["watched_accuracy"] = watched_accuracy(config, data, step.meta, seed)

    return watch


def _snapshots(
    folder: Path, outer_steps: int, start: condensed.Meta, whitening: Whitening | None
) -> Callable[[OuterStep], None]:
    """Return a callback that keeps the images at the start and at eight outer steps."""
    wanted = {round(outer_steps * i / _SNAPSHOTS) for i in range(1, _SNAPSHOTS + 1)}

    def keep(number: int, meta: condensed.Meta) -> None:
        content = {"step": number, "images": _shown(meta, whitening)}
        checkpoint_files.save(folder / "images" / f"step-{number:06d}.safetensors", content)

    def keep_if_wanted(step: OuterStep) -> None:
        if step.number == 1:  # only now, so that a run whose first step fails leaves no files
            keep(0, start)
        if step.number in wanted:
            keep(step.number, step.meta)

    return keep_if_wanted


def _verdict(accuracy: Mapping[str, Any]) -> str:
    """Return a sentence that compares the condensed images with random real images and with class means."""
    mean = {name: 100 * found["mean"] for name, found in accuracy.items()}
    gain = mean["condensed"] - mean["random_real"]
    if gain <= 0:
        return (
            f"Condensed images are {-gain:.1f} points worse than as many random real ones: this estimator has not "
            "found better images in these outer steps. The curves below tell whether it was still descending, and, "
            "where random directions were drawn, how much of its estimates was noise."
        )
    gain_over_means = mean["condensed"] - mean["class_means"]
    beside_means = "better" if gain_over_means > 0 else "worse"
    return (
        f"Condensed images are {gain:.1f} points better than as many random real ones, and {abs(gain_over_means):.1f} "
        f"points {beside_means} than the mean images of the classes, which cost nothing."
    )


def _accuracy_over_steps(rows: Sequence[Mapping[str, Any]], final: float) -> Section:
    return Section(
        "Test accuracy over the outer steps",
        f"New networks trained on the images of each outer step, judged on at most {WATCHED:,} test images.",
        pictures.accuracy_over_steps(rows, final),
    )


def _all_images(images: Tensor, ipc: int, names: Sequence[str]) -> Section:
    shown = min(ipc, pictures.MOST_OF_A_CLASS)
    words = "" if shown == ipc else f"The first {shown} of {ipc} of each class."
    return Section("Condensed images", words, pictures.final(images, ipc, names))


def _labels(labels: np.ndarray, ipc: int, names: Sequence[str]) -> Section:
    """Return a table of the learned labels of the first image of each class, the largest entries of each."""
    rows = []
    for number, name in enumerate(names[:20]):
        label = labels[number * ipc]
        largest = np.argsort(-label)[:4]
        rows.append((name, ", ".join(f"{names[i]}: {label[i]:.2f}" for i in largest)))
    return Section(
        "Learned labels",
        "What the first image of each class stands for: the four largest entries of its learned label.",
        header=("image of class", "label"),
        rows=rows,
    )
