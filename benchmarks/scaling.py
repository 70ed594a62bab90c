"""How much faster two single-thread workers are than one, what they send, and what drawing directions costs.

    torchrun --nproc-per-node 2 benchmarks/scaling.py   # the speed-up: needs two idle cores
    torchrun --nproc-per-node 2 benchmarks/scaling.py --default-allocator   # the same without bilevel.keep_freed_memory
    torchrun --nproc-per-node 2 benchmarks/scaling.py --parts   # processor time of what is shared, and of what is not
    python benchmarks/scaling.py --draws                 # seconds for one entry of a direction
    python benchmarks/scaling.py --paper                 # the plan for many workers and large models, from counting

The speed-up is that of whole outer steps of `fit`, with everything that belongs to them. One worker and two take turns:
in a round, worker 0 runs the steps alone while the other one waits at a barrier, then both run the same steps together,
and then each runs them for itself, both at once: two programs that have nothing to do with each other, whose throughput
over that of one is what the machine itself allows. Medians over the rounds. Freed memory is kept, as `bilevel run` does
(`bilevel.keep_freed_memory`); `--default-allocator` shows what happens otherwise. The waiting worker takes no processor
time, so on a busy machine processor time tells what idle cores would give: the steps alone over the larger of the two
shares. Writes `benchmarks/results/scaling.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import clocks_alone  # noqa: F401
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.directions.distributions import DISTRIBUTIONS, Directions
from bilevel.distributed import communication
from bilevel.estimators import forward_gradient
from bilevel.estimators.variates import as_tuple
from bilevel.experimental import Workers, join_workers
from bilevel.planning import planner
from bilevel.report.files import write_text
from bilevel.report.progress import bar

RESULTS = Path(__file__).parent / "results"
ROUNDS, STEPS, TARGET = 7, 4, 1.85
"""STEPS: outer steps of `fit` each time, so that its start weighs little, as in any run."""


def convnet_problem() -> tuple[Any, Tensor, Any]:
    """Ten condensed 16x16 images through a two-block convnet, T = 20: N = 2,560."""
    torch.manual_seed(0)
    x, y, labels = torch.randn(64, 1, 16, 16), torch.arange(64) % 10, torch.arange(10)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)]
    problem = bilevel.GradientDescent(
        lambda model, images, batch: cross_entropy(model(images), labels),
        lambda model, images, batch: cross_entropy(model(x), y),
        nn.Sequential(*layers),
        bilevel.optimizer(torch.optim.SGD, lr=0.02, momentum=0.9),
    )
    return problem, torch.rand(10, 1, 16, 16), bilevel.no_batches(20)


def mlp_problem() -> tuple[Any, Tensor, Any]:
    """Weights of 500 examples, a network of 64 hidden units trained by Adam, T = 40."""
    torch.manual_seed(0)
    x = torch.randn(500, 32)
    y = (x[:, 0] > 0).long()
    problem = bilevel.GradientDescent(
        lambda model, w, batch: (w.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean(),
        lambda model, w, batch: cross_entropy(model(x[:100]), y[:100]),
        nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 2)),
        bilevel.optimizer(torch.optim.Adam, lr=0.01),
    )
    return problem, torch.zeros(500), bilevel.no_batches(40)


def solver_problem() -> tuple[Any, Tensor, Any]:
    """A black box: explicit diffusion on a line with a conductivity in each of 200 cells."""

    def solve(meta: Tensor) -> Tensor:
        u = torch.sin(torch.linspace(0, 6.28, 201))
        for _ in range(400):
            flux = 0.2 * meta.sigmoid() * (u[1:] - u[:-1])
            u = torch.cat([u[:1], u[1:-1] + flux[1:] - flux[:-1], u[-1:]])
        return u

    return bilevel.BlackBox(solve, lambda u, meta, batch: (u**2).mean()), torch.zeros(200), None


CASES: dict[str, tuple[Callable[[], tuple[Any, Tensor, Any]], bilevel.Estimator, int]] = {
    "convnet, 64 directions": (convnet_problem, bilevel.ForwardGradient(64, chunk_size=8), 1),
    "convnet, 8 directions, two control variates": (
        convnet_problem,
        bilevel.ForwardGradient(8, control_variate=(bilevel.TruncatedReverse(15), bilevel.CoarserProblem(steps=15))),
        1,
    ),
    "mlp with Adam, 64 directions": (mlp_problem, bilevel.ForwardGradient(64, chunk_size=16), 1),
    "black box, 64 directions": (solver_problem, bilevel.ZerothOrder(64), 1),
    "convnet, exact, 16 accumulated": (convnet_problem, bilevel.Reverse(), 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draws", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--default-allocator", action="store_true", help="hand freed memory back; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.default_allocator:
        bilevel.keep_freed_memory()
    if options.draws or options.paper:
        print("\n".join(draws() if options.draws else paper()))
        return
    workers = join_workers(timeout=1800)
    if workers.size != 2:
        raise SystemExit("two workers are needed: torchrun --nproc-per-node 2 benchmarks/scaling.py")
    if options.parts:
        lines = parts(workers)
        print("\n".join(lines) if workers.first else "", end="", flush=True)
        return
    rows = []
    with bar("rounds", options.rounds * len(CASES), show=workers.first) as shown:
        for name in CASES:
            rows.append(measured(workers, name, options.rounds, lambda name=name: shown.advance(name)))
    if workers.first:
        page = "\n".join([*as_markdown(rows, options.rounds), *draws()]) + "\n"
        if not options.default_allocator:
            write_text(RESULTS / "scaling.md", page)
        print(page)


def measured(workers: Workers, name: str, rounds: int, advance: Callable[[], None]) -> dict[str, Any]:
    """Wall and processor seconds of an outer step, alone and together, by turns."""
    make, estimator, accumulate = CASES[name]
    problem, meta, batches = make()

    def steps(among: Workers) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        phases = [bilevel.Phase(estimator, STEPS, accumulate)]
        bilevel.fit(problem, meta, batches, phases=phases, progress=False, workers=among)
        return (time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS

    alone, together, unrelated, waiting = [], [], [], []
    for number in range(rounds + 1):  # the first one pays for what torch sets up once
        dist.barrier()
        found, wait = (0.0, 0.0), time.process_time()
        if workers.first:
            found = steps(Workers())
        dist.barrier()
        waited = time.process_time() - wait
        both = workers.gather("shares", torch.tensor([*steps(workers), waited]))
        dist.barrier()
        apart = workers.gather("two programs", torch.tensor([steps(Workers())[0]]))
        if number:
            alone.append(found)
            unrelated.append(float(apart.max()))
            together.append((float(both[:, 0].max()), float(both[:, 1].max())))
            waiting.append(float(both[1, 2]))
            advance()
    ratios = (
        [[a[i] / t[i] for a, t in zip(alone, together, strict=True)] for i in range(2)] if workers.first else [[], []]
    )
    limit = [2 * a[0] / u for a, u in zip(alone, unrelated, strict=True)] if workers.first else []
    how = communication.chosen("auto", getattr(estimator, "directions", 1), meta.numel(), 2)
    directions = getattr(estimator, "directions", 0)
    variates = len(as_tuple(getattr(estimator, "control_variate", None)))
    sent = communication.sent_bytes(how, directions, meta.numel(), 2, variates=variates)
    return {
        "name": name,
        "alone": statistics.median(a[0] for a in alone) if workers.first else 0.0,
        "speedups": [sorted(r) for r in [*ratios, limit]],
        "exchange": how if directions else "gradient",
        "bytes": sent if directions else communication.reduced_bytes(meta.numel(), 2, 4),
        "waiting": statistics.median(waiting),
    }


def parts(workers: Workers) -> list[str]:
    """Processor seconds of an outer step of two workers: of what they share, of what each repeats, and of meeting."""
    lines = ["| outer step | chunks, shared | what each repeats | meeting | at most so many times as fast |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name in ("convnet, 64 directions", "mlp with Adam, 64 directions"):
        make, estimator, _ = CASES[name]
        problem, meta, batches = make()
        spent: dict[str, float] = {}

        def timed(function: Callable[..., Any], what: str, spent: dict[str, float] = spent) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                began = time.process_time()
                try:
                    return function(*arguments)
                finally:
                    spent[what] += time.process_time() - began

            return run

        for count in (1, STEPS):  # the first one pays for what torch sets up once
            spent.update(chunks=0.0, meetings=0.0)
            with (
                patch.object(forward_gradient, "push_forward", timed(forward_gradient.push_forward, "chunks")),
                patch.object(Workers, "_meet", timed(Workers._meet, "meetings")),
            ):
                began = time.process_time()
                phases = [bilevel.Phase(estimator, count)]
                bilevel.fit(problem, meta, batches, phases=phases, progress=False, workers=workers)
                total = time.process_time() - began
        shared, met = spent["chunks"] / STEPS, spent["meetings"] / STEPS
        rest = total / STEPS - shared - met
        most = (2 * shared + rest) / (shared + rest + met)
        lines.append(f"| {name} | {shared:.3f} s | {rest:.4f} s | {met:.4f} s | {most:.2f} |")
    return [*lines, ""]


def as_markdown(rows: list[dict[str, Any]], rounds: int) -> list[str]:
    """The table, and the machine's load while it was made."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        "# Two workers against one",
        "",
        f"`torchrun --nproc-per-node 2 benchmarks/scaling.py --rounds {rounds}`: one thread each, "
        f"{os.cpu_count()} cores, load averages (1, 5, 15 minutes) {load} at the end, torch {torch.__version__}, "
        f"Python {platform.python_version()}. Median [least, most] of {rounds} rounds of {STEPS} outer steps; target "
        f"{TARGET}.",
        "",
        "| outer step | seconds alone | speed-up, wall | speed-up, processor time | two unrelated programs, wall "
        "| exchange | bytes sent by each |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        texts = [f"{statistics.median(s):.2f} [{s[0]:.2f}, {s[-1]:.2f}]" for s in row["speedups"]]
        lines.append(
            f"| {row['name']} | {row['alone']:.3f} | {' | '.join(texts)} | {row['exchange']} | {row['bytes']:.0f} |"
        )
    if os.getloadavg()[1] > (os.cpu_count() or 1) + 1:
        lines += ["", "Others were at work on these cores, so the wall times are not those of an idle machine."]
    return [*lines, ""]


