"""The command `bilevel evaluate DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bilevel import checks
from bilevel.cli import arguments

USAGE = """usage: bilevel evaluate DIR [options]

Evaluate the result of a run again, from the checkpoint in its folder: with the settings of the run, or with others,
such as more networks (--evaluation-runs 10), wider ones (--width 128), other kinds (--evaluation-models mlp resnet) or
longer trainings (--evaluation-steps 1000). The run may be unfinished. The results go to DIR/evaluation.json.
`bilevel evaluate DIR --help` shows all settings of the run's task."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What `bilevel evaluate` is told besides the task's own settings."""

    seed: int | None = None
    """Seed of the evaluation; by default that of the run, which repeats the run's own evaluation."""
    data_dir: Path | None = None
    """Folder with the data files of the run, if it needs any."""


def run(rest: Sequence[str]) -> None:
    """Evaluate the run in the folder that the first argument names, and print the results."""
    from bilevel.tasks import evaluating
    from bilevel.tasks.registry import TASKS

    if not rest or rest[0].startswith("-"):
        raise ValueError(f"the folder of a run is needed\n\n{USAGE}")
    folder = Path(rest[0])
    name = evaluating.task_of(folder)
    if name not in TASKS:
        raise ValueError(f"{folder} holds a run of task {name!r}{checks.did_you_mean(name, TASKS)}")
    task = TASKS[name]
    options, config = arguments.parse(
        f"bilevel evaluate {folder}",
        f"Evaluate a run of the task {name} again. The defaults are the settings of the run.",
        rest[1:],
        evaluate=EvaluateOptions(),
        task=evaluating.config_of(task, folder),
    )
    results = evaluating.evaluate(task, folder, config, options.data_dir, options.seed)
    table = Table(show_header=False, box=None)
    for label, value in task.headline(results):
        table.add_row(label, value)
    Console().print(table)
    print(f"results: {folder / evaluating.EVALUATION}")
