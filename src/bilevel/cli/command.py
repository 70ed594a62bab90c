"""The command `bilevel`: list, run, evaluate, compare, check, plan, report, completion."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bilevel import __version__, checks, distributed, trees
from bilevel.checking.check import check
from bilevel.cli import arguments, completion, evaluate_command
from bilevel.cli.check_options import CheckOptions
from bilevel.cli.compare_options import CompareOptions
from bilevel.cli.method_tables import Field, Row, print_methods
from bilevel.comparison import compare, plot
from bilevel.errors import BilevelError, Terminated
from bilevel.estimators import names
from bilevel.planning import registry
from bilevel.report.files import write_json
from bilevel.training import metrics, run_page
from bilevel.training.run_record import CHECKPOINT
from bilevel.unrolling import freed_memory

if TYPE_CHECKING:
    from bilevel.tasks.task import Task

_USAGE = """usage: bilevel COMMAND ...

  list                    the tasks, their presets, and the estimators
  run TASK [options]      train, evaluate, write a folder with results and a report
  evaluate DIR [options]  evaluate the result of a run again, with other networks or more repetitions
  compare TASK [options]  several estimators at one point, against the exact hypergradient
  check TASK [options]    the task's problem beside a plain PyTorch loop, and its derivatives beside differences
  plan TASK [options]     memory and time of every estimator, and which one to take
  plan --params 1.5e9 ... the same from sizes alone, for a machine that is not at hand
  report DIR              make the report of a finished run again, or that of a fit in your own script
  report DIR DIR ...      a page with several runs of a task side by side
  completion bash         print a script that completes commands and options in a shell

Several processes share a run: torchrun --nproc-per-node 2 --module bilevel run TASK [options]; with --max-restarts 3
the run goes on from its checkpoint when one of them dies.
`bilevel run TASK --help` shows all options of a task, `bilevel --version` the version."""

_BROKEN_PIPE = 141
"""128 and the number of SIGPIPE, the exit code that a shell reports for a program whose reader has gone."""
_OPTIONAL_PACKAGES = {"tyro", "docstring_parser", "jinja2", "matplotlib", "PIL", "sklearn", "scipy", "tensorboard"}
_LANGUAGE_PACKAGES = {"transformers", "tokenizers", "peft"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. What a user can put right ends with one message and exit code 1 (2 for a wrong command)."""
    try:
        try:
            _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        raise SystemExit(_BROKEN_PIPE) from None


def _main(argv: Sequence[str] | None) -> None:
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if command == "--version":
        print(f"bilevel {__version__}")
        return
    commands: dict[str, Callable[[list[str]], None]] = {
        "list": _list,
        "run": _run,
        "evaluate": evaluate_command.run,
        "compare": _compare,
        "check": _check,
        "plan": _plan,
        "report": _report,
        "completion": _completion,
    }
    helps = ("-h", "--help")
    if command in (*helps, "help") or (
        command in commands and command not in ("run", "evaluate") and rest[:1] in ([h] for h in helps)
    ):
        print(_USAGE)
        return
    if command not in commands:
        _fail(f"there is no command {command!r}{checks.did_you_mean(command, commands)}\n\n{_USAGE}", code=2)
    rank = distributed.rank_in_environment()
    if rank and command != "run":  # only a run has anything to share
        return
    with warnings.catch_warnings(), _quiet(rank) if rank else nullcontext():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}", "yellow")
        try:
            _recorded(commands[command])(rest)
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if package not in _OPTIONAL_PACKAGES | _LANGUAGE_PACKAGES:
                raise
            extra = "lm" if package in _LANGUAGE_PACKAGES else "tasks"
            _fail(f"this needs the package {package}: pip install 'bilevel[{extra}]'", code=1)
        except BrokenPipeError:
            raise
        except (BilevelError, ValueError, OSError) as error:
            _fail(str(error), code=1)
        except KeyboardInterrupt as error:
            _fail(str(error) or "interrupted", code=130)
        except Terminated as error:
            _fail(str(error.__cause__ or "terminated"), code=143)


