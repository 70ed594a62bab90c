"""What an experiment provides, so that `bilevel run`, `compare` and `report` work on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from bilevel.optim.update_rule import Optimizer
from bilevel.problem import BlackBox, Unrollable
from bilevel.report.page import Section
from bilevel.training.accumulation import batch_of, batches_of
from bilevel.training.outer_loop import OuterStep

Config = TypeVar("Config")


@dataclass(frozen=True)
class Preset(Generic[Config]):
    """A configuration that is known to work."""

    config: Config
    estimator: str
    outer_steps: int
    summary: str
    patience: int | None = None
    """End early when the outer loss has not improved for so many outer steps."""


@dataclass(frozen=True)
class Setup:
    """A bilevel problem ready for `fit`; the fields are its arguments."""

    problem: Unrollable | BlackBox
    meta: Any
    inner_batches: Any
    outer_batch: Any
    optimizer: Optimizer
    project: Callable[[Any], Any] | None = None
    retreats: int = 0
    clip_norm: float | None = None
    callbacks: Sequence[Callable[[OuterStep], None]] = ()
    """Besides those of the task."""

    def inner_batches_of(self, draw: int) -> Any:
        """The inner batches of one draw."""
        return batches_of(self.inner_batches, draw)

    def outer_batch_of(self, draw: int) -> Any:
        """The outer batch of one draw."""
        return batch_of(self.outer_batch, draw)


@dataclass(frozen=True)
class Trained(Generic[Config]):
    """A run whose outer loop is done, before it is judged."""

    config: Config
    data_dir: Path | None
    folder: Path
    meta: Any
    outer_steps: int
    seed: int
    progress: bool
    fit: Callable[[Setup, str], Any]
    """`fit(setup, name)`: the same phases on another setup, recorded in the subfolder `name`; the φ found."""


class Task(ABC, Generic[Config]):
    """An experiment: a family of bilevel problems with a way to judge the result."""

    name: str
    summary: str
    presets: Mapping[str, Preset[Config]]
    """The first is the default."""

    def prepared(
        self,
        config: Config,  # noqa: ARG002 (a task without stages has no use for them)
        data_dir: Path | None,  # noqa: ARG002
        folder: Path,  # noqa: ARG002
        seed: int,  # noqa: ARG002
        progress: bool,  # noqa: ARG002
    ) -> Task[Config]:
        """The task with its stages before the outer loop done, such as a pretrained model in `folder`/stages.

        A run calls this first, and what it returns for everything else; a resumed run finds what is there already.
        """
        return self

    @abstractmethod
    def setup(self, config: Config, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:
        """The bilevel problem of this configuration."""

    @abstractmethod
    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:
        """What to record into the run's folder while it runs; `start` is φ before the first outer step."""

    @abstractmethod
    def evaluate(self, config: Config, data_dir: Path | None, meta: Any, seed: int, progress: bool) -> dict[str, Any]:
        """What `results.json` says about the trained φ."""

    def adapted(self, preset: Preset[Config], config: Config) -> Preset[Config]:  # noqa: ARG002
        """The preset, with the estimator and the outer steps that suit a changed configuration."""
        return preset

    def judge(self, run: Trained[Config]) -> dict[str, Any]:
        """As `evaluate`, for tasks that need more than φ: further outer loops, or what lies in the folder."""
        return self.evaluate(run.config, run.data_dir, run.meta, run.seed, run.progress)

    @abstractmethod
    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The numbers that matter, as (name, value)."""

    @abstractmethod
    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:
        """The task's own part of the report."""
