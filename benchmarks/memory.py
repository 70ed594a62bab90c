"""Peak memory, and time, of the hypergradient estimators against T, the number of inner steps.

    python benchmarks/memory.py                    # T = 10, 100, 1000 on the MLP, about ten minutes on one core
    python benchmarks/memory.py --problem convnet  # the paper's kind of network
    python benchmarks/memory.py --quick            # T = 10, 100, once each; prints, and writes nothing without --out

Every measurement is a process of its own: this file again, with hidden arguments, answering in JSON. It makes one
warm-up call of the same estimator (which loads kernels and fills caches), and reports how far the peak of its resident
memory rose, during the one call that counts, above what was resident before. Nothing else is subtracted.

Exit code 1 if the memory of `ForwardGradient` or `ZerothOrder` varies by more than 5 % over T.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import clocks_alone  # noqa: F401
import numpy as np
import rich
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.estimators import Estimator
from bilevel.unrolling.unroll import unroll

FLATNESS = 0.05
CLAIM_TOLERANCE = 0.3
STEPS = (10, 100, 1000)
TIMED_STEPS = 100
"""Time is measured up to this T: it is linear in T, and a long inner loop would say the same at ten times the cost."""
ENOUGH_SECONDS = 45
"""A point that has taken so long is not repeated any more."""
PLAIN = "plain descent"
GIB = 2**30

# Memory is measured with an allocator that hands back what is freed. glibc keeps freed blocks for later and raises its
# threshold for doing so as it goes; then the resident memory before a call depends on the calls before it, and its peak
# on how the heap is fragmented. With these settings every tensor from 64 KiB is a mapping of its own, gone when freed.
# The price is a page fault for every page of every new tensor, so time is measured with the allocator as it comes.
RETURNING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """An estimator and what its docstring says about it."""

    name: str
    make: Callable[[], Estimator] | None
    growth: Callable[[int], float]
    """How the number of states kept grows with T, up to a factor; constant where nothing should grow."""
    memory_claim: str
    time_claim: str
    units: Callable[[int, int], tuple[float, float]]
    """Claimed cost from T and the products that a linear solver spent: from, to, in plain inner steps."""
    warm_up_steps: int = 2
    must_be_flat: bool = False


def _flat(steps: int) -> float:
    return 1.0


TRUNCATION = 5

SUBJECTS = [
    Subject(PLAIN, None, _flat, "—", "T", lambda T, k: (T, T)),
    Subject(
        'Reverse("graph")', lambda: bilevel.Reverse("graph"), float, "T graphs", "about 3T", lambda T, k: (3 * T, 3 * T)
    ),
    Subject(
        'Reverse("all")', lambda: bilevel.Reverse("all"), float, "T states", "4T to 5T", lambda T, k: (4 * T, 5 * T)
    ),
    Subject(
        'Reverse("sqrt")',
        lambda: bilevel.Reverse("sqrt"),
        math.sqrt,
        "√(2T) states",
        "5T to 6T",
        lambda T, k: (5 * T, 6 * T),
    ),
    Subject(
        f"TruncatedReverse({TRUNCATION})",
        lambda: bilevel.TruncatedReverse(TRUNCATION),
        _flat,
        f"{TRUNCATION} states",
        "T + 3s to T + 4s",
        lambda T, k: (T + 3 * TRUNCATION, T + 4 * TRUNCATION),
        warm_up_steps=TRUNCATION,
    ),
    Subject(
        "ForwardGradient(1)",
        lambda: bilevel.ForwardGradient(1),
        _flat,
        "1 + 1 states, activations",
        "(1 + 2b)T",
        lambda T, k: (3 * T, 3 * T),
        must_be_flat=True,
    ),
    Subject(
        "ForwardGradient(8)",
        lambda: bilevel.ForwardGradient(8),
        _flat,
        "1 + 8 states, activations",
        "(1 + 2b)T",
        lambda T, k: (17 * T, 17 * T),
        must_be_flat=True,
    ),
    Subject(
        "ZerothOrder(1)",
        lambda: bilevel.ZerothOrder(1),
        _flat,
        "one solve",
        "(1 + 2b)T",
        lambda T, k: (3 * T, 3 * T),
        must_be_flat=True,
    ),
    Subject(
        "Implicit()",
        lambda: bilevel.Implicit(),
        _flat,
        "graph of one gradient",
        "T + 1 + 2·products",
        lambda T, k: (T + 1 + 2 * k, T + 1 + 2 * (k + 1)),  # with or without the product with Y
    ),
    Subject(
        "HessianFree()",
        lambda: bilevel.HessianFree(),
        _flat,
        "graph of one gradient",
        "T + 3",
        lambda T, k: (T + 3, T + 3),
    ),
]
BY_NAME = {subject.name: subject for subject in SUBJECTS}


@dataclass(frozen=True)
class Task:
    """A problem with its data: per-example weights φ for training on real digits with SGD and momentum."""

    problem: bilevel.GradientDescent
    meta: Tensor
    batch: Callable[[int], Any]
    outer_batch: Any
    parameters: int

    @property
    def state_bytes(self) -> int:
        """One inner state: the parameters and their momentum."""
        return 2 * 4 * self.parameters


def _mlp() -> nn.Module:
    width = 704
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )  # 0.55 M parameters


def _convnet() -> nn.Module:
    width = 128

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True), nn.ReLU()]

    # Two poolings for 8 × 8 images, where the paper has three for 32 × 32: norms need more than one pixel.
    layers = [*block(1), nn.AvgPool2d(2), *block(width), nn.AvgPool2d(2), *block(width)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(4 * width, 10))  # 0.30 M


NETWORKS = {"mlp": (_mlp, 0.05), "convnet": (_convnet, 0.01)}
BATCH_SIZE, OUTER_BATCH_SIZE, TRAINING_SIZE = 16, 64, 1024


def make_task(name: str, data: Path) -> Task:
    """The problem of that name on the digits stored in a file."""
    with np.load(data) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    make_network, learning_rate = NETWORKS[name]
    torch.manual_seed(0)
    network = make_network()

    def inner_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        each = cross_entropy(model(images[batch]), labels[batch], reduction="none")
        return (meta[batch].sigmoid() * each).mean()

    def outer_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return cross_entropy(model(images[batch]), labels[batch])

    return Task(
        bilevel.GradientDescent(
            inner_loss, outer_loss, network, bilevel.optimizer(torch.optim.SGD, lr=learning_rate, momentum=0.9)
        ),
        meta=torch.zeros(TRAINING_SIZE),
        batch=lambda t: (torch.arange(BATCH_SIZE) + t * BATCH_SIZE) % TRAINING_SIZE,
        outer_batch=torch.arange(TRAINING_SIZE, TRAINING_SIZE + OUTER_BATCH_SIZE),
        parameters=sum(p.numel() for p in network.parameters()),
    )


def call_of(subject: Subject, task: Task) -> Callable[[int], bilevel.Estimate | None]:
    """`call(T)`: the estimator on an inner loop of T steps, or the inner loop alone."""

    def call(steps: int) -> bilevel.Estimate | None:
        inner = bilevel.batches(task.batch, steps)
        if subject.make is None:
            unroll(task.problem, task.meta, inner, task.outer_batch, seed=0).value()
            return None
        return subject.make()(task.problem, task.meta, inner, task.outer_batch)

    return call


# -- in a process of its own -------------------------------------------------------------------------------------------


def resident(what: str) -> int:
    """`VmRSS`, the resident memory now, or `VmHWM`, its peak since the last reset, in bytes."""
    with open("/proc/self/status") as status:
        found = next(line for line in status if line.startswith(what))
    return int(found.split()[1]) * 1024


def reset_peak() -> None:
    """Let the peak start again from what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure_memory(
    call: Callable[[int], Any], warm_up_steps: int, steps: int, on_one_cpu: bool = True
) -> dict[str, Any]:
    """How far the resident memory rises during `call(steps)`."""
    # Linux counts resident pages by CPU and adds them up 32 at a time, so on one CPU the recorded peak is within
    # 128 KiB of the truth, and on n of them within n times that.
    if on_one_cpu:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    call(warm_up_steps)
    gc.collect()
    reset_peak()
    before = resident("VmRSS")
    call(steps)
    return {"extra_bytes": resident("VmHWM") - before, "bytes_before": before}


