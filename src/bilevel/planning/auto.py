"""An estimator that uses the method that the planner recommends for a problem."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from bilevel import checks, distributed
from bilevel.errors import MemoryBudgetError
from bilevel.estimators.base import Estimate, Estimator
from bilevel.planning import planner
from bilevel.unrolling.unroll import Unroll

_CHOSEN: WeakKeyDictionary[Any, dict[Any, Estimator]] = WeakKeyDictionary()
"""The recommendations made so far for each problem, so that each problem is measured only once."""


@dataclass(frozen=True)
class Auto(Estimator):
    """The estimator that `bilevel.plan` recommends for the available memory.

    It is an exact method if one fits; else (FG)²U or differences of solves, if the signal-to-noise ratio of their
    estimate is at least 0.1; else a biased method, with a warning; else the estimate that is mostly noise.

    The choice rests on bytes counted in one inner step and on the methods' costs in units, not on timings, so it is the
    same in every run. It is made at the first call for a problem and kept for later calls.

    Args:
        memory: the memory that may be used beyond the model and the data: `"8GB"`, `"512MiB"`, or a number of bytes.
        directions: b, the number of random directions if the choice is a method that has them; at most N.

    Cost: about fifty inner steps at the first call, and then the cost of the method. Bias: the bias of the method. A
    `UserWarning` is given when a biased method is chosen.

    Raises:
        MemoryBudgetError: no method fits into the memory.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta**2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> bilevel.Auto("1GB")(problem, torch.tensor(2.0), 4).grad  # 2 (1 − 0.5⁴)² φ
    tensor(3.5156)
    """

    memory: str | float = "4GB"
    directions: int = 16
    needs_derivatives: ClassVar[bool] = False
    is_random: ClassVar[bool] = True
    """True because the chosen method may be random. For one inner loop ask `auto.resolved(run).is_random`."""

    def __post_init__(self) -> None:
        planner.parse_bytes(self.memory)
        checks.whole_number(self.directions, "directions")

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        raise TypeError(
            "Auto has no cost of its own: what an estimate costs depends on the method that is chosen for an inner "
            "loop; ask that one with auto.resolved(run).units(steps, meta_size)"
        )

    def resolved(self, run: Unroll) -> Estimator:
        """Return the estimator that is recommended for this inner loop."""
        run = run.eager
        known = _CHOSEN.setdefault(run.problem, {})
        workers = distributed.current().size
        key = (self, run.steps, run.meta_size, workers)
        if key not in known:
            plan = planner.plan_of(run, self.memory, self.directions, workers)
            if plan.recommended is None:
                raise MemoryBudgetError(f"Auto(memory={self.memory!r}): {plan.reason}; give it more memory")
            if any(row.biased for row in plan.rows if row.estimator == plan.recommended):
                warnings.warn(f"Auto(memory={self.memory!r}) takes {plan.recommended}: {plan.reason}", stacklevel=5)
            known[key] = plan.recommended
        return known[key]

    def redrawn(self, number: int) -> Estimator:
        if number:
            raise TypeError("Auto draws no directions itself; write auto.resolved(run).redrawn(number)")
        return self

    def _estimate(self, run: Unroll) -> Estimate:
        return self.resolved(run)._estimate(run)
