"""The parts of `benchmarks/gpu.py`: what each measures, and the columns of its table.

A part is a list of jobs with names. A job returns rows, and they are written as soon as it is done. Everything that a
job needs is made in it, so that a part can go on from any job.
"""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gpu_subjects
import torch
from gpu_subjects import Setting

import bilevel
from bilevel.estimators.names import describe
from bilevel.planning.live_memory import counting

ROOT = Path(__file__).parent.parent
MIB = 2**20
Row = dict[str, Any]
Jobs = Mapping[str, Callable[[], list[Row]]]


@dataclass(frozen=True)
class Part:
    """One table."""

    title: str
    says: str
    """What the table shows, and what it is compared with."""
    columns: tuple[str, ...]
    seconds: float
    """The most that the part may take."""
    jobs: Callable[[Setting], Jobs]
    least: float = 5.0
    """The part is not begun with fewer seconds than that, except at toy size."""


@dataclass(frozen=True)
class Measured:
    """One call: its result, its time, and its memory."""

    result: Any
    seconds: float
    held: int
    """Bytes that the device held before the call. Without a GPU, 0."""
    more: int
    """Bytes at the peak above that."""

    @property
    def columns(self) -> Row:
        """Time and memory as columns of a table."""
        whole = {"GiB": round((self.held + self.more) / 2**30, 3)} if self.held else {}
        return {**whole, "more, MiB": round(self.more / MIB, 2), "s": round(self.seconds, 3)}


def measured(device: torch.device, call: Callable[[], Any]) -> Measured:
    """Measure one call: on a GPU the memory that PyTorch allocated there, and without one the live tensors.

    Tensors are counted in a second call, because counting takes time.
    """
    gc.collect()
    if device.type != "cuda":
        began = time.process_time()
        result = call()
        seconds = time.process_time() - began
        with counting() as live:
            call()
        return Measured(result, seconds, 0, live.peak)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held, began = torch.cuda.memory_allocated(device), time.perf_counter()
    result = call()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return Measured(result, seconds, held, torch.cuda.max_memory_allocated(device) - held)


def of_convnet(setting: Setting, subject: Any, estimator: bilevel.Estimator, steps: int, compile: bool = False) -> Row:
    """Measure one estimator on a ConvNet, after a call with few steps that loads and compiles what it needs."""
    problem = subject.problem()
    if compile:
        problem = problem.compiled()
    first = estimator(problem, subject.meta, bilevel.no_batches(min(10, steps)))
    found = measured(setting.device, lambda: estimator(problem, subject.meta, bilevel.no_batches(steps)))
    return {
        **found.columns,
        **({"compile, s": round(first.compile_seconds, 1)} if compile else {}),
        "gradient": found.result.grad,
    }


def without_gradient(row: Row) -> Row:
    """Return the row without what is no column."""
    return {name: value for name, value in row.items() if name != "gradient"}


# -- the tests that need a GPU -----------------------------------------------------------------------------------------


