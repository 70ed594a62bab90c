"""`make` asks PyTorch's own index for torch alone, and does without it where it does not answer."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTORCH = "download.pytorch.org"
PYTHON = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
    *{pytorch}*) echo "WARNING: Retrying (Retry(total=4))" >&2; exit {code} ;;
esac
"""
"""Stands in for the Python of the virtual environment: it writes down what it is asked."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with what `make` reads."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def install(copy: Path, reachable: bool, gpu: bool) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """What pip is asked by `make .venv/dev`, command by command, and what is printed."""
    log, python = copy / "log", copy / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    scripts = {python: PYTHON.format(log=log, pytorch=PYTORCH, code=0 if reachable else 1)}
    if gpu:
        scripts[copy / "bin/nvidia-smi"] = "#!/bin/sh\n"
    for path, text in scripts.items():
        path.write_text(text)
        path.chmod(0o755)
    folders = [str(copy / "bin"), *(f for f in os.environ["PATH"].split(":") if not Path(f, "nvidia-smi").exists())]
    done = subprocess.run(
        ["make", "--silent", ".venv/dev"],
        cwd=copy,
        env={**os.environ, "PATH": ":".join(folders), "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in log.read_text().splitlines()], done


@pytest.mark.parametrize("reachable", [True, False])
def test_pytorchs_index_is_asked_for_torch_alone(copy: Path, reachable: bool) -> None:
    (torch, others), done = install(copy, reachable, gpu=False)
    assert "torch" in torch
    assert not any(word.startswith(".[") for word in torch)
    assert "--no-deps" in torch  # which come from the ordinary index
    assert torch[torch.index("--retries") + 1] == "0"
    assert int(torch[torch.index("--timeout") + 1]) <= 15
    assert f"--index-url https://{PYTORCH}/whl/cpu" in " ".join(torch)
    assert ".[dev]" in others
    assert PYTORCH not in " ".join(others)
    assert all("--constraint constraints.txt" in " ".join(command) for command in (torch, others))
    assert "WARNING" not in done.stdout + done.stderr
    assert ("does not answer" in done.stdout) == (not reachable)
    assert (copy / ".venv/dev").exists()


def test_with_a_gpu_the_default_build_is_taken(copy: Path) -> None:
    (everything,), done = install(copy, reachable=True, gpu=True)
    assert ".[dev]" in everything
    assert PYTORCH not in " ".join(everything)
    assert done.stdout + done.stderr == ""
