"""Errors of the library. Wrong arguments raise the built-in `TypeError` and `ValueError`."""

from __future__ import annotations

from typing import Any


class BilevelError(Exception):
    """Base class of the errors below."""


class NonFiniteError(BilevelError, ArithmeticError):
    """A loss, state or hypergradient became NaN or infinite.

    `inner_step` is the first inner step (from 0) whose result was not finite, `None` when every inner step was fine;
    `last_finite_state` is the inner state before that step.
    """

    def __init__(self, message: str, inner_step: int | None = None, last_finite_state: Any = None) -> None:
        super().__init__(message)
        self.inner_step = inner_step
        self.last_finite_state = last_finite_state


class SolverError(BilevelError, ArithmeticError):
    """The solve of a black box failed: it diverged, did not return in time, or cannot take these meta parameters.

    Raise it in `solve`. `fit` then halves the outer step that led there, as often as
    `bilevel.OuterUpdate(max_backtracks=…)` allows.
    """


class NoDependenceError(BilevelError, ValueError):
    """A loss or state does not depend on a quantity that it must depend on, so the hypergradient would be wrongly zero.

    The inner loop must depend on the meta parameters, the inner loss on the inner parameters, and the outer loss on
    the final inner state.
    """


class ReplayError(BilevelError, RuntimeError):
    """An inner step gave another result when it was computed again: its loss, step or data have a memory.

    `inner_step` is the first step (from 0) that differs, `None` where that is not known.
    """

    def __init__(self, message: str, inner_step: int | None = None) -> None:
        super().__init__(message)
        self.inner_step = inner_step


class CheckError(BilevelError, RuntimeError):
    """A problem is not the loop that the user would have written, or a derivative disagrees with differences.

    `table` is the table of what was compared.
    """

    def __init__(self, message: str, table: str = "") -> None:
        super().__init__(message)
        self.table = table


class MissingDerivativeError(BilevelError, NotImplementedError):
    """An operation of the user's model lacks the kind of derivative that the chosen estimator needs."""


class CompileError(BilevelError, RuntimeError):
    """The inner gradient cannot be compiled as `GradientDescent(..., compile=...)` asks."""


class MemoryBudgetError(BilevelError, MemoryError):
    """No method fits into the memory that is available."""


class CheckpointError(BilevelError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class WorkerError(BilevelError):
    """Another worker failed, died, computed other numbers or did not answer in time."""


class Terminated(SystemExit):
    """The process was asked to stop (SIGTERM), after a checkpoint was written. Uncaught, it ends with exit code 143."""

    def __init__(self) -> None:
        super().__init__(143)


class DataError(BilevelError):
    """A data file is missing or damaged."""
