"""What is learned: the condensed images and, if wanted, their labels and the inner learning rates.

The meta parameters are a dict. Its entry "images" is always there, "labels" with learned labels, and "log_rates" with
`learn_rates`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from bilevel import randomness
from bilevel.tasks.condensation import augmentation
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.images.labelled import LabelledImages

Meta = dict[str, Tensor]
_CERTAINTY = 4.0
"""The logit of the class of an image in its label before the first outer step. The other logits are 0."""
_HEIGHT = 5.0
"""The difference between the output for the class of an image and the other outputs, for the squared loss."""


def start(config: Condensation, data: LabelledImages, seed: int) -> Meta:
    """Return the meta parameters before the first outer step."""
    meta = {"images": _starting_images(config, data, seed)}
    device = data.train_images.device
    if config.labels == "learned":
        classes = classes_of(config, data)
        if config.inner_loss == "squared":
            meta["labels"] = _rows_of(classes, data.classes)
        else:
            meta["labels"] = _CERTAINTY * one_hot(classes, data.classes).float()
    if config.learn_rates != "no":
        count = config.inner_steps if config.learn_rates == "each" else 1
        meta["log_rates"] = torch.zeros(count, device=device)
    return meta


def classes_of(config: Condensation, data: LabelledImages) -> Tensor:
    """Return the class of each condensed image, `[classes · ipc]`, class by class."""
    return torch.arange(data.classes, device=data.train_labels.device).repeat_interleave(config.ipc)


def loss(config: Condensation, model: Any, meta: Meta, classes: Tensor, batch: Any) -> Tensor:
    """Return the inner loss of a network on the condensed images of a batch, see `distance`.

    Args:
        config: the settings.
        model: the network.
        meta: the meta parameters.
        classes: the class of each condensed image.
        batch: the numbers of the images, and the numbers of their augmentation, see `parts`.
    """
    chosen, numbers = parts(batch)
    images = meta["images"] if chosen is None else meta["images"][chosen]
    if numbers is not None:
        images = augmentation.apply(images, numbers)
    found = targets(config, meta, classes)
    return distance(config, model(images), found if chosen is None else found[chosen])


def targets(config: Condensation, meta: Meta, classes: Tensor) -> Tensor:
    """Return what networks are trained towards.

    With the cross-entropy these are the classes, or learned distributions over the classes, which are the softmax of
    learned logits. With the squared loss they are rows of numbers, which are learned without a bound.
    """
    if "labels" not in meta:
        return classes
    return meta["labels"] if config.inner_loss == "squared" else meta["labels"].softmax(1)


def distance(config: Condensation, outputs: Tensor, found: Tensor) -> Tensor:
    """Return the loss of outputs `[n, classes]` with targets: classes `[n]`, or `[n, classes]`, see `targets`.

    A class counts as a row of the squared loss that is 5 · (1 − 1/classes) for the class and −5/classes elsewhere.
    """
    if config.inner_loss == "cross-entropy":
        return cross_entropy(outputs, found)
    if found.ndim == 1:
        found = _rows_of(found, outputs.shape[1], outputs.dtype)
    return 0.5 * (outputs - found).square().sum(1).mean()


def _rows_of(classes: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _HEIGHT * (one_hot(classes, count).to(dtype) - 1 / count)


def parts(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the numbers of the images of a batch (`None` for all images) and those of their augmentation, if any."""
    if isinstance(batch, dict):
        return batch["chosen"], batch["numbers"]
    return batch, None


def rate(config: Condensation, step: int, steps: int) -> float:
    """Return the inner learning rate of a step by the schedule alone."""
    if config.inner_schedule == "constant":
        return config.inner_lr
    return 0.5 * config.inner_lr * (1 + math.cos(math.pi * step / steps))


def factor(config: Condensation, meta: Meta, step: int) -> Tensor | float:
    """Return the learned factor of the inner learning rate of a step."""
    if "log_rates" not in meta:
        return 1.0
    return meta["log_rates"][step if config.learn_rates == "each" else 0].exp()


def random_real_images(config: Condensation, data: LabelledImages, seed: int, number: int) -> Tensor:
    """Draw as many random real images as there are condensed images, class by class, as a control.

    Raises:
        ValueError: a class has too few real images.
    """
    generator = randomness.generator(seed, randomness.CONDENSATION_CONTROL, number)
    chosen = [generator.choice(members, config.ipc, replace=False) for members in _members(config, data)]
    return data.train_images[torch.from_numpy(np.concatenate(chosen)).to(data.train_images.device)]


def mean_images(config: Condensation, data: LabelledImages, seed: int) -> Tensor:
    """Return the mean images of the `ipc` clusters that k-means finds in each class, class by class.

    With one image per class, this is the mean image of each class.

    Raises:
        ValueError: a class has too few real images.
    """
    if config.ipc == 1:
        means = [
            data.train_images[torch.from_numpy(members)].mean(0, keepdim=True) for members in _members(config, data)
        ]
        return torch.cat(means)
    from sklearn.cluster import MiniBatchKMeans

    flat = data.train_images.flatten(1).cpu().numpy()
    found = []
    for number, members in enumerate(_members(config, data)):
        state = randomness.derive(seed, randomness.CONDENSATION_MEANS, number) % 2**32
        once: Any = 1  # the package's annotation names the word "auto" only
        clusters = MiniBatchKMeans(config.ipc, random_state=state, n_init=once, batch_size=1024).fit(flat[members])
        found.append(torch.from_numpy(clusters.cluster_centers_))
    return torch.cat(found).to(data.train_images).reshape(-1, *data.shape)


def _members(config: Condensation, data: LabelledImages) -> list[np.ndarray]:
    """Return the numbers of the real images of each class."""
    labels = data.train_labels.cpu().numpy()
    found = [np.flatnonzero(labels == label) for label in range(data.classes)]
    for label, members in enumerate(found):
        if len(members) < config.ipc:
            raise ValueError(f"ipc={config.ipc}, but class {label} has {len(members)} real images")
    return found


def _starting_images(config: Condensation, data: LabelledImages, seed: int) -> Tensor:
    if config.start == "real":
        return random_real_images(config, data, randomness.derive(seed, randomness.CONDENSATION_START), 0)
    if config.start == "mean":
        return mean_images(config, data, seed)
    generator = randomness.generator(seed, randomness.CONDENSATION_START)
    size = (data.classes * config.ipc, *data.shape)
    if config.whiten:
        scale = float(data.train_images[:1000].std())
        return scale * torch.from_numpy(generator.standard_normal(size, dtype=np.float32)).to(data.train_images.device)
    return torch.from_numpy(generator.random(size, dtype=np.float32)).to(data.train_images.device)
