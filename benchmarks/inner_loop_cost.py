"""Time of estimates in this source tree and in another one, taken in turn: what a change of the inner loop costs.

    OMP_NUM_THREADS=1 python benchmarks/inner_loop_cost.py --before ../before --repetitions 30

`--before` is a checkout of the commit to compare with, `git worktree add ../before COMMIT`. Each tree is imported by a
process of its own, and the two compute one estimate each in turn, so that both meet the same load of the machine. Times
are process times. The table gives the least of each, and the median of the ratios of neighbouring estimates.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
ROWS = (
    ("mlp-adam", "Reverse()", 20),
    ("mlp-adam", "Reverse('graph')", 20),
    ("mlp-adam", "ForwardGradient(4)", 20),
    ("mlp-adam", "ForwardGradient(4, tangents='shared')", 20),
    ("mlp-adam", "ZerothOrder(2)", 20),
    ("gpt2-adam", "Reverse()", 2),
    ("gpt2-adam", "ForwardGradient(4)", 2),
)
"""Model of `benchmarks/models.py`, estimator, inner steps."""


def serve(model: str, estimator: str, steps: int) -> None:
    """Compute one estimate for each line of the input, and print its process time."""
    import models
    import torch

    import bilevel

    torch.set_num_threads(1)
    subject = models.MODELS[model]()
    problem, method = subject.problem(), eval(estimator, dict(vars(bilevel)))
    for _ in sys.stdin:
        start = time.process_time()
        method(problem, subject.meta, bilevel.no_batches(steps))
        print(time.process_time() - start, flush=True)


class Side:
    """A process with one of the source trees."""

    def __init__(self, tree: Path, row: tuple[str, str, int]) -> None:
        path = os.pathsep.join([str(tree / "src"), str(HERE / "benchmarks")])
        command = [sys.executable, __file__, "--serve", *map(str, row)]
        environment = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.seconds: list[float] = []

    def measure(self) -> float:
        """Return the process time of one estimate."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def compare(before: Path, row: tuple[str, str, int], repetitions: int) -> str:
    """Measure both trees in turn; a line of the table."""
    sides = [Side(before, row), Side(HERE, row)]
    for side in sides:
        side.measure()  # the first estimate pays for what torch sets up once
    for number in range(repetitions):
        for side in sides if number % 2 == 0 else reversed(sides):
            side.seconds.append(side.measure())
    for side in sides:
        side.process.communicate()
    ratio = statistics.median(new / old for old, new in zip(sides[0].seconds, sides[1].seconds, strict=True))
    least = [min(side.seconds) for side in sides]
    model, estimator, steps = row
    return f"| {model} | `{estimator}` | {steps} | {least[0]:.3f} | {least[1]:.3f} | {ratio:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="the source tree to compare with")
    parser.add_argument(
        "--repetitions", type=int, default=30, help="estimates of each tree, of an MLP; a third of a GPT-2"
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], options.serve[1], int(options.serve[2]))
        return
    lines = [
        "| model | estimator | steps | before, s | now, s | median ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    for row in ROWS:
        repetitions = options.repetitions if row[0].startswith("mlp") else max(3, options.repetitions // 3)
        lines.append(compare(options.before.resolve(), row, repetitions))
        print(lines[-1], flush=True)
    write(options.before, options.repetitions, lines)


def write(before: Path, repetitions: int, lines: list[str]) -> None:
    """Write the page of results."""
    commit = subprocess.run(
        ["git", "-C", str(before), "log", "-1", "--format=%h of %as"], capture_output=True, text=True, check=True
    ).stdout.strip()
    page = [
        "# What the checks of the inner loop cost",
        "",
        "`OMP_NUM_THREADS=1 python benchmarks/inner_loop_cost.py --before ../before "
        f"--repetitions {repetitions}`, where `../before` is commit {commit}, before steps were compared and losses "
        f"watched. Process time of one estimate in each tree in turn, {time.strftime('%Y-%m-%d')}, "
        f"{platform.machine()}, python {platform.python_version()}. The ratio is the median over neighbouring "
        "estimates. The aim is 1.03 at most. `Reverse()` computes each step again and compares it with the kept state.",
        "",
        *lines,
    ]
    (HERE / "benchmarks" / "results" / "inner_loop_cost.md").write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
