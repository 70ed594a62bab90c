"""Labelled examples from a file of the user's own: csv, npz or parquet."""

from __future__ import annotations

import csv
import importlib.util
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import randomness
from bilevel.errors import DataError
from bilevel.tasks.cleaning.config import Cleaning
from bilevel.tasks.image_data import LabelledImages, device

ENDINGS = (".csv", ".npz", ".parquet")
_FEWEST_TRUSTED = 10
_TEST_PART = 0.2
"""The part of the trusted rows that is kept for the test accuracy."""


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    features: np.ndarray
    """`[n, features]`, float64, all finite."""
    labels: np.ndarray
    """`[n]`, as they stand in the file."""
    trusted: np.ndarray
    """`[n]`, bool: the rows whose label is known to be right."""


@dataclass(frozen=True)
class FileData:
    """A file in the form in which the task uses it: rows with suspected labels, trusted rows, and rows for the test."""

    images: LabelledImages
    """The rows with suspected labels as its training set, and a part of the trusted rows as its test set. `[n,
    features]`, scaled to mean 0 and variance 1."""
    trusted_images: Tensor
    trusted_labels: Tensor
    rows: list[int]
    """The number of each suspected row in the file, from 0 and without the header."""
    names: list[str]
    """The label of each class."""


def is_file(name: str) -> bool:
    """Whether the setting `data` names a file and not a built-in data set."""
    return name.lower().endswith(ENDINGS)


def load(config: Cleaning, seed: int) -> FileData:
    """Read the file and split the trusted rows.

    Raises:
        DataError: the file is missing or damaged, or its content cannot be used.
    """
    path = Path(config.data)
    table = read(path, config.label, config.trusted_column)
    names, labels = np.unique(table.labels, return_inverse=True)
    if len(names) < 2:
        raise DataError(f"{path}: all labels are {names[0]!r}; at least two classes are needed")
    trusted, suspected = np.flatnonzero(table.trusted), np.flatnonzero(~table.trusted)
    if len(trusted) < _FEWEST_TRUSTED:
        raise DataError(
            f"{path}: {len(trusted)} rows are trusted; at least {_FEWEST_TRUSTED} are needed, because the weights are "
            "chosen for them"
        )
    if len(suspected) < max(1, config.inner_batch):
        raise DataError(
            f"{path}: {len(suspected)} rows are not trusted, fewer than inner_batch={config.inner_batch}; take a "
            "smaller --inner-batch, or 0 for all rows in each step"
        )
    if only := set(labels[trusted]) - set(labels[suspected]):
        raise DataError(
            f"{path}: the label {str(names[min(only)])!r} occurs in trusted rows only, so no training example has it; "
            "mark some of its rows as not trusted, or leave it out"
        )
    order = randomness.generator(seed, randomness.CLEANING_CHOICE).permutation(trusted)
    test, kept = np.split(order, [round(_TEST_PART * len(order))])
    mean, spread = table.features[suspected].mean(0), table.features[suspected].std(0)
    scaled = (table.features - mean) / np.where(spread > 0, spread, 1.0)
    where = device(config.device)
    x, y = torch.tensor(scaled, dtype=torch.float32, device=where), torch.from_numpy(labels).to(where)
    return FileData(
        LabelledImages(x[suspected], y[suspected], x[test], y[test]),
        x[kept],
        y[kept],
        suspected.tolist(),
        [str(name) for name in names],
    )


def read(path: Path, label: str, trusted: str) -> Table:
    """Read a file with a column of labels, a column that marks trusted rows, and features in all other columns.

    A csv file has a header. An npz file has arrays `[n]` or `[n, …]` in place of columns.

    Raises:
        DataError: the file is missing or damaged, a column is missing, or a feature is no finite number.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; pass --data FILE with one of {', '.join(ENDINGS)}")
    reader = {".csv": _csv, ".npz": _npz, ".parquet": _parquet}[path.suffix.lower()]
    columns = reader(path)
    for name, what, flag in ((label, "labels", "label"), (trusted, "marks of trusted rows", "trusted-column")):
        if name not in columns:
            raise DataError(
                f"{path} has no column {name!r} with the {what}: it has {', '.join(columns) or 'none'}; name it by "
                f"--{flag}"
            )
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{path}: the columns have different lengths: {sizes}")
    if sizes[label] == 0:
        raise DataError(f"{path} holds no rows")
    labels, marks = columns.pop(label), columns.pop(trusted)
    if not columns:
        raise DataError(f"{path} has no column of features besides {label!r} and {trusted!r}")
    features = np.concatenate([_numbers(path, name, column) for name, column in columns.items()], axis=1)
    return Table(features, _labels(path, label, labels), _marks(path, trusted, marks))


def _csv(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    rows = [row for row in rows if row]
    if len(set(header)) < len(header):
        raise DataError(f"{path}: the header {header} has a name twice; rename a column")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise DataError(f"{path} is damaged: row {number} has {len(row)} cells, and the header has {len(header)}")
    return {name: np.array([row[i] for row in rows], dtype=str) for i, name in enumerate(header)}


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: np.atleast_1d(content[name]) for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged, or no npz file: {error}") from error


def _parquet(path: Path) -> dict[str, np.ndarray]:
    missing = [name for name in ("pandas", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f"{path}: reading parquet needs {' and '.join(missing)}: pip install {' '.join(missing)}; or save the data "
            "as csv or npz"
        )
    import pandas as pd  # pyright: ignore[reportMissingImports]

    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path} is damaged: {error}") from error
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def _numbers(path: Path, name: str, column: np.ndarray) -> np.ndarray:
    """Return the features `[n, k]` in a column."""
    try:
        numbers = np.asarray(column, dtype=np.float64).reshape(len(column), -1)
    except (TypeError, ValueError):
        wrong = next(i for i, value in enumerate(column) if not _is_number(value))
        raise DataError(
            f"{path}: the column {name!r} holds {str(column[wrong])!r} in row {wrong}; features must be numbers: "
            "encode the column, or leave it out"
        ) from None
    bad = np.flatnonzero(~np.isfinite(numbers).all(1))
    if len(bad):
        raise DataError(
            f"{path}: the column {name!r} is NaN or infinite in {len(bad)} rows, the first of which is row {bad[0]}; "
            "fill in these values, or leave the rows out"
        )
    return numbers


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _labels(path: Path, name: str, column: np.ndarray) -> np.ndarray:
    texts = column.astype(str) if column.dtype.kind in "OU" else column
    missing = np.isin(texts, ["", "nan", "None"]) if texts.dtype.kind == "U" else ~np.isfinite(texts)
    if texts.ndim != 1 or missing.any():
        where = f"in row {np.flatnonzero(missing)[0]}" if texts.ndim == 1 else f"of shape {texts.shape}"
        raise DataError(f"{path}: the column {name!r} has no label {where}; each row needs one label")
    return texts


def _marks(path: Path, name: str, column: np.ndarray) -> np.ndarray:
    words = {"1": True, "true": True, "1.0": True, "0": False, "false": False, "0.0": False, "": False}
    try:
        return np.array([words[str(value).lower()] for value in column], dtype=bool)
    except KeyError as error:
        raise DataError(
            f"{path}: the column {name!r} holds {error}; 1 or true marks a row whose label is known to be right, and 0 "
            "or false any other row"
        ) from None
