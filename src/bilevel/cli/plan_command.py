"""The command `bilevel plan`: its options and its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from bilevel.checks import whole_number
from bilevel.cli.method_tables import Field, Row, print_methods
from bilevel.estimators import ZerothOrder, names
from bilevel.planning import planner

if TYPE_CHECKING:
    from bilevel.tasks.task import Setup

USAGE = """usage: bilevel plan TASK [--memory 4GB] [options]
       bilevel plan --params M --meta-params N --steps T [--memory 80GB] [options]

The first form measures one inner step of a task and predicts the memory and the time of every estimator on it. The
second form needs no task and no machine: it counts from the number of inner parameters M, of meta parameters N and of
inner steps T. Both recommend an estimator and say why. For example:

  bilevel plan condensation --memory 20MB
  bilevel plan --params 1.5e9 --meta-params 8e7 --steps 48 --workers 64 --memory 80GB

`bilevel list` names the tasks; `bilevel plan --params 1 --help` and `bilevel plan TASK --help` show all options. In a
program, bilevel.plan(problem, meta, inner_batches, outer_batch, memory="8GB") does the same for your own problem."""
FROM_SIZES = "Memory and time of every estimator from sizes alone; times in units of one inner gradient."


@dataclass(frozen=True)
class PlanOptions:
    """The options of `bilevel plan TASK`, in addition to the settings of the task."""

    memory: str = "4GB"
    """Memory that a worker may use beyond the model and the data, such as 8GB or 512MiB."""
    directions: int = 16
    """Random directions, where a method has them."""
    workers: int = 1
    """The number of workers that share the directions."""
    seed: int = 0
    """The seed of the inner step that is measured."""
    data_dir: Path | None = None
    """Folder with the data files, for presets that need files."""


@dataclass(frozen=True)
class SizeOptions:
    """Options of `bilevel plan` without a task."""

    params: float | None = None
    """M, inner parameters, such as 1.5e9."""
    meta_params: float | None = None
    """N, meta parameters."""
    steps: int | None = None
    """T, inner steps."""
    memory: str = "80GB"
    """Memory that a worker may use beyond the model and the data."""
    directions: int = 64
    """Random directions, where a method has them."""
    workers: int = 1
    """The number of workers that share the directions."""
    optimizer_memory: float = 2
    """Numbers that the inner optimiser keeps for each parameter: 0 for SGD, 1 with momentum, 2 for Adam."""
    bytes_per_number: float = 4
    """Bytes of a number, 4 for float32."""
    activation_bytes: float = 0
    """Bytes of the activations of one inner forward pass."""


def plan_task(setup: Setup, options: PlanOptions) -> planner.Plan:
    """Return the plan for the inner loop of a task at its starting point."""
    return planner.plan(
        setup.problem,
        setup.meta,
        setup.inner_batches_of(draw=0),
        setup.outer_batch_of(draw=0),
        options.seed,
        memory=options.memory,
        directions=options.directions,
        workers=options.workers,
    )


def plan_from_sizes(options: SizeOptions) -> planner.Plan:
    """Return the plan that follows from sizes alone."""
    params, meta_params, steps = options.params, options.meta_params, options.steps
    if params is None or meta_params is None or steps is None:
        sizes = {"--params": params, "--meta-params": meta_params, "--steps": steps}
        missing = ", ".join(flag for flag, size in sizes.items() if size is None)
        raise ValueError(
            f"{missing} missing: a plan from sizes needs --params, --meta-params and --steps; `bilevel plan` without "
            "arguments explains both kinds of plans"
        )
    for flag, size in (("--params", params), ("--meta-params", meta_params)):
        if not 1 <= size < float("inf"):
            raise ValueError(f"{flag} {size}: a number of at least 1 is needed")
    whole_number(steps, "steps")
    return planner.plan_from_sizes(
        params,
        meta_params,
        steps,
        memory=options.memory,
        directions=options.directions,
        workers=options.workers,
        optimizer_memory=options.optimizer_memory,
        bytes_per_number=options.bytes_per_number,
        activation_bytes=options.activation_bytes,
    )


def show(plan: planner.Plan, where: str, in_units: bool = False) -> None:
    """Print the table and the recommendation."""
    shared = plan.workers > 1
    title = f"{where}: N = {plan.costs.meta_size}, T = {plan.steps}, {planner.size_text(plan.memory)}"
    fields = [
        Field("error", "left", wraps=True),
        Field("memory"),
        Field("units" if in_units else "seconds"),
        Field("fits", "left"),
        *([Field("exchange", "left"), Field("sent a step")] if shared else []),
    ]
    rows = [
        Row(
            names.describe(row.estimator),
            [
                error_text(row),
                planner.size_text(row.bytes),
                f"{row.seconds:.3g}",
                "yes" if row.fits else "no",
                *(exchange_texts(row) if shared else ()),
            ],
            bold=row.estimator == plan.recommended,
        )
        for row in plan.rows
    ]
    console = Console()
    print_methods(console, f"{title} for each of {plan.workers} workers" if shared else title, fields, rows)
    advice = "none" if plan.recommended is None else names.describe(plan.recommended)
    console.print(Text(f"recommended: {advice}"), soft_wrap=True)
    console.print(Text(f"because {plan.reason}." if plan.recommended else f"{plan.reason}."))


def exchange_texts(row: planner.PlanRow) -> tuple[str, str]:
    """Return the data that several workers exchange, and the amount that each of them sends, as texts."""
    return ("nothing", "–") if row.sent_bytes is None else (str(row.exchange), planner.size_text(row.sent_bytes))


def error_text(row: planner.PlanRow) -> str:
    """Return the known properties of a method's error as text."""
    if row.relative_variance is None:
        return "biased"
    if row.exact:
        return "exact"
    noise = f"relative variance {row.relative_variance:.3g}"
    return f"{noise}, O(step²)" if isinstance(row.estimator, ZerothOrder) else noise
