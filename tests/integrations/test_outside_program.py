"""Another program as the inner solver: in parallel, with a time limit, second attempts, and no process left behind."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from bilevel.errors import SolverError
from bilevel.experimental import OutsideProgram

POINT = torch.tensor(2.0, dtype=torch.float64)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def number(folder: Path) -> torch.Tensor:
    return torch.tensor(float((folder / "stdout").read_text()), dtype=torch.float64)


def program(code: str, **settings: Any) -> OutsideProgram:
    """Prints something of `phi`, the point, and `run`, the number of the run."""
    runs = itertools.count(1)
    return OutsideProgram(
        lambda meta, folder: python(f"import os, sys, time; phi = {float(meta)}; run = {next(runs)}\n{code}"),
        number,
        **settings,
    )


def test_states_come_back_in_order() -> None:
    slow_first = program("time.sleep(0.3 * (phi == 1)); print(phi ** 2)", workers=3)
    points = [torch.tensor(float(i), dtype=torch.float64) for i in (1, 2, 3)]
    assert [float(state) for state in slow_first.solve_all(points)] == [1, 4, 9]
    assert slow_first.started == 3
    assert not slow_first.failures


def test_evaluations_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for a file that the other writes."""
    code = (
        f"mine, other = ('a', 'b') if phi == 1 else ('b', 'a')\nopen(f'{tmp_path}/' + mine, 'w').close()\n"
        f"while not os.path.exists(f'{tmp_path}/' + other): time.sleep(0.01)\nprint(phi)"
    )
    both = program(code, workers=2, time_limit=20, attempts=1)
    assert len(both.solve_all([torch.tensor(1.0), torch.tensor(2.0)])) == 2


def test_an_estimate_asks_for_all_its_points_at_once() -> None:
    asked: list[int] = []
    plain = program("print(phi ** 3)", workers=2)

    def solve_all(metas: Any) -> Any:
        asked.append(len(metas))
        return plain.solve_all(metas)

    problem = bilevel.BlackBox(plain.solve, lambda state, meta, batch: state, solve_all)
    one_by_one = bilevel.BlackBox(plain.solve, lambda state, meta, batch: state)
    estimator = bilevel.ZerothOrder(1, step_size=1e-3)
    at_once, in_turn = (estimator(each, POINT) for each in (problem, one_by_one))
    assert asked == [3]
    assert float(at_once.grad) == float(in_turn.grad) == pytest.approx(12.0, rel=1e-6)
    assert float(at_once.value) == float(at_once.state) == 8.0
    short = bilevel.BlackBox(plain.solve, lambda state, meta, batch: state, lambda metas: [metas[0]])
    with pytest.raises(ValueError, match="solve_all returned 1 states for 3 points"):
        estimator(short, POINT)


def test_failed_attempts_are_repeated_and_reported() -> None:
    flaky = program("sys.exit('out of licences') if run % 2 else print(phi)", attempts=2)
    assert float(flaky.solve(POINT)) == 2.0
    (failure,) = flaky.failures
    assert failure.attempt == 1
    assert failure.reason == "it ended with exit code 1; it said: out of licences"
    assert flaky.started == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('no convergence')", "ended with exit code 1; it said: no convergence"),
        ("print('many')", "its result cannot be read .ValueError: could not convert"),
        ("print('nan')", "its result holds NaN or infinity"),
        ("time.sleep(60)", r"it did not return within 0\.3 s"),
    ],
)
def test_an_evaluation_without_a_result_is_an_error(code: str, message: str) -> None:
    began, failing = time.monotonic(), program(code, time_limit=0.3 if "sleep" in code else 20, attempts=2)
    with pytest.raises(SolverError, match=rf"no result in 2 attempts at meta = 2\.0: .*{message}"):
        failing.solve(POINT)
    assert len(failing.failures) == failing.started == 2
    assert time.monotonic() - began < 30


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(SolverError, match="no-such-program cannot be started"):
        OutsideProgram(lambda meta, folder: ["no-such-program"], number).solve(POINT)


def test_a_time_limit_ends_what_the_program_started_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        f"import subprocess; child = subprocess.Popen(['sleep', '60'])\n"
        f"open('{note}', 'w').write(str(child.pid))\nchild.wait()"
    )
    with pytest.raises(SolverError, match="did not return"):
        program(code, time_limit=2, attempts=1).solve(POINT)
    assert _gone(int(note.read_text()))


def test_one_failure_ends_the_others(tmp_path: Path) -> None:
    code = "sys.exit('broken') if phi == 1 else time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(SolverError, match="broken"):
        program(code, workers=2, attempts=1).solve_all([torch.tensor(1.0), torch.tensor(2.0)])
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_the_example_finds_the_coefficient_in_spite_of_failures() -> None:
    path = Path(__file__).parents[2] / "examples" / "outside_program.py"
    spec = importlib.util.spec_from_file_location("outside_program_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    diffusion, simulator = example.fit_diffusion(steps=4, time_limit=5.0)
    assert 0.02 < diffusion < 0.4  # on its way from 0.5
    assert any("segmentation fault" in failure.reason for failure in simulator.failures)
    assert any("did not return" in failure.reason for failure in simulator.failures)
    assert simulator.started == 4 * 3 + len(simulator.failures)


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z":
                return True  # ended, and nobody has asked for its exit code
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False
