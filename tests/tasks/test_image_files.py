"""CIFAR archives, folders of images and .npz files, whole, damaged, missing and mixed up."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idx_files import write
from PIL import Image

from bilevel.errors import DataError
from bilevel.tasks import image_data

Content = dict[str, bytes]


def some_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def parts(classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images and labels of each file: 25 train images in all, with each class at least once for 10 classes."""
    names = [f"data_batch_{n}" for n in range(1, 6)] if classes == 10 else ["train"]
    per_file = 5 if classes == 10 else 100
    made = {
        name: (some_images(per_file, number), (np.arange(per_file) + per_file * number) % classes)
        for number, name in enumerate(names)
    }
    return {**made, "test_batch" if classes == 10 else "test": (some_images(4, 9), np.array([3, 1, 2, 0]))}


def python_form(classes: int) -> Content:
    """The files as the authors of CIFAR made them: pickles of Python 2 with bytes as keys."""
    labels = b"labels" if classes == 10 else b"fine_labels"
    files = {
        name: pickle.dumps({b"data": images.reshape(len(images), -1), labels: found.tolist()}, protocol=2)
        for name, (images, found) in parts(classes).items()
    }
    names = [f"name {n}".encode() for n in range(classes)]
    meta = {b"label_names" if classes == 10 else b"fine_label_names": names}
    return {**files, "batches.meta" if classes == 10 else "meta": pickle.dumps(meta, protocol=2)}


def binary_form(classes: int) -> Content:
    files = {}
    for name, (images, labels) in parts(classes).items():
        coarse = np.full((len(images), 1 if classes == 100 else 0), 7, dtype=np.uint8)
        rows = [coarse, labels[:, None].astype(np.uint8), images.reshape(len(images), -1)]
        files[f"{name}.bin"] = np.concatenate(rows, axis=1).tobytes()
    names = "\n".join(f"name{n}" for n in range(classes)) + "\n\n"
    return {**files, "batches.meta.txt" if classes == 10 else "fine_label_names.txt": names.encode()}


FOLDERS = {
    (10, "python"): "cifar-10-batches-py",
    (10, "binary"): "cifar-10-batches-bin",
    (100, "python"): "cifar-100-python",
    (100, "binary"): "cifar-100-binary",
}
FORMS: dict[str, Callable[[int], Content]] = {"python": python_form, "binary": binary_form}


