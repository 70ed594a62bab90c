"""Data sets of labelled images by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from bilevel.errors import DataError
from bilevel.tasks.images.cifar import read_cifar
from bilevel.tasks.images.idx import FASHION_CLASSES, read_mnist
from bilevel.tasks.images.labelled import LabelledImages
from bilevel.tasks.images.own import read_folder, read_npz

DataName = Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "folder", "npz"]

_FILES: dict[str, str] = {
    "mnist": "FOLDER with its four idx files (.gz or unpacked)",
    "fashion-mnist": "FOLDER with its four idx files (.gz or unpacked)",
    "cifar10": "FOLDER with cifar-10-python.tar.gz or cifar-10-binary.tar.gz, packed or unpacked",
    "cifar100": "FOLDER with cifar-100-python.tar.gz or cifar-100-binary.tar.gz, packed or unpacked",
    "folder": "FOLDER with a folder of image files for each class, or with train and test that hold these",
    "npz": "FILE.npz with the arrays images and labels, or x_train, y_train, x_test and y_test",
}


def load(name: DataName, data_dir: Path | None, device_name: str = "cpu") -> LabelledImages:
    """Return a data set on a device.

    Args:
        name: "digits" needs no files. The others are read from files: "mnist" and "fashion-mnist" from idx files,
            "cifar10" and "cifar100" from their official archives, "folder" from image files in a folder for each class,
            and "npz" from a file of NumPy arrays.
        data_dir: the folder or file with the data.
        device_name: the name of the device, see `device`.

    Raises:
        DataError: the files are missing or damaged.
        ValueError: the device cannot be used.
    """
    if name == "digits":
        return digits().to(device(device_name))
    if data_dir is None:
        raise DataError(f"{name} is read from files: pass --data-dir {_FILES[name]}")
    readers = {
        "mnist": read_mnist,
        "fashion-mnist": lambda folder: read_mnist(folder, FASHION_CLASSES),
        "cifar10": lambda folder: read_cifar(folder, 10),
        "cifar100": lambda folder: read_cifar(folder, 100),
        "folder": read_folder,
        "npz": read_npz,
    }
    return readers[name](data_dir).to(device(device_name))


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
