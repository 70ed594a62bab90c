"""Labelled images: scikit-learn's handwritten digits, and the idx files of MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bilevel.errors import DataError

DataName = Literal["digits", "mnist"]


@dataclass(frozen=True)
class LabelledImages:
    """A classification problem on images."""

    train_images: Tensor
    """Images `[n, channels, height, width]`, float32 in [0, 1]."""
    train_labels: Tensor
    """Labels `[n]`, int64, counted from 0."""
    test_images: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, `(channels, height, width)`."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1

    def to(self, device: torch.device) -> LabelledImages:
        """Return a copy on a device."""
        return LabelledImages(
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
        )


def load(name: DataName, data_dir: Path | None, device_name: str = "cpu") -> LabelledImages:
    """Return a data set on a device.

    Args:
        name: "digits", which needs no files, or "mnist".
        data_dir: the folder with the files of the data set.
        device_name: the name of the device, see `device`.

    Raises:
        DataError: the files are missing or damaged.
        ValueError: the device cannot be used.
    """
    if name == "digits":
        return digits().to(device(device_name))
    if data_dir is None:
        raise DataError("mnist is read from files: pass --data-dir FOLDER with its four idx files (.gz or unpacked)")
    return mnist(data_dir).to(device(device_name))


def device(name: str) -> torch.device:
    """Return the device with this name. `auto` selects a GPU if there is one.

    Raises:
        ValueError: the device cannot be used.
    """
    chosen = name
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device={name!r} cannot be used ({reason}); take auto, cpu or cuda") from error
    return torch.device(chosen)


def digits() -> LabelledImages:
    """Return the 1797 real handwritten 8×8 digits that come with scikit-learn.

    The test set consists of 500 of them, with the same proportion of each class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    pixels = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    classes = torch.tensor(labels, dtype=torch.int64)
    return LabelledImages(pixels[train], classes[train], pixels[test], classes[test])


def mnist(folder: Path) -> LabelledImages:
    """Read MNIST from a folder with its four idx files, with their usual names, compressed or not.

    Raises:
        DataError: the files are missing, damaged, or do not match each other.
    """
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} is not a folder")
    parts = []
    for split in ("train", "t10k"):
        images = read_idx(_find(folder, f"{split}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_find(folder, f"{split}-labels-idx1-ubyte"), dimensions=1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels")
        if len(images) == 0:
            raise DataError(f"{folder}: the {split} files hold no images")
        parts.append((torch.from_numpy(images).float().div(255).unsqueeze(1), torch.from_numpy(labels).long()))
    (train_images, train_labels), (test_images, test_labels) = parts
    if train_images.shape[1:] != test_images.shape[1:]:
        sizes = ", but ".join(
            f"{split} images of {images.shape[2]}x{images.shape[3]}"
            for split, images in (("train", train_images), ("t10k", test_images))
        )
        raise DataError(f"{folder}: {sizes}")
    if test_labels.max() > train_labels.max():
        raise DataError(
            f"{folder}: t10k labels up to {test_labels.max()}, but train labels only up to {train_labels.max()}"
        )
    return LabelledImages(train_images, train_labels, test_images, test_labels)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an array of bytes in the idx format, compressed (`.gz`) or not.

    Raises:
        DataError: the file is damaged or has another number of dimensions.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    expected = struct.pack(">HBB", 0, 8, dimensions)
    if content[:4] != expected:
        raise DataError(
            f"{path} is no idx file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}: it starts with "
            f"{content[:4].hex() or 'nothing'}, not {expected.hex()}"
        )
    offset = 4 * (1 + dimensions)
    if len(content) < offset:
        raise DataError(f"{path} is damaged: it ends within its header, after {len(content)} bytes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - offset != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header promises {math.prod(shape)} bytes of data, it holds {len(content) - offset}"
        )
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path:
    found = sorted(p for p in folder.iterdir() if p.name.removesuffix(".gz").endswith(name))
    if not found:
        raise DataError(f"{folder} has no file {name} or {name}.gz")
    if len(found) > 1:
        raise DataError(f"{folder} has several files for {name}: {', '.join(p.name for p in found)}; keep one")
    return found[0]