def _list(rest: list[str]) -> None:
    from bilevel.tasks.registry import TASKS

    if rest:
        raise ValueError(f"bilevel list takes no arguments, but was given {' '.join(rest)}")
    console = Console()
    tasks = Table(
        Column("task", no_wrap=True),
        Column("preset", no_wrap=True),
        "what it is",
        title="tasks",
        title_justify="left",
    )
    for task in TASKS.values():
        for i, (name, preset) in enumerate(task.presets.items()):
            tasks.add_row(task.name if i == 0 else "", name, preset.summary)
    console.print(tasks)
    settings = [f"{setting}," for kind in registry.by_name().values() for setting in names.settings_of(kind)]
    estimators = Table(
        Column("estimator", no_wrap=True),
        Column("settings", min_width=max(map(len, settings))),
        "what it is",
        title="estimators",
        title_justify="left",
    )
    for name, kind in registry.by_name().items():
        summary = (kind.__doc__ or "").split(". ")[0].split("\n")[0]
        estimators.add_row(name, ", ".join(names.settings_of(kind)), summary)
    console.print(estimators)


def _run(rest: list[str]) -> None:
    from bilevel.tasks import run_folder, running
    from bilevel.tasks.options import RunOptions

    if rest[:1] in (["-h"], ["--help"]):
        print(f"{_USAGE}\n\nOptions that all tasks share:\n\n{_common_options()}")
        return
    task, preset = _task_and_preset("run", rest)
    _, options, config, settings = arguments.parse(
        f"bilevel run {task.name}",
        f"{task.summary[:1].upper()}{task.summary[1:]}.",
        rest[1:],
        preset=_preset_option(task, preset),
        run=RunOptions(),
        task=task.presets[preset].config,
        estimator=arguments.estimator_settings(taken=task.presets[preset].config),
    )
    freed_memory.keep_freed_memory()
    folder = run_folder.folder_of(task, options)
    try:
        results = running.run(task, task.presets[preset], config, options, arguments.given(settings))
    except (KeyboardInterrupt, Terminated) as error:
        if not ((folder / CHECKPOINT).exists() or (folder / run_folder.STAGES).exists()):
            raise
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else "terminated"
        message = KeyboardInterrupt(f"{what}; {folder} holds a checkpoint: go on with --resume")
        if isinstance(error, KeyboardInterrupt):
            raise message from None
        raise Terminated from message
    if not results:  # another worker has them
        return
    table = Table(show_header=False, box=None)
    for name, value in task.headline(results):
        table.add_row(name, value)
    Console().print(table)
    print(f"report: {folder / run_folder.REPORT}")


def _compare(rest: list[str]) -> None:
    from bilevel.tasks import running

    task, preset = _task_and_preset("compare", rest)
    _, options, config = arguments.parse(
        f"bilevel compare {task.name}",
        "The hypergradient at the task's starting point by several estimators, against the exact one.",
        rest[1:],
        preset=_preset_option(task, preset),
        compare=CompareOptions(),
        task=task.presets[preset].config,
    )
    if not options.estimators:
        raise ValueError(f"--estimators needs at least one; there are {', '.join(registry.by_name())}")
    estimators = [registry.parse(text) for text in options.estimators]
    setup = task.setup(config, options.data_dir, 1, options.seed)
    if setup.problem.is_black_box:
        raise ValueError(
            f"with these settings the inner loop of {task.name} is a black box, without the exact hypergradient that "
            "estimators are compared with; choose settings with which it can be differentiated"
        )
    inner_batches = setup.inner_batches_of(draw=0)
    rows = compare.compare(
        running.compiled(setup.problem, options.compile),
        setup.meta,
        inner_batches,
        setup.outer_batch_of(draw=0),
        options.seed,
        estimators=estimators,
        repeats=options.repeats,
        progress=True,
    )
    if options.out is not None:
        plot.write(options.out.with_suffix(".png"), rows, task.name)
        write_json(options.out, {"task": task.name, "rows": compare.as_dicts(rows), "versions": running.versions()})
    console = Console()
    point = f"{task.name} at its starting point: N = {trees.size(setup.meta)} meta parameters"
    title = f"{point}, T = {len(setup.problem.batches_of(inner_batches))}"
    print_methods(console, title, *_comparison_table(rows))
    console.print(
        "relative error: ‖estimate − exact‖/‖exact‖; standard error: what the estimator expects of itself, likewise "
        "relative; ±: 95 % intervals, from --repeats 3 on; units: "
        "process time over that of the inner loop alone. Times are the best of up to three.",
        style="dim",
    )


