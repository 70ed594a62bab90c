"""`attribute` computes how much each training example helped each query."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from bilevel.attribution.result import Attribution
from bilevel.attribution.weight_derivatives import scores_by
from bilevel.attribution.weighted_training import WeightedTraining
from bilevel.estimators.base import Estimator
from bilevel.estimators.reverse import Reverse


def attribute(
    training: WeightedTraining, queries: Any, estimator: Estimator | None = None, weights: Tensor | None = None
) -> Attribution:
    """Compute how much each training example helped each query, by the derivative of the whole training run.

    With the loss ℓ_q(w) of query q after training with the weights w `[N]`, the scores are

        scores[q, i] = −∂ℓ_q/∂w_i   at w = 1.

    An example with a positive score lowered the loss of the query, and an example with a negative score raised it. To
    first order, training without the examples in a set R changes the loss of query q by the sum of scores[q, i] over R.

    Args:
        training: the run; `WeightedTraining.of(model, dataset, loss, recipe)` builds it.
        queries: the batch that the run's outer loss receives; it returns the losses `[m]`. For a run that was built
            from a dataset, queries have the form of a batch of it.
        estimator: the method; by default `Reverse()`, which is exact. `TruncatedReverse(steps)` and `Implicit(...)`
            are cheaper and biased.
        weights: where the derivative is taken, `[N]`; by default ones.

    Returns:
        An `Attribution` with `scores` `[m, N]`.

    Raises:
        NoDependenceError: a query's loss does not depend on any example.
        NonFiniteError: the training, or a loss, or a score is NaN or infinite.
        ValueError: the weights or the losses cannot be used.

    Cost: with `Reverse()`, (2 + 2m)·T units for T steps and m queries. The training is run, and run again, once for all
    queries. Memory: T states, or fewer with `Reverse("sqrt")`. Bias: none with `Reverse()`.

    Reference: Ilyas and Engstrom, MAGIC, arXiv 2504.16430; Engstrom et al., arXiv 2503.13751.

    >>> import torch, bilevel
    >>> from bilevel.attribution import Recipe, WeightedTraining
    >>> x = torch.tensor([[1.0], [2.0], [6.0]])
    >>> training = WeightedTraining.of(
    ...     model=torch.nn.Linear(1, 1, bias=False),
    ...     dataset=(x, 2 * x),
    ...     loss=lambda model, batch: (model(batch[0]) - batch[1]).square()[:, 0],
    ...     recipe=Recipe(bilevel.optimizer(torch.optim.SGD, lr=0.01), batch_size=3, epochs=2),
    ... )
    >>> found = bilevel.attribute(training, (torch.tensor([[3.0]]), torch.tensor([[6.0]])))
    >>> found.most_helpful(2)
    tensor([[2, 1]])
    """
    if not isinstance(training, WeightedTraining):
        raise TypeError(
            f"training is a {type(training).__name__}; build it by "
            "bilevel.attribution.WeightedTraining.of(model, dataset, loss, recipe)"
        )
    estimator = Reverse() if estimator is None else estimator
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator is {estimator!r}; an estimator such as bilevel.Reverse() is needed")
    began = time.perf_counter()
    scores, losses = scores_by(training, queries, estimator, weights)
    return Attribution(scores, losses, training, queries, repr(estimator), time.perf_counter() - began)