def draws() -> list[str]:
    """Nanoseconds of processor time for drawing one entry of a direction and adding it up."""
    lines = ["`python benchmarks/scaling.py --draws`, N = 1,000,000, chunks of 8, float32:", ""]
    lines += ["| distribution | ns for an entry |", "| --- | --- |"]
    leaf = torch.zeros(1000, 1000)
    for name in DISTRIBUTIONS:
        directions = Directions(name, 0, 16, [leaf])
        found = []
        for _ in range(3):
            began, total = time.process_time(), torch.zeros_like(leaf)
            for chunk in (range(8), range(8, 16)):
                for v in directions.draw(chunk):
                    total += torch.einsum("k,k...->...", torch.ones(8), v)
            found.append((time.process_time() - began) / (16 * leaf.numel()) * 1e9)
        lines.append(f"| {name} | {statistics.median(found):.1f} |")
    return lines


FLOPS, TOKENS = 1.25e14, 1024
"""Of one worker: 40 % of the 312 TFLOP/s of an A100 in bfloat16; and of one inner step: one document."""


def paper() -> list[str]:
    """Online adaptation of a language model: N = 8e7, T = 48, plain SGD, bfloat16, 1,024 directions.

    A gradient takes 6 M FLOPs a token. Tangents by differences need no activations of their own: a worker holds the
    parameters, one tangent of them for each direction, two gradients and a moved copy, and one pass's activations.
    """
    meta_size, steps, directions = 8 * 10**7, 48, 1024
    lines = ["`python benchmarks/scaling.py --paper`:", ""]
    lines += [
        "| inner model | workers | directions each | memory | seconds, computing | sent by each | seconds, sending |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for size, activations in ((1.5e9, 4e9), (7e9, 16e9)):
        unit = 6 * size * TOKENS / FLOPS
        for workers in (1, 64, 1024):
            share = directions // workers
            carried = min(share, 4)  # at once, in chunks
            seconds = (share // carried + 2 * share) * steps * unit
            memory = 2 * size * (1 + carried + 3) + activations
            sent = communication.sent_bytes("gradient", directions, meta_size, workers) if workers > 1 else 0.0
            lines.append(
                f"| {size:.2g} | {workers} | {share} | {planner.size_text(memory)} | {seconds:,.0f} | "
                f"{planner.size_text(sent)} | {sent / communication.BYTES_PER_SECOND:.1f} |"
            )
    return lines


if __name__ == "__main__":
    main()
