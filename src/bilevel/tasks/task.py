"""What an experiment provides, so that `bilevel run`, `compare` and `report` work on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from bilevel.optim import Optimizer
from bilevel.outer_loop import OuterStep, batch_of, batches_of
from bilevel.problem import BlackBox, Unrollable
from bilevel.report import Section

Config = TypeVar("Config")


@dataclass(frozen=True)
class Preset(Generic[Config]):
    """A configuration that is known to work."""

    config: Config
    estimator: str
    outer_steps: int
    summary: str


@dataclass(frozen=True)
class Setup:
    """A bilevel problem ready for `fit`; the fields are its arguments."""

    problem: Unrollable | BlackBox
    meta: Any
    inner_batches: Any
    outer_batch: Any
    optimizer: Optimizer
    project: Callable[[Any], Any] | None = None

    def inner_batches_of(self, draw: int) -> Any:
        """The inner batches of one draw."""
        return batches_of(self.inner_batches, draw)

    def outer_batch_of(self, draw: int) -> Any:
        """The outer batch of one draw."""
        return batch_of(self.outer_batch, draw)


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

    @abstractmethod
    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The numbers that matter, as (name, value)."""

    @abstractmethod
    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:
        """The task's own part of the report."""
