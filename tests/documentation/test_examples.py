"""The examples that the documentation shows run, and their pictures are small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NAMES = ["attribution", "example_weights", "mixture"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_its_picture_small(name: str) -> None:
    code = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 25
    assert (ROOT / "docs" / "pictures" / f"{name}.png").stat().st_size < 60_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_draws_its_picture(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "examples.png").stat().st_size > 5_000
    assert done.stdout.strip()
