"""When `fit` goes on to the next phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fit_cases import exact, outer_optimizer, phases_of, tensor, train

from bilevel import (
    Estimate,
    Estimator,
    FitResult,
    Phase,
    Reverse,
    TruncatedReverse,
    trees,
)
from bilevel.unrolling.unroll import Unroll


@dataclass(frozen=True)
class Scripted(Estimator):
    """An estimator whose outer losses are prescribed, draw by draw; its gradient is all ones."""

    losses: tuple[float, ...]
    is_random = False

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:
        raise NotImplementedError

    def _estimate(self, run: Unroll) -> Estimate:
        ones = trees.map_leaves(torch.ones_like, run.meta)
        return Estimate(tensor(self.losses[run.outer_batch])[0], ones, run.start())


def train_scripted(phases: Sequence[Phase], **changes: Any) -> FitResult:
    return train(phases, outer_batch=lambda draw: draw, **changes)


def test_phases_switch_at_the_step_count() -> None:
    result = train([Phase(Reverse(), 3), Phase(TruncatedReverse(1), 1), Phase(Reverse(), 2)])
    assert phases_of(result) == [0, 0, 0, 1, 2, 2]


# (losses, patience, least improvement, steps until the phase ends)
PATIENCE: dict[str, tuple[tuple[float, ...], int, float, int]] = {
    "always better": ((9, 8, 7, 6, 5, 4, 3, 2), 1, 0.0, 8),
    "stalls at once": ((5, 5, 4, 3, 2, 1, 0, 0), 1, 0.0, 2),
    "equal is no improvement": ((5, 4, 4, 4, 3, 2, 1, 0), 2, 0.0, 4),
    "an improvement starts the count again": ((5, 6, 4, 5, 5, 5, 9, 9), 3, 0.0, 6),
    "measured from the best, not from the last": ((5, 9, 8, 7, 6, 1, 1, 1), 3, 0.0, 4),
    "too small an improvement": ((100, 95, 89, 85, 82, 81, 79, 70), 2, 0.1, 5),
    "exactly the least improvement is too small": ((64, 48, 36, 27, 1, 1, 1, 1), 1, 0.25, 2),
    "relative to the size of a negative loss": ((-10, -10.5, -10.9, -12, -12.5, -13, -14, -14), 2, 0.1, 3),
    "a negative loss that improves": ((-10, -12, -14, -16, -18, -20, -23, -26), 1, 0.1, 8),
    "never within the steps": ((5, 5, 5, 5, 5, 5, 5, 5), 8, 0.0, 8),
    "at the very last step": ((5, 5, 5, 5, 5, 5, 5, 5), 7, 0.0, 8),
}


@pytest.mark.parametrize("name", PATIENCE)
def test_phases_switch_when_progress_stalls(name: str) -> None:
    losses, patience, min_improvement, expected = PATIENCE[name]
    after = tuple(float(i) for i in range(3))
    estimator = Scripted(losses[:expected] + after)
    phases = [
        Phase(estimator, 8, patience=patience, min_improvement=min_improvement),
        Phase(estimator, 3),
    ]
    result = train_scripted(phases)
    assert phases_of(result) == [0] * expected + [1] * 3
    assert [row["outer_loss"] for row in result.history] == [float(x) for x in losses[:expected] + after]


def test_each_phase_starts_to_count_anew() -> None:
    """The second starts with a worse loss than the first ended with, and after a count that had begun."""
    estimator = Scripted((1, 2, 2, 9, 8, 7, 7, 7, 5, 5))
    phases = [
        Phase(estimator, 3, patience=3),  # ends by its steps, with two stalled
        Phase(estimator, 9, patience=2),
        Phase(estimator, 2, patience=1),
    ]
    assert phases_of(train_scripted(phases)) == [0] * 3 + [1] * 5 + [2] * 2


def test_patience_goes_by_the_mean_of_accumulated_losses() -> None:
    estimator = Scripted((4, 6, 1, 9, 0, 10, 3, 3))  # means 5, 5, 5, 3
    assert len(train_scripted([Phase(estimator, 4, accumulate=2, patience=2)]).history) == 3


def test_the_outer_optimizer_goes_on_through_a_switch() -> None:
    """With one estimator in all of them, phases make no difference; with Adam's memory lost they would."""
    whole = train(exact(9), optimizer=outer_optimizer("one cycle"))
    parts = train([*exact(4), *exact(2), *exact(3)], optimizer=outer_optimizer("one cycle"))
    assert torch.equal(whole.meta, parts.meta)
    fresh = train(exact(5), train(exact(4), optimizer=outer_optimizer("Adam")).meta, optimizer=outer_optimizer("Adam"))
    assert not torch.equal(fresh.meta, train(exact(9), optimizer=outer_optimizer("Adam")).meta)
