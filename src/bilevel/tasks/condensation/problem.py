"""Condensation as a bilevel problem. The inner loop trains on synthetic images, and the outer loss uses real images."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import bilevel
from bilevel import randomness
from bilevel.optim.update_rule import Optimizer
from bilevel.tasks.condensation import augmentation, condensed
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.models import build
from bilevel.tasks.images.labelled import LabelledImages
from bilevel.tasks.task import Setup


def setup(config: Condensation, data: LabelledImages, outer_steps: int, seed: int) -> Setup:
    """Return the bilevel problem, the images at the start, the batches and the outer optimiser."""
    classes = condensed.classes_of(config, data)
    with randomness.torch_seeded(seed):
        network(config, data)  # settings for which a network or a control cannot be made are refused here
    condensed.random_real_images(config, data, seed, 0)

    def inner_loss(model: Any, meta: condensed.Meta, batch: Any) -> Tensor:
        return condensed.loss(config, model, meta, classes, batch)

    def outer_loss(model: Any, _meta: condensed.Meta, batch: Any) -> Tensor:
        chosen, numbers = condensed.parts(batch)
        images = data.train_images[chosen]
        if numbers is not None:
            images = augmentation.apply(images, numbers)
        return cross_entropy(model(images), data.train_labels[chosen])

    def outer_batch(draw: int) -> Any:
        chosen = _without_replacement(
            data.train_labels, config.outer_batch, randomness.derive(seed, randomness.CONDENSATION_OUTER, draw)
        )
        if not config.augmented:
            return chosen
        generator = randomness.generator(seed, randomness.CONDENSATION_VIEWS, 1, draw)
        return {"chosen": chosen, "numbers": augmentation.draw(config, len(chosen), generator).to(chosen.device)}

    return Setup(
        problem=bilevel.GradientDescent(
            inner_loss, outer_loss, lambda meta: network(config, data), inner_optimizer(config)
        ),
        meta=condensed.start(config, data, seed),
        inner_batches=functools.partial(inner_batches, config, classes, seed),
        outer_batch=outer_batch,
        optimizer=bilevel.optimizer(
            torch.optim.Adam,
            lr=config.outer_lr,
            # A function of the step alone, so that a run that is made longer decays over its new length.
            schedule=functools.partial(LambdaLR, lr_lambda=lambda step: max(0.0, 1 - step / outer_steps)),
        ),
        update=bilevel.OuterUpdate(
            project=None if config.unbounded or config.whiten else _bounded, clip_norm=config.clip_norm or None
        ),
    )


def _bounded(meta: condensed.Meta) -> condensed.Meta:
    return {**meta, "images": meta["images"].clamp(0, 1)}


def network(config: Condensation, data: LabelledImages) -> nn.Module:
    """Return a newly initialised network for these images."""
    return build(config.model, data.shape, data.classes, config.width, config.blocks).to(data.train_images.device)


def inner_optimizer(config: Condensation) -> Optimizer:
    """Return the inner optimiser with its schedule, and with the learned factors of its learning rate."""
    settings: dict[str, Any] = {"weight_decay": config.weight_decay, "lr": config.inner_lr}
    if config.learn_rates != "no":
        settings["lr"] = lambda meta, step: (
            condensed.rate(config, step, config.inner_steps) * condensed.factor(config, meta, step)
        )
    elif config.inner_schedule == "cosine":
        settings["schedule"] = functools.partial(CosineAnnealingLR, T_max=config.inner_steps)
    if config.inner_optimizer == "adam":
        return bilevel.optimizer(torch.optim.Adam, betas=(config.momentum, 0.999), **settings)
    return bilevel.optimizer(torch.optim.SGD, momentum=config.momentum, **settings)


def inner_batches(config: Condensation, classes: Tensor, seed: int, draw: int) -> Any:
    """Return the batches of condensed images for one estimate.

    Each epoch uses every image once. Its last batch holds the remaining images.
    """
    count, steps = len(classes), config.inner_steps
    if config.least_inner_steps:
        generator = randomness.generator(seed, randomness.CONDENSATION_STEPS, draw)
        steps = int(generator.integers(config.least_inner_steps, config.inner_steps + 1))
    whole = config.inner_batch == 0 or config.inner_batch >= count
    if whole and not config.augmented:
        return bilevel.no_batches(steps)
    per_epoch = 1 if whole else -(-count // config.inner_batch)

    def chosen(t: int) -> Tensor | None:
        if whole:
            return None
        order = randomness.generator(seed, randomness.CONDENSATION_INNER, draw, t // per_epoch).permutation(count)
        first = (t % per_epoch) * config.inner_batch
        return torch.from_numpy(order[first : first + config.inner_batch]).to(classes.device)

    def get(t: int) -> Any:
        images = chosen(t)
        if not config.augmented:
            return images
        generator = randomness.generator(seed, randomness.CONDENSATION_VIEWS, 0, draw, t)
        number = count if images is None else len(images)
        return {"chosen": images, "numbers": augmentation.draw(config, number, generator).to(classes.device)}

    return bilevel.batches(get, steps=steps)


def _without_replacement(labels: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[:count].to(labels.device)