def _check(rest: list[str]) -> None:
    task, preset = _task_and_preset("check", rest)
    _, options, config = arguments.parse(
        f"bilevel check {task.name}",
        "The task's problem at its starting point beside a plain PyTorch loop, and its derivatives beside differences. "
        "Exit code: 0 if all is right, 1 if something is wrong, 3 if something could not be judged.",
        rest[1:],
        preset=_preset_option(task, preset),
        check=CheckOptions(),
        task=task.presets[preset].config,
    )
    setup = task.setup(config, options.data_dir, 1, options.seed)
    report = check(
        setup.problem,
        setup.meta,
        setup.inner_batches_of(draw=0),
        setup.outer_batch_of(draw=0),
        options.seed,
        estimators=[registry.parse(text) for text in options.estimators] or None,
        stable=options.stable,
        budget=options.budget,
    )
    print(report)
    if options.out is not None:
        report.save(options.out)
    raise SystemExit(report.exit_code)


def _comparison_table(compared: Sequence[compare.ComparisonRow]) -> tuple[list[Field], list[Row]]:
    """Return the columns and the numbers of each method."""
    headers = ["relative error", "bias²", "variance", "cosine", "standard error", "units", "seconds", "memory, MiB"]
    if any(row.compile_seconds is not None for row in compared):
        headers.append("compiling, s")
    rows = [
        Row(
            row.estimator,
            [
                _with_interval(row, "relative_error"),
                _with_interval(row, "squared_bias"),
                _with_interval(row, "variance"),
                _with_interval(row, "cosine"),
                "–" if row.standard_error is None else f"{row.standard_error:.3g}",
                f"{row.units:.1f}",
                f"{row.seconds:.2f}",
                "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f}",
                *([] if row.compile_seconds is None else [f"{row.compile_seconds:.1f}"]),
            ],
        )
        for row in compared
    ]
    return [Field(header) for header in headers], rows


def _with_interval(row: compare.ComparisonRow, name: str) -> str:
    value = getattr(row, name)
    if value is None:
        return "–"
    text = f"{value:.4f}" if name == "cosine" else f"{value:.3g}"
    return f"{text} ± {row.half_widths[name]:.2g}" if name in row.half_widths else text


def _plan(rest: list[str]) -> None:
    from bilevel.cli import plan_command

    if not rest:
        print(plan_command.USAGE)
        return
    if rest[0].startswith("-"):
        (sizes,) = arguments.parse("bilevel plan", plan_command.FROM_SIZES, rest, sizes=plan_command.SizeOptions())
        plan_command.show(plan_command.plan_from_sizes(sizes), "from sizes", in_units=True)
        return
    task, preset = _task_and_preset("plan", rest)
    _, options, config = arguments.parse(
        f"bilevel plan {task.name}",
        "The memory and time that every estimator will take on this task, and which one to take.",
        rest[1:],
        preset=_preset_option(task, preset),
        plan=plan_command.PlanOptions(),
        task=task.presets[preset].config,
    )
    freed_memory.keep_freed_memory()  # as a run does, whose times are predicted
    setup = task.setup(config, options.data_dir, 1, options.seed)
    plan_command.show(plan_command.plan_task(setup, options), task.name)


