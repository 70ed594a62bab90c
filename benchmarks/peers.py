"""The same hypergradients by this library and by others: time, memory, and agreement with the truth.

    pip install --no-deps -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py

Every point is two processes of its own, one thread each: one for time (process time, medians), one for memory (how far
the peak of resident memory rises above what was there before the call, as in `benchmarks/memory.py`). The truth is
`Reverse("sqrt")` in float64. Writes `benchmarks/results/peers.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from memory import RETURNING_ALLOCATOR, measure_memory
from models import MODELS, Subject
from torch import Tensor

import bilevel
from bilevel import autodiff
from bilevel.files import write_json, write_text
from bilevel.modules import modules_in
from bilevel.progress import bar
from bilevel.unroll import unroll

RESULTS = Path(__file__).parent / "results"
POINTS = [(name, T) for name in ("mlp-adam", "convnet-momentum") for T in (10, 50, 200)]
POINTS += [("gpt2-sgd", 10), ("gpt2-adam", 10)]
PLAIN = "plain descent"
LONG = 2000
SECONDS = 240
"""A process that takes longer is stopped."""

Method = Callable[[Subject, int], Tensor | None]


def plain(subject: Subject, steps: int) -> None:
    """The inner loop alone."""
    unroll(subject.problem(), subject.meta, bilevel.no_batches(steps), None, seed=0).value()


def ours(estimator: bilevel.Estimator) -> Method:
    """An estimator of this library."""
    return lambda subject, steps: estimator(subject.problem(), subject.meta, bilevel.no_batches(steps)).grad


def recipe(count: int) -> Method:
    """All directions in one vmap(jvp) of the whole unrolled loss, as in the code released with (FG)²U."""

    def estimate(subject: Subject, steps: int) -> Tensor:
        run = unroll(subject.problem(), subject.meta, bilevel.no_batches(steps), None, seed=0)

        def loss(meta: Tensor) -> Tensor:
            state = run.start()
            for t in range(steps):
                state = run.step(t, state, meta)
            return run.outer_loss(state, meta)

        vectors = [torch.ones(count, *subject.meta.shape)]
        with autodiff.differentiable_kernels(modules_in([run.start()])):
            pushed = autodiff.push_forward(loss, [subject.meta], [vectors])
        return torch.einsum("k,k...->...", pushed.tangents[0], vectors[0]) / count

    return estimate


def through_higher(subject: Subject, steps: int) -> Tensor:
    """`higher.innerloop_ctx`."""
    import higher  # pyright: ignore[reportMissingImports]

    meta = subject.meta.clone().requires_grad_()
    optimizer = subject.algorithm(subject.network.parameters(), **subject.settings)
    with higher.innerloop_ctx(subject.network, optimizer, copy_initial_weights=False) as (model, inner):
        for _ in range(steps):
            inner.step(subject.inner_loss(model, meta))
        return torch.autograd.grad(subject.outer_loss(model), meta)[0]


def through_torchopt(subject: Subject, steps: int) -> Tensor:
    """`torchopt.MetaAdam` or `MetaSGD`, with their defaults."""
    import torchopt  # pyright: ignore[reportMissingImports]

    kind = torchopt.MetaAdam if subject.algorithm is torch.optim.Adam else torchopt.MetaSGD
    meta = subject.meta.clone().requires_grad_()
    model = copy.deepcopy(subject.network)
    inner = kind(model, **subject.settings)
    for _ in range(steps):
        inner.step(subject.inner_loss(model, meta))
    return torch.autograd.grad(subject.outer_loss(model), meta)[0]


METHODS: dict[str, Method] = {
    PLAIN: plain,
    "higher": through_higher,
    "TorchOpt": through_torchopt,
    "vmap(jvp) of everything, 2": recipe(2),
    "vmap(jvp) of everything, 8": recipe(8),
    'Reverse("graph")': ours(bilevel.Reverse("graph")),
    'Reverse("all")': ours(bilevel.Reverse("all")),
    'Reverse("sqrt")': ours(bilevel.Reverse("sqrt")),
    'Reverse("log")': ours(bilevel.Reverse("log")),
    'Reverse("all", offload="disk")': ours(bilevel.Reverse("all", offload="disk")),
    "ForwardGradient(2)": ours(bilevel.ForwardGradient(2)),
    "ForwardGradient(8)": ours(bilevel.ForwardGradient(8)),
}
ESTIMATES = [name for name in METHODS if name.startswith(("vmap", "Forward"))]


# -- in a process of its own -------------------------------------------------------------------------------------------


def child(what: str, model: str, method: str, steps: int, repeats: int, truth: str) -> dict[str, Any]:
    """One measurement."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if what == "truth":
        torch.save(ours(bilevel.Reverse("sqrt"))(MODELS[model](dtype=torch.float64), steps), truth)
        return {}
    subject = MODELS[model]()
    function = METHODS[method]
    if what == "memory":
        return measure_memory(lambda steps: function(subject, steps), 2, steps)
    function(subject, 2)
    seconds, grad = [], None
    for _ in range(repeats):
        start = time.process_time()
        grad = function(subject, steps)
        seconds.append(time.process_time() - start)
    found: dict[str, Any] = {"seconds": statistics.median(seconds), "repeats": repeats}
    if grad is not None and method not in ESTIMATES:
        exact = torch.load(truth)
        found["not_finite"] = int((~torch.isfinite(grad)).sum())
        found["relative_error"] = float((grad.double() - exact).norm() / exact.norm())
    return found


