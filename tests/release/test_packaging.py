"""The wheel and the source distribution hold what they should, and work where the source tree is out of reach."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import bilevel

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = Path(__file__).parent / "first_hypergradient.py"
CONSUMER = """\
from typing_extensions import assert_type
import torch
import bilevel

estimate = bilevel.Reverse()(bilevel.Problem(lambda m: m, lambda s, m, b: s * m, lambda s, m, b: s), torch.ones(()), 3)
assert_type(estimate, bilevel.Estimate)
assert_type(estimate.value, torch.Tensor)
assert_type(estimate.standard_error, float | torch.Tensor | None)
bilevel.ForwardGradient(directions="many")
"""


def source_files() -> set[str]:
    """Every file of the package, by its path in the wheel."""
    source = ROOT / "src"
    files = (path for path in (source / "bilevel").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(source)) for path in files}


def outside() -> dict[str, str]:
    """The environment without the variables that would put the source tree on the path."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    pytest.importorskip("hatchling", reason="hatchling builds the package; it is in the extra dev")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel; the other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(packages)
    # A line of a .pth file is a folder for sys.path; the .pth files in that folder, such as that of an editable
    # installation of this repository, are not read.
    (packages / "others.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
        licenses = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert names == source_files()
    assert "bilevel/py.typed" in names
    assert "bilevel/report/templates/report.html.jinja" in names
    assert f"\nVersion: {bilevel.__version__}\n" in metadata
    assert licenses


@pytest.mark.slow
def test_a_wheel_can_be_built_from_the_source_distribution(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=unpacked, check=True
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as again, zipfile.ZipFile(built[0]) as wheel:
        assert sorted(again.namelist()) == sorted(wheel.namelist())
    for name in ("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "tests/conftest.py", "docs/architecture.md"):
        assert (unpacked / name).exists(), name


@pytest.mark.slow
def test_the_installed_package_takes_a_hypergradient(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(installed), str(EXAMPLE)], cwd=tmp_path, env=outside(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed.parent.parent)


@pytest.mark.slow
def test_types_are_seen_from_outside(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", str(installed), "consumer.py"],
        cwd=tmp_path,
        env=outside(),
        capture_output=True,
        text=True,
        check=False,
    )
    errors = re.findall(r"consumer\.py:(\d+):\d+ - error", done.stdout)
    assert errors == [str(CONSUMER.count("\n"))], done.stdout  # the last line alone is wrong


def test_one_version_everywhere() -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation is not None
    assert changelog is not None
    assert citation[1] == changelog[1] == bilevel.__version__


def test_every_python_that_is_tested_is_declared() -> None:
    """The classifiers name the Pythons of the workflow and no others."""
    declared = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()))
    tested = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/tests.yml").read_text())
    assert tested is not None
    assert declared == set(re.findall(r"3\.\d+", tested[1]))
