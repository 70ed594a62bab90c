"""The interface of an experiment, which `bilevel run`, `compare` and `report` use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from bilevel.estimators import Estimator
from bilevel.optim.update_rule import Optimizer
from bilevel.problem import BilevelProblem
from bilevel.report.page import Section
from bilevel.training.accumulation import batch_of, batches_of
from bilevel.training.outer_loop import OuterStep
from bilevel.training.phases import Phase
from bilevel.training.settings import OuterUpdate

Config = TypeVar("Config")


@dataclass(frozen=True)
class Preset(Generic[Config]):
    """A configuration that is known to work, with an estimator and a number of outer steps."""

    config: Config
    estimator: Estimator
    outer_steps: int
    summary: str
    patience: int | None = None
    """End the run early if the outer loss has not improved for this many outer steps."""
    accumulate: int = 1
    """Number of estimates that are averaged in each outer step."""
    before: tuple[Phase, ...] = ()
    """Phases with other estimators before this one."""


@dataclass(frozen=True)
class Setup:
    """A bilevel problem with further arguments of `fit`."""

    problem: BilevelProblem
    meta: Any
    inner_batches: Any
    outer_batch: Any
    optimizer: Optimizer
    update: OuterUpdate = field(default_factory=OuterUpdate)
    callbacks: Sequence[Callable[[OuterStep], None]] = ()
    """Callbacks in addition to those of the task."""
    recorders: Sequence[Callable[[Path], Callable[[OuterStep], None]]] = ()
    """Functions from the run's folder to a callback that writes into it."""
    stream: bool | int = False
    """Whether each estimate goes on from the state in which the one before ended."""

    def inner_batches_of(self, draw: int) -> Any:
        """Return the inner batches of the estimate with this number."""
        return batches_of(self.inner_batches, draw)

    def outer_batch_of(self, draw: int) -> Any:
        """Return the outer batch of the estimate with this number."""
        return batch_of(self.outer_batch, draw)


@dataclass(frozen=True)
class Trained(Generic[Config]):
    """A run after its outer loop and before its evaluation."""

    config: Config
    data_dir: Path | None
    folder: Path
    meta: Any
    outer_steps: int
    seed: int
    progress: bool
    fit: Callable[[Setup, str], Any]
    """`fit(setup, name)` runs the same phases on another setup, records them in the subfolder `name`, and returns φ."""


class Task(ABC, Generic[Config]):
    """An experiment: a family of bilevel problems, and an evaluation of the results."""

    name: str
    summary: str
    presets: Mapping[str, Preset[Config]]
    """Configurations by name. The first one is the default."""

    def prepared(
        self,
        config: Config,  # noqa: ARG002 (a task without stages has no use for them)
        data_dir: Path | None,  # noqa: ARG002
        folder: Path,  # noqa: ARG002
        seed: int,  # noqa: ARG002
        progress: bool,  # noqa: ARG002
    ) -> Task[Config]:
        """Run the stages before the outer loop, such as pretraining a model into `folder`/stages.

        Returns the task that the rest of the run uses. A resumed run reads the results of finished stages from the
        folder.
        """
        return self

    @abstractmethod
    def setup(self, config: Config, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:
        """Return the bilevel problem of this configuration."""

    @abstractmethod
    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:
        """Return callbacks that record into the run's folder; `start` is φ before the first outer step."""

    @abstractmethod
    def evaluate(self, config: Config, data_dir: Path | None, meta: Any, seed: int, progress: bool) -> dict[str, Any]:
        """Return the entries of `results.json` about the trained φ."""

    def adapted(self, preset: Preset[Config], config: Config) -> Preset[Config]:  # noqa: ARG002
        """Return the preset with the estimator and the number of outer steps that suit this configuration."""
        return preset

    def judge(self, run: Trained[Config]) -> dict[str, Any]:
        """Return the entries of `results.json`, for tasks that need further outer loops or files of the run."""
        return self.evaluate(run.config, run.data_dir, run.meta, run.seed, run.progress)

    @abstractmethod
    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the most important numbers, as pairs of name and value."""

    @abstractmethod
    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:
        """Return the task's own part of the report."""
