"""Formulas in docstrings keep their symbols: c − vᵀY is not C − vᵀY."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tests", "benchmarks", "examples")
FORMULA = '''"""Module."""


def product():
    """c − vᵀY for a cotangent c."""


def solution():
    """x with Hx ≈ b."""
'''


def docstrings() -> Iterator[tuple[str, str]]:
    """The place and the text of every docstring and of every string that documents a field."""
    for path in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Expr(value=ast.Constant(value=str() as text)):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def test_the_linter_leaves_formulas_alone() -> None:
    fixed = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--fix", "--quiet", "--stdin-filename", "formula.py", "-"],
        input=FORMULA,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    assert (fixed.stdout, fixed.stderr) == (FORMULA, "")


@pytest.mark.parametrize("begin", [r"[CDVWX]\b", r"[A-Z]\w+ · "], ids=["symbol", "product"])
def test_no_docstring_begins_with_a_capitalised_symbol(begin: str) -> None:
    """The cotangents c and d, the vectors v, w and x have no capital namesakes here; names in a product have none."""
    assert [f"{place} {text[:60]}" for place, text in docstrings() if re.match(begin, text)] == []
