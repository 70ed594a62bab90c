"""The number of inner steps that a run of PDE discovery computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counter:
    """Counts inner steps, and gives them in solves; a solve is `steps_of_a_solve` inner steps."""

    steps_of_a_solve: int = 1
    steps: int = 0

    def take(self) -> float:
        """Return the number of solves since the last call."""
        steps, self.steps = self.steps, 0
        return steps / self.steps_of_a_solve
