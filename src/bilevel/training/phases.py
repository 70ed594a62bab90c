"""Phases of an outer loop: which estimator has how many steps, and when the next one takes over."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.estimators import Estimator


@dataclass(frozen=True)
class Phase:
    """A stretch of the outer loop with one estimator.

    Args:
        estimator: how the hypergradient is found.
        steps: outer steps at most.
        accumulate: estimates averaged for one outer step. Each has directions and batches of its own. Several workers
            share them, where the estimator has no directions that they could share.
        patience: end the phase early when the outer loss has not improved for so many outer steps.
        min_improvement: what counts as an improvement, as a fraction of the best outer loss so far.

    The paper's two phases, a cheap biased method first and (FG)²U from where it leads:

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
        for name in ("steps", "accumulate", "patience"):
            count = getattr(self, name)
            if count is None and name == "patience":
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count!r}: a whole number of at least 1 is needed")
        if not 0 <= self.min_improvement < 1:
            raise ValueError(f"min_improvement={self.min_improvement!r}: a fraction in [0, 1) is needed")


@dataclass
class Progress:
    """Where in its phases an outer loop is."""

    phases: list[Phase]
    outer_step: int = 0
    phase: int = 0
    phase_step: int = 0
    best: float | None = None
    """The least outer loss of this phase so far."""
    stalled: int = 0
    """Outer steps since the best one."""

    @property
    def current(self) -> Phase:
        """The phase that the next outer step belongs to."""
        return self.phases[self.phase]

    @property
    def finished(self) -> bool:
        """Whether all phases are over."""
        return self.phase == len(self.phases)

    @property
    def total_steps(self) -> int:
        """Outer steps of the whole run, as far as is known: those done, and those that are left at most."""
        return self.outer_step - self.phase_step + sum(phase.steps for phase in self.phases[self.phase :])

    def count(self, outer_loss: float) -> None:
        """One more outer step is done."""
        phase = self.current
        self.outer_step += 1
        self.phase_step += 1
        if self.best is None or outer_loss < self.best - phase.min_improvement * abs(self.best):
            self.best, self.stalled = outer_loss, 0
        else:
            self.stalled += 1
        if self.phase_step == phase.steps or self.stalled == phase.patience:
            self.phase, self.phase_step, self.best, self.stalled = self.phase + 1, 0, None, 0