# -- the parent --------------------------------------------------------------------------------------------------------


def in_child(*arguments: Any) -> dict[str, Any]:
    """The answer of a measurement, or why there is none."""
    extra = RETURNING_ALLOCATOR if arguments[0] == "memory" else {}
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **extra},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"more than {SECONDS} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failure": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure() -> list[dict[str, Any]]:
    """All points."""
    rows = []
    plan = [(model, T, method) for model, T in POINTS for method in METHODS]
    plan += [("mlp-adam", LONG, method) for method in (PLAIN, 'Reverse("log")', 'Reverse("all", offload="disk")')]
    with tempfile.TemporaryDirectory() as folder, bar("points", len(plan)) as shown:
        for model, T, method in plan:
            truth = Path(folder) / f"{model}-{T}.pt"
            if not truth.exists():
                in_child("truth", model, "-", T, 1, truth)
            repeats = 5 if T <= 50 and not model.startswith("gpt2") else 3 if T < LONG else 1
            row = {"model": model, "steps": T, "method": method}
            row |= in_child("time", model, method, T, repeats, truth)
            if "failure" not in row:
                row |= in_child("memory", model, method, T, 1, truth)
            rows.append(row)
            shown.advance(f"{model}, T = {T}: {method}")
    return rows


def at(rows: list[dict[str, Any]], model: str, steps: int, method: str) -> dict[str, Any] | None:
    """A point that was measured."""
    wanted = (model, steps, method)
    return next((r for r in rows if (r["model"], r["steps"], r["method"]) == wanted and "failure" not in r), None)


