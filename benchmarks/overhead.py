"""What an estimate costs beside the same thing written by hand, row by row:

    OMP_NUM_THREADS=1 python benchmarks/overhead.py
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --profile "40-40, T = 5"

Every row has a process of its own, in which the code by hand and the estimators take turns, so that all of them meet
the same load of the machine. Times are process times on one thread, medians; every ratio is the median of the ratios of
neighbouring runs. Numbers are compared with those by hand before anything is timed. `--profile` prints where one row's
estimators spend their time, by cProfile. Writes `benchmarks/results/overhead.md`.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import platform
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import many
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import ForwardGradient, Reverse, Tasks
from bilevel.report.files import write_text

RESULTS = Path(__file__).parent / "results"
NOTES = Path(__file__).parent / "overhead_notes.md"
"""What explains the figures: profiles, and what was tried where one was missed."""
Subjects = dict[str, tuple[Callable[[], Any], Callable[[], Any], float]]
"""By the name of an estimator: it, what it is compared with, and the target for the ratio of the two."""


def same(found: Any, expected: list[Tensor], tolerance: float = 1e-3) -> None:
    leaves = list(found.values()) if isinstance(found, dict) else [found]
    got, wanted = (torch.cat([t.reshape(-1) for t in each]) for each in (leaves, expected))
    assert (got - wanted).norm() <= tolerance * wanted.norm(), (got - wanted).norm() / wanted.norm()


def unrolled_by_hand(
    net: nn.Module, loss: Any, rate: float, steps: int, phi: Tensor | None, inner: Any, outer: Any
) -> list[Tensor]:
    """A graph through plain SGD, and one backward pass: to φ, or to the initial parameters."""
    start = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    meta = start if phi is None else phi.detach().requires_grad_()
    params = start
    for _ in range(steps):
        value = loss(lambda x, params=params: functional_call(net, params, (x,)), meta, inner)
        slopes = torch.autograd.grad(value, list(params.values()), create_graph=True)
        params = {name: p - rate * s for (name, p), s in zip(params.items(), slopes, strict=True)}
    value = loss(lambda x: functional_call(net, params, (x,)), meta, outer)
    return list(torch.autograd.grad(value, list(meta.values()) if isinstance(meta, dict) else [meta]))


def square(model: Any, meta: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def weighted(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (meta.sigmoid() * cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()


def mlp() -> tuple[nn.Module, Tensor, Any, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    data = [(torch.randn(128, 64), torch.randint(10, (128,))) for _ in range(2)]
    return net, torch.zeros(128), data[0], data[1]


def small() -> Subjects:
    net = many.network()
    inner, outer = ((x[0], y[0]) for x, y in many.sinusoids(1, seed=0))
    problem = many.maml(net)
    batches = bilevel.batches(lambda t: inner, many.INNER)

    def hand() -> list[Tensor]:
        return unrolled_by_hand(net, square, many.RATE, many.INNER, None, inner, outer)

    def graph() -> Any:
        return Reverse("graph")(problem, net, batches, outer).grad

    def kept() -> Any:
        return Reverse()(problem, net, batches, outer).grad

    same(graph(), hand())
    same(kept(), hand())
    return {'`Reverse("graph")`': (graph, hand, 1.3), "`Reverse()`": (kept, graph, 1.4)}


def long() -> Subjects:
    net, phi, inner, outer = mlp()
    problem = bilevel.GradientDescent(weighted, weighted, net, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    batches = bilevel.batches(lambda t: inner, 50)

    def hand() -> list[Tensor]:
        return unrolled_by_hand(net, weighted, 0.1, 50, phi, inner, outer)

    def graph() -> Any:
        return Reverse("graph")(problem, phi, batches, outer).grad

    def kept() -> Any:
        return Reverse()(problem, phi, batches, outer).grad

    same(graph(), hand())
    same(kept(), hand())
    return {'`Reverse("graph")`': (graph, hand, 1.1), "`Reverse()`": (kept, graph, 1.4)}


def forward(steps: int) -> Callable[[], Subjects]:
    def subjects() -> Subjects:
        net, phi, inner, outer = mlp()
        problem = bilevel.GradientDescent(weighted, weighted, net, bilevel.optimizer(torch.optim.SGD, lr=0.1))
        batches = bilevel.batches(lambda t: inner, steps)
        start = {name: p.detach() for name, p in net.named_parameters()}

        def whole(phi: Tensor) -> Tensor:
            params = start
            for _ in range(steps):
                slopes = grad(lambda p: weighted(lambda x: functional_call(net, p, (x,)), phi, inner))(params)
                params = {name: p - 0.1 * slopes[name] for name, p in params.items()}
            return weighted(lambda x: functional_call(net, params, (x,)), phi, outer)

        def hand() -> list[Tensor]:
            directions = 2.0 * torch.randint(2, (16, len(phi))) - 1
            pushed: Any = vmap(lambda v: jvp(whole, (phi,), (v,)), out_dims=(None, 0))  # pyright: ignore[reportArgumentType]
            slopes = pushed(directions)[1]
            return [slopes @ directions / 16]

        def library() -> Any:
            return ForwardGradient(16)(problem, phi, batches, outer).grad

        assert library().isfinite().all()
        return {"`ForwardGradient(16)`": (library, hand, 1.05)}

    return subjects


def tasks() -> Subjects:
    net = many.network()
    inner, outer = many.sinusoids(many.TASKS, seed=0)
    problem, batches = Tasks(many.maml(net), many.TASKS), bilevel.batches(lambda t: inner, many.INNER)

    def hand() -> list[Tensor]:
        return many.tasks_by_hand(net, inner, outer)

    def graph() -> Any:
        return Reverse("graph")(problem, net, batches, outer).grad

    same(graph(), hand())
    return {'`Reverse("graph")`': (graph, hand, 1.2)}


def losses(m: int) -> Callable[[], Subjects]:
    def subjects() -> Subjects:
        problem, _, meta, hand = many.losses_by_hand(m)

        def graph() -> Any:
            return Reverse("graph")(problem, meta, many.STEPS).grad

        same(graph(), [hand()])
        return {'`Reverse("graph")`': (graph, hand, 1.2)}

    return subjects


ROWS: dict[str, Callable[[], Subjects]] = {
    "40-40, T = 5": small,
    "MLP 64-64-64-10, T = 50": long,
    "MLP 64-64-64-10, T = 10, forward": forward(10),
    "MLP 64-64-64-10, T = 50, forward": forward(50),
    "K = 25 tasks of 40-40, T = 5": tasks,
    "m = 10 outer losses, T = 50": losses(10),
    "m = 50 outer losses, T = 50": losses(50),
}


def measured(row: str, seconds: float) -> list[tuple[str, float, float, float, float]]:
    """For each estimator: its milliseconds, those of what it is compared with, the ratio, and the target."""
    found = []
    for name, (library, hand, target) in ROWS[row]().items():
        pairs: list[tuple[float, float]] = []
        stop = time.process_time() + seconds
        for number in range(10**6):
            times = []
            for call in (library, hand):
                began = time.process_time()
                call()
                times.append(time.process_time() - began)
            if number > 1:  # the first estimates check what is checked once, and set up what PyTorch sets up once
                pairs.append((times[0], times[1]))
            if number > 10 and time.process_time() > stop:
                break
        ratio = statistics.median(a / b for a, b in pairs)
        ms = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
        found.append((name, ms[0], ms[1], ratio, target))
    return found


def profile(row: str) -> None:
    for name, (library, _, _) in ROWS[row]().items():
        library()
        gc.collect()
        profiler = cProfile.Profile()
        with profiler:
            for _ in range(20):
                library()
        print(name)
        for order in ("tottime", "cumtime"):
            text = io.StringIO()
            pstats.Stats(profiler, stream=text).sort_stats(order).print_stats(45)
            print("\n".join(line for line in text.getvalue().splitlines()[4:] if line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="process time for each pair of a row")
    parser.add_argument("--row", choices=list(ROWS), help="measure this row only, and print it as JSON")
    parser.add_argument("--profile", choices=list(ROWS), help="print a profile of this row's estimators")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.profile:
        profile(options.profile)
        return
    if options.row:
        print(json.dumps(measured(options.row, options.seconds)))
        return
    lines = [
        "# Estimates beside code by hand",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/overhead.py`: process time in milliseconds, medians, float32, one "
        f"thread, a process for each row. bilevel {bilevel.__version__}, torch {torch.__version__}, python "
        f"{platform.python_version()}, {platform.machine()}. `Reverse()` is compared with "
        '`Reverse("graph")`, everything else with the same computation written by hand with `torch.autograd` or '
        "`torch.func`. A ratio of 1 means that the library costs nothing.",
        "",
        "| inner loop | estimator | ms | compared with, ms | ratio | target |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for row in ROWS:
        command = [sys.executable, __file__, "--row", row, "--seconds", str(options.seconds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        for name, library, hand, ratio, target in json.loads(done.stdout):
            lines.append(f"| {row} | {name} | {library:.1f} | {hand:.1f} | {ratio:.2f} | {target:.2f} |")
            print(lines[-1], flush=True)
    write_text(RESULTS / "overhead.md", "\n".join([*lines, "", NOTES.read_text(encoding="utf-8")]))


if __name__ == "__main__":
    main()
