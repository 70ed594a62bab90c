"""What is checked: a problem at a point, in the user's dtype and in float64, with the plain loop beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import randomness, trees
from bilevel.unrolling import argument_checks
from bilevel.unrolling.double_precision import as_double, lowest_dtype, problem_in_double
from bilevel.unrolling.plain_copies import NoPlainLoopError
from bilevel.unrolling.plain_loop import PlainLoop
from bilevel.unrolling.stopped_gradients import Tape
from bilevel.unrolling.unroll import Unroll, unroll


@dataclass
class Subject:
    """A problem and its arguments, as a user hands them to an estimator."""

    problem: Any
    meta: Any
    inner_batches: Any
    outer_batch: Any
    seed: int
    tapes: list[Tape] = field(default_factory=list)
    """The stopped gradients that were met so far."""

    @cached_property
    def run(self) -> Unroll:
        """The inner loop in the user's dtype."""
        return unroll(self.problem, self.meta, self.inner_batches, self.outer_batch, self.seed)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype of φ and of the inner state."""
        return lowest_dtype(self.run.meta, self.run.start())

    @cached_property
    def double(self) -> Unroll | str:
        """The inner loop in float64, or why there is none."""
        try:
            run = self.run
            problem = problem_in_double(run.problem, self.dtype)
            found = unroll(problem, as_double(run.meta), self.inner_batches, self.outer_batch, self.seed)
            state = found.descend(found.start(), 0, min(1, found.steps))
            low = lowest_dtype(state)
            if torch.finfo(low).eps > torch.finfo(torch.float64).eps:
                return f"a step gives {low} for parameters in float64"
            if found.outer_loss(state, found.meta).dtype != torch.float64:
                return "outer_loss is not computed in float64"
        except Exception as error:  # whatever a user's code raises for a dtype that it was not written for
            return f"{type(error).__name__}: {_first_line(error)}"
        return found

    def plain(self, in_double: bool, hooks: bool = True) -> PlainLoop | str:
        """Return the plain loop, or why there is none."""
        try:
            return PlainLoop(self.run, self.meta, self.dtype if in_double else None, hooks)
        except NoPlainLoopError as error:
            return str(error)

    @property
    def steps(self) -> int:
        """T, the number of inner steps."""
        return self.run.steps

    @property
    def meta_size(self) -> int:
        """N, the number of meta parameters."""
        return trees.size(self.run.meta)

    def chosen_steps(self) -> list[int]:
        """Return the first step, the last one, and one between them that the seed decides on."""
        between = 1 + randomness.derive(self.seed, self.steps) % max(self.steps - 2, 1)
        return sorted({0, min(between, self.steps - 1), self.steps - 1})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def described(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {_first_line(error)}"


def require_one_outer_loss(value: Tensor) -> None:
    """Raise if `outer_loss` returned a vector of losses."""
    argument_checks.one_outer_loss(value, "check compares", ", or check each entry by itself")