def measure_time(
    call: Callable[[int], Any], plain: Callable[[int], Any], warm_up_steps: int, steps: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Process time of the call and of the plain inner loop, by turns."""
    call(warm_up_steps)
    plain(warm_up_steps)
    result: dict[str, Any] = {"call": {}, "plain": {}, "products": 0}
    for T in steps:
        for _ in range(repeats):
            for name, function in (("plain", plain), ("call", call)):
                start = time.process_time()
                estimate = function(T)
                result[name].setdefault(str(T), []).append(time.process_time() - start)
                if estimate is not None:
                    result["products"] = int(estimate.diagnostics.get("solver_iterations", 0))
    return result


def run_child(arguments: argparse.Namespace) -> None:
    """What the child processes do: one measurement, printed as JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # conjugate gradients do not converge here, which is not what is looked at
    task = make_task(arguments.problem, Path(arguments.data))
    subject = BY_NAME[arguments.estimator]
    call = call_of(subject, task)
    if arguments.child == "memory":
        result = measure_memory(call, subject.warm_up_steps, arguments.steps[0])
    else:
        plain = call_of(BY_NAME[PLAIN], task)
        result = measure_time(call, plain, subject.warm_up_steps, arguments.steps, arguments.repeats)
    print(json.dumps({**result, "state_bytes": task.state_bytes, "parameters": task.parameters}))


# -- the parent --------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """Peak memory of one estimator at one T."""

    estimator: str
    steps: int
    runs: list[int] = field(default_factory=list)
    """Extra bytes in each process; empty if the point was skipped."""
    predicted_bytes: float | None = None
    """For a point that was skipped: what smaller T lead to expect."""

    @property
    def extra_bytes(self) -> float | None:
        """The median, if measured."""
        return median(self.runs) if self.runs else None


@dataclass
class Timing:
    """Process times of one estimator, and of the plain inner loop in the same process."""

    estimator: str
    call_seconds: dict[int, list[float]]
    plain_seconds: dict[int, list[float]]
    products: int

    def units(self, steps: int) -> float:
        """The cost of a call in plain inner steps."""
        return median(self.call_seconds[steps]) / median(self.plain_seconds[steps]) * steps


@dataclass
class Results:
    """Everything that was measured."""

    problem: str
    steps: list[int]
    parameters: int = 0
    state_bytes: int = 0
    points: list[Point] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def measured(self, estimator: str) -> dict[int, float]:
        """Extra bytes of an estimator by T, where measured."""
        found = {p.steps: p.extra_bytes for p in self.points if p.estimator == estimator}
        return {steps: extra for steps, extra in found.items() if extra is not None}

    def states(self, estimator: str) -> dict[int, float]:
        """The same in states."""
        return {steps: extra / self.state_bytes for steps, extra in self.measured(estimator).items()}


def in_child(kind: str, problem: str, data: Path, subject: Subject, steps: Sequence[int], repeats: int) -> dict:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", kind, "--problem", problem, "--data", str(data)]
    command += ["--estimator", subject.name, "--repeats", str(repeats), "--steps", *map(str, steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(RETURNING_ALLOCATOR if kind == "memory" else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{subject.name} at T = {list(steps)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def predict(growth: Callable[[int], float], measured: dict[int, float], steps: int) -> float:
    """Extra bytes at T from what smaller T took: a line in `growth(T)` through the two largest, rounded up for one."""
    if not measured:
        return 0.0
    known = sorted(measured)
    last = known[-1]
    if len(known) == 1 or growth(steps) == growth(last):
        return measured[last] * growth(steps) / growth(last)
    before = known[-2]
    slope = (measured[last] - measured[before]) / (growth(last) - growth(before))
    return measured[last] + slope * (growth(steps) - growth(last))


def expected_seconds(subject: Subject, steps: int, repeats: int) -> float:
    """A guess, to weigh the points in the progress bar: seconds to start a process, and some ms for every unit."""
    once = 2.5 + 6e-3 * subject.units(steps, 0)[1]
    return once * min(repeats, math.ceil(ENOUGH_SECONDS / once))


def measure(problem: str, data: Path, steps: Sequence[int], repeats: int, limit_bytes: float) -> Results:
    """All points, from the smallest T up, then all times."""
    results = Results(problem, list(steps))
    timed = [T for T in steps if T <= TIMED_STEPS]
    seconds = {(s.name, T): expected_seconds(s, T, repeats) for T in steps for s in SUBJECTS}
    columns = TextColumn("{task.description:38}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:")
    with Progress(*columns, TimeRemainingColumn(), speed_estimate_period=3600) as progress:
        bar = progress.add_task("", total=sum(seconds.values()) + 4 * len(SUBJECTS))
        for T in steps:
            for subject in SUBJECTS:
                progress.update(bar, description=f"memory of {subject.name}, T = {T}")
                point = Point(subject.name, T)
                expected = predict(subject.growth, results.measured(subject.name), T)
                if expected > limit_bytes:
                    point.predicted_bytes = expected
                else:
                    began = time.monotonic()
                    while len(point.runs) < repeats and time.monotonic() - began < ENOUGH_SECONDS:
                        answer = in_child("memory", problem, data, subject, [T], repeats)
                        point.runs.append(answer["extra_bytes"])
                        results.parameters, results.state_bytes = answer["parameters"], answer["state_bytes"]
                results.points.append(point)
                progress.advance(bar, seconds[subject.name, T])
        for subject in SUBJECTS:
            progress.update(bar, description=f"time of {subject.name}")
            answer = in_child("time", problem, data, subject, timed, repeats)
            call, plain = ({int(T): runs for T, runs in answer[key].items()} for key in ("call", "plain"))
            results.timings.append(Timing(subject.name, call, plain, answer["products"]))
            progress.advance(bar, 4)
    return results


# -- what the numbers say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A sentence with its numbers, and whether it is as it should be (`None` if it only informs)."""

    sentence: str
    holds: bool | None
    decides: bool = False

    def __str__(self) -> str:
        return f"{ {True: 'yes ', False: 'NO  ', None: '    '}[self.holds] } {self.sentence}"


def fitted_exponent(measured: dict[int, float]) -> float | None:
    """The p of a + b·T^p through three points whose T are a geometric sequence; the constant part a drops out."""
    if len(measured) < 3:
        return None
    (t0, y0), (t1, y1), (t2, y2) = sorted(measured.items())[-3:]
    if t0 * t2 != t1 * t1 or not (y2 > y1 > y0):
        return None
    return math.log((y2 - y1) / (y1 - y0)) / math.log(t1 / t0)


def spread(measured: dict[int, float]) -> float:
    """(largest − smallest) / smallest."""
    return max(measured.values()) / min(measured.values()) - 1


def verdicts(results: Results) -> Iterator[Verdict]:
    """What must hold, and what is worth knowing."""
    for subject in SUBJECTS:
        measured = results.measured(subject.name)
        if len(measured) < 2:
            continue
        over = f"over T = {', '.join(map(str, measured))}"
        if subject.growth is _flat:
            found = spread(measured)
            sentence = f"{subject.name}: peak memory varies by {found:.1%} {over}"
            if subject.must_be_flat:
                yield Verdict(f"{sentence}; at most {FLATNESS:.0%}", found <= FLATNESS, decides=True)
            else:
                yield Verdict(sentence, None)
            continue
        expected = 0.5 if subject.growth is math.sqrt else 1.0
        exponent = fitted_exponent(measured)
        if exponent is None:
            yield Verdict(f"{subject.name}: an exponent needs three values of T", None)
        else:
            sentence = f"{subject.name}: a + b·T^p fits with p = {exponent:.2f} {over}; about {expected} is expected"
            yield Verdict(sentence, abs(exponent - expected) <= 0.1)


def memory_findings(results: Results) -> dict[str, str]:
    """By estimator, the number in states that its docstring's claim speaks of."""
    found: dict[str, str] = {}
    at = {s.name: results.states(s.name) for s in SUBJECTS}
    plain = median(at[PLAIN].values())

    def per(name: str, growth: Callable[[int], float]) -> float | None:
        known = sorted(at[name])[-2:]
        if len(known) < 2:
            return None
        return (at[name][known[1]] - at[name][known[0]]) / (growth(known[1]) - growth(known[0]))

    graph, every = per('Reverse("graph")', float), per('Reverse("all")', float)
    root = per('Reverse("sqrt")', lambda T: math.sqrt(2 * T))
    if graph is not None:
        found['Reverse("graph")'] = f"{graph:.2f} T states"
    if every is not None:
        first = min(at['Reverse("all")'])
        constant = at['Reverse("all")'][first] - every * first
        found['Reverse("all")'] = f"{every:.2f} T states, and {constant:.1f}"
        name = f"TruncatedReverse({TRUNCATION})"
        found[name] = f"{median(at[name].values()) - constant:.1f} states, and the {constant:.1f} of Reverse"
    if root is not None:
        found['Reverse("sqrt")'] = f"{root:.2f} · √(2T) states, and a constant"
    for k in (1, 8):
        total = median(at[f"ForwardGradient({k})"].values())
        found[f"ForwardGradient({k})"] = f"{total:.1f} states = (1 + {k}) · {total / (1 + k):.1f}; plain {plain:.1f}"
    total = median(at["ZerothOrder(1)"].values())
    found["ZerothOrder(1)"] = f"{total:.1f} states; plain {plain:.1f}"
    for name in ("Implicit()", "HessianFree()"):
        found[name] = f"{median(at[name].values()):.1f} states; plain {plain:.1f}"
    return found


def time_finding(subject: Subject, timing: Timing) -> str:
    """Units measured against units claimed, at the largest T that was timed."""
    T = max(timing.call_seconds)
    low, high = subject.units(T, timing.products)
    measured = timing.units(T)
    claim = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    off = measured / high - 1 if measured > high else measured / low - 1 if measured < low else 0.0
    mark = f", off by {off:+.0%}" if abs(off) > CLAIM_TOLERANCE else ""
    return f"{measured:.0f} of {claim}{mark}"


# -- showing it --------------------------------------------------------------------------------------------------------


def main_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table of memory and time: header and rows."""
    timed = sorted(results.timings[0].call_seconds)
    header = ["estimator", *(f"T = {T}: MiB (states)" for T in results.steps), *(f"units / T, T = {T}" for T in timed)]
    rows = []
    for subject, timing in zip(SUBJECTS, results.timings, strict=True):
        row = [subject.name]
        for point in (p for p in results.points if p.estimator == subject.name):
            if point.extra_bytes is None:
                assert point.predicted_bytes is not None
                row.append(f"not measured: would need {point.predicted_bytes / GIB:.1f} GiB")
            else:
                row.append(f"{point.extra_bytes / 2**20:.1f} ({point.extra_bytes / results.state_bytes:.1f})")
        rows.append(row + [f"{timing.units(T) / T:.2f}" for T in timed])
    return header, rows


def claim_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table of the docstrings' claims: header and rows."""
    T = max(results.timings[0].call_seconds)
    memory = memory_findings(results)
    header = ["estimator", "memory claimed", "memory measured", "units claimed", f"units measured at T = {T}"]
    rows = [
        [s.name, s.memory_claim, memory.get(s.name, "—"), s.time_claim, time_finding(s, timing)]
        for s, timing in zip(SUBJECTS, results.timings, strict=True)
        if s.make is not None
    ]
    return header, rows


def show(title: str, table: tuple[list[str], list[list[str]]]) -> None:
    """Print a table."""
    header, rows = table
    drawn = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        drawn.add_column(name, justify="left" if i == 0 or rows[0][i][-1].isalpha() else "right")
    for row in rows:
        drawn.add_row(*row)
    rich.print(drawn)


def as_markdown(table: tuple[list[str], list[list[str]]]) -> str:
    """A table for a Markdown page."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def circumstances(results: Results, command: str) -> dict[str, Any]:
    """What one must know to read the numbers, and to get them again."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": {
            "bilevel": bilevel.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "cores_used": 1,
            "memory_gib": round(memory / GIB),
        },
        "problem": {
            "name": results.problem,
            "parameters": results.parameters,
            "state_bytes": results.state_bytes,
            "meta_parameters": TRAINING_SIZE,
            "batch_size": BATCH_SIZE,
            "optimizer": "SGD with momentum 0.9",
        },
    }


def write(results: Results, facts: dict[str, Any], found: list[Verdict], folder: Path) -> list[Path]:
    """The numbers as JSON, the tables as Markdown."""
    name = "memory" if results.problem == "mlp" else f"memory-{results.problem}"
    folder.mkdir(parents=True, exist_ok=True)
    points = [{**asdict(point), "extra_bytes": point.extra_bytes} for point in results.points]
    times = [
        asdict(timing) | {"units": {T: timing.units(T) for T in timing.call_seconds}} for timing in results.timings
    ]
    content = {**facts, "points": points, "times": times, "verdicts": [asdict(v) for v in found]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    machine, problem, versions = facts["machine"], facts["problem"], facts["versions"]
    single = [f"{p.estimator} at T = {p.steps} ({len(p.runs)})" for p in results.points if 0 < len(p.runs) < 3]
    fewer = f" Fewer runs, because they are long: {', '.join(single)}." if single else ""
    page = f"""# Peak memory and time of the estimators: {problem["name"]} on digits

    {facts["command"]}

{facts["date"]}; {", ".join(f"{k} {v}" for k, v in versions.items())}; {machine["system"]} on {machine["architecture"]},
one of {machine["cores"]} cores, {machine["memory_gib"]} GiB of memory, no GPU.

Inner problem: {problem["parameters"]:,} parameters, {problem["optimizer"]}, batches of {problem["batch_size"]} real
digits; meta parameters: the weights of {problem["meta_parameters"]:,} training examples; float32. One state, parameters
and momentum, is {problem["state_bytes"] / 2**20:.2f} MiB.

{as_markdown(main_rows(results))}

Memory: how far the peak of resident memory during one call rises above what was resident before it, in a process of
its own for every number; median of 3 processes.{fewer} The allocator is told to return what is freed. Besides
tensors the numbers contain what Python itself takes: reference cycles that PyTorch's tree functions leave at every step
wait for the garbage collector, and its free lists fill up, up to about half a MiB within the first thousand steps.
Units: process time of a call over that of one plain inner step, the plain inner loop being timed in the same process;
with the allocator as it comes, one thread, medians.

{chr(10).join(f"- {str(verdict).strip()}" for verdict in found)}

What the docstrings claim, and what was found:

{as_markdown(claim_rows(results))}
"""
    (folder / f"{name}.md").write_text(page)
    return [folder / f"{name}.json", folder / f"{name}.md"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=sorted(NETWORKS), default="mlp", help="the inner model")
    parser.add_argument("--quick", action="store_true", help="T = 10, 100, each point once")
    parser.add_argument("--limit-gib", type=float, default=6.0, help="skip points expected to need more memory")
    parser.add_argument("--out", type=Path, help="folder for the results (default: beside this file, unless --quick)")
    for name in ("--child", "--estimator", "--data"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def command_line(arguments: argparse.Namespace) -> str:
    """The command that gives these numbers again."""
    command = f"python benchmarks/memory.py --problem {arguments.problem}"
    command += " --quick" if arguments.quick else ""
    return command + ("" if arguments.limit_gib == 6 else f" --limit-gib {arguments.limit_gib:g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if what must be flat is not."""
    arguments = parse(argv)
    if arguments.child:
        run_child(arguments)
        return 0
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise SystemExit(
            "the peak of resident memory is read from Linux's /proc/self/clear_refs and /proc/self/status, which this "
            "system does not offer; run it on Linux, in a container if need be"
        )
    from sklearn.datasets import load_digits  # here, so that the child processes start without it

    with tempfile.TemporaryDirectory() as folder:
        images, labels = load_digits(return_X_y=True)
        data = Path(folder) / "digits.npz"
        np.savez(data, images=np.asarray(images, np.float32) / 16, labels=np.asarray(labels, np.int64))
        steps, repeats = (STEPS[:2], 1) if arguments.quick else (STEPS, 3)
        results = measure(arguments.problem, data, steps, repeats, arguments.limit_gib * GIB)
    found = list(verdicts(results))
    facts = circumstances(results, command_line(arguments))
    state = f"{results.parameters:,} parameters, one state {results.state_bytes / 2**20:.2f} MiB"
    show(f"Extra peak memory and time: {results.problem}, {state}", main_rows(results))
    show("Claims of the docstrings", claim_rows(results))
    for verdict in found:
        print(verdict)
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results")
    if out is not None:
        for path in write(results, facts, found, out):
            print(f"written: {path.name}")
    return int(any(v.decides and not v.holds for v in found))


if __name__ == "__main__":
    sys.exit(main())
