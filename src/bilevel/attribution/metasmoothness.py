"""Metasmoothness: whether the trained model follows the weights of its examples smoothly."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import checks, randomness, trees
from bilevel.attribution.weighted_training import WeightedTraining


def metasmoothness(training: WeightedTraining, step: float = 0.1, directions: int = 2, seed: int = 0) -> float:
    """Measure how smoothly the trained parameters follow the weights of the examples, from −1 to 1.

    With θ(w) the parameters `[M]` after training with the weights w `[N]`, a random direction v `[N]` of signs and the
    differences Δ(w) = (θ(w + hv) − θ(w))/h, it is

        Σ_j |Δ_j(w)| · sign Δ_j(w) · sign Δ_j(w + hv) / Σ_j |Δ_j(w)|   at w = 1,

    the mean over the directions. It is 1 if each parameter goes on as it began, and about 0 if two neighbouring
    differences have nothing to do with each other: then the derivative says little about a retraining.

    Args:
        training: the run.
        step: h.
        directions: the number of directions.
        seed: of the directions.

    Returns:
        The mean over the directions. Values above 0.9 go with scores that predict retrainings well. To raise a lower
        one, take an epsilon of 1e-4 or more in Adam, an activation with a continuous derivative (GELU for ReLU), a
        lower learning rate, or larger batches.

    Raises:
        ValueError: a number is out of its range, or the parameters do not depend on the weights.

    Cost: (1 + 2 · directions) · T units.

    Reference: Engstrom et al., arXiv 2503.13751, Definition 2.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda mean, weights, batch: (weights * (mean - torch.tensor([1.0, 2.0, 6.0])) ** 2).mean(),
    ...     outer_loss=lambda mean, weights, queries: (mean - queries) ** 2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> metasmoothness(WeightedTraining(problem, examples=3, inner_batches=4))
    1.0
    """
    checks.positive(step, "step")
    if step > 0.5:
        raise ValueError(f"step={step}: two steps from a weight of 1 must not reach 0; a step of at most 0.5 is needed")
    checks.whole_number(directions, "directions")
    start = _parameters(training, training.weights())
    found: list[float] = []
    for number in range(directions):
        generator = randomness.generator(seed, randomness.WEIGHT_DIRECTIONS, number)
        signs = generator.choice([-1.0, 1.0], training.examples)
        v = torch.from_numpy(signs).to(training.weights().dtype)
        there, further = (_parameters(training, 1 + k * step * v) for k in (1, 2))
        first, second = there - start, further - there
        total = first.abs().sum()
        if total == 0:
            raise ValueError("the trained parameters do not depend on the weights; multiply each loss by its weight")
        found.append(float((first.abs() * first.sign() * second.sign()).sum() / total))
    return sum(found) / len(found)


def _parameters(training: WeightedTraining, weights: Tensor) -> Tensor:
    state = training.train(weights)
    params = getattr(state, "params", state)
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in trees.split(params).differentiable])
