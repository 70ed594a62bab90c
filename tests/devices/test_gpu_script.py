"""`benchmarks/gpu.py` without a GPU: it goes on where it was stopped, and its toy form runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
HERE = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("BILEVEL_SHORT_CHECK", os.environ["BILEVEL_SHORT_CHECK"])  # importing it sets another value
    import gpu

    return gpu


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", small=True, data_dir=None, out=folder)


def with_jobs(script: Any, monkeypatch: pytest.MonkeyPatch, **jobs: Any) -> None:
    """Let the part `peers` have these jobs."""
    part = script.PARTS["peers"]
    made = type(part)(part.title, part.says, ("method", "s", "remark"), 60, lambda setting: jobs)
    monkeypatch.setitem(script.PARTS, "peers", made)


def test_a_part_goes_on_where_it_was(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    broken = [True]

    def job(name: str) -> Any:
        def run() -> list[dict[str, Any]]:
            calls.append(name)
            if name == "second" and broken:
                raise RuntimeError("it broke")
            return [{"method": name, "s": 1.5}]

        return run

    with_jobs(script, monkeypatch, first=job("first"), second=job("second"), third=job("third"))
    where = script.Where(options(tmp_path))
    with pytest.raises(SystemExit):
        script.run_part("peers", where, 60)
    assert calls == ["first", "second", "third"]  # the others still run
    assert not where.is_done("peers")
    assert "Not all of it has been measured" in script.page(where)
    broken.clear()
    calls.clear()
    script.run_part("peers", where, 60)
    assert calls == ["second"]
    assert where.is_done("peers")
    text = script.page(where)
    assert "| method | s |\n| --- | --- |\n| `first` | 1.5 |" in text
    assert "A toy run without a GPU" in text
    assert text.count("Not measured yet.") == len(script.PARTS) - 1
    where.versions = {**where.versions, "torch": "another"}
    assert not where.is_done("peers")


def test_what_does_not_fit_is_a_row_and_time_ends(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with_jobs(script, monkeypatch, large=full)
    where = script.Where(options(tmp_path))
    script.run_part("peers", where, -1)
    assert not where.path("peers").exists()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    script.run_part("peers", where, 60)
    assert where.is_done("peers")
    assert "| `large` | does not fit into the memory of the GPU |" in script.page(where)


def test_parts_are_run_in_processes_and_again_when_asked(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[str, float]] = []

    def in_child(name: str, options: Any, seconds: float) -> bool:
        ran.append((name, seconds))
        where = script.Where(options)
        where.path(name).parent.mkdir(exist_ok=True)
        content = {**where.read(name), "complete": name != "planner"}
        where.path(name).write_text(json.dumps(content), encoding="utf-8")
        return name != "planner"

    def call(*arguments: str) -> list[str]:
        ran.clear()
        words = ["gpu.py", "--device", "cpu", "--small", "--out", str(tmp_path), "--parts", "convnet", "planner"]
        monkeypatch.setattr(sys, "argv", [*words, *arguments])
        with nullcontext() if "0" in arguments else pytest.raises(SystemExit, match="1"):  # the planner fails
            script.main()
        return [name for name, _ in ran]

    monkeypatch.setattr(script, "in_child", in_child)
    assert call() == ["convnet", "planner"]
    assert [seconds for _, seconds in ran] == [script.PARTS[name].seconds for name, _ in ran]
    assert call() == ["planner"]
    assert call("--again", "convnet") == ["convnet", "planner"]
    assert call("--again") == ["convnet", "planner"]
    assert call("--minutes", "0", "--again") == []


def test_measured_counts_what_a_call_makes(script: Any) -> None:
    import gpu_parts

    found = gpu_parts.measured(HERE, lambda: torch.ones(2**18).sum())
    assert float(found.result) == 2**18
    assert found.columns["more, MiB"] == pytest.approx(1, abs=0.01)


def test_outcomes_of_tests_are_read_with_their_reasons(script: Any) -> None:
    import gpu_parts

    xml = """<s><testcase name="a"/><testcase name="b"><skipped message="no GPU"/></testcase>
    <testcase name="c"><failure message="assert 1 == 2&#10;more">x</failure></testcase></s>"""
    found = [gpu_parts.outcome(each) for each in ElementTree.fromstring(xml)]
    assert found == ["passed", "skipped: no GPU", "FAILED: assert 1 == 2"]


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["--device", "cpu"], "add --small"), ([], "there is no GPU that PyTorch can use")]
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], expected: str, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit):
        script.parsed()
    assert expected in capsys.readouterr().err


def run(folder: Path, *parts: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--small", "--out", str(folder)]
    done = subprocess.run([*command, *(["--parts", *parts] if parts else [])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "gpu_toy.md").read_text(encoding="utf-8")


def test_a_part_of_the_toy_form(tmp_path: Path) -> None:
    """Exact methods agree, and other libraries are measured or skipped by name."""
    text = run(tmp_path, "peers")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `Reverse")]
    assert len(rows) == 4
    for row in rows:
        assert float(row[4].strip(" |")) < 1e-4
    assert "TorchOpt" in text


@pytest.mark.slow
def test_the_whole_toy_form(tmp_path: Path) -> None:
    text = run(tmp_path)
    assert "Not measured yet" not in text
    assert "Not all of it" not in text
