"""Fit a coefficient of a simulator that is another program, two of them at once, some of whose runs fail.

    python examples/outside_program.py

`heat_solver.py` beside this file is the simulator. Every seventh run of it crashes and every eleventh hangs: such
evaluations are ended after the time limit, run again, and counted.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import bilevel

SOLVER = Path(__file__).with_name("heat_solver.py")
TRUE_DIFFUSION = 0.1


def simulator(time_limit: float = 10.0, trouble: bool = True) -> bilevel.experimental.OutsideProgram:
    """The simulator as a function of log(diffusion)."""
    runs = itertools.count(1)

    def command(log_diffusion: torch.Tensor, folder: Path) -> Sequence[str]:
        number = next(runs)
        misbehave = "crash" if trouble and number % 7 == 0 else "hang" if trouble and number % 11 == 0 else None
        asked = {"diffusion": float(log_diffusion.exp()), "cells": 100, "steps": 100, "misbehave": misbehave}
        (folder / "input.json").write_text(json.dumps(asked))
        return [sys.executable, str(SOLVER)]

    def read(folder: Path) -> torch.Tensor:
        return torch.from_numpy(np.loadtxt(folder / "output.csv"))

    return bilevel.experimental.OutsideProgram(command, read, workers=2, time_limit=time_limit, attempts=3)


def fit_diffusion(steps: int = 15, time_limit: float = 10.0) -> tuple[float, bilevel.experimental.OutsideProgram]:
    """The diffusion found from a solution observed at the end, and the simulator with what went wrong in it."""
    observed = simulator(trouble=False).solve(torch.tensor(TRUE_DIFFUSION).log().double())
    program = simulator(time_limit)

    def outer_loss(state: torch.Tensor, log_diffusion: torch.Tensor, batch: None) -> torch.Tensor:
        return (state - observed).square().mean() / observed.square().mean()

    found = bilevel.fit(
        bilevel.BlackBox(program.solve, outer_loss, program.solve_all),
        torch.tensor(0.5).log().double(),  # the logarithm: whatever the outer loop does, diffusion is positive
        estimator=bilevel.ZerothOrder(1, step_size=1e-3),
        steps=steps,
        optimizer=bilevel.optimizer(torch.optim.Rprop, lr=0.3, etas=(0.3, 1.2)),
        update=bilevel.OuterUpdate(max_backtracks=5),
    )
    return float(found.meta.exp()), program


def main() -> None:
    diffusion, program = fit_diffusion(steps=25, time_limit=10.0)
    print(f"diffusion {diffusion:.5f}, true value {TRUE_DIFFUSION}")
    print(f"{program.started} runs of the simulator, {len(program.failures)} of them failed:")
    for failure in program.failures:
        print(f"  attempt {failure.attempt}: {failure.reason}")


if __name__ == "__main__":
    main()
