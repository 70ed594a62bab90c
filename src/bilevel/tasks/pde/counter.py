"""The number of inner steps that a run of PDE discovery computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counter:
    """A counter of inner steps that reports them as a number of solves, of `steps_of_a_solve` inner steps each."""

    steps_of_a_solve: int = 1
    steps: int = 0

    def take(self) -> float:
        """Return the number of solves since the last call."""
        steps, self.steps = self.steps, 0
        return steps / self.steps_of_a_solve
