"""What `bilevel.keep_freed_memory()` gains in time, and what it costs in memory.

    python benchmarks/allocator.py            # about ten minutes on one core
    python benchmarks/allocator.py --rounds 1

A process for each measurement (this file again, with hidden arguments), with and without by turns; in each, one
hypergradient to warm up and one that counts: its process time, of that the part spent in the kernel, its page faults,
and how high resident memory came in the whole process above what it was before the first one. One thread. Writes
`benchmarks/results/allocator.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from models import MODELS

import bilevel
from bilevel.report.files import write_text
from bilevel.report.peak_memory import PeakMemory
from bilevel.report.progress import bar

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, bilevel.Estimator] = {
    "Reverse()": bilevel.Reverse(),
    'Reverse("graph")': bilevel.Reverse("graph"),
    "ForwardGradient(8)": bilevel.ForwardGradient(8),
}
STEPS = {"mlp-adam": 50, "convnet-momentum": 50, "gpt2-sgd": 10}
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, method, kept = options.one
        print(json.dumps(measured(model, method, kept == "kept")))
        return
    lines = [
        "# Freed memory, kept or handed back",
        "",
        f"`python benchmarks/allocator.py --rounds {options.rounds}`: one hypergradient with glibc's allocator as it "
        f"comes → after `bilevel.keep_freed_memory()`; one thread, medians of {options.rounds} processes each, by "
        f"turns; torch {torch.__version__}, {' '.join(platform.libc_ver())}, Python {platform.python_version()}.",
        "",
        "| model | method | T | process seconds | taken off | of it in the kernel | page faults | peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    with bar("processes", len(STEPS) * len(METHODS) * options.rounds * 2) as shown:
        for model in STEPS:
            for method in METHODS:
                found: dict[str, list[dict[str, float]]] = {"free": [], "kept": []}
                for _ in range(options.rounds):
                    for how, rows in found.items():
                        rows.append(in_a_process(model, method, how))
                        shown.advance(f"{model}, {method}")
                free, kept = (
                    {key: statistics.median(row[key] for row in rows) for key in rows[0]} for rows in found.values()
                )
                pairs = [
                    f"{free['seconds']:.2f} → {kept['seconds']:.2f}",
                    f"{1 - kept['seconds'] / free['seconds']:.0%}",
                    f"{free['kernel']:.2f} → {kept['kernel']:.2f}",
                    f"{free['faults']:,.0f} → {kept['faults']:,.0f}",
                    f"{free['peak']:.0f} → {kept['peak']:.0f}",
                ]
                lines.append(f"| {model} | `{method}` | {STEPS[model]} | {' | '.join(pairs)} |")
    write_text(RESULTS / "allocator.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def in_a_process(model: str, method: str, how: str) -> dict[str, float]:
    """The answer of this file in a process of its own."""
    command = [sys.executable, __file__, "--one", model, method, how]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.strip().splitlines()[-1])


def measured(model: str, method: str, kept: bool) -> dict[str, float]:
    """Time, faults and memory of one hypergradient."""
    torch.set_num_threads(1)
    if kept and not bilevel.keep_freed_memory():
        raise SystemExit("freed memory cannot be kept here: the C library is not glibc, or its variables are set")
    subject = MODELS[model]()
    problem, steps = subject.problem(), bilevel.no_batches(STEPS[model])
    with PeakMemory() as memory:
        METHODS[method](problem, subject.meta, steps)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF)
        METHODS[method](problem, subject.meta, steps)
        after = resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    return {
        "seconds": after.ru_utime - before.ru_utime + kernel,
        "kernel": kernel,
        "faults": after.ru_minflt - before.ru_minflt,
        "peak": (memory.peak or 0) / 2**20,
    }


if __name__ == "__main__":
    main()
