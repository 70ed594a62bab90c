"""CIFAR-10 and CIFAR-100 in their official archives, in the Python form and the binary form, packed or unpacked.

Reference: Krizhevsky, "Learning multiple layers of features from tiny images", 2009, and the description of the formats
at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.errors import DataError
from bilevel.tasks.images.labelled import LabelledImages, from_arrays

_PIXELS = 3 * 32 * 32
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""What a file of CIFAR in the Python form is made of. A pickle with anything else could run code, and is refused."""


@dataclass(frozen=True)
class _Variant:
    """The names of the files of one of the two data sets."""

    archive: str
    python_train: tuple[str, ...]
    python_test: str
    python_names: str
    labels: bytes
    names: bytes
    binary_train: tuple[str, ...]
    binary_test: str
    binary_names: str
    label_bytes: int
    """The number of bytes before the pixels of an image in the binary form. The last one is the label."""


_VARIANTS = {
    10: _Variant(
        archive="cifar-10",
        python_train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        python_test="test_batch",
        python_names="batches.meta",
        labels=b"labels",
        names=b"label_names",
        binary_train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        binary_test="test_batch.bin",
        binary_names="batches.meta.txt",
        label_bytes=1,
    ),
    100: _Variant(
        archive="cifar-100",
        python_train=("train",),
        python_test="test",
        python_names="meta",
        labels=b"fine_labels",
        names=b"fine_label_names",
        binary_train=("train.bin",),
        binary_test="test.bin",
        binary_names="fine_label_names.txt",
        label_bytes=2,
    ),
}

Files = Mapping[str, Callable[[], bytes]]
Part = tuple[np.ndarray, np.ndarray]


def read_cifar(folder: Path, classes: int) -> LabelledImages:
    """Read CIFAR-10 or CIFAR-100.

    Args:
        folder: a folder with the official archive (`cifar-10-python.tar.gz` or `cifar-10-binary.tar.gz`, or the same of
            CIFAR-100), with its unpacked folder, or with the files of that folder.
        classes: 10 or 100.

    Raises:
        DataError: files are missing or damaged, or belong to the other data set.
    """
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} is not a folder")
    variant = _VARIANTS[classes]
    places = _places(folder, variant)
    for where, files in places:
        for read, needed in (
            (_read_python, (*variant.python_train, variant.python_test)),
            (_read_binary, (*variant.binary_train, variant.binary_test)),
        ):
            if not any(name in files for name in needed):
                continue
            if missing := [name for name in needed if name not in files]:
                raise DataError(f"{where} has no {', '.join(missing)}; CIFAR-{classes} needs {', '.join(needed)}")
            return read(where, files, variant, classes)
    raise DataError(_nothing_found(folder, variant, classes))


def _places(folder: Path, variant: _Variant) -> list[tuple[Path, Files]]:
    """Return the places where the files may be, with the files in each."""
    unpacked = [folder / f"{variant.archive}-{ending}" for ending in ("batches-py", "batches-bin", "python", "binary")]
    places: list[tuple[Path, Files]] = [
        (place, {path.name: path.read_bytes for path in place.iterdir() if path.is_file()})
        for place in (*unpacked, folder)
        if place.is_dir()
    ]
    for form in ("python", "binary"):
        if (archive := folder / f"{variant.archive}-{form}.tar.gz").exists():
            places.insert(0, (archive, _unpacked(archive)))
    return places


