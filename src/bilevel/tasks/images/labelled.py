"""A data set of labelled images in memory, and the checks that every reader makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bilevel.errors import DataError


@dataclass(frozen=True)
class LabelledImages:
    """A classification problem on images."""

    train_images: Tensor
    """Images `[n, channels, height, width]`, float32 in [0, 1]."""
    train_labels: Tensor
    """Labels `[n]`, int64, counted from 0."""
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...] = ()
    """The name of each class, or nothing if classes have numbers only."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, `(channels, height, width)`."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class; its number where it has no name."""
        return self.class_names or tuple(str(number) for number in range(self.classes))

    def to(self, device: torch.device) -> LabelledImages:
        """Return a copy on a device."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def from_arrays(
    where: Path,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: tuple[str, ...] = (),
) -> LabelledImages:
    """Return the data set of these arrays.

    Args:
        where: the file or folder that the arrays come from, for error messages.
        train: images `[n, height, width]`, `[n, height, width, channels]` or `[n, channels, height, width]`, as bytes
            or as floats in [0, 1], with 1 or 3 channels; and labels `[n]`, whole numbers counted from 0.
        test: the same.
        class_names: the name of each class.

    Raises:
        DataError: the arrays are no labelled images, or the two parts do not match each other.
    """
    (train_images, train_labels), (test_images, test_labels) = (
        (_images(where, part, images), torch.from_numpy(checked_labels(where, part, labels, len(images))))
        for part, (images, labels) in (("train", train), ("test", test))
    )
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{where}: train images have shape {tuple(train_images.shape[1:])} (channels, height, width), but test "
            f"images {tuple(test_images.shape[1:])}"
        )
    present = torch.bincount(train_labels)
    if bool((present == 0).any()):
        missing = [number for number, count in enumerate(present.tolist()) if count == 0]
        raise DataError(
            f"{where}: labels go up to {len(present) - 1}, but no train image has label "
            f"{', '.join(map(str, missing[:5]))}; number the classes from 0 without gaps"
        )
    if int(test_labels.max()) >= len(present):
        raise DataError(
            f"{where}: test labels up to {int(test_labels.max())}, but train labels only up to {len(present) - 1}"
        )
    return LabelledImages(train_images, train_labels, test_images, test_labels, class_names)


def _images(where: Path, part: str, images: np.ndarray) -> Tensor:
    if len(images) == 0:
        raise DataError(f"{where}: there are no {part} images")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = np.moveaxis(images, 3, 1)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"{where}: the {part} images have shape {images.shape}; needed is [n, height, width], "
            "[n, height, width, channels] or [n, channels, height, width] with 1 or 3 channels"
        )
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images)).float().div_(255)
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{where}: the {part} images are {images.dtype}; needed are uint8, or floats between 0 and 1")
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # also for NaN
        raise DataError(
            f"{where}: the {part} images are floats between {low:g} and {high:g}; needed are floats between 0 and 1, "
            "or uint8"
        )
    return pixels


def checked_labels(where: Path, part: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Return labels as int64 `[count]`.

    Raises:
        DataError: they are not `count` whole numbers counted from 0.
    """
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (count,):
        raise DataError(f"{where}: {count} {part} images, but labels of shape {labels.shape}; needed is ({count},)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: the {part} labels are {labels.dtype}; needed are whole numbers counted from 0")
    if count and int(labels.min()) < 0:
        raise DataError(f"{where}: a {part} label is {int(labels.min())}; labels are counted from 0")
    return labels.astype(np.int64)
