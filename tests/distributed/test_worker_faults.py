"""Killed workers: torchrun starts the group again, and the run ends with the numbers of an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import SMALL, numbers_of, run

from bilevel.training import metrics

ROOT = Path(__file__).parents[2]
FLAGS = ["--estimator", "forward-gradient", "--directions", "4", "--chunk-size", "2", "--exchange", "slopes"]
MORE = ["--outer-steps", "20", "--checkpoint-every", "5"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_kills_at_random_moments() -> None:
    """The benchmark, with a few kills."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "3", "--seed", "1"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr
    counts = dict(re.findall(r"\| ([a-z ]+) \| (\d+) \|", ended.stdout))
    assert counts["killed before the end"] == "3"
    assert counts["other numbers"] == counts["lines lost or doubled"] == counts["files left"] == "0"


def workers_of(agent: int) -> list[int]:
    """The process ids of an agent's workers, by rank."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(each[5:]) for each in variables if each.startswith(b"RANK=")]
        found.update(dict.fromkeys(ranks, int(child)))
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the hypergradient estimates are noise")  # four directions for 640 pixels
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the workers are found in /proc")
def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """The command, under the real agent; the undisturbed run is one process's."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--module", "bilevel"]
    command += ["run", "condensation", *SMALL, *FLAGS, *MORE, "--out", str(folder)]
    agent = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 1800
    while len(metrics.read(folder / metrics.FILE)) < 7:
        assert agent.poll() is None, agent.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(workers_of(agent.pid)[1], signal.SIGKILL)
    out, err = agent.communicate(timeout=1800)
    assert agent.returncode == 0, err
    assert out.count("report: ") == 1
    run(tmp_path / "undisturbed", *FLAGS, *MORE)
    assert numbers_of(folder) == numbers_of(tmp_path / "undisturbed")
