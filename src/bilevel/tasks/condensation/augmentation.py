"""Random flips, shifts and rotations of images, as functions of random numbers that are drawn beforehand.

The numbers are part of a batch and not drawn in the loss. A step that is computed again therefore sees the same images.
Every pixel of the result is a weighted mean of four pixels of the image, and the result is linear in the image. PyTorch
differentiates `grid_sample` once only, and hypergradients need two derivatives.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bilevel.tasks.condensation.config import Condensation


def draw(config: Condensation, count: int, generator: np.random.Generator) -> Tensor:
    """Draw the random numbers (mirrored, shift down, shift right, angle in radians) of `count` images, `[count, 4]`."""
    mirrored = generator.integers(0, 2, count) if config.flip else np.zeros(count)
    shifts = generator.integers(-config.shift, config.shift + 1, (count, 2))
    angles = math.radians(config.rotate) * generator.uniform(-1, 1, count)
    return torch.from_numpy(np.column_stack([mirrored, shifts, angles]).astype(np.float32))


def apply(images: Tensor, numbers: Tensor) -> Tensor:
    """Return the images after flips, rotations about their centre, and shifts.

    Args:
        images: `[n, channels, height, width]`.
        numbers: `[n, 4]`, see `draw`.

    Pixels from outside the image are those of its nearest border. A rotated pixel is interpolated bilinearly.
    """
    count, channels, height, width = images.shape
    mirrored, down, right, angle = numbers.to(images).unbind(1)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=images.device, dtype=images.dtype) - (height - 1) / 2,
        torch.arange(width, device=images.device, dtype=images.dtype) - (width - 1) / 2,
        indexing="ij",
    )
    y, x = rows - down.view(-1, 1, 1), columns - right.view(-1, 1, 1)
    sine, cosine = angle.sin().view(-1, 1, 1), angle.cos().view(-1, 1, 1)
    y, x = cosine * y - sine * x, sine * y + cosine * x
    x = torch.where(mirrored.view(-1, 1, 1) > 0, -x, x)
    y = (y + (height - 1) / 2).clamp(0, height - 1)
    x = (x + (width - 1) / 2).clamp(0, width - 1)
    top, left = y.floor(), x.floor()
    below, beside = y - top, x - left
    flat, result = images.reshape(count, channels, -1), 0
    for row, row_weight in ((top, 1 - below), ((top + 1).clamp(max=height - 1), below)):
        for column, weight in ((left, 1 - beside), ((left + 1).clamp(max=width - 1), beside)):
            places = (row * width + column).long().reshape(count, 1, -1).expand(-1, channels, -1)
            result = result + flat.gather(2, places) * (row_weight * weight).reshape(count, 1, -1)
    assert isinstance(result, Tensor)
    return result.reshape(images.shape)
