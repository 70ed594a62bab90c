"""A warning if the estimates of an outer loop are mostly noise, given at most once in a run, after ten estimates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

WATCHED = 10
"""The number of outer steps after which it is decided whether the estimates are mostly noise."""


@dataclass
class NoiseWatch:
    """The sums of signal and noise over the first outer steps with random directions."""

    signal_squared: float = 0.0
    noise_squared: float = 0.0
    noisy_steps: int = 0

    def add(self, squared_norm: float, error: float | None) -> None:
        """Add an estimate. Warn, once in a run, if the estimates of ten outer steps together are mostly noise.

        E‖estimate‖² = ‖∇h‖² + error², so ‖estimate‖² − error² is an unbiased estimate of the squared signal.

        Args:
            squared_norm: ‖estimate‖².
            error: the standard error of the estimate; `None` if it is not known.
        """
        if error is None or self.noisy_steps == WATCHED:
            return
        self.noisy_steps += 1
        self.signal_squared += squared_norm - error**2
        self.noise_squared += error**2
        if self.noisy_steps == WATCHED and self.signal_squared < 0.01 * self.noise_squared:
            ratio = max(self.signal_squared, 0.0) / self.noise_squared
            warnings.warn(
                f"the hypergradient estimates are noise: over the first {WATCHED} outer steps with random directions, "
                f"the signal is {ratio**0.5:.2g} of the standard error (a cosine of about {ratio**0.5:.2g} to the true "
                "hypergradient); take a control variate (control_variate=bilevel.TruncatedReverse(5)), more directions "
                "or accumulate=, or Reverse(), whose exact gradient costs about as much as two directions",
                stacklevel=4,
            )


def pooled(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the mean of independent estimates from their standard errors.

    It is `None` if one of them is not known.

    >>> pooled([3.0, 4.0]), pooled([3.0, None])
    (2.5, None)
    """
    known = [error for error in errors if error is not None]
    return sum(error**2 for error in known) ** 0.5 / len(known) if len(known) == len(errors) else None
