"""The same hypergradients by this library and by others: time, memory, and agreement with the truth.

    python -m venv peers && peers/bin/pip install -c constraints.txt . transformers datasets simple-parsing natsort \\
        jaxtyping accelerate petname ml_dtypes scipy peft tqdm psutil
    peers/bin/pip install --no-deps --ignore-requires-python -r benchmarks/requirements-peers.txt
    peers/bin/python benchmarks/peers.py               # goes on where it was stopped; --minutes 8 stops it in between
    peers/bin/python benchmarks/peers.py --only-write  # the page from what has been measured

Time: process time on one thread. A round is one process that calls every method once on one model at one T, after a
short call to warm up; rounds are repeated and medians taken, so what else the machine does falls on all methods alike.
Memory: a process for each, how far the peak of resident memory rises above what was there before the call, as in
`benchmarks/memory.py`. The truth is `Reverse("sqrt")` in float64. A method that would take more than 6 GiB, by what it
took at a smaller T, is not run. Writes `benchmarks/results/peers.json` after every step, and `.md`.
"""

from __future__ import annotations

import argparse
import functools
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

import peer_methods
import torch
from memory import RETURNING_ALLOCATOR, measure_memory
from models import MODELS, Subject
from torch import Tensor

import bilevel
from bilevel.files import write_json, write_text
from bilevel.progress import bar
from bilevel.unroll import unroll

RESULTS = Path(__file__).parent / "results"
PLAIN = "plain descent"
LONG = 2000
ROUNDS = 5
SECONDS = 400
"""A process that takes longer is stopped."""
MOST = 6 * 2**30
KEEPING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""glibc keeps what is freed, as PyTorch's allocator does on a GPU; otherwise every large tensor comes in new pages."""

Method = Callable[[Subject, int], Tensor | None]


def plain(subject: Subject, steps: int) -> None:
    """The inner loop alone."""
    unroll(subject.problem(), subject.meta, bilevel.no_batches(steps), None, seed=0).value()


def ours(estimator: bilevel.Estimator) -> Method:
    """An estimator of this library."""
    return lambda subject, steps: estimator(subject.problem(), subject.meta, bilevel.no_batches(steps)).grad


METHODS: dict[str, Method] = {
    PLAIN: plain,
    "higher": peer_methods.through_higher,
    "TorchOpt": peer_methods.through_torchopt,
    "Betty": peer_methods.through_betty,
    "Bergson": peer_methods.through_bergson,
    'Reverse("graph")': ours(bilevel.Reverse("graph")),
    'Reverse("all")': ours(bilevel.Reverse("all")),
    'Reverse("sqrt")': ours(bilevel.Reverse("sqrt")),
    'Reverse("log")': ours(bilevel.Reverse("log")),
    'Reverse("all", offload="disk")': ours(bilevel.Reverse("all", offload="disk")),
    "ForwardGradient(2)": ours(bilevel.ForwardGradient(2)),
    "ForwardGradient(8)": ours(bilevel.ForwardGradient(8)),
    "vmap(jvp) of everything, 2": functools.partial(peer_methods.recipe, 2),
    "vmap(jvp) of everything, 8": functools.partial(peer_methods.recipe, 8),
}
PEERS = ("higher", "TorchOpt", "Betty", "Bergson")
ESTIMATES = [name for name in METHODS if name.startswith(("vmap", "Forward"))]
FLAT_AT_LENGTH = (PLAIN, 'Reverse("log")', 'Reverse("all", offload="disk")')
EXACT = [name for name in METHODS if name not in ESTIMATES]
POINTS: dict[tuple[str, int], list[str]] = {
    **{(name, T): list(METHODS) for T in (10, 50, 200) for name in ("mlp-adam", "convnet-momentum")},
    **{(name, 10): list(METHODS) for name in ("gpt2-sgd", "gpt2-adam")},
    **{(name, 50): EXACT for name in ("gpt2-sgd", "gpt2-adam")},
    ("mlp-adam", LONG): list(FLAT_AT_LENGTH),
}
"""What is measured. GPT-2 at T = 200 would take its graphs 28 GiB and a round twenty minutes."""
ORDER = [("mlp-adam", 200), ("gpt2-adam", 10), ("convnet-momentum", 200), ("gpt2-sgd", 10), ("mlp-adam", LONG)]
ORDER += [point for point in POINTS if point not in ORDER]


