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

    params: float = 1e6
    """M, inner parameters, such as 1.5e9."""
    meta_params: float = 1e3
    """N, meta parameters."""
    steps: int = 100
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
    for name in ("params", "meta_params"):
        if not 1 <= getattr(options, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: a number of at least 1 is needed")
    whole_number(options.steps, "steps")
    return planner.plan_from_sizes(
        options.params,
        options.meta_params,
        options.steps,
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
