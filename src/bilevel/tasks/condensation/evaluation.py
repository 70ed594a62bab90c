"""Evaluation of condensed images by the test accuracy of networks trained only on them, with two controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from bilevel import randomness
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.pictures import NAMES
from bilevel.tasks.condensation.problem import condensed_labels, network, random_real_images
from bilevel.tasks.image_data import LabelledImages
from bilevel.tasks.trials import accuracies_of


def accuracies(
    config: Condensation, data: LabelledImages, images: Tensor, seed: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Compute the test accuracy, as a fraction, after training on the condensed images and on two controls.

    The controls are as many random real images, and the whole real set. All three train networks from the same
    initialisations with the same SGD. The random real images are drawn anew for every run.
    """
    labels = condensed_labels(config, data)
    steps = config.evaluation_steps or config.inner_steps
    few = len(labels)
    whole_batch = min(128, len(data.train_labels))
    whole_steps = config.whole_set_epochs * (len(data.train_labels) // whole_batch)

    def condensed(number: int) -> float:
        return _trained_accuracy(config, data, images, labels, few, steps, seed, number)

    def random_real(number: int) -> float:
        real = random_real_images(config, data, seed, number)
        return _trained_accuracy(config, data, real, labels, few, steps, seed, number)

    def whole_set(number: int) -> float:
        return _trained_accuracy(
            config, data, data.train_images, data.train_labels, whole_batch, whole_steps, seed, number
        )

    trials: dict[str, Callable[[int], float]] = {
        "condensed": condensed,
        "random_real": random_real,
        "whole_set": whole_set,
    }
    return accuracies_of(trials, NAMES, config.evaluation_runs, progress)


def _trained_accuracy(
    config: Condensation,
    data: LabelledImages,
    images: Tensor,
    labels: Tensor,
    batch: int,
    steps: int,
    seed: int,
    number: int,
) -> float:
    """Compute the test accuracy of newly initialised network `number` after `steps` steps on these images."""
    with randomness.torch_seeded(seed, randomness.CONDENSATION_NETWORK, number):
        model = network(config, data)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.inner_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    per_epoch = max(1, len(labels) // batch)
    order = torch.arange(len(labels))
    for step in range(steps):
        if batch < len(labels):
            if step % per_epoch == 0:
                epoch_seed = randomness.derive(seed, randomness.CONDENSATION_ORDER, number, step // per_epoch)
                order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch_seed))
            first = (step % per_epoch) * batch
            chosen = order[first : first + batch].to(labels.device)
            loss = cross_entropy(model(images[chosen]), labels[chosen])
        else:
            loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        hits = [
            (model(x).argmax(1) == y).float().sum()
            for x, y in zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
        ]
    return float(torch.stack(hits).sum()) / len(data.test_labels)