# -- in a process of its own -------------------------------------------------------------------------------------------


def child(what: str, model: str, steps: int, methods: list[str], truth: str) -> Iterator[dict[str, Any]]:
    """One measurement of each method, a line of JSON for each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if what == "truth":
        torch.save(ours(bilevel.Reverse("sqrt"))(MODELS[model](dtype=torch.float64), steps), truth)
        return
    for method in methods:
        subject, function = MODELS[model](), METHODS[method]
        if what == "memory":
            yield {"method": method, **measure_memory(lambda steps: function(subject, steps), 2, steps)}
            continue
        try:
            function(subject, 2)
            start = time.process_time()
            grad = function(subject, steps)
            seconds = time.process_time() - start
        except Exception as error:
            if method not in PEERS:
                raise
            yield {"method": method, "failure": f"{type(error).__name__}: {error}"[:200]}
            continue
        yield {"method": method, "seconds": seconds, **({} if grad is None else agreement(method, grad, truth))}


def agreement(method: str, grad: Tensor, truth: str) -> dict[str, Any]:
    """How far an exact method is from the truth."""
    if method in ESTIMATES:
        return {}
    exact = torch.load(truth)
    error = float((grad.double() - exact).norm() / exact.norm())
    return {"not_finite": int((~torch.isfinite(grad)).sum()), "relative_error": error}


# -- the parent --------------------------------------------------------------------------------------------------------


def in_child(what: str, model: str, steps: int, methods: list[str], truth: Path) -> list[dict[str, Any]]:
    """What a process printed, and why it ended where it did not end well."""
    extra = {"memory": RETURNING_ALLOCATOR, "kept": KEEPING_ALLOCATOR}.get(what, {})
    command = [sys.executable, __file__, "--child", what, model, str(steps), json.dumps(methods), str(truth)]
    failure = None
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **extra},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        output = done.stdout
        if done.returncode:
            failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    except subprocess.TimeoutExpired as stopped:
        output = (stopped.stdout or b"").decode()
        failure = f"more than {SECONDS} s"
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"method"')]
    if failure is not None and len(found) < len(methods):
        found.append({"method": methods[len(found)], "failure": failure})
    return found


class Measured:
    """What has been measured so far, on disk after every process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def row(self, model: str, steps: int, method: str) -> dict[str, Any]:
        """The row of that point, made if there is none."""
        wanted = {"model": model, "steps": steps, "method": method}
        for row in self.rows:
            if wanted.items() <= row.items():
                return row
        self.rows.append({**wanted, "all_seconds": []})
        return self.rows[-1]

    def note(self, model: str, steps: int, found: list[dict[str, Any]], kept: bool = False) -> None:
        """Add what a process found."""
        for each in found:
            row = self.row(model, steps, each["method"] + (KEPT if kept else ""))
            if "seconds" in each:
                row["all_seconds"].append(each.pop("seconds"))
            row.update(each | {"method": row["method"]})
            if row["all_seconds"]:
                row["seconds"] = statistics.median(row["all_seconds"])
        write_json(self._path, {"command": "python benchmarks/peers.py", "versions": versions(), "rows": self.rows})

    def expected_bytes(self, model: str, steps: int, method: str) -> float:
        """By what the method took at smaller T, as if all of it grew with T."""
        known = [r for r in self.rows if (r["model"], r["method"]) == (model, method) and "extra_bytes" in r]
        return max((r["extra_bytes"] * steps / r["steps"] for r in known if r["steps"] < steps), default=0.0)


KEPT = ", allocator that keeps"
OF_KEPT = [PLAIN, "ForwardGradient(8)", "vmap(jvp) of everything, 8"]


