"""Hypergradients with and without `compile=True`: time, compile time, peak memory and agreement.

    python benchmarks/compile.py                    # every model; about half an hour on one core
    python benchmarks/compile.py --models mlp-adam  # measured anew, the others kept

One thread, T = 10, float32. For each model and method a process of its own times both, by turns: process time of one
hypergradient, medians of 7 (5 on the GPT-2), after a first call of each, which compiles. Compile time is wall time with
empty caches. Memory is measured in two more processes, as in `benchmarks/memory.py`: how far resident memory rises in
the second call, with an allocator that hands back what is freed. Agreement is measured in float64 in another process,
beside how far the uncompiled hypergradient moves when every number of φ is rounded differently: the problem's own
sensitivity to rounding.
Writes `benchmarks/results/compile.json` and `.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import RETURNING_ALLOCATOR
from models import MODELS

import bilevel
from bilevel import ForwardGradient, Reverse
from bilevel.report.files import write_json, write_text
from bilevel.report.peak_memory import PeakMemory
from bilevel.report.progress import bar

RESULTS = Path(__file__).parent / "results"
SUBJECTS = ("mlp-adam", "convnet-momentum", "gpt2-adam")
STEPS = 10
METHODS: dict[str, Callable[[], Any]] = {
    "Reverse()": Reverse,
    'Reverse("graph")': lambda: Reverse("graph"),
    "ForwardGradient(8)": lambda: ForwardGradient(8),
}
PARTS = ("time", "memory eager", "memory compiled", "agreement", "rounding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PART_FUNCTIONS[options.part[0]](options.part[1], options.part[2])))
        return
    path = RESULTS / "compile.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    wanted = [(model, method) for model in options.models for method in options.methods]
    versions = {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with bar("measuring", len(wanted) * len(PARTS)) as shown:
        for model, method in wanted:
            row: dict[str, Any] = {"model": model, "method": method}
            with tempfile.TemporaryDirectory() as cache:
                for part in PARTS:
                    row |= in_a_process(part, model, method, cache)
                    shown.advance(f"{model}, {method}, {part}")
            rows = [r for r in rows if (r["model"], r["method"]) != (model, method)] + [row]
            rows.sort(key=lambda r: (SUBJECTS.index(r["model"]), list(METHODS).index(r["method"])))
            content = {"command": "python benchmarks/compile.py", "versions": versions, "machine": machine()}
            write_json(path, {**content, "rows": rows})
            write_text(RESULTS / "compile.md", as_markdown(rows, versions))
    print((RESULTS / "compile.md").read_text())


def in_a_process(part: str, model: str, method: str, cache: str) -> dict[str, Any]:
    """One part of a row. The parts share what the first one compiled, as far as PyTorch's caches go."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    if part.startswith("memory"):
        environment |= RETURNING_ALLOCATOR
    command = [sys.executable, __file__, "--part", part, model, method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{part} of {model}, {method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def prepared(model: str, method: str, compiled: bool, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    """A function that makes one estimate."""
    torch.set_num_threads(1)
    subject = MODELS[model](dtype)
    problem = subject.problem().compiled() if compiled else subject.problem()
    estimator = METHODS[method]()
    return lambda: estimator(problem, subject.meta, bilevel.no_batches(STEPS))


def timed(model: str, method: str) -> dict[str, Any]:
    """Seconds of both, by turns, and of compiling."""
    calls = {"eager": prepared(model, method, False), "compiled": prepared(model, method, True)}
    compiling = [call().compile_seconds for call in calls.values()][1]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5 if model.startswith("gpt2") else 7):
        for name, call in calls.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    return {"compile_seconds": compiling, **{f"{name}_seconds": median(found) for name, found in seconds.items()}}


def peak(model: str, method: str, compiled: bool) -> dict[str, Any]:
    """Bytes."""
    call = prepared(model, method, compiled)
    call()
    with PeakMemory() as memory:
        call()
    return {f"{'compiled' if compiled else 'eager'}_bytes": memory.peak}


def agreement(model: str, method: str) -> dict[str, Any]:
    """Of the hypergradients, relative, in float64."""
    eager, compiled = (prepared(model, method, c, torch.float64)().grad for c in (False, True))
    return {"difference": float((compiled - eager).norm() / eager.norm())}


def rounding(model: str, method: str) -> dict[str, Any]:
    """How far the hypergradient itself moves when every number of φ is rounded differently, uncompiled."""
    subject, estimator = MODELS[model](torch.float64), METHODS[method]()
    torch.set_num_threads(1)
    problem, steps = subject.problem(), bilevel.no_batches(STEPS)
    noise = torch.randn(subject.meta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = subject.meta + torch.finfo(torch.float64).eps * noise * subject.meta.abs().clamp(min=0.5)
    here, there = (estimator(problem, meta, steps).grad for meta in (subject.meta, moved))
    return {"rounding": float((here - there).norm() / here.norm())}


PART_FUNCTIONS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "time": timed,
    "memory eager": lambda model, method: peak(model, method, False),
    "memory compiled": lambda model, method: peak(model, method, True),
    "agreement": agreement,
    "rounding": rounding,
}


def machine() -> str:
    """What it was measured on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {datetime.date.today()}"


def as_markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The table with the command that made it."""
    lines = [
        "# The inner gradient and its derivatives, compiled",
        "",
        f"`python benchmarks/compile.py`: process time of one hypergradient through {STEPS} inner steps, medians of 7 "
        "(5 on the GPT-2) by turns; compile time (wall, empty caches) apart; peak of resident memory above what was "
        "there before, a process each; one thread, float32. "
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}; {machine()}.",
        "",
        "| model | method | eager, s | compiled, s | ratio | compiling, s | pays after | eager, MiB | compiled, MiB | "
        "difference in float64 | φ rounded otherwise |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        eager, compiled, compiling = (row[f"{name}_seconds"] for name in ("eager", "compiled", "compile"))
        pays = f"{compiling / (eager - compiled):,.0f} estimates" if compiled < 0.98 * eager else "never"
        lines.append(
            f"| {row['model']} | `{row['method']}` | {eager:.3f} | {compiled:.3f} | {compiled / eager:.2f} | "
            f"{compiling:.0f} | {pays} | {row['eager_bytes'] / 2**20:.0f} | {row['compiled_bytes'] / 2**20:.0f} | "
            f"{row['difference']:.0e} | {row['rounding']:.0e} |"
        )
    there = {(row["model"], row["method"]) for row in rows}
    missing = [f"{model} `{method}`" for model in SUBJECTS for method in METHODS if (model, method) not in there]
    lines += [
        "",
        "The last two columns: relative difference of the compiled hypergradient from the uncompiled one, and how "
        "far the uncompiled one moves when every number of φ is rounded differently. Inside of Adam, gradients "
        "that are zero but for rounding are divided by about 1e-8, so a hypergradient through it is not "
        "determined more closely than that.",
        *(["", f"Not measured: {', '.join(missing)}."] if missing else []),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
