"""The idx files of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from bilevel.errors import DataError
from bilevel.tasks.images.labelled import LabelledImages, from_arrays

FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
"""The classes of Fashion-MNIST (Xiao et al., 2017)."""


def read_mnist(folder: Path, class_names: tuple[str, ...] = ()) -> LabelledImages:
    """Read four idx files with the usual names of MNIST, compressed or not. Fashion-MNIST has the same names.

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
        parts.append((images, labels))
    train, test = parts
    return from_arrays(folder, train, test, class_names)


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
