"""Plain trainings of networks on images, as the evaluation needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import randomness
from bilevel.tasks.condensation import augmentation, condensed
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.models import ModelName, build
from bilevel.tasks.images.labelled import LabelledImages

_AT_ONCE = 1000
"""The number of test images that a network sees at once."""


@dataclass(frozen=True)
class Training:
    """What a network is trained on, and for how long."""

    images: Tensor
    targets: Tensor
    """A class for each image, or a distribution over the classes."""
    batch: int
    steps: int
    rate: Callable[[int], float]
    """The learning rate of each step."""
    model: ModelName


def on_condensed(config: Condensation, data: LabelledImages, meta: condensed.Meta, model: ModelName) -> Training:
    """Return the training on the condensed images, with the labels and rates that were learned with them."""
    steps, classes = config.steps_of_evaluation, condensed.classes_of(config, data)
    meta = {name: value.detach() for name, value in meta.items()}
    return Training(
        meta["images"],
        condensed.targets(config, meta, classes),
        config.inner_batch or len(classes),
        steps,
        lambda step: condensed.rate(config, step, steps) * float(condensed.factor(config, meta, step)),
        model,
    )


def on_real(
    config: Condensation, images: Tensor, labels: Tensor, batch: int | None = None, steps: int | None = None
) -> Training:
    """Return the training on real images with the schedule of the settings."""
    count = config.steps_of_evaluation if steps is None else steps
    return Training(
        images,
        labels,
        len(labels) if batch is None else batch,
        count,
        lambda step: condensed.rate(config, step, count),
        config.model,
    )


def trained(
    config: Condensation, data: LabelledImages, training: Training, seed: int, stream: int, number: int
) -> nn.Module:
    """Return newly initialised network `number` of a stream of random numbers after its training."""
    device = data.train_images.device
    with randomness.torch_seeded(seed, stream, number):
        model = build(training.model, data.shape, data.classes, config.width, config.blocks).to(device)
    optimizer = _optimizer(config, model)
    count = len(training.images)
    per_epoch = max(1, count // training.batch)
    order = torch.arange(count)
    views = randomness.generator(seed, randomness.CONDENSATION_VIEWS, stream, number)
    for step in range(training.steps):
        images, targets = training.images, training.targets
        if training.batch < count:
            if step % per_epoch == 0:
                epoch_seed = randomness.derive(seed, randomness.CONDENSATION_ORDER, number, step // per_epoch)
                order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch_seed))
            first = (step % per_epoch) * training.batch
            chosen = order[first : first + training.batch].to(device)
            images, targets = images[chosen], targets[chosen]
        if config.augmented:
            images = augmentation.apply(images, augmentation.draw(config, len(images), views))
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        optimizer.zero_grad()
        condensed.distance(config, model(images), targets).backward()
        optimizer.step()
    return model


def _optimizer(config: Condensation, model: nn.Module) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.inner_lr, "weight_decay": config.weight_decay}
    if config.inner_optimizer == "adam":
        return torch.optim.Adam(model.parameters(), betas=(config.momentum, 0.999), **settings)
    return torch.optim.SGD(model.parameters(), momentum=config.momentum, **settings)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a network classifies rightly."""
    model.eval()
    hits = [
        (model(x).argmax(1) == y).float().sum()
        for x, y in zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
    ]
    return float(torch.stack(hits).sum()) / len(labels)
