"""The exponential mean of past estimates, which `RunningMean` makes a control variate of later ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.estimators import Estimator, variates


@dataclass
class PastEstimates:
    """m ← δ m + (1 − δ) g, and the weight of all g in it, 1 − δᵏ after k of them, by which it is divided."""

    decay: float | None
    """δ; `None` if no phase asks for the past, so that nothing is kept."""
    past: list[Tensor] | None = None
    past_weight: float = 0.0

    @classmethod
    def wanted_by(cls, estimators: Sequence[Estimator]) -> PastEstimates:
        """What the first of them that has a running mean asks for; kept over all phases."""
        wanted = [variates.running_mean_of(estimator) for estimator in estimators]
        return cls(next((mean.decay for mean in wanted if mean is not None), None))

    def given_to(self, estimator: Estimator) -> Estimator:
        """The estimator with this past."""
        past = None if self.past is None else [mean / self.past_weight for mean in self.past]
        return variates.with_past(estimator, past)

    def remember(self, gradients: Sequence[Tensor]) -> None:
        """The mean takes in one outer step's estimate."""
        if self.decay is None:
            return
        old = [torch.zeros_like(g) for g in gradients] if self.past is None else self.past
        self.past = [self.decay * mean + (1 - self.decay) * g for mean, g in zip(old, gradients, strict=True)]
        self.past_weight = self.decay * self.past_weight + 1 - self.decay
