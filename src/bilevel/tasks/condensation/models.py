"""The networks that are trained on condensed images."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

ModelName = Literal["convnet", "mlp"]


def convnet(shape: tuple[int, int, int], classes: int, width: int, blocks: int) -> nn.Sequential:
    """Return the paper's convolutional network.

    It consists of blocks of (3×3 convolution, ReLU, instance norm, 2×2 average pooling), and a linear layer.

    Args:
        shape: the shape of an image, `(channels, height, width)`.
        classes: the number of outputs.
        width: the number of filters per convolution (128 in the paper).
        blocks: the number of blocks, each of which halves the image (3 in the paper).

    Raises:
        ValueError: there are too many blocks for the size of the image.
    """
    channels, *size = shape
    if min(size) >> (blocks - 1) < 4:  # the size of the input of the last instance norm
        most = min(size).bit_length() - 2
        raise ValueError(
            f"blocks={blocks} on {size[0]}x{size[1]} images: the last pooling would average nearly the whole "
            "normalised map, whose mean is zero by construction, so the network could learn nothing; take "
            + (f"blocks <= {most}" if most >= 1 else "model=mlp")
        )
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers += [
            nn.Conv2d(channels if block == 0 else width, width, 3, padding=1),
            nn.ReLU(),
            nn.InstanceNorm2d(width, affine=True),
            nn.AvgPool2d(2),
        ]
    features = width * math.prod(s >> blocks for s in size)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


def mlp(shape: tuple[int, int, int], classes: int, width: int) -> nn.Sequential:
    """Return a network with two hidden layers of `width` ReLU units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def build(name: ModelName, shape: tuple[int, int, int], classes: int, width: int, blocks: int) -> nn.Module:
    """Return a newly initialised network by its name. It uses torch's global random number generator."""
    with torch.no_grad():
        return convnet(shape, classes, width, blocks) if name == "convnet" else mlp(shape, classes, width)
