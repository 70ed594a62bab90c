"""Tangents in chunks: each running the inner loop again in forward mode, or all sharing one graph of each step.

    python benchmarks/shared_steps.py

8 directions through 3 inner steps of an MLP, a convnet and a GPT-2. One thread. Time: process time over that of the
plain inner loop, the best of 3. Memory: peak of the bytes in live tensors above what lay there before. Writes
`benchmarks/results/shared_steps.json` and `.md`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import MODELS

import bilevel
from bilevel import ForwardGradient
from bilevel.planning.live_memory import counting
from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar
from bilevel.unrolling.unroll import unroll

RESULTS = Path(__file__).parent / "results"
STEPS, DIRECTIONS, CHUNKS, REPEATS = 3, 8, (1, 2, 4, 8), 3
SUBJECTS = ("mlp-adam", "convnet-momentum", "gpt2-sgd")


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with bar("measuring", len(SUBJECTS) * len(CHUNKS) * 2) as shown:
        for name in SUBJECTS:
            subject = MODELS[name]()
            problem, meta, steps = subject.problem(), subject.meta, bilevel.no_batches(STEPS)
            run = unroll(problem, meta, steps, None, 0)
            plain, _ = measured(lambda run=run: run.descend(run.start()))
            for chunk in CHUNKS:
                row: dict[str, Any] = {"model": name, "chunk_size": chunk}
                for tangents in ("exact", "shared"):
                    estimator = ForwardGradient(DIRECTIONS, chunk_size=chunk, tangents=tangents)
                    seconds, peak = measured(lambda e=estimator, p=problem, m=meta, s=steps: e(p, m, s))
                    row |= {f"{tangents}_units": seconds / plain, f"{tangents}_mib": peak / 2**20}
                    shown.advance(f"{name}, {tangents}, {chunk}")
                rows.append(row)
    versions = {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()}
    command = "python benchmarks/shared_steps.py"
    write_json(RESULTS / "shared_steps.json", {"command": command, "versions": versions, "rows": rows})
    write_text(RESULTS / "shared_steps.md", as_markdown(rows, versions))


def measured(function: Callable[[], Any]) -> tuple[float, int]:
    """Process time, the best of some, and peak of live tensors."""
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    with counting() as live:
        function()
    return min(times), live.peak


def as_markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The table with the command that made it."""
    lines = [
        "# Chunks of directions that share the inner steps",
        "",
        f"`python benchmarks/shared_steps.py`: {DIRECTIONS} directions, {STEPS} inner steps; process time in units of "
        f"the plain inner loop, best of {REPEATS}; peak of live tensors; one thread, float32. "
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}. By the formulas "
        f"{2 * DIRECTIONS} + 8/chunk units in forward mode, {2 * DIRECTIONS} + 1 shared.",
        "",
        "| model | chunk_size | forward mode, units | shared, units | ratio | forward mode, MiB | shared, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = row["exact_units"] / row["shared_units"]
        lines.append(
            f"| {row['model']} | {row['chunk_size']} | {row['exact_units']:.1f} | {row['shared_units']:.1f} | "
            f"{ratio:.2f} | {row['exact_mib']:.1f} | {row['shared_mib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
