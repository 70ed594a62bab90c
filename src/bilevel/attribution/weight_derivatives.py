"""Derivatives of the losses of queries with respect to the weights of the examples, by any estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.attribution.weighted_training import WeightedTraining
from bilevel.errors import NoDependenceError
from bilevel.estimators.base import Estimator


def scores_by(
    training: WeightedTraining, queries: Any, estimator: Estimator, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scores −∂ℓ_q/∂w_i `[m, N]` and the losses ℓ_q `[m]`.

    Raises:
        NoDependenceError: a query's loss does not depend on any example.
        ValueError: the outer loss returned one number, or the weights cannot be used.
    """
    at = training.checked(weights)
    estimate = estimator(training.problem, at, training.inner_batches, queries, seed=training.seed)
    losses = torch.as_tensor(estimate.value).detach()
    if losses.ndim != 1:
        raise ValueError(
            "the outer loss returned one number; a vector with one loss for each query is needed: leave out .mean()"
        )
    grad = estimate.grad.detach()
    without = (grad == 0).all(1).nonzero()[:, 0].tolist()
    if without:
        raise NoDependenceError(
            f"queries {without[:10]} have a loss that depends on no training example: every derivative is zero. The "
            "loss may be cut off from the model by .detach() or argmax, or be exactly 0 in this precision"
        )
    return -grad, losses
