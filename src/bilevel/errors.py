"""What can go wrong while a bilevel problem is solved. Wrong arguments are plain `TypeError` and `ValueError`."""

from __future__ import annotations

from typing import Any


class BilevelError(Exception):
    """Base of the errors below."""


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
    """A black box's solve failed: it blew up, did not return in time, or was given what it cannot take.

    Raise it in `solve`; `fit(retreats=...)` then goes back part of the outer step that led there.
    """


class NoDependenceError(BilevelError, ValueError):
    """What must depend on something does not, so that the hypergradient would be zero for the wrong reason.

    The inner loop must depend on the meta parameters, the inner loss on the inner parameters, and the outer loss on
    the final inner state.
    """


class MissingDerivativeError(BilevelError, NotImplementedError):
    """An operation of the user's model lacks the kind of derivative that the chosen estimator needs."""


class CompileError(BilevelError, RuntimeError):
    """The inner gradient cannot be compiled as `GradientDescent(..., compile=...)` asks."""


class MemoryBudgetError(BilevelError, MemoryError):
    """No method fits into the memory that there is."""


class CheckpointError(BilevelError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class WorkerError(BilevelError):
    """Another worker failed, died, lost step or did not come in time."""


class Terminated(SystemExit):
    """The process was asked to stop (SIGTERM), and what it had is saved. Uncaught, it ends with exit code 143."""

    def __init__(self) -> None:
        super().__init__(143)


class DataError(BilevelError):
    """A data file is missing or damaged."""