def verdicts(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The ratios that were asked for."""
    for model, T in POINTS:
        yield from against_peers(rows, model, T)
        yield from of_directions(rows, model, T)
    for model in ("gpt2-sgd", "gpt2-adam"):
        yield from of_transformer(rows, model)
    for method in ('Reverse("log")', 'Reverse("all", offload="disk")'):
        short, long = at(rows, "mlp-adam", 200, method), at(rows, "mlp-adam", LONG, method)
        if short and long:
            what = f"`{method}`: memory at T = {LONG} over that at T = 200"
            yield verdict(what, long["extra_bytes"] / short["extra_bytes"], at_most=1.5)


def against_peers(rows: list[dict[str, Any]], model: str, T: int) -> Iterator[str]:
    """Exact methods beside the fastest and the leanest peer."""
    peers = [r for r in (at(rows, model, T, m) for m in ("higher", "TorchOpt")) if r]
    if not peers:
        return
    fastest, leanest = min(r["seconds"] for r in peers), min(r["extra_bytes"] for r in peers)
    if graph := at(rows, model, T, 'Reverse("graph")'):
        what = f'{model}, T = {T}: time of `Reverse("graph")` over that of the fastest peer'
        yield verdict(what, graph["seconds"] / fastest, at_most=1.0)
    for method, memory, seconds in (('Reverse("all")', 8, 1.5), ('Reverse("sqrt")', 20, 2.1)):
        row = at(rows, model, T, method)
        if row and T == 200:
            what = f"{model}, T = {T}: memory of the leanest peer over that of `{method}`"
            yield verdict(what, leanest / row["extra_bytes"], at_least=memory)
            what = f"{model}, T = {T}: time of `{method}` over that of the fastest peer"
            yield verdict(what, row["seconds"] / fastest, at_most=seconds)


def of_directions(rows: list[dict[str, Any]], model: str, T: int) -> Iterator[str]:
    """Eight directions at once."""
    eight, base = at(rows, model, T, "ForwardGradient(8)"), at(rows, model, T, PLAIN)
    if eight and base:
        what = f"{model}, T = {T}: units per direction of `ForwardGradient(8)`"
        yield verdict(what, (eight["seconds"] / base["seconds"] - 1) / 8, at_most=2.3)
    other = at(rows, model, T, "vmap(jvp) of everything, 8")
    if eight and other:
        what = f"{model}, T = {T}: time of `ForwardGradient(8)` over that of vmap(jvp) of everything"
        yield verdict(what, eight["seconds"] / other["seconds"], at_most=1.0)


def of_transformer(rows: list[dict[str, Any]], model: str) -> Iterator[str]:
    """The exact gradient beside two directions, and both beside stored graphs."""
    exact, two, graph = (at(rows, model, 10, m) for m in ('Reverse("all")', "ForwardGradient(2)", 'Reverse("graph")'))
    if not (exact and two and graph):
        return
    for what, key in (("time", "seconds"), ("memory", "extra_bytes")):
        yield verdict(f'{model}: {what} of `Reverse("all")` over that of two directions', exact[key] / two[key], 1.0)
        for name, row in (('Reverse("all")', exact), ("ForwardGradient(2)", two)):
            asked = 1.0 if key == "seconds" else 0.2
            yield verdict(f"{model}: {what} of `{name}` over that of stored graphs", row[key] / graph[key], asked)


def verdict(what: str, value: float, at_most: float | None = None, at_least: float | None = None) -> str:
    """A ratio, and whether it is as asked for."""
    holds = value <= at_most if at_most is not None else value >= (at_least or 0)
    asked = f"at most {at_most}" if at_most is not None else f"at least {at_least}"
    return f"- {'yes' if holds else 'NO'}: {what}: {value:.2f} ({asked})"


def as_markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> Iterator[str]:
    """The tables with the command that made them."""
    yield "# This library beside others"
    yield ""
    yield (
        "`python benchmarks/peers.py`: process time, medians of 5 (3 for T = 200 and GPT-2, 1 for T = 2000); extra "
        "peak memory; relative error against float64, for exact methods. One thread of a machine with two cores, "
        f"others at work on it, no GPU. {', '.join(f'{k} {v}' for k, v in versions.items())}."
    )
    for model, T in dict.fromkeys((r["model"], r["steps"]) for r in rows):
        base = at(rows, model, T, PLAIN)
        yield ""
        yield f"## {model}, T = {T}"
        yield ""
        yield "| method | seconds | units / T | extra MiB | relative error | not finite |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for row in (r for r in rows if (r["model"], r["steps"]) == (model, T)):
            if "failure" in row:
                yield f"| {row['method']} | failed: {row['failure']} | | | | |"
                continue
            units = f"{row['seconds'] / base['seconds']:.2f}" if base else ""
            error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
            extra = f"{row['extra_bytes'] / 2**20:.1f}"
            bad = row.get("not_finite", "")
            yield f"| {row['method']} | {row['seconds']:.3f} | {units} | {extra} | {error} | {bad} |"
    yield ""
    yield "## What was asked for"
    yield ""
    yield from verdicts(rows)
    yield ""
    yield (
        "Betty is not in the tables: its hypergradients are of one inner step by implicit or finite-difference "
        "formulas, so it can't be asked for that of T steps. Bergson's trainer takes Hugging Face data sets and its "
        "own losses, not a given inner loss; it was not run."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, model, method, steps, repeats, truth = arguments.child
        print(json.dumps(child(what, model, method, int(steps), int(repeats), truth)))
        return
    rows = measure()
    versions = {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()}
    write_json(RESULTS / "peers.json", {"command": "python benchmarks/peers.py", "versions": versions, "rows": rows})
    write_text(RESULTS / "peers.md", "\n".join(as_markdown(rows, versions)) + "\n")
    print((RESULTS / "peers.md").read_text())


if __name__ == "__main__":
    main()
