"""Run a task from its configuration to a folder with results and a report."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bilevel import checks, distributed, metrics, randomness, report
from bilevel.compiled import compile_seconds
from bilevel.distributed import Workers
from bilevel.errors import CheckpointError, DataError
from bilevel.estimators import names
from bilevel.files import remove_leftovers, write_json
from bilevel.outer_loop import OuterStep
from bilevel.phases import Phase
from bilevel.problem import BlackBox, GradientDescent
from bilevel.run_record import CHECKPOINT
from bilevel.tasks.task import Preset, Setup, Task, Trained
from bilevel.training import FitResult, fit

CONFIG, RESULTS, REPORT, STAGES = "config.json", "results.json", "report.html", "stages"


@dataclass(frozen=True)
class RunOptions:
    """What every task's run is told besides the task's own settings."""

    estimator: str | None = field(default=None, metadata={"metavar": "NAME"})
    """Estimator, such as reverse or "forward-gradient(directions=8)", see `bilevel list`; the preset's by default."""
    phases: tuple[str, ...] | None = field(default=None, metadata={"metavar": "NAME:STEPS[:PATIENCE] ..."})
    """Several estimators in turn, each for STEPS outer steps, or until PATIENCE of them bring no lower outer loss."""
    outer_steps: int | None = None
    """Outer steps, if there is one estimator; the preset's by default."""
    accumulate: int = 1
    """Estimates averaged for each outer step."""
    seed: int = 0
    """Determines every random number of the run."""
    out: Path | None = None
    """Folder for the results; runs/TASK by default."""
    resume: bool = False
    """Go on from the folder's checkpoint; start if there is none."""
    data_dir: Path | None = None
    """Folder with the data files, for presets that need any."""
    checkpoint_every: int = 50
    """Outer steps between two checkpoints."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    compile: str | None = field(default=None, metadata={"metavar": "BACKEND"})
    """Compile the inner gradient and its derivatives with a backend of torch.compile, such as inductor."""
    timeout: float = distributed.TIMEOUT
    """Under torchrun: seconds that a worker waits for another before it is an error."""

    def __post_init__(self) -> None:
        randomness.check_seed(self.seed)
        checks.positive(self.timeout, "timeout")


def make_phases(preset: Preset[Any], options: RunOptions, settings: Mapping[str, Any]) -> list[Phase]:
    """The phases that the options ask for; `settings` go to every estimator that has them."""
    if options.phases is not None and (options.estimator is not None or options.outer_steps is not None):
        raise ValueError("--phases says which estimators run and for how long; drop --estimator and --outer-steps")
    if options.phases is not None:
        specs = [_phase_spec(text) for text in options.phases]
    else:
        steps = preset.outer_steps if options.outer_steps is None else options.outer_steps
        specs = [(options.estimator or preset.estimator, steps, preset.patience)]
    if not specs:
        raise ValueError('--phases needs at least one ESTIMATOR:STEPS, such as --phases hessian-free:50 "reverse:100"')
    phases, used = [], set()
    for text, steps, patience in specs:
        kind, own = names.read(text)
        fitting = {k: v for k, v in settings.items() if k in names.settings_of(kind) and k not in own}
        phases.append(Phase(names.parse(text, **fitting), steps, options.accumulate, patience))
        used |= set(fitting)
    for name in settings:
        if name not in used:
            raise ValueError(f"--{name.replace('_', '-')} has no effect: {_why_unused(name, [s[0] for s in specs])}")
    return phases


def run(
    task: Task[Any],
    preset: Preset[Any],
    config: Any,
    options: RunOptions,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, evaluate, and write `config.json`, `metrics.jsonl`, `results.json` and `report.html`; the results.

    What can be refused is refused before anything is written, and a run whose first outer step fails leaves nothing.
    Under torchrun, the workers share the training; the first one writes, evaluates and has results.
    """
    for package in ("jinja2", "matplotlib", *(["tensorboard"] if options.tensorboard else [])):
        importlib.import_module(package)  # now, not after the training
    phases = make_phases(task.adapted(preset, config), options, settings or {})
    outer_steps = sum(phase.steps for phase in phases)
    folder = folder_of(task, options)
    written = {
        "task": task.name,
        **dataclasses.asdict(config),
        "phases": [_describe(phase) for phase in phases],
        "outer_steps": outer_steps,
        "accumulate": options.accumulate,
        "seed": options.seed,
        **({} if options.compile is None else {"compile": options.compile}),
    }
    workers = distributed.join_workers(options.timeout)
    resume = workers.any("resuming", options.resume or distributed.restarted())

    def train(
        setup: Setup, out: Path, callbacks: Sequence[Callable[[OuterStep], None]], progress: bool, workers: Workers
    ) -> FitResult:
        return fit(
            compiled(setup.problem, options.compile),
            setup.meta,
            setup.inner_batches,
            setup.outer_batch,
            options.seed,
            phases=phases,
            optimizer=setup.optimizer,
            project=setup.project,
            retreats=setup.retreats,
            clip_norm=setup.clip_norm,
            callbacks=[*callbacks, *setup.callbacks],
            out=out,
            resume=resume,
            checkpoint_every=options.checkpoint_every,
            config={k: v for k, v in written.items() if k != "phases"},
            tensorboard=options.tensorboard,
            progress=progress,
            workers=workers,
        )

    with ExitStack() as claim:
        if_first = _claimed(folder, written, resume) if workers.first else nullcontext()
        workers.together("the run's folder", lambda: claim.enter_context(if_first))
        task = _prepared(task, workers, config, options, folder, progress)
        setup = task.setup(config, options.data_dir, outer_steps, options.seed)
        _require_derivatives(setup.problem, phases)
        compiled(setup.problem, options.compile)
        fitted = train(setup, folder, task.callbacks(folder, outer_steps, setup.meta), progress, workers)
    if not workers.first:
        return {}
    began = time.perf_counter()
    trained = Trained(
        config,
        options.data_dir,
        folder,
        fitted.meta,
        outer_steps,
        options.seed,
        progress,
        fit=lambda setup, name: train(setup, folder / name, [], progress=False, workers=Workers()).meta,
    )
    judged = task.judge(trained)
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


