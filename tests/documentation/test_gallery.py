"""The scripts of the gallery run, and do what their pages say."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "examples" / "gallery"
PICTURES = ROOT / "docs" / "pictures" / "gallery"
MAKE = runpy.run_path(str(ROOT / "docs" / "make_gallery.py"))
MAML = "squared error after 5 steps"

Claim = Callable[[dict[str, float]], bool]
CLAIMS: dict[str, Claim] = {
    "maml": lambda r: max(r[f"{MAML}, MAML"], r[f"{MAML}, Meta-SGD"]) < 0.7 * r[f"{MAML}, one network for all tasks"],
    "noisy_labels": lambda r: (
        r["test accuracy, learned weights"] > max(r["test accuracy, all examples"], r["test accuracy, trusted alone"])
        and r["area under ROC, trusted alone"] > r["area under ROC, learned weights"] > 0.75
    ),
    "learning_rates": lambda r: (
        r["validation loss, learned, 60 rates"] < r["validation loss, random, 1 rate"]
        and r["validation loss, random, 1 rate"] < r["validation loss, random, 60 rates"]
    ),
    "ridge": lambda r: (
        r["relative difference to the derivative of the direct solver"] < 1e-6
        and r["validation error, 65 penalties"] < 0.85 * r["validation error, one penalty (grid)"]
        and r["test error, 65 penalties"] > 0.95 * r["test error, one penalty (grid)"]
    ),
    "condensation": lambda r: (
        r["test accuracy, learned"] > r["test accuracy, class means"] > r["test accuracy, one example each"]
    ),
    "ode": lambda r: (
        r["distance of the two minima in error bars"] < 0.05
        and r["error of least_squares in error bars"] < 3
        and r["largest error of the growth rate"] < 0.5
    ),
    "own_solver": lambda r: r["validation loss, random, 2"] < r["validation loss, ZerothOrder, 18"],
    "mixture": lambda r: r["target loss, learned"] < r["target loss, random search"] < r["target loss, uniform"],
}
"""What the text of each script says about its results."""


def results(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.rsplit(": ", 1) for line in text.splitlines())}


def lines_of_code(path: Path) -> int:
    """Lines that are neither empty, nor a comment, nor part of the docstring."""
    text = path.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0].end_lineno or 0
    lines = [line.strip() for line in text.splitlines()[docstring:]]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_every_script_is_in_the_gallery() -> None:
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"style"}
    assert scripts == set(MAKE["ORDER"]) == set(CLAIMS)


def test_the_page_is_up_to_date() -> None:
    """If this fails, run `python docs/make_gallery.py`."""
    assert MAKE["PAGE"].read_text(encoding="utf-8") == MAKE["page"]()


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_script_is_short_and_its_picture_small(name: str) -> None:
    assert lines_of_code(SCRIPTS / f"{name}.py") <= 60
    assert (PICTURES / f"{name}.png").stat().st_size < 60_000


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_the_results_on_the_page_are_what_the_text_says(name: str) -> None:
    assert CLAIMS[name](results((PICTURES / f"{name}.txt").read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_script_runs_and_does_what_its_text_says(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py")],
        env={**os.environ, "BILEVEL_PICTURES": str(tmp_path), "BILEVEL_SHORT_CHECK": "on"},  # as for its readers
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = results(done.stdout)
    assert found.keys() == results((PICTURES / f"{name}.txt").read_text(encoding="utf-8")).keys()
    assert CLAIMS[name](found), done.stdout
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
