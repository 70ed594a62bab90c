"""Settings of `fit` that belong together: the update of the meta parameters, and the folder of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel import checks


@dataclass(frozen=True)
class OuterUpdate:
    """Settings of the update of the meta parameters in `fit`, in addition to the outer optimiser.

    Args:
        project: `project(meta) -> meta` maps the meta parameters to the nearest allowed values after each outer step,
            such as `lambda x: x.clamp(0, 1)`.
        clip_norm: the largest norm of a hypergradient that the outer optimiser receives. A longer one is scaled down to
            it. If the inner loop is chaotic for some batches, a single exploding estimate would otherwise stay in
            Adam's second moment for hundreds of steps. A row of the history contains the full `grad_norm`, and the
            factor as `clipped_to`, which is 1 for a hypergradient that was not clipped. Clipped estimates are biased.
            With `None` nothing is clipped.
        max_backtracks: the largest number of times that an outer step is halved if the inner loop fails at the new meta
            parameters (`NonFiniteError`, `SolverError`). A row of the history counts them as `backtracks`. The outer
            optimiser's own memory is not changed. With 0 such an error ends the run.

    Raises:
        TypeError, ValueError: a setting cannot be used. The message says what is needed.

    >>> OuterUpdate(project=lambda x: x.clamp(0, 1), clip_norm=1.0).clip_norm
    1.0
    """

    project: Callable[[Any], Any] | None = None
    clip_norm: float | None = None
    max_backtracks: int = 0

    def __post_init__(self) -> None:
        if self.project is not None:
            checks.a_function(self.project, "project", "project(meta)")
        if self.clip_norm is not None:
            checks.positive(self.clip_norm, "clip_norm")
        checks.whole_number(self.max_backtracks, "max_backtracks", at_least=0)


@dataclass(frozen=True)
class RunFolder:
    """The folder into which `fit` writes a run, and the settings with which it is written and resumed.

    The folder holds `metrics.jsonl`, with a line for each outer step, and the last two checkpoint files, of which
    `checkpoint.safetensors` is the newest.

    Args:
        path: the folder. It is created if it does not exist.
        resume: whether to continue from the checkpoint file in the folder, or to start if there is none. The results
            are those of a run that was never interrupted.
        checkpoint_every: the number of outer steps between two checkpoint files. One is also written at the end, on an
            interruption (Ctrl-C, SIGTERM) and on an error.
        tensorboard: whether to write TensorBoard events into the subfolder `tensorboard`.
        config: further settings, which must be equal to those in a checkpoint file from which the run is resumed.

    Raises:
        TypeError, ValueError: a setting cannot be used. The message says what is needed.

    >>> RunFolder("runs/first", resume=True).checkpoint_every
    50
    """

    path: str | Path
    resume: bool = False
    checkpoint_every: int = 50
    tensorboard: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path):
            raise TypeError(f"path is {self.path!r} ({type(self.path).__name__}); the path of a folder is needed")
        checks.whole_number(self.checkpoint_every, "checkpoint_every")


def as_run_folder(out: str | Path | RunFolder | None) -> RunFolder | None:
    """Return the argument `out` of `fit` as a `RunFolder`; `None` if nothing is to be written."""
    if out is None or isinstance(out, RunFolder):
        return out
    if not isinstance(out, str | Path):
        raise TypeError(
            f"out is {out!r} ({type(out).__name__}); the path of a folder is needed, or bilevel.RunFolder(path, ...)"
        )
    return RunFolder(out)
