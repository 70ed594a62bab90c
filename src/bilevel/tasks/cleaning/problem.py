"""Cleaning as a bilevel problem: the inner loop trains on weighted examples, the outer loss judges on trusted ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import randomness
from bilevel.tasks.cleaning.config import Cleaning
from bilevel.tasks.image_data import LabelledImages
from bilevel.tasks.task import Setup

# Counters that keep this task's random streams apart.


@dataclass(frozen=True)
class NoisyLabels:
    """Training examples some of whose labels are wrong, and a few others that can be trusted."""

    images: Tensor
    """`[N, channels, height, width]`."""
    labels: Tensor
    """As given, `[N]`."""
    true_labels: Tensor
    """As they should be, `[N]`; for judging alone."""
    trusted_images: Tensor
    trusted_labels: Tensor

    @property
    def wrong(self) -> Tensor:
        """Whose label is wrong, `[N]`."""
        return self.labels != self.true_labels


def noisy_labels(config: Cleaning, data: LabelledImages, seed: int) -> NoisyLabels:
    """Random examples of the training set; each label is wrong with the probability asked for, and then any other."""
    count = len(data.train_labels)
    if config.examples + config.trusted > count:
        raise ValueError(
            f"examples={config.examples} and trusted={config.trusted}: the training set holds {count} examples, "
            f"so their sum must be at most that"
        )
    device = data.train_labels.device
    order = torch.from_numpy(randomness.generator(seed, randomness.CLEANING_CHOICE).permutation(count)).to(device)
    chosen, trusted = order[: config.examples], order[config.examples :][: config.trusted]
    generator = randomness.generator(seed, randomness.CLEANING_WRONG)
    wrong = torch.from_numpy(generator.random(config.examples) < config.wrong).to(device)
    if not 0 < int(wrong.sum()) < config.examples:
        raise ValueError(
            f"examples={config.examples} with wrong={config.wrong}: all labels came out "
            f"{'wrong' if wrong.any() else 'right'}; take more examples, or another seed"
        )
    shift = torch.from_numpy(generator.integers(1, data.classes, config.examples)).to(device)
    right = data.train_labels[chosen]
    return NoisyLabels(
        images=data.train_images[chosen],
        labels=torch.where(wrong, (right + shift) % data.classes, right),
        true_labels=right,
        trusted_images=data.train_images[trusted],
        trusted_labels=data.train_labels[trusted],
    )


def setup(config: Cleaning, data: LabelledImages, seed: int) -> Setup:
    """The bilevel problem, equal weights to start from, the batches and the outer optimiser."""
    noisy = noisy_labels(config, data, seed)

    def inner_loss(model: Any, phi: Tensor, chosen: Tensor | None) -> Tensor:
        here = slice(None) if chosen is None else chosen
        return weighted_loss(model, weights(phi)[here], noisy.images[here], noisy.labels[here])

    def outer_loss(model: Any, _phi: Tensor, _batch: None) -> Tensor:
        return cross_entropy(model(noisy.trusted_images), noisy.trusted_labels)

    return Setup(
        problem=bilevel.GradientDescent(
            inner_loss,
            outer_loss,
            lambda phi: network(config, data),
            bilevel.optimizer(torch.optim.SGD, lr=config.inner_lr, momentum=config.momentum),
        ),
        meta=torch.zeros(config.examples, device=data.train_labels.device),
        inner_batches=functools.partial(inner_batches, config, noisy.labels, seed),
        outer_batch=None,
        optimizer=bilevel.optimizer(torch.optim.Adam, lr=config.outer_lr),
    )


def weights(phi: Tensor) -> Tensor:
    """In (0, 1), from meta parameters without bounds."""
    return phi.sigmoid()


def weighted_loss(model: Any, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Σ w ℓ / Σ w: small weights leave the pace of the training as it is."""
    return (weights * cross_entropy(model(images), labels, reduction="none")).sum() / weights.sum()


def network(config: Cleaning, data: LabelledImages) -> nn.Module:
    """A freshly initialised network with one hidden layer, from torch's global generator."""
    features = data.train_images[0].numel()
    layers = nn.Flatten(), nn.Linear(features, config.width), nn.Tanh(), nn.Linear(config.width, data.classes)
    return nn.Sequential(*layers).to(data.train_images.device)


def inner_batches(config: Cleaning, labels: Tensor, seed: int, draw: int) -> Any:
    """T batches of indices into the examples; an epoch takes each once and drops what does not fill a batch."""
    count = len(labels)
    if config.inner_batch == 0 or config.inner_batch >= count:
        return bilevel.no_batches(config.inner_steps)
    per_epoch = count // config.inner_batch

    def get(t: int) -> Tensor:
        order = randomness.generator(seed, randomness.CLEANING_INNER, draw, t // per_epoch).permutation(count)
        first = (t % per_epoch) * config.inner_batch
        return torch.from_numpy(order[first : first + config.inner_batch]).to(labels.device)

    return bilevel.batches(get, steps=config.inner_steps)