def versions() -> dict[str, str]:
    """Of what was compared."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "bilevel": bilevel.__version__, "torch": torch.__version__}
    for name in ("higher", "torchopt", "betty-ml", "bergson", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def measure(measured: Measured, minutes: float) -> bool:
    """Measure what is not there yet, until the time is over; whether all is there."""
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, bar("rounds", ROUNDS) as shown:
        for number in range(ROUNDS):
            for model, T in ORDER:
                if not one_round(measured, model, T, number, Path(folder) / f"{model}-{T}.pt", end):
                    return False
            shown.advance(f"round {number + 1}")
    return True


def one_round(measured: Measured, model: str, T: int, number: int, truth: Path, end: float) -> bool:
    """A round of times of one point; before the first, its memory. False if there was no time for it."""

    def missing(key: str, count: int, suffix: str = "") -> list[str]:
        rows = {m: measured.row(model, T, m + suffix) for m in POINTS[model, T]}
        return [m for m, r in rows.items() if "failure" not in r and len(r.get(key) or []) < count]

    rounds = 1 if T == LONG else ROUNDS
    if number >= rounds:
        return True
    for method in POINTS[model, T]:
        row = measured.row(model, T, method)
        if "extra_bytes" in row or "failure" in row:
            continue
        if time.monotonic() > end:
            return False
        if measured.expected_bytes(model, T, method) > MOST and method not in FLAT:
            size = measured.expected_bytes(model, T, method) / 2**30
            measured.note(model, T, [{"method": method, "failure": f"not run: about {size:.0f} GiB, by T = 10"}])
            continue
        measured.note(model, T, in_child("memory", model, T, [method], truth))
    for what, suffix, wanted in (("time", "", list(METHODS)), ("kept", KEPT, OF_KEPT)):
        methods = [m for m in missing("all_seconds", number + 1, suffix) if m in wanted]
        if not methods or (what == "kept" and T not in (10, 200)) or T == LONG and what == "kept":
            continue
        if time.monotonic() > end:
            return False
        if not truth.exists():
            in_child("truth", model, T, [], truth)
        measured.note(model, T, in_child(what, model, T, methods, truth), kept=what == "kept")
    return True


FLAT = ('Reverse("sqrt")', 'Reverse("log")', 'Reverse("all", offload="disk")', "Bergson", PLAIN, *ESTIMATES)
"""Methods whose memory does not grow in proportion to T."""


def at(rows: list[dict[str, Any]], model: str, steps: int, method: str) -> dict[str, Any] | None:
    """A point that was measured."""
    wanted = (model, steps, method)
    whole = [r for r in rows if (r["model"], r["steps"], r["method"]) == wanted and "seconds" in r]
    return next((r for r in whole if "extra_bytes" in r or r["method"].endswith(KEPT)), None)


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


def as_markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The tables with the command that made them."""
    yield "# This library beside others"
    yield ""
    yield (
        "`python benchmarks/peers.py`: process time, medians of 5 (3 for T = 200 and GPT-2, 1 for T = 2000); extra "
        "peak memory; relative error against float64, for exact methods. One thread of a machine with two cores, "
        f"others at work on it, no GPU. {', '.join(f'{k} {v}' for k, v in versions().items())}."
    )
    for model, T in dict.fromkeys((r["model"], r["steps"]) for r in rows):
        base = at(rows, model, T, PLAIN)
        yield ""
        yield f"## {model}, T = {T}"
        yield ""
        yield "| method | seconds | units / T | extra MiB | relative error | not finite |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for row in (r for r in rows if (r["model"], r["steps"]) == (model, T)):
            if "seconds" not in row or "extra_bytes" not in row:
                yield f"| {row['method']} | {row.get('failure', 'not measured')} | | | | |"
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
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no process after so long")
    parser.add_argument("--only-write", action="store_true", help="measure nothing")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, model, steps, methods, truth = arguments.child
        for found in child(what, model, int(steps), json.loads(methods), truth):
            print(json.dumps(found), flush=True)
        return
    measured = Measured(RESULTS / "peers.json")
    done = arguments.only_write or measure(measured, arguments.minutes)
    write_text(RESULTS / "peers.md", "\n".join(as_markdown(measured.rows)) + "\n")
    print((RESULTS / "peers.md").read_text())
    sys.exit(0 if done else 3)


if __name__ == "__main__":
    main()