def tests(setting: Setting) -> Jobs:
    """Run the tests that are marked `gpu`."""

    def run() -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/devices", f"--junitxml={report}"]
            done = subprocess.run(
                [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode not in (0, 1):
                raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        return [
            {
                "test": case.get("name", ""),
                "result": outcome(case),
                "s": round(float(case.get("time", 0.0)), 2),
            }
            for case in cases
        ]

    return {"tests": run}


def outcome(case: ElementTree.Element) -> str:
    """Return what became of a test, with the reason."""
    for kind, word in (("skipped", "skipped"), ("failure", "FAILED"), ("error", "ERROR")):
        if (found := case.find(kind)) is not None:
            return f"{word}: {found.get('message', '').splitlines()[0]}"
    return "passed"


# -- hypergradients of the paper's ConvNet -----------------------------------------------------------------------------


def convnets(setting: Setting) -> Jobs:
    """Measure methods on both settings of the condensation."""
    steps = 4 if setting.small else 100
    methods: dict[str, bilevel.Estimator] = {
        'Reverse("graph")': bilevel.Reverse("graph"),
        "Reverse()": bilevel.Reverse(),
        'Reverse(offload="cpu")': bilevel.Reverse(offload="cpu"),
        'Reverse("log")': bilevel.Reverse("log"),
        "TruncatedReverse(2)" if setting.small else "TruncatedReverse(10)": bilevel.TruncatedReverse(
            2 if setting.small else 10
        ),
        "HessianFree()": bilevel.HessianFree(),
    }
    for count, chunk in ((1, 1), (4, 2), (4, 4)) if setting.small else ((1, 1), (32, 8), (32, 32)):
        methods[f"ForwardGradient({count}, chunk_size={chunk})"] = bilevel.ForwardGradient(count, chunk_size=chunk)

    def job(name: str, method: str, autocast: bool) -> Callable[[], list[Row]]:
        def run() -> list[Row]:
            subject = gpu_subjects.convnet(setting, name, autocast)
            row = without_gradient(of_convnet(setting, subject, methods[method], steps))
            return [{"images": name, "T": steps, "method": method + ", bfloat16 autocast" * autocast, **row}]

        return run

    found = {f"{name}, {method}": job(name, method, False) for name in gpu_subjects.FULL for method in methods}
    for name in gpu_subjects.FULL:
        found[f"{name}, autocast"] = job(name, "Reverse()", True)
    return found


# -- hypergradients of language models ---------------------------------------------------------------------------------

PAPER = {
    ("graph", 1): 10.49,
    ("graph", 2): 15.32,
    ("graph", 4): 25.97,
    ("graph", 6): 38.03,
    ("forward", 24): 10.76,
    ("forward", 48): 11.46,
}
"""GiB in the paper's Figure 1, with DistilGPT2: RGU, and (FG)²U with an unknown number of directions at once."""


def language_models(setting: Setting) -> Jobs:
    """Measure methods on the weight model of online-lm."""
    short, long = ((1, 2), (2, 3)) if setting.small else ((1, 2, 4, 6), (24, 48))
    of_gpt2 = (2, 3) if setting.small else (6, 24, 48)
    directions, chunk = (2, 1) if setting.small else (8, 4)

    def job(model: str, method: str, estimator: bilevel.Estimator, steps: int, paper: float | None = None) -> Any:
        def run() -> list[Row]:
            it = gpu_subjects.language_model(setting, model, steps)
            estimator(it.problem, it.weight_model, it.documents[: min(2, steps)], it.outer_batch)
            found = measured(
                setting.device, lambda: estimator(it.problem, it.weight_model, it.documents, it.outer_batch).value
            )
            shown = {} if paper is None or setting.small else {"paper, GiB": paper}
            return [{"model": model, "T": steps, "method": method, **found.columns, **shown}]

        return run

    found: dict[str, Any] = {}
    for steps in short:
        found[f"distilgpt2, graph, {steps}"] = job(
            "distilgpt2", 'Reverse("graph")', bilevel.Reverse("graph"), steps, PAPER.get(("graph", steps))
        )
    for steps in long:
        found[f"distilgpt2, forward, {steps}"] = job(
            "distilgpt2", "ForwardGradient(1)", bilevel.ForwardGradient(1), steps, PAPER.get(("forward", steps))
        )
    exact = bilevel.Reverse("log", offload="cpu")
    in_chunks = bilevel.ForwardGradient(directions, chunk_size=chunk)
    differences = bilevel.ForwardGradient(directions, chunk_size=chunk, tangents="difference")
    for steps in of_gpt2:
        for name, estimator in (
            ('Reverse("log", offload="cpu")', exact),
            (f"ForwardGradient({directions}, chunk_size={chunk})", in_chunks),
            (f'ForwardGradient({directions}, chunk_size={chunk}, tangents="difference")', differences),
        ):
            found[f"gpt2, {name}, {steps}"] = job("gpt2", name, estimator, steps)
    return found


# -- other libraries ---------------------------------------------------------------------------------------------------


def peers(setting: Setting) -> Jobs:
    """Measure this library and others on the same problem."""
    import peer_methods

    others = {
        "TorchOpt": (("torchopt",), peer_methods.through_torchopt),
        "Bergson": (("torchopt", "bergson"), peer_methods.through_bergson),
    }
    ours: dict[str, bilevel.Estimator] = {'Reverse("graph")': bilevel.Reverse("graph"), "Reverse()": bilevel.Reverse()}

    def reference(steps: int) -> torch.Tensor:
        subject = gpu_subjects.convnet(setting, "MNIST-1")
        return bilevel.Reverse("log")(subject.problem(), subject.meta, bilevel.no_batches(steps)).grad

    def job(name: str, steps: int) -> Callable[[], list[Row]]:
        def run() -> list[Row]:
            row: Row = {"T": steps, "method": name}
            packages, function = others.get(name, ((), None))
            missing = [package for package in packages if importlib.util.find_spec(package) is None]
            if missing:
                return [{**row, "remark": f"skipped: the package {missing[0]} is not installed"}]
            subject = gpu_subjects.convnet(setting, "MNIST-1")
            if function is None:
                found = of_convnet(setting, subject, ours[name], steps)
            else:
                try:
                    function(subject, min(2, steps))
                    call = measured(setting.device, lambda: function(subject, steps))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a failure of another library is a result
                    return [{**row, "remark": f"fails: {type(error).__name__}: {str(error).splitlines()[0][:80]}"}]
                found = {**call.columns, "gradient": call.result}
            expected = reference(steps)
            apart = float((found["gradient"].reshape(expected.shape) - expected).norm() / expected.norm())
            return [{**row, **without_gradient(found), "apart": f"{apart:.1e}"}]

        return run

    lengths = (2, 4) if setting.small else (20, 100)
    return {f"{name}, {steps}": job(name, steps) for steps in lengths for name in (*ours, *others)}


# -- compiled code -----------------------------------------------------------------------------------------------------


def compiled(setting: Setting) -> Jobs:
    """Measure the same estimates with and without compiled gradients."""
    steps = 4 if setting.small else 50
    count = 2 if setting.small else 8
    methods: dict[str, bilevel.Estimator] = {
        "Reverse()": bilevel.Reverse(),
        f"ForwardGradient({count})": bilevel.ForwardGradient(count),
    }

    def job(method: str) -> Callable[[], list[Row]]:
        def run() -> list[Row]:
            subject = gpu_subjects.convnet(setting, "MNIST-1")
            rows = [of_convnet(setting, subject, methods[method], steps, compile) for compile in (False, True)]
            eager, made = (row["gradient"] for row in rows)
            apart = {"apart": f"{float((made - eager).norm() / eager.norm()):.1e}"}
            return [
                {"method": method, "code": code, "T": steps, **without_gradient(row), **more}
                for code, row, more in zip(("eager", "compiled"), rows, ({}, apart), strict=True)
            ]

        return run

    return {method: job(method) for method in methods}


# -- the planner -------------------------------------------------------------------------------------------------------


def planner(setting: Setting) -> Jobs:
    """Compare the planner's predictions with what is measured."""
    steps = 4 if setting.small else 50

    def run() -> list[Row]:
        subject = gpu_subjects.convnet(setting, "MNIST-1")
        problem, batches = subject.problem(), bilevel.no_batches(steps)
        rows = []
        for row in bilevel.plan(problem, subject.meta, batches, memory="64GB", directions=4).rows:
            row.estimator(problem, subject.meta, bilevel.no_batches(min(10, steps)))
            estimator = row.estimator
            found = measured(setting.device, lambda estimator=estimator: estimator(problem, subject.meta, batches))
            rows.append(
                {
                    "method": describe(row.estimator),
                    "T": steps,
                    "predicted, MiB": round(row.bytes / MIB, 2),
                    "more, MiB": round(found.more / MIB, 2),
                    "predicted, s": round(row.seconds, 3),
                    "s": round(found.seconds, 3),
                }
            )
        return rows

    return {"plan": run}


# -- condensation for a time -------------------------------------------------------------------------------------------


def condensation(setting: Setting) -> Jobs:
    """Condense digits for a fixed time by two methods, and train new networks on the result."""
    methods: dict[str, bilevel.Estimator] = {
        "Reverse()": bilevel.Reverse(),
        "ForwardGradient(4)" if setting.small else "ForwardGradient(32)": bilevel.ForwardGradient(
            4 if setting.small else 32
        ),
    }
    evaluation_steps, networks = (20, 2) if setting.small else (1000, 3)
    seconds = setting.seconds / len(methods) * 0.9  # the rest is for training the networks

    def job(method: str) -> Callable[[], list[Row]]:
        def run() -> list[Row]:
            it = gpu_subjects.condensing(setting)
            torch.manual_seed(0)
            start = torch.rand(gpu_subjects.CLASSES, *it.data.shape).to(setting.device)
            began = time.perf_counter()

            def stop_in_time(step: Any) -> None:
                if time.perf_counter() - began > seconds:
                    step.stop()

            fitted = bilevel.fit(
                it.problem(),
                start,
                it.steps,
                it.real_batch,
                estimator=methods[method],
                steps=10_000,
                optimizer=bilevel.optimizer(torch.optim.Adam, lr=1e-2),
                update=bilevel.OuterUpdate(project=lambda x: x.clamp(0, 1)),
                callbacks=[stop_in_time],
                progress=False,
            )
            taken = time.perf_counter() - began
            found = {}
            for name, pixels in (("accuracy, %", fitted.meta), ("before, %", start)):
                each = [100 * it.accuracy(pixels, evaluation_steps, seed) for seed in range(networks)]
                found[name] = f"{mean(each):.1f} ± {stdev(each):.1f}"
            shown = {"paper, %": 92.32 if method == "Reverse()" else 82.44} if it.data_name == "mnist" else {}
            done = {"outer steps": len(fitted.history), "s": round(taken, 1)}
            return [{"data": it.data_name, "method": method, "T": it.steps, **done, **found, **shown}]

        return run

    return {method: job(method) for method in methods}


PARTS: dict[str, Part] = {
    "tests": Part("Tests on the GPU", "The tests that are marked `gpu`.", ("test", "result", "s"), 90, tests),
    "convnet": Part(
        "One hypergradient of a ConvNet",
        "The paper's ConvNet with the shapes of its condensation of MNIST (one image per class) and CIFAR-10 (ten). "
        "The paper has no figures for these two. For CIFAR-100 with fifty images per class, it gives 3.03 GiB for "
        "truncated reverse mode, 2.87 GiB for Hessian-free and 1.22 to 35.21 GiB for 1 to 32 directions at once.",
        ("images", "T", "method", "GiB", "more, MiB", "s", "remark"),
        60,
        convnets,
    ),
    "language_models": Part(
        "One hypergradient of a weight model for GPT-2",
        "The task online-lm, one document of 512 tokens a step, float32. The paper's figures are of its Figure 1, with "
        "DistilGPT2; it does not say how many directions it carries at once, nor the length of a document.",
        ("model", "T", "method", "GiB", "more, MiB", "s", "paper, GiB", "remark"),
        120,
        language_models,
    ),
    "peers": Part(
        "Other libraries",
        "The ConvNet with the shapes of MNIST, one image per class. The column `apart` is the relative distance from "
        'the gradient of `Reverse("log")`.',
        ("method", "T", "GiB", "more, MiB", "s", "apart", "remark"),
        40,
        peers,
    ),
    "compiled": Part(
        "Eager and compiled",
        "The same problem with and without `compile=True`. The column `apart` is the relative distance of the two "
        "gradients.",
        ("method", "code", "T", "GiB", "more, MiB", "s", "compile, s", "apart", "remark"),
        60,
        compiled,
    ),
    "planner": Part(
        "Predictions of the planner",
        "The same problem: what `plan` predicts from one step, and what a whole call takes.",
        ("method", "T", "predicted, MiB", "more, MiB", "predicted, s", "s", "remark"),
        30,
        planner,
    ),
    "condensation": Part(
        "Condensation for a fixed time",
        "One image per class, with the paper's settings but for the number of outer steps: the paper makes 10,000, "
        "each with 16 accumulated estimates. Accuracy is that of new networks trained on the ten images, before and "
        "after. The paper's figures are for MNIST.",
        ("data", "method", "T", "outer steps", "s", "before, %", "accuracy, %", "paper, %", "remark"),
        300,
        condensation,
        least=120,
    ),
}
