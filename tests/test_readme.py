"""The README's examples run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bilevel import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What the Python blocks print, run one after the other."""
    lines: list[str] = []
    exec("\n".join(blocks("python")), {"print": lines.append})
    return lines


def test_python_example_says_what_the_text_says(printed: list[str]) -> None:
    derivatives, weights, errors = ([float(n) for n in re.findall(r"[-+]?\d+\.\d+", line)] for line in printed)
    assert derivatives[0] > 0 > derivatives[1]
    assert weights[0] < 0.2 * weights[1]
    error, standard_error = errors
    assert 0.3 * standard_error < error < 3 * standard_error
    for shown, line in zip("".join(blocks("text")).splitlines(), printed, strict=False):
        numbers = r"[-+]?\d+\.\d+"
        assert re.sub(numbers, "#", shown) == re.sub(numbers, "#", line)
        assert [float(n) for n in re.findall(numbers, shown)] == pytest.approx(
            [float(n) for n in re.findall(numbers, line)], rel=0.1, abs=2e-4
        )


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `bilevel` command of the README, made small by further flags."""
    monkeypatch.chdir(tmp_path)
    sizes = {
        "condensation": "--width 8 --inner-steps 3 --evaluation-runs 1 --whole-set-epochs 1 --outer-batch 64",
        "cleaning": "--width 8 --inner-steps 3 --evaluation-runs 1 --examples 50 --trusted 10",
        "pde": "--points 64 --starts 2",
    }
    commands = [
        shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line.startswith("bilevel")
    ]
    assert {words[1] for words in commands} == {"list", "run", "compare", "plan", "report"}
    for _, command, *rest in commands:
        if command == "run":
            small = shlex.split(sizes[rest[0]])
            rest = [re.sub(r":50$", ":1", word) for word in rest] + small
            rest += [] if "--phases" in rest else ["--outer-steps", "2"]
        cli.main([command, *rest, *(["--inner-steps", "3", "--width", "8"] if command == "compare" else [])])
    assert (tmp_path / "runs/exact/report.html").stat().st_size > 10_000


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
