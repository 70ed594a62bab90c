"""Small data sets in the idx format, written from its description."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    """The idx format, from its description: type (8: bytes) and dimensions, the shape, the data; all big-endian."""
    header = struct.pack(">HBB", 0, 8, array.ndim) if magic is None else struct.pack(">I", magic)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "train_images": generator.integers(0, 256, (6, 5, 4)),
        "train_labels": np.array([0, 1, 2, 2, 1, 0]),
        "test_images": generator.integers(0, 256, (3, 5, 4)),
        "test_labels": np.array([2, 0, 1]),
    }


def write(
    folder: Path, prefix: str = "", packed: bool = False, changed: Mapping[str, np.ndarray] = MappingProxyType({})
) -> Path:
    for name, array in {**arrays(), **changed}.items():
        content = idx(array)
        path = folder / (prefix + NAMES[name] + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder
