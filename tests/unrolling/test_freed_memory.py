"""Freed memory that the process keeps: counted in page faults, which do not depend on how busy the machine is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, run

from bilevel import cli
from bilevel.unrolling import freed_memory

PROGRAM = """
import resource, sys
import torch
import bilevel

kept = bilevel.keep_freed_memory() if sys.argv[1] == "kept" else None
torch.set_num_threads(1)
x = torch.ones(2**20)  # 4 MiB

def step():
    return sum(float((((x + 1) * 2 - x) / 3)[0]) for _ in range(50))

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

on_glibc = pytest.mark.skipif(freed_memory._glibc() is None, reason="the C library is not glibc")


def faults(how: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, how]
    ended = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    kept, count = ended.stdout.split()
    return kept, int(count)


@pytest.mark.slow
@on_glibc
def test_kept_memory_is_not_fetched_again() -> None:
    kept, count = faults("kept")
    assert kept == "True"
    assert count < 1000  # of 4 · 50 blocks of 1024 pages
    # Where addresses fall is random, and so is whether the system hands out huge pages: now and then the plain
    # allocator has little to give back.
    assert any(faults("free")[1] > 10 * (count + 50) for _ in range(10))


@on_glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        pytest.param("MALLOC_MMAP_THRESHOLD_", "65536", marks=pytest.mark.slow),
        pytest.param("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536", marks=pytest.mark.slow),
    ],
)
def test_the_users_own_settings_stay(name: str, value: str) -> None:
    kept, count = faults("kept", **{name: value})
    assert kept == "False"
    assert count > 10_000


@pytest.mark.parametrize("without", [lambda: None, lambda: type("Refusing", (), {"mallopt": lambda *_: 0})])
def test_false_where_nothing_can_be_done(without: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(freed_memory, "_glibc", without)
    assert freed_memory.keep_freed_memory() is False


def test_only_linux_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert freed_memory._glibc() is None


def test_a_run_keeps_freed_memory_and_so_does_the_plan_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(freed_memory, "keep_freed_memory", lambda: calls.append("kept"))
    run(tmp_path / "run", "--estimator", "hessian-free", "--outer-steps", "1")
    assert calls == ["kept"]
    cli.main(["plan", "condensation", "--memory", "1GB", *SMALL])
    assert calls == ["kept", "kept"]
    cli.main(["plan", "--params", "1e6", "--meta-params", "10", "--steps", "5", "--memory", "1GB"])
    assert calls == ["kept", "kept"]  # nothing is measured
