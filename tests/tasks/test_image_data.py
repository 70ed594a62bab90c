"""Image data: the split of the digits, and idx files whole and damaged."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import NAMES, arrays, idx, write

from bilevel.errors import DataError
from bilevel.tasks import image_data

# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_split_in_two() -> None:
    from sklearn.datasets import load_digits

    data = image_data.digits()
    assert data.train_images.shape == (1297, 1, 8, 8)
    assert data.test_images.shape == (500, 1, 8, 8)
    assert (data.shape, data.classes) == ((1, 8, 8), 10)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    both = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert both.min() == 0
    assert both.max() == 1
    # Disjoint and complete: together they are the original rows (all different from each other), each with its label.
    images, labels = load_digits(return_X_y=True)
    rows = {tuple(row): label for row, label in zip((images / 16).astype(np.float32).tolist(), labels, strict=True)}
    assert len(rows) == len(images) == 1797
    found = [tuple(row) for row in both.tolist()]
    assert set(found) == set(rows)
    assert [rows[row] for row in found] == torch.cat([data.train_labels, data.test_labels]).tolist()


def test_digits_are_stratified() -> None:
    data = image_data.digits()
    in_all = torch.bincount(data.train_labels) + torch.bincount(data.test_labels)
    share = 500 / 1797
    assert (torch.bincount(data.test_labels) - share * in_all).abs().max() <= 1


def test_digits_are_the_same_every_time() -> None:
    first, second = image_data.digits(), image_data.load("digits", None)
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(second, name))


# -- idx files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("prefix", ["", "mnist_"])
def test_mnist_from_a_folder(tmp_path: Path, packed: bool, prefix: str) -> None:
    expected = arrays()
    data = image_data.load("mnist", write(tmp_path, prefix, packed))
    assert (data.shape, data.classes) == ((1, 5, 4), 3)
    for name in NAMES:
        found = getattr(data, name)
        if name.endswith("images"):
            assert found.dtype == torch.float32
            found = found.squeeze(1) * 255
        assert found.round().numpy().tolist() == expected[name].tolist()


def test_mnist_without_a_folder() -> None:
    with pytest.raises(DataError, match="pass --data-dir FOLDER with its four idx files"):
        image_data.load("mnist", None)


Damage = Callable[[Path], object]


def changed(name: str, change: Callable[[bytes], bytes], packed: bool = False) -> Damage:
    """Write all files, and one of them with its bytes changed (packed: after packing)."""

    def damage(folder: Path) -> None:
        write(folder, packed=packed)
        path = folder / (NAMES[name] + (".gz" if packed else ""))
        path.write_bytes(change(path.read_bytes()))

    return damage


def without(name: str) -> Damage:
    return lambda folder: (write(folder) / NAMES[name]).unlink()


def two_of(name: str) -> Damage:
    return lambda folder: (write(folder) / (NAMES[name] + ".gz")).write_bytes(b"")


def a_folder_named(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (write(folder) / NAMES[name]).unlink()
        (folder / NAMES[name]).mkdir()

    return damage


def with_arrays(**arrays: np.ndarray) -> Damage:
    return lambda folder: write(folder, changed=arrays)


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "missing": (without("test_labels"), ["has no file t10k-labels-idx1-ubyte", ".gz"]),
    "two candidates": (
        two_of("train_images"),
        ["several files", "train-images-idx3-ubyte, train-images-idx3-ubyte.gz", "keep one"],
    ),
    "a folder": (a_folder_named("train_images"), ["train-images-idx3-ubyte is damaged"]),
    "empty file": (changed("train_labels", lambda content: b""), ["train-labels-idx1-ubyte is no idx file", "nothing"]),
    "header cut": (
        changed("train_images", lambda content: content[:10]),
        ["train-images-idx3-ubyte is damaged", "header, after 10 bytes"],
    ),
    "too short": (
        changed("train_images", lambda content: content[:-1]),
        ["train-images-idx3-ubyte is damaged", "promises 120 bytes", "holds 119"],
    ),
    "too long": (
        changed("test_labels", lambda content: content + b"\0"),
        ["t10k-labels-idx1-ubyte is damaged", "promises 3 bytes", "holds 4"],
    ),
    "labels for images": (
        changed("train_images", lambda content: idx(arrays()["train_labels"])),
        ["train-images-idx3-ubyte", "3 dimensions", "00000801", "00000803"],
    ),
    "of floats": (
        changed("train_labels", lambda content: idx(arrays()["train_labels"], magic=0x0D01)),
        ["train-labels-idx1-ubyte", "1 dimension:", "00000d01", "00000801"],
    ),
    "gz without its name": (
        changed("train_images", gzip.compress),
        ["train-images-idx3-ubyte is no idx file", "1f8b"],
    ),
    "no gz": (
        changed("train_images", lambda content: idx(arrays()["train_images"]), packed=True),
        ["train-images-idx3-ubyte.gz is damaged"],
    ),
    "gz cut": (
        changed("test_images", lambda content: content[:-20], packed=True),
        ["t10k-images-idx3-ubyte.gz is damaged"],
    ),
    "gz with a wrong byte": (
        changed("test_images", lambda content: content[:40] + bytes([content[40] ^ 255]) + content[41:], packed=True),
        ["t10k-images-idx3-ubyte.gz is damaged"],
    ),
    "labels short": (
        with_arrays(train_labels=np.zeros(5)),
        ["6 train images, but 5 labels"],
    ),
    "no images": (
        with_arrays(test_images=np.zeros((0, 5, 4)), test_labels=np.zeros(0)),
        ["the t10k files hold no images"],
    ),
    "two sizes": (
        with_arrays(test_images=np.zeros((3, 4, 5))),
        ["train images have shape (1, 5, 4) (channels, height, width), but test images (1, 4, 5)"],
    ),
    "unknown label": (
        with_arrays(test_labels=np.array([0, 1, 3])),
        ["test labels up to 3, but train labels only up to 2"],
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named(what: str, tmp_path: Path) -> None:
    damage, fragments = DAMAGES[what]
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        image_data.load("mnist", tmp_path)
    for fragment in [str(tmp_path), *fragments]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("what", ["nothing there", "a file"])
def test_a_folder_is_needed(what: str, tmp_path: Path) -> None:
    path = tmp_path / "here"
    if what == "a file":
        path.write_bytes(b"")
    with pytest.raises(DataError, match=f"{path} is not a folder"):
        image_data.load("mnist", path)
