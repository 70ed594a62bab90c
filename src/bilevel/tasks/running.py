"""Run a task from its configuration to a folder with results and a report."""

from __future__ import annotations

import dataclasses
import importlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bilevel import distributed
from bilevel.compilation.compiled_gradient import compile_seconds
from bilevel.distributed.workers import Workers
from bilevel.estimators import names
from bilevel.problem import BilevelProblem
from bilevel.report import page
from bilevel.report.files import write_json
from bilevel.report.tf32 import gpu_and_tf32
from bilevel.tasks.options import RunOptions, describe, make_phases
from bilevel.tasks.run_folder import CONFIG, LENGTHS, REPORT, RESULTS, claimed, folder_of, read_json
from bilevel.tasks.task import Preset, Setup, Task, Trained
from bilevel.training import metrics
from bilevel.training.fit import FitResult, fit
from bilevel.training.outer_loop import OuterStep
from bilevel.training.phases import Phase
from bilevel.training.settings import RunFolder


def run(
    task: Task[Any],
    preset: Preset[Any],
    config: Any,
    options: RunOptions,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, evaluate, write `config.json`, `metrics.jsonl`, `results.json` and `report.html`, and return the results.

    Wrong settings are refused before anything is written. A run whose first outer step fails leaves no files. Under
    torchrun, the workers share the training. The first worker evaluates and writes the files.

    Args:
        task: the task.
        preset: the preset from which the options that were not given are taken.
        config: the settings of the task.
        options: the options of the run.
        settings: settings of the estimators; see `options.make_phases`.
        progress: whether to show progress bars.

    Returns:
        The content of `results.json`. Workers other than the first return an empty dict.
    """
    for package in ("jinja2", "matplotlib", *(["tensorboard"] if options.tensorboard else [])):
        importlib.import_module(package)  # a missing package is reported now and not after the training
    phases = make_phases(task.adapted(preset, config), options, settings or {})
    outer_steps = sum(phase.steps for phase in phases)
    folder = folder_of(task, options)
    written = _settings(task, config, options, phases)
    workers = distributed.join_workers(options.timeout)
    resume = workers.any("resuming", options.resume or distributed.restarted())
    training = _Training(options, phases, written, resume)
    with ExitStack() as claim:
        if_first = claimed(folder, written, resume) if workers.first else nullcontext()
        workers.together("the run's folder", lambda: claim.enter_context(if_first))
        task = _prepared(task, workers, config, options, folder, progress)
        setup = task.setup(config, options.data_dir, outer_steps, options.seed)
        _require_derivatives(setup.problem, phases)
        compiled(setup.problem, options.compile)
        fitted = training.of(setup, folder, task.callbacks(folder, outer_steps, setup.meta), progress, workers)
    if not workers.first:
        return {}
    began = time.perf_counter()
    judged = task.judge(
        Trained(
            config,
            options.data_dir,
            folder,
            fitted.meta,
            outer_steps,
            options.seed,
            progress,
            fit=lambda setup, name: training.of(setup, folder / name, [], progress=False, workers=Workers()).meta,
        )
    )
    outer_seconds = fitted.history[-1]["seconds"]
    results = {
        "task": task.name,
        "phases": written["phases"],
        **judged,
        "seconds": round(outer_seconds + time.perf_counter() - began, 2),
        "outer_loop_seconds": round(outer_seconds, 2),
        **({} if options.compile is None else {"compile_seconds": round(compile_seconds(), 2)}),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
    }
    write_json(folder / RESULTS, results)
    write_report(task, folder)
    return results


def _settings(task: Task[Any], config: Any, options: RunOptions, phases: Sequence[Phase]) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "task": task.name,
        **dataclasses.asdict(config),
        "phases": [describe(phase) for phase in phases],
        "outer_steps": sum(phase.steps for phase in phases),
        "accumulate": phases[-1].accumulate,
        "seed": options.seed,
        **({} if options.compile is None else {"compile": options.compile}),
    }


@dataclass(frozen=True)
class _Training:
    """The training of a run, which can be applied to each setup of its task."""

    options: RunOptions
    phases: list[Phase]
    written: Mapping[str, Any]
    resume: bool

    def of(
        self,
        setup: Setup,
        out: Path,
        callbacks: Sequence[Callable[[OuterStep], None]],
        progress: bool,
        workers: Workers,
    ) -> FitResult:
        """Run the outer loop of a setup."""
        return fit(
            compiled(setup.problem, self.options.compile),
            setup.meta,
            setup.inner_batches,
            setup.outer_batch,
            self.options.seed,
            phases=self.phases,
            optimizer=setup.optimizer,
            update=setup.update,
            stream=setup.stream,
            callbacks=[*callbacks, *setup.callbacks, *(recorder(out) for recorder in setup.recorders)],
            out=RunFolder(
                out,
                resume=self.resume,
                checkpoint_every=self.options.checkpoint_every,
                tensorboard=self.options.tensorboard,
                config={k: v for k, v in self.written.items() if k not in LENGTHS},
            ),
            progress=progress,
            workers=workers,
        )


def _prepared(
    task: Task[Any], workers: Workers, config: Any, options: RunOptions, folder: Path, progress: bool
) -> Task[Any]:
    """Run the task's stages before the outer loop. The first worker computes them, and the others read its files."""

    def prepare(progress: bool) -> Task[Any]:
        return task.prepared(config, options.data_dir, folder, options.seed, progress)

    made = workers.together("the stages before the outer loop", lambda: prepare(progress) if workers.first else task)
    return made if workers.first else prepare(False)


def _require_derivatives(problem: BilevelProblem, phases: Sequence[Phase]) -> None:
    """Raise a ValueError if an estimator needs derivatives of a problem that has none, before anything is written."""
    for phase in phases:
        if problem.is_black_box and phase.estimator.needs_derivatives:
            raise ValueError(
                f"{names.describe(phase.estimator)} differentiates the inner loop, and here that is a black box "
                "without derivatives: take zeroth-order, or settings of the task with which it can be differentiated"
            )


def compiled(problem: BilevelProblem, backend: str | None) -> BilevelProblem:
    """Return the problem, compiled if a backend is named.

    Raises:
        ValueError: the problem has no inner gradient that could be compiled.
    """
    if backend is None:
        return problem
    if (descent := problem.as_gradient_descent) is None:
        raise ValueError(
            f"--compile {backend}: the gradient of an inner loss is what is compiled, and with these settings the task "
            f"has none: its inner loop is a {type(problem).__name__}"
        )
    return descent.compiled(backend)


def write_report(task: Task[Any], folder: Path) -> Path:
    """Write `report.html` from the files of a finished run, and return its path."""
    config, results = read_json(folder / CONFIG), read_json(folder / RESULTS)
    rows = metrics.read(folder / metrics.FILE)
    headline = [
        *task.headline(results),
        ("outer loop", f"{results['outer_loop_seconds']:.0f} s"),
        *([("compiling, besides", f"{results['compile_seconds']:.0f} s")] if "compile_seconds" in results else []),
        ("peak memory of the process", f"{results['peak_memory_bytes'] / 2**20:.0f} MiB"),
    ]
    sections = [
        *task.sections(folder, results),
        page.curves(rows, config["phases"]),
        page.settings({**config, **{f"version of {k}": v for k, v in results["versions"].items()}}),
    ]
    subtitle = (
        f"Task: {task.summary}. {len(rows)} outer steps, seed {config['seed']}: {', then '.join(config['phases'])}"
    )
    page.write(folder / REPORT, f"bilevel: {task.name}", subtitle, headline, sections)
    return folder / REPORT


def peak_memory_bytes() -> int:
    """Return the peak memory of this process in bytes. On a GPU, it is the largest memory that torch has allocated."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions of the software on which the numbers of a run depend."""
    found = {"bilevel": metadata.version("bilevel"), "torch": torch.__version__, "python": platform.python_version()}
    return {**found, **gpu_and_tf32()}
