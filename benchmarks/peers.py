"""The same hypergradients by this library and by others: time, memory, and agreement with the truth.

    python -m venv peers
    peers/bin/pip install -c constraints.txt '.[tasks]' transformers  # then what Bergson's trainer imports
    peers/bin/pip install datasets simple-parsing natsort jaxtyping accelerate petname ml_dtypes scipy peft psutil
    peers/bin/pip install --no-deps --ignore-requires-python -r benchmarks/requirements-peers.txt
    peers/bin/python benchmarks/peers.py               # goes on where it was stopped; --minutes 8 stops it in between
    peers/bin/python benchmarks/peers.py --only-write  # the page from what has been measured

Time: process time on one thread. A round is one process that calls every method once on one model at one T, after a
short call to warm up; rounds are repeated and medians taken, so what else the machine does falls on all methods alike.
Memory: a process for each (forked once everything is imported), how far the peak of resident memory rises above what
was there before the call, as in `benchmarks/memory.py`. The truth is `Reverse("sqrt")` in float64. A method that would
take more than 10 GiB, by what it took at a smaller T, is not run. Writes `benchmarks/results/peers.json` after every
process, and `.md`.
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
from models import MODELS, Subject, with_recomputed_layers
from torch import Tensor

import bilevel
from bilevel.report.files import write_json, write_text
from bilevel.report.progress import bar
from bilevel.unrolling.unroll import unroll

RESULTS = Path(__file__).parent / "results"
NOTES = Path(__file__).parent / "peers_notes.md"
"""What explains the figures: profiles, and what was tried where one was missed."""
PLAIN = "plain descent"
LONG = 2000
ROUNDS = 5
ONCE = (("mlp-adam", LONG), ("gpt2-adam", 50), ("gpt2-adam", 200))
"""Points that take minutes, and get one round, at the end."""
SECONDS = 1200
"""A process that takes longer is stopped."""
AT_ONCE = 4
"""Of memory, measurements between two looks at the clock."""
MOST = 10 * 2**30
KEEPING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""glibc keeps what is freed, as PyTorch's allocator does on a GPU; otherwise every large tensor comes in new pages."""

Method = Callable[[Subject, int], Tensor | None]


def plain(subject: Subject, steps: int) -> None:
    """The inner loop alone."""
    unroll(subject.problem(), subject.meta, bilevel.no_batches(steps), None, seed=0).value()


def ours(estimator: bilevel.Estimator) -> Method:
    """An estimator of this library."""
    return lambda subject, steps: estimator(subject.problem(), subject.meta, bilevel.no_batches(steps)).grad


def recomputed(method: Method) -> Method:
    """The same with every transformer layer computed again when it is needed, which no peer can be given."""
    return lambda subject, steps: method(with_recomputed_layers(subject), steps)


RECOMPUTED = ", Recomputed layers"
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
    'Reverse("all")' + RECOMPUTED: recomputed(ours(bilevel.Reverse("all"))),
    'Reverse("sqrt")' + RECOMPUTED: recomputed(ours(bilevel.Reverse("sqrt"))),
    "ForwardGradient(2)" + RECOMPUTED: recomputed(ours(bilevel.ForwardGradient(2))),
    "vmap(jvp) of everything, 2": functools.partial(peer_methods.recipe, 2),
    "vmap(jvp) of everything, 8": functools.partial(peer_methods.recipe, 8),
}
PEERS = ("higher", "TorchOpt", "Betty", "Bergson")
ESTIMATES = [name for name in METHODS if name.startswith(("vmap", "Forward"))]
FLAT_AT_LENGTH = (PLAIN, 'Reverse("log")', 'Reverse("all", offload="disk")')
GROWING = ("higher", "TorchOpt", "Betty", 'Reverse("graph")', 'Reverse("all")')
"""Whose memory is proportional to T."""
FOR_ALL = [name for name in METHODS if not name.endswith(RECOMPUTED)]
EXACT = [name for name in FOR_ALL if name not in ESTIMATES]
LEFT_OUT = ('Reverse("log")', 'Reverse("all", offload="disk")', "vmap(jvp) of everything, 2")
OF_GPT2 = [name for name in METHODS if name not in LEFT_OUT]
OF_LONG_GPT2 = [*(name for name in EXACT if name != 'Reverse("all")'), 'Reverse("sqrt")' + RECOMPUTED]
POINTS: dict[tuple[str, int], list[str]] = {
    ("mlp-adam", 200): EXACT,
    ("gpt2-adam", 10): OF_GPT2,
    ("convnet-momentum", 200): EXACT,
    ("mlp-adam", 50): FOR_ALL,
    ("convnet-momentum", 50): FOR_ALL,
    ("mlp-adam", LONG): list(FLAT_AT_LENGTH),
    ("mlp-adam", 10): FOR_ALL,
    ("convnet-momentum", 10): FOR_ALL,
    ("gpt2-sgd", 10): OF_GPT2,
    ("gpt2-adam", 50): OF_LONG_GPT2,
    ("gpt2-adam", 200): OF_LONG_GPT2,
}
"""What is measured, in this order; directions mostly at T = 10 and 50, since they cost the same at every step."""