def put(folder: Path, files: Content) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def pack(archive: Path, inside: str, files: Content) -> None:
    with tarfile.open(archive, "w:gz") as opened:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{inside}/{name}")
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("place", ["archive", "unpacked", "the files themselves"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int, form: str, place: str) -> None:
    files = FORMS[form](classes)
    if place == "archive":
        pack(tmp_path / f"cifar-{classes}-{form}.tar.gz", FOLDERS[classes, form], files)
    else:
        put(tmp_path / FOLDERS[classes, form] if place == "unpacked" else tmp_path, files)
    data = image_data.load("cifar10" if classes == 10 else "cifar100", tmp_path)
    expected = list(parts(classes).values())
    images, labels = (np.concatenate([part[i] for part in expected[:-1]]) for i in (0, 1))
    assert data.shape == (3, 32, 32)
    assert data.classes == classes
    assert torch.equal((data.train_images * 255).round().byte(), torch.from_numpy(images))
    assert data.train_labels.tolist() == labels.tolist()
    assert torch.equal((data.test_images * 255).round().byte(), torch.from_numpy(expected[-1][0]))
    assert data.test_labels.tolist() == expected[-1][1].tolist()
    assert data.names[3].replace(" ", "") == "name3"


def changed(files: Content, name: str, content: bytes) -> Content:
    return {**files, name: content}


def without(files: Content, name: str) -> Content:
    return {key: value for key, value in files.items() if key != name}


def packed(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


CIFAR_FAULTS: dict[str, tuple[Content, str]] = {
    "nothing": ({}, "has no files of CIFAR-10: put cifar-10-python.tar.gz or cifar-10-binary.tar.gz there"),
    "a batch is missing": (without(python_form(10), "data_batch_4"), "has no data_batch_4; CIFAR-10 needs"),
    "the test set is missing": (without(binary_form(10), "test_batch.bin"), "has no test_batch.bin"),
    "CIFAR-100 in Python form": (python_form(100), "holds CIFAR-100, not CIFAR-10; pass --data cifar100"),
    "CIFAR-100 in binary form": (binary_form(100), "holds CIFAR-100, not CIFAR-10; pass --data cifar100"),
    "a file of CIFAR-100": (
        changed(python_form(10), "data_batch_2", python_form(100)["train"]),
        "has no entry 'labels', as files of CIFAR-10 have; it is a file of CIFAR-100",
    ),
    "a pickle cut off": (
        changed(python_form(10), "data_batch_2", python_form(10)["data_batch_2"][:1000]),
        "data_batch_2 is damaged",
    ),
    "no pickle": (changed(python_form(10), "data_batch_2", b"<html>"), "data_batch_2 is damaged"),
    "a pickle that runs code": (
        changed(python_form(10), "data_batch_2", packed(Evil())),
        "which no file of CIFAR does",
    ),
    "a list": (changed(python_form(10), "test_batch", packed([1])), "holds a list, not a dict"),
    "too few labels": (
        changed(
            python_form(10),
            "test_batch",
            packed({b"data": np.zeros((4, 3072), np.uint8), b"labels": [1, 2]}),
        ),
        "holds 4 images, but 2 labels",
    ),
    "other pixels": (
        changed(python_form(10), "test_batch", packed({b"data": np.zeros((4, 100), np.uint8), b"labels": [1] * 4})),
        "its entry 'data' is uint8 (4, 100), not uint8 (n, 3072)",
    ),
    "a binary file cut off": (
        changed(binary_form(10), "data_batch_2.bin", binary_form(10)["data_batch_2.bin"][:-1]),
        "is no multiple of 3073",
    ),
    "an empty binary file": (changed(binary_form(10), "test_batch.bin", b""), "its size of 0 bytes"),
    "a label out of range": (
        changed(binary_form(10), "test_batch.bin", bytes([77]) + bytes(3072)),
        "has the label 77, and CIFAR-10 has labels below 10",
    ),
}


@pytest.mark.parametrize("fault", CIFAR_FAULTS)
def test_faults_of_cifar_are_named(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, message = CIFAR_FAULTS[fault]
    put(tmp_path, files)
    with pytest.raises(DataError) as caught:
        image_data.load("cifar10", tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_damaged_archive_of_cifar(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-100-python.tar.gz"
    pack(archive, "cifar-100-python", python_form(100))
    archive.write_bytes(archive.read_bytes()[:-4000])
    with pytest.raises(DataError, match=r"cifar-100-python.tar.gz is damaged: .*; download it again"):
        image_data.load("cifar100", tmp_path)
    with pytest.raises(DataError, match="holds CIFAR-100, not CIFAR-10"):
        image_data.load("cifar10", tmp_path)


def test_fashion_mnist_has_names(tmp_path: Path) -> None:
    data = image_data.load("fashion-mnist", write(tmp_path))
    assert data.names[:3] == ("T-shirt", "trouser", "pullover")
    assert image_data.load("mnist", tmp_path).names == ("0", "1", "2")


# -- folders -----------------------------------------------------------------------------------------------------------


def save(path: Path, mode: str = "L", size: tuple[int, int] = (5, 4), value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)
    return path


def test_a_folder_with_train_and_test(tmp_path: Path) -> None:
    for number, name in enumerate(["cat", "dog", "eel"]):
        for image in range(3):
            save(tmp_path / "train" / name / f"{image}.png", value=10 * number + image)
        if name != "eel":
            save(tmp_path / "test" / name / "a.png", value=100 + number)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = image_data.load("folder", tmp_path)
    assert data.names == ("cat", "dog", "eel")
    assert data.shape == (1, 4, 5)
    assert (data.train_images[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (data.test_images[:, 0, 0, 0] * 255).round().tolist() == [100, 101]
    assert data.test_labels.tolist() == [0, 1]


def test_a_folder_without_a_test_set_is_split_by_class(tmp_path: Path) -> None:
    for number, (name, count) in enumerate({"a": 10, "b": 20, "c": 2}.items()):
        for image in range(count):
            save(tmp_path / name / f"{image}.jpeg", value=50 * number + image)
    first, second = image_data.load("folder", tmp_path), image_data.load("folder", tmp_path)
    assert torch.bincount(first.test_labels).tolist() == [2, 4, 1]
    assert torch.bincount(first.train_labels).tolist() == [8, 16, 1]
    assert torch.equal(first.test_images, second.test_images)


def test_grey_images_among_coloured_ones_become_coloured(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "0.png", value=51)
        save(tmp_path / name / "1.png", mode="RGB", value=51)
    data = image_data.load("folder", tmp_path)
    assert data.shape == (3, 4, 5)
    colours = torch.cat([data.train_images, data.test_images])[:, :, 0, 0].mul(255).round().tolist()
    assert sorted(colours) == [[51, 0, 255]] * 2 + [[51, 51, 51]] * 2


def damaged_image(folder: Path) -> None:
    save(folder / "b" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: None, "has 0 folders; needed is a folder of images for each of two or more classes"),
    "one class": (lambda folder: save(folder / "a" / "0.png"), "has 1 folders"),
    "no test": (lambda folder: save(folder / "train" / "a" / "0.png"), "has a folder train, but no folder test"),
    "an empty class": (lambda folder: [save(folder / "a" / "0.png"), (folder / "b").mkdir()], "has no image files"),
    "two sizes": (
        lambda folder: [
            save(folder / "a" / "0.png"),
            save(folder / "a" / "1.png"),
            save(folder / "b" / "0.png", size=(6, 4)),
        ],
        "has 6x4 pixels, and ",
    ),
    "damaged": (lambda folder: [save(folder / "a" / "0.png"), damaged_image(folder)], "is damaged or no image"),
    "one image": (
        lambda folder: [save(folder / "a" / "0.png"), save(folder / "b" / "0.png")],
        "class 0 has one image; at least two are needed",
    ),
    "an unknown test class": (
        lambda folder: [
            save(folder / part / name / "0.png")
            for part, name in [("train", "a"), ("train", "b"), ("test", "c"), ("test", "a")]
        ],
        "has classes that",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_faults_of_folders_are_named(fault: str, tmp_path: Path) -> None:
    prepare, message = FOLDER_FAULTS[fault]
    prepare(tmp_path)
    with pytest.raises(DataError) as caught:
        image_data.load("folder", tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# -- .npz --------------------------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(20) % 2


@pytest.mark.parametrize(
    "layout",
    {
        "bytes, channels last": lambda x: x,
        "bytes, channels first": lambda x: x.transpose(0, 3, 1, 2),
        "floats": lambda x: x / 255,
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize(
    "names", [("x_train", "y_train", "x_test", "y_test"), ("images", "labels", "test_images", "test_labels")]
)
def test_npz(tmp_path: Path, names: tuple[str, ...], layout: tuple[str, Callable[[Any], Any]]) -> None:
    values = layout[1](IMAGES), LABELS[:, None], layout[1](IMAGES[:4]), LABELS[:4]
    arrays: dict[str, Any] = dict(zip(names, values, strict=True))
    np.savez(tmp_path / "data.npz", **arrays)
    for path in (tmp_path, tmp_path / "data.npz"):
        data = image_data.load("npz", path)
        assert data.shape == (3, 6, 5)
        expected = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
        assert torch.equal((data.train_images * 255).round().byte(), expected)
        assert torch.equal((data.test_images * 255).round().byte(), expected[:4])
        assert data.train_labels.tolist() == LABELS.tolist()


def test_npz_without_a_test_set_is_split_by_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=IMAGES[..., 0], labels=LABELS)
    data = image_data.load("npz", tmp_path)
    assert data.shape == (1, 6, 5)
    assert torch.bincount(data.test_labels).tolist() == [2, 2]


NPZ_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "other names": ({"a": IMAGES}, "holds the arrays a; needed are images and labels"),
    "too few labels": ({"images": IMAGES, "labels": LABELS[:3]}, "20 images in images, but 3 labels in labels"),
    "numbers of labels": (
        {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS[:2]},
        "20 test images, but labels of shape (2,)",
    ),
    "floats up to 255": ({"images": IMAGES.astype(float), "labels": LABELS}, "are floats between 0 and 255"),
    "NaN": ({"images": np.full((20, 6, 5), np.nan), "labels": LABELS}, "are floats between nan and nan"),
    "whole numbers": ({"images": IMAGES.astype(int), "labels": LABELS}, "images are int64"),
    "four channels": ({"images": np.zeros((20, 6, 5, 4), np.uint8), "labels": LABELS}, "have shape (16, 6, 5, 4)"),
    "flat": ({"images": np.zeros((20, 30), np.uint8), "labels": LABELS}, "have shape (16, 30)"),
    "labels from 1": ({"images": IMAGES, "labels": LABELS + 1}, "no train image has label 0"),
    "negative labels": ({"images": IMAGES, "labels": LABELS - 1}, "label is -1; labels are counted from 0"),
    "float labels": ({"images": IMAGES, "labels": LABELS / 2}, "labels are float64"),
    "one-hot labels": ({"images": IMAGES, "labels": np.eye(2)[LABELS]}, "labels of shape"),
    "none": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "there are no train images"),
    "sizes": (
        {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:, :4], "y_test": LABELS},
        "train images have shape (3, 6, 5) (channels, height, width), but test images (3, 4, 5)",
    ),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_faults_of_npz_files_are_named(fault: str, tmp_path: Path) -> None:
    arrays, message = NPZ_FAULTS[fault]
    np.savez(tmp_path / "data.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError) as caught:
        image_data.load("npz", tmp_path)
    assert message in str(caught.value)
    assert "data.npz" in str(caught.value)


def test_npz_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needed is a .npz file, or a folder with one of them; found none"):
        image_data.load("npz", tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match=r"a.npz is no .npz file that can be read"):
        image_data.load("npz", tmp_path)
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object), labels=np.array([0]))
    with pytest.raises(DataError, match=r"a.npz is no .npz file that can be read"):
        image_data.load("npz", tmp_path)
    with pytest.raises(DataError, match=r"is no .npz file that can be read"):
        image_data.load("npz", tmp_path / "missing.npz")


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "folder", "npz"])
def test_every_data_set_of_files_asks_for_its_place(name: image_data.DataName) -> None:
    with pytest.raises(DataError, match=f"{name} is read from files: pass --data-dir F"):
        image_data.load(name, None)
