"""The linear datamodeling score: how well scores of examples predict the losses after a retraining."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilevel import checks, randomness
from bilevel.attribution.retraining import Retrained


@dataclass(frozen=True, eq=False)
class DatamodelingScore:
    """A linear datamodeling score (LDS) with its interval. Made by `linear_datamodeling_score`."""

    mean: float
    """The mean of the rank correlations over the queries."""
    low: float
    """The lower end of the bootstrap interval, which covers 95 %."""
    high: float
    """The upper end of the bootstrap interval."""
    correlations: Tensor
    """`[m]`: the rank correlation of each query."""

    def __str__(self) -> str:
        """Return the mean and the interval.

        >>> str(DatamodelingScore(0.9712, 0.9654, 0.9768, torch.ones(1)))
        '0.971 [0.965, 0.977]'
        """
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def linear_datamodeling_score(
    scores: Tensor, retrained: Retrained, resamples: int = 2000, seed: int = 0
) -> DatamodelingScore:
    """Compute how well scores predict the order of the losses after retraining on random subsets.

    The prediction for query q and a subset S is the sum of scores[q, i] over i in S. The score of a query is Spearman's
    rank correlation, over the subsets, of the predictions with minus the measured losses. A query whose predictions are
    all equal counts as 0.

    Args:
        scores: `[m, N]`, positive where an example helps.
        retrained: the result of `retrain`.
        resamples: the number of bootstrap samples. They are drawn from the queries; the subsets are the same in all of
            them, so the interval does not include the chance in the choice of the subsets.
        seed: of the bootstrap.

    Raises:
        ValueError: the shapes do not agree, or the scores are not finite.

    Reference: Park et al., TRAK, ICML 2023, Definition 2.4; Ilyas et al., Datamodels, ICML 2022.

    >>> kept = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    >>> effect = torch.tensor([[3.0, 1.0, 0.5]])
    >>> measured = Retrained(kept, -(kept.float() @ effect.T) ** 3, seconds=0.0)
    >>> linear_datamodeling_score(effect, measured).mean
    1.0
    """
    checks.whole_number(resamples, "resamples")
    expected = (retrained.losses.shape[1], retrained.kept.shape[1])
    if scores.shape != expected:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}; the retrainings have {expected[0]} queries and {expected[1]} "
            f"examples, so {expected} is needed"
        )
    if not scores.isfinite().all():
        raise ValueError("scores holds NaN or infinity")
    predicted = retrained.kept.double() @ scores.double().T
    correlations = spearman(predicted.numpy(force=True), -retrained.losses.double().numpy(force=True))
    generator = randomness.generator(seed, randomness.BOOTSTRAP)
    draws = generator.integers(len(correlations), size=(resamples, len(correlations)))
    low, high = np.quantile(correlations[draws].mean(1), [0.025, 0.975])
    return DatamodelingScore(float(correlations.mean()), float(low), float(high), torch.from_numpy(correlations))


def spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation of each column `[m]` of two matrices `[s, m]`; 0 where a column is constant.

    >>> spearman(np.array([[1.0], [2.0], [4.0]]), np.array([[0.1], [0.3], [0.2]]))
    array([0.5])
    """
    a, b = (ranks - ranks.mean(0) for ranks in map(_ranks, (one, other)))
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 0, (a * b).sum(0) / np.where(norm > 0, norm, 1.0), 0.0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks within each column. Equal values share the mean of their ranks."""
    ranks = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, place, count = np.unique(values[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks
