"""Images of a user's own: a folder with a folder for each class, and a `.npz` file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from bilevel.errors import DataError
from bilevel.report.progress import bar
from bilevel.tasks.images.labelled import LabelledImages, checked_labels, from_arrays

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
)
"""Names of the four arrays. The two of the test set may be missing."""
TEST_SHARE = 0.2
"""The share of each class that becomes the test set of images that come without one."""


def read_folder(folder: Path) -> LabelledImages:
    """Read image files from a folder with a folder for each class, by the alphabetical order of their names.

    Args:
        folder: a folder with `train` and `test`, which hold the folders of the classes. If there is no `train`, the
            folder itself holds the folders of the classes, and a fifth of each class becomes the test set, the same at
            every call.

    Raises:
        DataError: there are no images, an image cannot be read, or images have different sizes.
    """
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} is not a folder")
    if not (folder / "train").is_dir():
        files = _files_by_class(folder)
        images, labels = _read(files)
        train, test = split(folder, images, labels)
        return from_arrays(folder, train, test, tuple(files))
    if not (folder / "test").is_dir():
        raise DataError(f"{folder} has a folder train, but no folder test")
    files, test_files = _files_by_class(folder / "train"), _files_by_class(folder / "test")
    if unknown := sorted(test_files.keys() - files.keys()):
        raise DataError(f"{folder / 'test'} has classes that {folder / 'train'} has not: {', '.join(unknown[:5])}")
    everything = {**files, **{f"test/{name}": test_files.get(name, []) for name in files}}
    images, labels = _read(everything)
    in_train = labels < len(files)
    return from_arrays(
        folder,
        (images[in_train], labels[in_train]),
        (images[~in_train], labels[~in_train] - len(files)),
        tuple(files),
    )


def read_npz(path: Path) -> LabelledImages:
    """Read a `.npz` file with images and labels.

    Args:
        path: the file, or a folder with one `.npz` file. It holds the arrays x_train, y_train, x_test, y_test, or
            images, labels, test_images, test_labels. Without test arrays, a fifth of each class becomes the test set.

    Raises:
        DataError: the file is missing, damaged, or holds other arrays.
    """
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if len(found) != 1:
            names = ", ".join(each.name for each in found[:5]) or "none"
            raise DataError(f"--data-dir {path}: needed is a .npz file, or a folder with one of them; found {names}")
        path = found[0]
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no .npz file that can be read: {error}") from error
    for names in _KEYS:
        if names[0] in arrays and names[1] in arrays:
            train = arrays[names[0]], arrays[names[1]]
            if len(train[0]) != len(train[1]):
                raise DataError(
                    f"{path}: {len(train[0])} images in {names[0]}, but {len(train[1])} labels in {names[1]}"
                )
            if names[2] in arrays and names[3] in arrays:
                return from_arrays(path, train, (arrays[names[2]], arrays[names[3]]))
            return from_arrays(path, *split(path, *train))
    raise DataError(
        f"{path} holds the arrays {', '.join(arrays) or 'none'}; needed are images and labels, or x_train and y_train, "
        "with test_images and test_labels, or x_test and y_test, for the test set"
    )


def split(
    where: Path, images: np.ndarray, labels: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return the train set and the test set, a fifth of each class chosen at random, the same at every call.

    Raises:
        DataError: a class has only one image, or the labels are not whole numbers counted from 0.
    """
    labels = checked_labels(where, "train", labels, len(images))
    generator = np.random.default_rng(0)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"{where}: class {label} has one image; at least two are needed, of which one is for testing"
            )
        count = max(1, round(TEST_SHARE * len(members)))
        in_test[generator.permutation(members)[:count]] = True
    return (images[~in_test], labels[~in_test]), (images[in_test], labels[in_test])


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {
        place.name: sorted(path for path in place.iterdir() if path.suffix.lower() in _ENDINGS) for place in classes
    }
    if len(found) < 2:
        raise DataError(
            f"{folder} has {len(found)} folders; needed is a folder of images for each of two or more classes"
        )
    if empty := [name for name, files in found.items() if not files]:
        raise DataError(f"{folder / empty[0]} has no image files ({', '.join(sorted(_ENDINGS))})")
    return found


def _read(files: dict[str, list[Path]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of all files as bytes, and the position of the class of each."""
    from PIL import Image

    paths = [(label, path) for label, found in enumerate(files.values()) for path in found]
    images: list[np.ndarray] = []
    with bar("image files", len(paths), show=len(paths) > 2000) as shown:
        for _, path in paths:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
            except (OSError, ValueError, SyntaxError) as error:  # Pillow raises each of them for a damaged file
                raise DataError(f"{path} is damaged or no image: {error}") from error
            if images and pixels.shape[:2] != images[0].shape[:2]:
                raise DataError(
                    f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, and {paths[0][1]} has "
                    f"{images[0].shape[1]}x{images[0].shape[0]}; bring all images to one size first"
                )
            images.append(pixels)
            shown.advance()
    if any(pixels.ndim == 3 for pixels in images):  # grey images among coloured ones
        images = [pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1) for pixels in images]
    return np.stack(images), np.array([label for label, _ in paths])
