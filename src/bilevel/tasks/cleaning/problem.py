"""Cleaning as a bilevel problem. The inner loop trains on weighted examples, and the outer loss is that of trusted
ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import randomness
from bilevel.tasks import image_data
from bilevel.tasks.cleaning import files
from bilevel.tasks.cleaning.config import Cleaning
from bilevel.tasks.image_data import LabelledImages
from bilevel.tasks.task import Setup

# Counters that separate this task's random streams.


@dataclass(frozen=True)
class NoisyLabels:
    """Training examples of which some have wrong labels, and a few further examples with right labels."""

    images: Tensor
    """Images `[N, channels, height, width]`."""
    labels: Tensor
    """Given labels `[N]`, of which some are wrong."""
    true_labels: Tensor
    """True labels `[N]`, which are used only for evaluation."""
    trusted_images: Tensor
    trusted_labels: Tensor
    known: bool = True
    """Whether the true labels are known. Those of a file are not, and `true_labels` are then the labels it has."""

    @property
    def wrong(self) -> Tensor:
        """A mask `[N]` of the examples whose label is wrong."""
        return self.labels != self.true_labels


def noisy_labels(config: Cleaning, data: LabelledImages, seed: int) -> NoisyLabels:
    """Draw random examples of the training set and replace each label with probability `config.wrong`.

    The wrong label is any of the other classes with equal probability.

    Raises:
        ValueError: the training set is too small, or all labels came out right or all wrong.
    """
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


def loaded(config: Cleaning, data_dir: Path | None, seed: int) -> tuple[LabelledImages, NoisyLabels]:
    """Return the data, and the examples with labels that may be wrong. The labels of a file are taken as they are."""
    if files.is_file(config.data):
        found = files.load(config, seed)
        images, labels = found.images.train_images, found.images.train_labels
        return found.images, NoisyLabels(
            images, labels, labels, found.trusted_images, found.trusted_labels, known=False
        )
    data = image_data.load("mnist" if config.data == "mnist" else "digits", data_dir, config.device)
    return data, noisy_labels(config, data, seed)


def setup(config: Cleaning, data: LabelledImages, seed: int, noisy: NoisyLabels | None = None) -> Setup:
    """Return the bilevel problem, equal weights as the start, the batches and the outer optimiser."""
    noisy = noisy_labels(config, data, seed) if noisy is None else noisy

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
        meta=torch.zeros(len(noisy.labels), device=data.train_labels.device),
        inner_batches=functools.partial(inner_batches, config, noisy.labels, seed),
        outer_batch=None,
        optimizer=bilevel.optimizer(torch.optim.Adam, lr=config.outer_lr),
    )


def weights(phi: Tensor) -> Tensor:
    """Return weights in (0, 1) from meta parameters without bounds."""
    return phi.sigmoid()


def weighted_loss(model: Any, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Compute Σ w ℓ / Σ w. A common factor of all weights does not change it."""
    return (weights * cross_entropy(model(images), labels, reduction="none")).sum() / weights.sum()


def network(config: Cleaning, data: LabelledImages) -> nn.Module:
    """Return a newly initialised network with one hidden layer. It uses torch's global random number generator."""
    features = data.train_images[0].numel()
    layers = nn.Flatten(), nn.Linear(features, config.width), nn.Tanh(), nn.Linear(config.width, data.classes)
    return nn.Sequential(*layers).to(data.train_images.device)


def inner_batches(config: Cleaning, labels: Tensor, seed: int, draw: int) -> Any:
    """Return T batches of indices into the examples.

    Each epoch uses an example at most once. Examples that do not fill a batch are left out.
    """
    count = len(labels)
    if config.inner_batch == 0 or config.inner_batch >= count:
        return bilevel.no_batches(config.inner_steps)
    per_epoch = count // config.inner_batch

    def get(t: int) -> Tensor:
        order = randomness.generator(seed, randomness.CLEANING_INNER, draw, t // per_epoch).permutation(count)
        first = (t % per_epoch) * config.inner_batch
        return torch.from_numpy(order[first : first + config.inner_batch]).to(labels.device)

    return bilevel.batches(get, steps=config.inner_steps)