def _report(rest: list[str]) -> None:
    from bilevel.tasks import run_folder, running, side_by_side
    from bilevel.tasks.registry import TASKS

    if not rest or any(word.startswith("-") for word in rest):
        raise ValueError("usage: bilevel report DIR [DIR ...], the folders of finished runs")
    if len(rest) > 1:
        folders = [Path(word) for word in rest]
        print(f"report: {side_by_side.write(Path('comparison.html'), TASKS, folders)}")
        return
    folder = Path(rest[0])
    if not (folder / run_folder.CONFIG).exists() and metrics.exist(folder):  # fit in a script of the user's
        print(f"report: {run_page.write_run_page(folder)}")
        return
    name = run_folder.read_json(folder / run_folder.CONFIG).get("task")
    if name not in TASKS:
        raise ValueError(f"{folder} holds a run of task {name!r}; there are {', '.join(TASKS)}")
    print(f"report: {running.write_report(TASKS[name], folder)}")


def _completion(rest: list[str]) -> None:
    if rest != ["bash"]:
        raise ValueError("usage: bilevel completion bash; zsh takes the same script after bashcompinit")
    print(completion.bash_script())


def _common_options() -> str:
    """Return a line or two for each option that `bilevel run` has for every task."""
    from docstring_parser import parse_from_object

    from bilevel.tasks.options import RunOptions

    lines = ["  --preset NAME\n      The configuration to start from; `bilevel list` names them."]
    kinds = {"int": " INT", "float": " FLOAT", "Path": " DIR", "bool": ""}
    texts = {found.arg_name: found.description for found in parse_from_object(RunOptions).params}
    for option in fields(RunOptions):
        kind = str(option.type).removesuffix(" | None")
        flag = arguments.flag(option.name) + (f" {name}" if (name := option.metadata.get("metavar")) else kinds[kind])
        default = "" if option.default is None or option.default is False else f" (default: {option.default})"
        lines.append(f"  {flag}\n      {texts[option.name]}{default}")
    return "\n".join(lines)


def _task_and_preset(command: str, rest: list[str]) -> tuple[Task[Any], str]:
    """The task that the first argument names, and the preset that --preset names among the others.

    The preset decides on the defaults of the flags, so it is read before they are.
    """
    from bilevel.tasks.registry import TASKS

    if not rest or rest[0] not in TASKS:
        wrong = f"there is no task {rest[0]!r}{checks.did_you_mean(rest[0], TASKS)}" if rest else "a task is needed"
        raise ValueError(f"{wrong}; there are {', '.join(TASKS)}: bilevel {command} {next(iter(TASKS))} [options]")
    task = TASKS[rest[0]]
    preset = next(iter(task.presets))
    for flag, following in zip(rest, [*rest[1:], "-"], strict=True):
        if flag == "--preset" and not following.startswith("-"):
            preset = following
        elif flag.startswith("--preset="):
            preset = flag.removeprefix("--preset=")
    if preset not in task.presets:
        meant = checks.did_you_mean(preset, task.presets)
        raise ValueError(f"{task.name} has no preset {preset!r}{meant}; there are {', '.join(task.presets)}")
    return task, preset


def _preset_option(task: Task[Any], chosen: str) -> Any:
    lines = "\n".join(f"{name}: {preset.summary}." for name, preset in task.presets.items())
    title = "The configuration to start from; the defaults below are its own."
    return arguments.choice("preset", list(task.presets), chosen, title, lines)


@contextmanager
def _quiet(rank: int) -> Iterator[None]:
    """Inside, nothing is shown: what all workers say, the first one says. An error that it does not know is shown."""
    shown = sys.stderr
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except SystemExit as end:
            error = end.__context__
            asked = isinstance(error, Terminated)  # torchrun stops all of them, and that is no error
            if error is not None and not asked and distributed.joined() and not distributed.known_to_all(error):
                print(f"bilevel: worker {rank}: {error}", file=shown)
            raise


def _recorded(function: Callable[[list[str]], None]) -> Callable[[list[str]], Any]:
    """Under torchrun, the function with its errors in torchrun's own summary as well."""
    if not distributed.from_environment():
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)


def _say(message: str, style: str) -> None:
    """To standard error, unbroken: messages hold paths and commands to copy."""
    text = Text(f"bilevel: {message}", style)
    Console(stderr=True).print(text, soft_wrap=True)


def _fail(message: str, code: int) -> NoReturn:
    _say(message, "red")
    raise SystemExit(code)
