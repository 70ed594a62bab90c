"""Evaluation of condensed images by the test accuracy of networks trained only on them, beside controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel import randomness
from bilevel.tasks.condensation import condensed
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.pictures import names_of
from bilevel.tasks.condensation.training import Training, accuracy, on_condensed, on_real, trained
from bilevel.tasks.images.labelled import LabelledImages
from bilevel.tasks.trials import accuracies_of

WATCHED = 2000
"""The largest number of test images for evaluations during the outer loop."""


def accuracies(
    config: Condensation, data: LabelledImages, meta: condensed.Meta, seed: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Compute the test accuracy, as a fraction, after training on the condensed images and on controls.

    The controls are as many random real images, the mean image of each class, as many centres of clusters of the real
    images (with several images per class), and the whole real set. All of them train networks from the same
    initialisations with the same optimiser. The random real images are drawn anew for every run. The condensed images
    are trained on with the labels and the rates that were learned with them. They are also evaluated by networks of
    the kinds in `evaluation_models`.
    """
    controls = _controls(config, data, seed)
    models = dict.fromkeys((config.model, *config.evaluation_models))

    def trial(make: Callable[[int], Training]) -> Callable[[int], float]:
        def run(number: int) -> float:
            model = trained(config, data, make(number), seed, randomness.CONDENSATION_NETWORK, number)
            return accuracy(model, data.test_images, data.test_labels)

        return run

    trials = {
        "condensed" if model == config.model else f"condensed_{model}": trial(
            lambda _, model=model: on_condensed(config, data, meta, model)
        )
        for model in models
    }
    trials.update({name: trial(make) for name, make in controls.items()})
    return accuracies_of(trials, names_of(trials), config.evaluation_runs, progress)


def _controls(config: Condensation, data: LabelledImages, seed: int) -> dict[str, Callable[[int], Training]]:
    """Return the training of each control as a function of the number of the run."""
    classes = condensed.classes_of(config, data)

    def random_real(number: int) -> Training:
        return on_real(config, condensed.random_real_images(config, data, seed, number), classes)

    controls = {"random_real": random_real}
    means = torch.stack([data.train_images[data.train_labels == label].mean(0) for label in range(data.classes)])
    controls["class_means"] = lambda number: on_real(config, means, torch.arange(data.classes, device=classes.device))
    if config.ipc > 1:
        centres: list[Tensor] = []

        def clusters(number: int) -> Training:
            if not centres:
                centres.append(condensed.mean_images(config, data, seed))
            return on_real(config, centres[0], classes)

        controls["centroids"] = clusters
    if config.whole_set_epochs:
        batch = min(128, len(data.train_labels))
        steps = config.whole_set_epochs * (len(data.train_labels) // batch)
        controls["whole_set"] = lambda number: on_real(config, data.train_images, data.train_labels, batch, steps)
    return controls


def watched_accuracy(config: Condensation, data: LabelledImages, meta: condensed.Meta, seed: int) -> float:
    """Return the mean accuracy of `watch` new networks on at most 2,000 test images, evenly spaced in the test set."""
    every = -(-len(data.test_labels) // WATCHED)
    images, labels = data.test_images[::every], data.test_labels[::every]
    training = on_condensed(config, data, meta, config.model)
    found = [
        accuracy(trained(config, data, training, seed, randomness.CONDENSATION_WATCH, number), images, labels)
        for number in range(config.watch)
    ]
    return sum(found) / len(found)
