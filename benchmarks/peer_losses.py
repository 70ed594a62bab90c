"""Hypergradients of m = 1, 10 and 50 outer losses of one inner loop, by this library and by others:

    OMP_NUM_THREADS=1 peers/bin/python benchmarks/peer_losses.py

`benchmarks/peers.py` says how to make the environment, and `benchmarks/peer_methods.py` with which settings the others
are called. The inner loop is the MLP with Adam of `benchmarks/models.py`, T = 50; each outer loss is that of one
example. Bergson goes back once for each loss. TorchOpt is given one graph and batched cotangents. Process time on one
thread, a process for each method and m, the median of several calls after one that is not counted. Writes
`benchmarks/results/peer_losses.md`.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peer_methods
import torch
from models import mlp
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.report.files import write_text

RESULTS = Path(__file__).parent / "results"
STEPS = 50
NUMBERS = (1, 10, 50)
Losses = Callable[[Any], Tensor]


def losses(m: int, dtype: torch.dtype = torch.float32) -> Losses:
    """The outer losses of m examples."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(m, 64, generator=generator).to(dtype), torch.randint(0, 10, (m,), generator=generator)
    return lambda model: cross_entropy(model(x), y, reduction="none")


def ours(estimator: bilevel.Estimator, subject: Any, steps: int, outer_losses: Losses) -> Tensor:
    """An estimator of this library, called once for the vector."""
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: subject.inner_loss(model, meta),
        lambda model, meta, batch: outer_losses(model),
        subject.network,
        bilevel.optimizer(subject.algorithm, **subject.settings),
    )
    return estimator(problem, subject.meta, steps).grad


METHODS: dict[str, Callable[[Any, int, Losses], Tensor]] = {
    "Bergson, a backward for each": peer_methods.through_bergson_losses,
    "TorchOpt, one graph": peer_methods.through_torchopt_losses,
    'Reverse("graph")': functools.partial(ours, bilevel.Reverse("graph")),
    "Reverse()": functools.partial(ours, bilevel.Reverse()),
    'Reverse("sqrt")': functools.partial(ours, bilevel.Reverse("sqrt")),
}


def measured(method: str, m: int, rounds: int) -> dict[str, float]:
    """Seconds, and the relative error against float64."""
    subject, function = mlp(), METHODS[method]
    function(subject, 2, losses(m))
    times, found = [], None
    for _ in range(rounds):
        began = time.process_time()
        found = function(subject, STEPS, losses(m))
        times.append(time.process_time() - began)
    exact = ours(bilevel.Reverse("graph"), mlp(torch.float64), STEPS, losses(m, torch.float64))
    assert found is not None
    return {"seconds": statistics.median(times), "error": float((found.double() - exact).norm() / exact.norm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.child:
        print(json.dumps(measured(options.child[0], int(options.child[1]), options.rounds)))
        return
    known = ", ".join(f"{name} {version(name)}" for name in ("torchopt", "bergson"))
    lines = [
        "# Outer losses of one inner loop",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/peer_losses.py --rounds {options.rounds}`: process time, medians, one "
        f"thread, T = {STEPS}, the MLP with Adam. bilevel {bilevel.__version__}, torch {torch.__version__}, {known}, "
        f"python {platform.python_version()}, {platform.machine()}. Bergson keeps the states of √T steps on disk, as "
        '`Reverse("sqrt")` keeps them in memory, and goes back once for each loss; the others go back once for all. '
        "The relative error is that against float64.",
        "",
        "| m | method | seconds | Bergson = 1 | relative error |",
        "| --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    for m in NUMBERS:
        first = None
        for method in METHODS:
            command = [sys.executable, __file__, "--rounds", str(options.rounds), "--child", method, str(m)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines.append(f"| {m} | {method} | {done.stderr.strip().splitlines()[-1][:120]} | | |")
                print(lines[-1], flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            first = found["seconds"] if first is None else first
            lines.append(
                f"| {m} | {method} | {found['seconds']:.3f} | {found['seconds'] / first:.2f} | {found['error']:.1e} |"
            )
            print(lines[-1], flush=True)
    write_text(RESULTS / "peer_losses.md", "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
