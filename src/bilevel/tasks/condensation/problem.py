"""Condensation as a bilevel problem. The inner loop trains on synthetic images, and the outer loss uses real images."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

import bilevel
from bilevel import randomness
from bilevel.optim.update_rule import Optimizer
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.models import build
from bilevel.tasks.image_data import LabelledImages
from bilevel.tasks.task import Setup

# Counters that separate this task's random streams.


def setup(config: Condensation, data: LabelledImages, outer_steps: int, seed: int) -> Setup:
    """Return the bilevel problem, the images at the start, the batches and the outer optimiser."""
    labels = condensed_labels(config, data)
    with randomness.torch_seeded(seed):
        network(config, data)  # settings for which a network or a control cannot be made are refused here
    random_real_images(config, data, seed, 0)

    def inner_loss(model: Any, images: Tensor, chosen: Tensor | None) -> Tensor:
        if chosen is None:
            return cross_entropy(model(images), labels)
        return cross_entropy(model(images[chosen]), labels[chosen])

    def outer_loss(model: Any, _images: Tensor, chosen: Tensor) -> Tensor:
        return cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])

    def outer_batch(draw: int) -> Tensor:
        return _without_replacement(
            data.train_labels, config.outer_batch, randomness.derive(seed, randomness.CONDENSATION_OUTER, draw)
        )

    return Setup(
        problem=bilevel.GradientDescent(inner_loss, outer_loss, lambda images: network(config, data), sgd(config)),
        meta=_starting_images(config, data, seed),
        inner_batches=functools.partial(inner_batches, config, labels, seed),
        outer_batch=outer_batch,
        optimizer=bilevel.optimizer(
            torch.optim.Adam,
            lr=config.outer_lr,
            schedule=functools.partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=outer_steps),
        ),
        update=bilevel.OuterUpdate(project=lambda images: images.clamp(0, 1)),
    )


def network(config: Condensation, data: LabelledImages) -> nn.Module:
    """Return a newly initialised network for these images."""
    return build(config.model, data.shape, data.classes, config.width, config.blocks).to(data.train_images.device)


def sgd(config: Condensation) -> Optimizer:
    """Return the inner optimiser: SGD with momentum and cosine decay over the inner steps."""
    return bilevel.optimizer(
        torch.optim.SGD,
        lr=config.inner_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=functools.partial(CosineAnnealingLR, T_max=config.inner_steps),
    )


def condensed_labels(config: Condensation, data: LabelledImages) -> Tensor:
    """Return the fixed labels of the condensed images, `[classes · ipc]`, class by class."""
    return torch.arange(data.classes, device=data.train_labels.device).repeat_interleave(config.ipc)


def inner_batches(config: Condensation, labels: Tensor, seed: int, draw: int) -> Any:
    """Return T batches of indices into the condensed images.

    Each epoch uses every image once. Its last batch holds the remaining images.
    """
    count = len(labels)
    if config.inner_batch == 0 or config.inner_batch >= count:
        return bilevel.no_batches(config.inner_steps)
    per_epoch = -(-count // config.inner_batch)

    def get(t: int) -> Tensor:
        order = randomness.generator(seed, randomness.CONDENSATION_INNER, draw, t // per_epoch).permutation(count)
        first = (t % per_epoch) * config.inner_batch
        return torch.from_numpy(order[first : first + config.inner_batch]).to(labels.device)

    return bilevel.batches(get, steps=config.inner_steps)


def random_real_images(config: Condensation, data: LabelledImages, seed: int, number: int) -> Tensor:
    """Draw as many random real images as there are condensed images, class by class, as a control.

    Raises:
        ValueError: a class has too few real images.
    """
    generator = randomness.generator(seed, randomness.CONDENSATION_CONTROL, number)
    labels = data.train_labels.cpu().numpy()
    chosen = []
    for label in range(data.classes):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < config.ipc:
            raise ValueError(f"ipc={config.ipc}, but class {label} has {len(of_class)} real images")
        chosen.append(generator.choice(of_class, config.ipc, replace=False))
    return data.train_images[torch.from_numpy(np.concatenate(chosen)).to(data.train_images.device)]


def _starting_images(config: Condensation, data: LabelledImages, seed: int) -> Tensor:
    if config.start == "real":
        return random_real_images(config, data, randomness.derive(seed, randomness.CONDENSATION_START), 0)
    noise = randomness.generator(seed, randomness.CONDENSATION_START).random(
        (data.classes * config.ipc, *data.shape), dtype=np.float32
    )
    return torch.from_numpy(noise).to(data.train_images.device)


def _without_replacement(labels: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[:count].to(labels.device)
