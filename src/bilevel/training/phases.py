"""Phases of an outer loop: the estimator of each, its number of steps, and when it ends early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bilevel import checks
from bilevel.estimators import Estimator


@dataclass(frozen=True)
class Phase:
    """A stretch of the outer loop with one estimator.

    Args:
        estimator: the method that estimates the hypergradient.
        steps: the largest number of outer steps.
        accumulate: the number of estimates that are averaged for one outer step. Each has its own directions and
            batches. Several workers share the estimates if the estimator has no directions that they could share.
        patience: end the phase early if the outer loss has not improved for this many outer steps.
        min_improvement: the smallest decrease that counts as an improvement, as a fraction of the best outer loss so
            far.

    The two phases of the paper are a cheap biased method, and then (FG)²U from the point that it reached:

    >>> from bilevel import ForwardGradient, HessianFree
    >>> phases = [Phase(HessianFree(), steps=100, patience=10), Phase(ForwardGradient(directions=32), steps=900)]

    Reference: Shen et al., NeurIPS 2024, §3.2.
    """

    estimator: Estimator
    steps: int
    accumulate: int = 1
    patience: int | None = None
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator):
            raise TypeError(f"estimator is {self.estimator!r}; write Phase(bilevel.Reverse(), steps=100)")
        checks.whole_number(self.steps, "steps")
        checks.whole_number(self.accumulate, "accumulate")
        if self.patience is not None:
            checks.whole_number(self.patience, "patience")
        checks.fraction(self.min_improvement, "min_improvement")


def phases_of(estimator: Estimator | None, steps: int | None, phases: Sequence[Phase] | None) -> list[Phase]:
    """Return the phases of an outer loop, from either `estimator` and `steps` or `phases`.

    Raises:
        ValueError: both or neither were passed, or `phases` is not a sequence of phases.
    """
    if phases is None:
        if estimator is None or steps is None:
            passed = f"estimator={estimator!r}, steps={steps!r}"
            raise ValueError(
                f"{passed}: write estimator=bilevel.Reverse(), steps=100, or for several estimators "
                "phases=[bilevel.Phase(bilevel.Reverse(), steps=100), ...]"
            )
        return [Phase(estimator, steps)]
    if estimator is not None or steps is not None:
        raise ValueError(
            f"phases={phases!r} together with estimator={estimator!r}, steps={steps!r}: each phase has its own "
            "estimator and number of steps; pass either phases, or estimator and steps"
        )
    if isinstance(phases, Phase) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"phases={phases!r}: write phases=[bilevel.Phase(bilevel.Reverse(), steps=100)]")
    return list(phases)


@dataclass
class Progress:
    """The place of an outer loop in its phases."""

    phases: list[Phase]
    outer_step: int = 0
    phase: int = 0
    phase_step: int = 0
    best: float | None = None
    """The smallest outer loss of this phase so far."""
    stalled: int = 0
    """The number of outer steps since the smallest outer loss."""

    @property
    def current(self) -> Phase:
        """The phase of the next outer step."""
        return self.phases[self.phase]

    @property
    def finished(self) -> bool:
        """Whether all phases are over."""
        return self.phase == len(self.phases)

    @property
    def total_steps(self) -> int:
        """The number of outer steps taken, plus the largest number of steps that are left."""
        if self.finished:
            return self.outer_step
        return self.outer_step - self.phase_step + sum(phase.steps for phase in self.phases[self.phase :])

    def count(self, outer_loss: float) -> None:
        """Count one more outer step, and end the phase if its steps or its patience are exhausted."""
        phase = self.current
        self.outer_step += 1
        self.phase_step += 1
        if self.best is None or outer_loss < self.best - phase.min_improvement * abs(self.best):
            self.best, self.stalled = outer_loss, 0
        else:
            self.stalled += 1
        if self.phase_step == phase.steps or self.stalled == phase.patience:
            self.phase += 1
            if not self.finished:  # the last phase may be made longer
                self.phase_step, self.best, self.stalled = 0, None, 0

    def go_on(self) -> None:
        """Go on with a last phase that was finished, and has more steps now.

        Raises:
            ValueError: it has fewer steps than were done.
        """
        last = self.phases[-1]
        if self.phase >= len(self.phases) - 1 and self.phase_step > last.steps:
            raise ValueError(
                f"{self.phase_step} steps of the last phase are done, and it has {last.steps} now; pass at least as "
                "many, or take another folder"
            )
        if self.finished and self.phase_step < last.steps and self.stalled != last.patience:
            self.phase -= 1