def _prepared(
    task: Task[Any], workers: Workers, config: Any, options: RunOptions, folder: Path, progress: bool
) -> Task[Any]:
    """The task with its stages before the outer loop done: by the first worker, from whose files the others read."""

    def prepare(progress: bool) -> Task[Any]:
        return task.prepared(config, options.data_dir, folder, options.seed, progress)

    made = workers.together("the stages before the outer loop", lambda: prepare(progress) if workers.first else task)
    return made if workers.first else prepare(False)


def _require_derivatives(problem: Any, phases: Sequence[Phase]) -> None:
    """Raise before anything is written for an estimator that cannot take this problem."""
    for phase in phases:
        if isinstance(problem, BlackBox) and phase.estimator.needs_derivatives:
            raise ValueError(
                f"{names.describe(phase.estimator)} differentiates the inner loop, and here that is a black box "
                "without derivatives: take zeroth-order, or settings of the task with which it can be differentiated"
            )


def compiled(problem: Any, backend: str | None) -> Any:
    """The problem, compiled if a backend is named."""
    if backend is None:
        return problem
    if not isinstance(problem, GradientDescent):
        raise ValueError(
            f"--compile {backend}: the gradient of an inner loss is what is compiled, and with these settings the task "
            f"has none: its inner loop is a {type(problem).__name__}"
        )
    return problem.compiled(backend)


def folder_of(task: Task[Any], options: RunOptions) -> Path:
    """Where the run's files go."""
    return options.out or Path("runs") / task.name


def write_report(task: Task[Any], folder: Path) -> Path:
    """Make `report.html` from what lies in a finished run's folder."""
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
        report.curves(rows, config["phases"]),
        report.settings({**config, **{f"version of {k}": v for k, v in results["versions"].items()}}),
    ]
    subtitle = (
        f"Task: {task.summary}. {len(rows)} outer steps, seed {config['seed']}: {', then '.join(config['phases'])}"
    )
    report.write(folder / REPORT, f"bilevel: {task.name}", subtitle, headline, sections)
    return folder / REPORT


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run's folder."""
    if not path.is_file():
        raise DataError(f"there is no {path}; the folder of a finished run holds one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} was not written by bilevel: it holds a {type(content).__name__}")
    return content


def peak_memory_bytes() -> int:
    """The most memory this process ever held; on a GPU, the most that torch allocated there."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"bilevel": metadata.version("bilevel"), "torch": torch.__version__, "python": platform.python_version()}


def _phase_spec(text: str) -> tuple[str, int, int | None]:
    head, *counts = text.split(":")
    try:
        steps, *patience = (int(count) for count in counts)
    except ValueError:
        steps, patience = 0, [0, 0]
    if len(patience) > 1:
        raise ValueError(f"--phases {text!r}: write ESTIMATOR:STEPS or ESTIMATOR:STEPS:PATIENCE, as in reverse:100:20")
    return head, steps, patience[0] if patience else None


def _why_unused(setting: str, texts: Sequence[str]) -> str:
    known = {text: names.settings_of(names.read(text)[0]) for text in texts}
    if any(setting in settings for settings in known.values()):
        return f"{', '.join(text for text in texts if setting in known[text])} says it already"
    return "; ".join(f"{text} has no such setting (it has: {', '.join(has)})" for text, has in known.items())


def _describe(phase: Phase) -> str:
    text = f"{names.describe(phase.estimator)}:{phase.steps}"
    return text if phase.patience is None else f"{text}:{phase.patience}"


@contextmanager
def _claimed(folder: Path, config: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Write the run's settings into its folder, unless it holds another run; take them back if it never begins."""
    path = folder / CONFIG
    remove_leftovers(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; --out names a folder")
    if path.exists():
        if not resume:
            raise FileExistsError(f"{folder} already holds a run; go on with it (--resume) or take another --out")
        _require_same_config(folder, read_json(path), json.loads(json.dumps(config)))
        yield
        return
    if _has_begun(folder):
        raise FileExistsError(f"{folder} holds a run without {CONFIG}, so not one of this command; take another --out")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        write_json(path, config)
        yield
    except BaseException:
        if not _has_begun(folder):
            with suppress(OSError):  # the first error is the one to report
                for leftover in (path, folder / metrics.FILE):
                    leftover.unlink(missing_ok=True)
                for place in missing:
                    place.rmdir()
        raise


def _require_same_config(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differing = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if differing:
        lines = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in differing)
        raise CheckpointError(f"{folder} holds a run of another configuration ({lines}); take another --out")


def _has_begun(folder: Path) -> bool:
    return (folder / CHECKPOINT).exists() or bool(metrics.read(folder / metrics.FILE)) or (folder / STAGES).exists()
