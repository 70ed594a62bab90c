"""The exponential mean of past estimates, which `RunningMean` uses as a control variate for later estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.estimators import Estimator, variates


@dataclass
class PastEstimates:
    """The mean m ← δ m + (1 − δ) g of past estimates g.

    It is divided by the total weight of all g, which is 1 − δᵏ after k estimates.
    """

    decay: float | None
    """δ; `None` if no phase needs past estimates, in which case nothing is kept."""
    past: list[Tensor] | None = None
    past_weight: float = 0.0

    @classmethod
    def wanted_by(cls, estimators: Sequence[Estimator]) -> PastEstimates:
        """Return an empty mean with the δ of the first estimator that has a running mean. It is kept in all phases."""
        wanted = [variates.running_mean_of(estimator) for estimator in estimators]
        return cls(next((mean.decay for mean in wanted if mean is not None), None))

    def given_to(self, estimator: Estimator) -> Estimator:
        """Return the estimator with this mean of past estimates."""
        past = None if self.past is None else [mean / self.past_weight for mean in self.past]
        return variates.with_past(estimator, past)

    def remember(self, gradients: Sequence[Tensor]) -> None:
        """Add the estimate of one outer step to the mean."""
        if self.decay is None:
            return
        old = [torch.zeros_like(g) for g in gradients] if self.past is None else self.past
        self.past = [self.decay * mean + (1 - self.decay) * g for mean, g in zip(old, gradients, strict=True)]
        self.past_weight = self.decay * self.past_weight + 1 - self.decay