def _unpacked(archive: Path) -> Files:
    """Return the files of an archive, each as a function that returns its content."""
    try:
        with tarfile.open(archive, "r:gz") as opened:
            found: dict[str, bytes] = {}
            for member in opened:
                if member.isfile() and (stream := opened.extractfile(member)) is not None:
                    found[Path(member.name).name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is damaged: {error}; download it again") from error

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: found[name]

    return {name: reader(name) for name in found}


def _nothing_found(folder: Path, variant: _Variant, classes: int) -> str:
    other = 110 - classes
    if any((folder / f"{_VARIANTS[other].archive}-{form}.tar.gz").exists() for form in ("python", "binary")) or any(
        files.keys() & {_VARIANTS[other].python_test, _VARIANTS[other].binary_test}
        for _, files in _places(folder, _VARIANTS[other])
    ):
        return f"{folder} holds CIFAR-{other}, not CIFAR-{classes}; pass --data cifar{other}, or another --data-dir"
    return (
        f"{folder} has no files of CIFAR-{classes}: put {variant.archive}-python.tar.gz or "
        f"{variant.archive}-binary.tar.gz there, packed or unpacked"
    )


# -- the Python form ---------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no file of CIFAR does")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_python(where: Path, files: Files, variant: _Variant, classes: int) -> LabelledImages:
    parts = [_python_part(where / name, files[name](), variant, classes) for name in variant.python_train]
    test = _python_part(where / variant.python_test, files[variant.python_test](), variant, classes)
    names: tuple[str, ...] = ()
    if variant.python_names in files:
        found = _unpickled(where / variant.python_names, files[variant.python_names]()).get(variant.names, [])
        names = tuple(name.decode() for name in found)
    return _joined(where, parts, test, names, classes)


def _python_part(path: Path, content: bytes, variant: _Variant, classes: int) -> Part:
    entries = _unpickled(path, content)
    if variant.labels not in entries:
        other = _VARIANTS[110 - classes]
        mixed = f"; it is a file of CIFAR-{110 - classes}" if other.labels in entries else ""
        raise DataError(f"{path} has no entry {variant.labels.decode()!r}, as files of CIFAR-{classes} have{mixed}")
    pixels = np.asarray(entries.get(b"data"))
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise DataError(
            f"{path} is damaged: its entry 'data' is {pixels.dtype} {pixels.shape}, not uint8 (n, {_PIXELS})"
        )
    labels = np.asarray(entries[variant.labels])
    if labels.shape != (len(pixels),):
        raise DataError(f"{path} is damaged: it holds {len(pixels)} images, but {labels.size} labels")
    return pixels.reshape(-1, 3, 32, 32), labels


def _unpickled(path: Path, content: bytes) -> dict[bytes, Any]:
    try:
        entries = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path} is no file of CIFAR: it holds a {type(entries).__name__}, not a dict")
    return {key.encode() if isinstance(key, str) else key: value for key, value in entries.items()}


# -- the binary form ---------------------------------------------------------------------------------------------------


def _read_binary(where: Path, files: Files, variant: _Variant, classes: int) -> LabelledImages:
    parts = [_binary_part(where / name, files[name](), variant) for name in variant.binary_train]
    test = _binary_part(where / variant.binary_test, files[variant.binary_test](), variant)
    names: tuple[str, ...] = ()
    if variant.binary_names in files:
        names = tuple(files[variant.binary_names]().decode().split())
    return _joined(where, parts, test, names, classes)


def _binary_part(path: Path, content: bytes, variant: _Variant) -> Part:
    length = variant.label_bytes + _PIXELS
    if not content or len(content) % length:
        raise DataError(f"{path} is damaged: its size of {len(content)} bytes is no multiple of {length}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, length)
    return rows[:, variant.label_bytes :].reshape(-1, 3, 32, 32), rows[:, variant.label_bytes - 1]


def _joined(where: Path, parts: list[Part], test: Part, names: tuple[str, ...], classes: int) -> LabelledImages:
    images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    highest = max(int(part.max(initial=0)) for part in (labels, test[1]))
    if highest >= classes:
        raise DataError(f"{where} has the label {highest}, and CIFAR-{classes} has labels below {classes}")
    if names and len(names) != classes:
        raise DataError(f"{where} names {len(names)} classes, and CIFAR-{classes} has {classes}")
    return from_arrays(where, (images, labels), test, names)
