"""The options of a run that are the same for all tasks, and the phases that they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel import checks, distributed, randomness
from bilevel.estimators import names
from bilevel.planning import registry
from bilevel.tasks.task import Preset
from bilevel.training.phases import Phase


@dataclass(frozen=True)
class RunOptions:
    """The options of `bilevel run`, in addition to the settings of the task."""

    estimator: str | None = field(default=None, metadata={"metavar": "NAME"})
    """Estimator, such as reverse or "forward-gradient(directions=8)", see `bilevel list`; by default the preset's."""
    phases: tuple[str, ...] | None = field(default=None, metadata={"metavar": "NAME:STEPS[:PATIENCE] ..."})
    """Several estimators in turn, each for STEPS outer steps, or until the outer loss has not improved for PATIENCE."""
    outer_steps: int | None = None
    """Number of outer steps, without --phases; by default the preset's."""
    accumulate: int | None = None
    """Number of estimates that are averaged in each outer step; by default the preset's."""
    seed: int = 0
    """Seed that determines every random number of the run."""
    out: Path | None = None
    """Folder for the results; runs/TASK by default."""
    resume: bool = False
    """Continue from the checkpoint in the folder, or start a new run if there is none."""
    data_dir: Path | None = None
    """Folder with the data files, for presets that need files."""
    checkpoint_every: int = 50
    """Number of outer steps between two checkpoints."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    compile: str | None = field(default=None, metadata={"metavar": "BACKEND"})
    """Compile the inner gradient and its derivatives with a backend of torch.compile, such as inductor."""
    timeout: float = distributed.TIMEOUT
    """Number of seconds that a worker waits for another worker before an error is raised, under torchrun."""

    def __post_init__(self) -> None:
        randomness.check_seed(self.seed)
        checks.positive(self.timeout, "timeout")


def make_phases(preset: Preset[Any], options: RunOptions, settings: Mapping[str, Any]) -> list[Phase]:
    """Return the phases that the options describe.

    Args:
        preset: the preset, from which the options that were not given are taken.
        options: the options of the run.
        settings: settings of estimators; each of them is passed to every estimator that has it.

    Raises:
        ValueError: options exclude each other, a phase cannot be read, or a setting has no effect.
    """
    if options.phases is not None and (options.estimator is not None or options.outer_steps is not None):
        raise ValueError("--phases says which estimators run and for how long; drop --estimator and --outer-steps")
    accumulate = preset.accumulate if options.accumulate is None else options.accumulate
    earlier: list[Phase] = []
    if options.phases is not None:
        specs = [_phase_spec(text) for text in options.phases]
    else:
        steps = preset.outer_steps if options.outer_steps is None else options.outer_steps
        specs = [(options.estimator or names.describe(preset.estimator), steps, preset.patience)]
        if options.estimator is None and options.outer_steps is None:
            earlier = list(preset.before)
    if not specs:
        raise ValueError('--phases needs at least one ESTIMATOR:STEPS, such as --phases hessian-free:50 "reverse:100"')
    phases, used = earlier, set()
    for text, steps, patience in specs:
        kind, own = registry.read(text)
        fitting = {k: v for k, v in settings.items() if k in names.settings_of(kind) and k not in own}
        phases.append(Phase(registry.parse(text, **fitting), steps, accumulate, patience))
        used |= set(fitting)
    for name in settings:
        if name not in used:
            raise ValueError(f"--{name.replace('_', '-')} has no effect: {_why_unused(name, [s[0] for s in specs])}")
    return phases


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
    known = {text: names.settings_of(registry.read(text)[0]) for text in texts}
    if any(setting in settings for settings in known.values()):
        return f"{', '.join(text for text in texts if setting in known[text])} says it already"
    return "; ".join(f"{text} has no such setting (it has: {', '.join(has)})" for text, has in known.items())


def describe(phase: Phase) -> str:
    """Return the text that describes this phase to `--phases`."""
    text = f"{names.describe(phase.estimator)}:{phase.steps}"
    return text if phase.patience is None else f"{text}:{phase.patience}"
