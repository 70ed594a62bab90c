"""Cleaning of a file of the user's own: reading, wrong content, and a whole run."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bilevel import cli
from bilevel.errors import DataError
from bilevel.tasks.cleaning import files
from bilevel.tasks.cleaning.config import Cleaning


def some_rows(count: int = 80, wrong: int = 12) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Features, labels of which the first few are wrong, and marks of trusted rows: the last 40."""
    x = np.random.default_rng(0).normal(size=(count, 2))
    x[:, 0] += 2 * np.sign(x[:, 0])
    labels = ["cat" if value > 0 else "dog" for value in x[:, 0]]
    labels = [("dog" if label == "cat" else "cat") if i < wrong else label for i, label in enumerate(labels)]
    return x, labels, np.arange(count) >= count - 40


def write_csv(path: Path) -> Path:
    x, labels, trusted = some_rows()
    rows = [f"{a},{label},{b},{int(mark)}" for (a, b), label, mark in zip(x, labels, trusted, strict=True)]
    path.write_text("\n".join(["a,kind,b,trusted", *rows]) + "\n")
    return path


def test_csv_and_npz_hold_the_same(tmp_path: Path) -> None:
    x, labels, trusted = some_rows()
    np.savez(tmp_path / "rows.npz", x=x, kind=np.array(labels), trusted=trusted)
    for path in (write_csv(tmp_path / "rows.csv"), tmp_path / "rows.npz"):
        table = files.read(path, "kind", "trusted")
        assert table.features == pytest.approx(x)
        assert table.labels.tolist() == labels
        assert table.trusted.tolist() == trusted.tolist()


def test_rows_are_split_and_scaled(tmp_path: Path) -> None:
    data = files.load(Cleaning(data=str(write_csv(tmp_path / "rows.csv")), label="kind", device="cpu"), seed=0)
    x, labels, _ = some_rows()
    assert data.rows == list(range(40))
    assert data.names == ["cat", "dog"]
    assert [data.names[i] for i in data.images.train_labels] == labels[:40]
    expected = (x - x[:40].mean(0)) / x[:40].std(0)
    assert data.images.train_images.numpy() == pytest.approx(expected[:40], abs=1e-5)
    assert (len(data.images.test_labels), len(data.trusted_labels)) == (8, 32)
    both = np.concatenate([data.images.test_images.numpy(), data.trusted_images.numpy()])
    assert np.sort(both[:, 0]) == pytest.approx(np.sort(expected[40:, 0]), abs=1e-5)


def test_a_run_finds_the_wrong_labels_of_a_file(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv")
    flags = "--label kind --inner-steps 20 --outer-steps 30 --outer-lr 0.3 --evaluation-runs 1 --device cpu"
    cli.main(["run", "cleaning", "--data", str(path), *flags.split(), "--out", str(tmp_path / "run")])
    with (tmp_path / "run" / "weights.csv").open(newline="") as file:
        rows = [int(row["row"]) for row in csv.DictReader(file)]
    assert sorted(rows) == list(range(40))
    assert sum(row < 12 for row in rows[:12]) >= 10
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "auc" not in results
    assert set(results["test_accuracy"]) == {"cleaned", "everything", "trusted_alone"}
    assert [each["row"] for each in results["suspects"]] == rows[:20]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The most suspicious rows" in page


def edited(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(re.sub(old, new, path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda path: path.unlink(), "there is no file"),
        (edited("a,kind", "a,sort"), "has no column 'kind' with the labels: it has a, sort, b, trusted"),
        (edited("b,trusted", "b,known"), "has no column 'trusted' with the marks of trusted rows"),
        (edited("a,kind,b", "b,kind,b"), "has a name twice"),
        (edited(r"\A(.*\n.*\n)[^,]*,", r"\1nan,"), "'a' is NaN or infinite in 1 rows, the first of which is row 1;"),
        (edited(r"\A(.*\n)[^,]*,", r"\1red,"), "the column 'a' holds 'red' in row 0; features must be numbers"),
        (edited(r"\A(.*\n[^,]*),[^,]*", r"\1,"), "'kind' has no label in row 0"),
        (edited(r"\A(.*\n)[^,]*,", r"\1"), "is damaged: row 1 has 3 cells, and the header has 4"),
        (edited(",1$", ",yes"), "the column 'trusted' holds 'yes'"),
        (edited(",1$", ",0"), "0 rows are trusted; at least 10 are needed"),
        (edited("cat", "dog"), "all labels are"),
        (edited(r"\n(.*\n)*", r"\n"), "holds no rows"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, change: Callable[[Path], object], fragment: str) -> None:
    path = write_csv(tmp_path / "rows.csv")
    change(path)
    with pytest.raises(DataError, match=re.escape(fragment)):
        files.load(Cleaning(data=str(path), label="kind", device="cpu"), 0)


def test_a_label_that_only_trusted_rows_have(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv")
    path.write_text(path.read_text() + "0.5,bird,0.5,1\n")
    with pytest.raises(DataError, match="the label 'bird' occurs in trusted rows only"):
        files.load(Cleaning(data=str(path), label="kind", device="cpu"), 0)


def test_fewer_rows_than_a_batch(tmp_path: Path) -> None:
    config = Cleaning(data=str(write_csv(tmp_path / "rows.csv")), label="kind", device="cpu")
    with pytest.raises(DataError, match="40 rows are not trusted, fewer than inner_batch=41"):
        files.load(replace(config, inner_batch=41), 0)
    assert len(files.load(replace(config, inner_batch=40), 0).rows) == 40


def test_other_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match="is damaged, or no npz file"):
        files.read(tmp_path / "a.npz", "label", "trusted")
    np.savez(tmp_path / "b.npz", x=np.ones((3, 2)), label=np.ones(4), trusted=np.ones(3))
    with pytest.raises(DataError, match="different lengths"):
        files.read(tmp_path / "b.npz", "label", "trusted")
    with pytest.raises(ValueError, match=r"data='rows\.xls': there are 'digits', 'mnist', and files"):
        Cleaning(data="rows.xls")


@pytest.mark.skipif(importlib.util.find_spec("pandas") is not None, reason="pandas is installed")
def test_parquet_names_the_packages_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="reading parquet needs pandas and pyarrow: pip install pandas pyarrow"):
        files.read(tmp_path / "a.parquet", "label", "trusted")
