"""The page with the matrix of estimators, optimisers, models and meta parameters says what comes out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "matrix.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script that makes the page."""
    spec = importlib.util.spec_from_file_location("make_matrix", DOCS / "make_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_numbers(line: str) -> str:
    """A row of the table without the numbers of reasons."""
    return re.sub(r" \(\d+\)", "", line)


def test_the_page_has_every_cell_and_none_is_wrong(generator: ModuleType) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(tuple(f"| {model} |" for model in generator.MODELS))]
    assert len(rows) == len(generator.slots())
    assert len(rows) * len(generator.ESTIMATORS) >= 500
    assert "WRONG" not in PAGE
    assert "not judged" not in PAGE


@pytest.mark.parametrize("number", range(3, 200, 41))
def test_rows_are_what_comes_out(generator: ModuleType, number: int) -> None:
    """Every forty-first row; if this fails, run `python docs/make_matrix.py`."""
    slot = generator.slots()[number]
    assert without_numbers(generator.line(slot, {})) in map(without_numbers, PAGE.splitlines())