# -- in a process of its own -------------------------------------------------------------------------------------------


def child(what: str, model: str, steps: int, methods: list[str], truth: str) -> Iterator[dict[str, Any]]:
    """One measurement of each method, a line of JSON for each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if what == "truth":
        torch.save(ours(bilevel.Reverse("sqrt"))(MODELS[model](dtype=torch.float64), steps), truth)
        return
    for method in methods:
        if what == "memory":
            in_fork(lambda method=method: {"method": method, **memory_of(model, steps, method)})
            continue
        subject, function = MODELS[model](), METHODS[method]
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


def in_fork(call: Callable[[], dict[str, Any]]) -> None:
    """Print what a call answers in a process of its own."""
    sys.stdout.flush()
    if pid := os.fork():
        os.waitpid(pid, 0)
        return
    print(json.dumps(call()), flush=True)
    os._exit(0)


def memory_of(model: str, steps: int, method: str) -> dict[str, Any]:
    """Peak of resident memory, or the error of a peer."""
    try:
        return measure_memory(functools.partial(METHODS[method], MODELS[model]()), 2, steps, on_one_cpu=False)
    except Exception as error:
        if method not in PEERS:
            raise
        return {"failure": f"{type(error).__name__}: {error}"[:200]}


def agreement(method: str, grad: Tensor, truth: str) -> dict[str, Any]:
    """How far an exact method is from the truth."""
    if method in ESTIMATES:
        return {}
    exact = torch.load(truth)
    error = float((grad.double() - exact).norm() / exact.norm())
    found: dict[str, Any] = {"not_finite": int((~torch.isfinite(grad)).sum())}
    return found if found["not_finite"] else {**found, "relative_error": error}


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
    answered = {each["method"] for each in found}
    missing = [method for method in methods if method not in answered]
    if missing:
        found.append({"method": missing[0], "failure": failure or "killed, or ended without an answer"})
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
        if method not in GROWING:
            return 0.0
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


def measure(measured: Measured, models: list[str], minutes: float) -> bool:
    """Measure what is not there yet, until the time is over; whether all is there."""
    end = time.monotonic() + 60 * minutes
    folder = Path(tempfile.gettempdir()) / "bilevel-peers-truth"
    folder.mkdir(exist_ok=True)
    rounds = [[point for point in POINTS if point not in ONCE]] * ROUNDS
    with bar("rounds", ROUNDS + 1) as shown:
        for number, points in (*enumerate(rounds), (0, ONCE)):
            for model, T in (point for point in points if point[0] in models):
                if not one_round(measured, model, T, number, folder / f"{model}-{T}.pt", end):
                    return False
            shown.advance(f"round {number + 1}")
    return True


def one_round(measured: Measured, model: str, T: int, number: int, truth: Path, end: float) -> bool:
    """One more round of times at one point, and before the first its memory. False if there was no time for it."""
    wanted: list[str] = []
    for method in POINTS[model, T]:
        row = measured.row(model, T, method)
        if "extra_bytes" in row or "failure" in row:
            continue
        if (expected := measured.expected_bytes(model, T, method)) > MOST:
            reason = f"not run: about {expected / 2**30:.0f} GiB, by what a smaller T took"
            measured.note(model, T, [{"method": method, "failure": reason}])
        else:
            wanted.append(method)
    for start in range(0, len(wanted), AT_ONCE):
        if time.monotonic() > end:
            return False
        measured.note(model, T, in_child("memory", model, T, wanted[start : start + AT_ONCE], truth))
    kept = OF_KEPT if T == 50 and not model.startswith("gpt2") else []
    for what, suffix, wanted in (("time", "", POINTS[model, T]), ("kept", KEPT, kept)):
        rows = {method: measured.row(model, T, method + suffix) for method in wanted}
        methods = [m for m, row in rows.items() if "failure" not in row and len(row["all_seconds"]) <= number]
        if not methods:
            continue
        if time.monotonic() > end:
            return False
        if not truth.exists():
            in_child("truth", model, T, [], truth)
        measured.note(model, T, in_child(what, model, T, methods, truth), kept=what == "kept")
    return True


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
    peers = {m: r for m in PEERS if (r := at(rows, model, T, m))}
    if not peers:
        return
    fastest = min(peers, key=lambda m: peers[m]["seconds"])
    leanest = min(peers, key=lambda m: peers[m]["extra_bytes"])
    seconds = peers[fastest]["seconds"]
    if graph := at(rows, model, T, 'Reverse("graph")'):
        what = f'{model}, T = {T}: time of `Reverse("graph")` over that of the fastest peer ({fastest})'
        yield verdict(what, graph["seconds"] / seconds, at_most=1.0)
    unrolling = min((r["extra_bytes"] for m, r in peers.items() if m != "Bergson"), default=None)
    for method, memory, time_limit in (('Reverse("all")', 8, 1.5), ('Reverse("sqrt")', 20, 2.1)):
        row = at(rows, model, T, method)
        if not (row and T == 200):
            continue
        what = f"{model}, T = {T}: memory of the leanest peer ({leanest}) over that of `{method}`"
        yield verdict(what, peers[leanest]["extra_bytes"] / row["extra_bytes"], at_least=memory)
        if leanest == "Bergson" and unrolling is not None:
            what = f"{model}, T = {T}: memory of the leanest peer that stores graphs over that of `{method}`"
            yield verdict(what, unrolling / row["extra_bytes"], at_least=memory)
        what = f"{model}, T = {T}: time of `{method}` over that of the fastest peer ({fastest})"
        yield verdict(what, row["seconds"] / seconds, at_most=time_limit)


def of_directions(rows: list[dict[str, Any]], model: str, T: int) -> Iterator[str]:
    """Eight directions at once."""
    for suffix in ("", KEPT):
        eight, base = at(rows, model, T, "ForwardGradient(8)" + suffix), at(rows, model, T, PLAIN + suffix)
        if eight and base:
            what = f"{model}, T = {T}: units per direction of `ForwardGradient(8)`{suffix}"
            yield verdict(what, (eight["seconds"] / base["seconds"] - 1) / 8, at_most=2.3)
    eight, other = (at(rows, model, T, m) for m in ("ForwardGradient(8)", "vmap(jvp) of everything, 8"))
    if eight and other:
        what = f"{model}, T = {T}: {{}} of `ForwardGradient(8)` over that of vmap(jvp) of everything, 8"
        yield verdict(what.format("time"), eight["seconds"] / other["seconds"], at_most=1.0)
        yield verdict(what.format("memory"), eight["extra_bytes"] / other["extra_bytes"], at_most=1.0)


def of_transformer(rows: list[dict[str, Any]], model: str) -> Iterator[str]:
    """The exact gradient beside two directions, and both beside stored graphs."""
    graph = at(rows, model, 10, 'Reverse("graph")')
    for suffix in ("", RECOMPUTED):
        names = [f'Reverse("all"){suffix}', f"ForwardGradient(2){suffix}"]
        exact, two = (at(rows, model, 10, name) for name in names)
        if not (exact and two and graph):
            continue
        for what, key, asked in (("time", "seconds", 1.0), ("memory", "extra_bytes", 0.2)):
            over = f"{model}, T = 10: {what} of `{names[0]}` over that of `{names[1]}`"
            yield verdict(over, exact[key] / two[key], 1.0)
            for name, row in zip(names, (exact, two), strict=True):
                over = f"{model}, T = 10: {what} of `{name}` over that of stored graphs"
                yield verdict(over, row[key] / graph[key], asked)


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
        "`python benchmarks/peers.py`, which also says how to install the others. Process time, medians over rounds, "
        "the number of which stands in the last column; how far resident memory rises at its peak; relative error "
        "against float64, for exact methods. One thread of a virtual machine with two cores of an x86-64 server and "
        "24 GiB of memory, no GPU, with other work on the other core, so ratios in a table mean more than "
        f"seconds. {', '.join(f'{k} {v}' for k, v in versions().items())}."
    )
    for model, T in dict.fromkeys((r["model"], r["steps"]) for r in rows):
        yield from table(rows, model, T)
    yield ""
    yield "## What was asked for"
    yield ""
    yield from verdicts(rows)
    yield ""
    yield from NOTES.read_text(encoding="utf-8").splitlines()


def table(rows: list[dict[str, Any]], model: str, T: int) -> Iterator[str]:
    """One model at one T."""
    here = {r["method"]: r for r in rows if (r["model"], r["steps"]) == (model, T)}
    base = here.get(PLAIN, {}).get("seconds")
    yield ""
    yield f"## {model}, T = {T}"
    yield ""
    yield "| method | seconds | plain descents | extra MiB | relative error | not finite | rounds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for method, row in here.items():
        if "failure" in row:
            yield f"| {method} | {row['failure']} | | | | | |"
        if "seconds" not in row:
            continue
        against = here.get(PLAIN + KEPT, {}).get("seconds") if method.endswith(KEPT) else base
        cells = [
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / against:.2f}" if against else "",
            f"{row['extra_bytes'] / 2**20:.1f}" if "extra_bytes" in row else "",
            f"{row['relative_error']:.1e}" if "relative_error" in row else "",
            str(row.get("not_finite", "")),
            str(len(row["all_seconds"])),
        ]
        yield f"| {method} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no process after so long")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only-write", action="store_true", help="measure nothing")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, model, steps, methods, truth = arguments.child
        for found in child(what, model, int(steps), json.loads(methods), truth):
            print(json.dumps(found), flush=True)
        return
    measured = Measured(RESULTS / "peers.json")
    done = arguments.only_write or measure(measured, arguments.models, arguments.minutes)
    write_text(RESULTS / "peers.md", "\n".join(as_markdown(measured.rows)) + "\n")
    print((RESULTS / "peers.md").read_text())
    sys.exit(0 if done else 3)


if __name__ == "__main__":
    main()
