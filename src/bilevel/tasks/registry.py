"""The tasks by name."""

from __future__ import annotations

from typing import Any

from bilevel.tasks.cleaning.task import CleaningTask
from bilevel.tasks.condensation.task import CondensationTask
from bilevel.tasks.mixture.task import MixtureTask
from bilevel.tasks.online_lm.task import OnlineLMTask
from bilevel.tasks.pde.task import PDETask
from bilevel.tasks.task import Task

TASKS: dict[str, Task[Any]] = {
    task.name: task for task in (CondensationTask(), CleaningTask(), PDETask(), OnlineLMTask(), MixtureTask())
}
