"""The networks that are trained on condensed images."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

ModelName = Literal["convnet", "mlp", "resnet"]


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


class _Residual(nn.Module):
    """Two 3×3 convolutions with batch norm, added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.convolutions(images) + self.shortcut(images))


def resnet(shape: tuple[int, int, int], classes: int, width: int) -> nn.Sequential:
    """Return a small residual network with batch norm: three blocks of `width`, 2 and 4 times `width` filters."""
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Residual(width, width, stride=1),
        _Residual(width, 2 * width, stride=2),
        _Residual(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def build(name: ModelName, shape: tuple[int, int, int], classes: int, width: int, blocks: int) -> nn.Module:
    """Return a newly initialised network by its name. It uses torch's global random number generator."""
    with torch.no_grad():
        if name == "convnet":
            return convnet(shape, classes, width, blocks)
        return mlp(shape, classes, width) if name == "mlp" else resnet(shape, classes, width)
