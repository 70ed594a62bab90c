"""Cheaper ways to score examples, with which exact scores are compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.attribution.weight_derivatives import scores_by
from bilevel.attribution.weighted_training import WeightedTraining
from bilevel.batches import require_batches
from bilevel.epochs import Epochs, epochs
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.truncated_reverse import TruncatedReverse
from bilevel.problem import as_problem
from bilevel.solvers import ConjugateGradient


def gradient_cosine(training: WeightedTraining, queries: Any) -> Tensor:
    """Score examples by the cosine of their gradient and the query's, both at the trained parameters.

    scores[q, i] = ⟨∇ℓ_q, ∇ℓ_i⟩ / (‖∇ℓ_q‖ ‖∇ℓ_i‖), where ℓ_i is the loss of example i. The order of training and the
    optimiser play no part in it.

    Args:
        training: a run that was built by `WeightedTraining.of`.
        queries: the queries that `attribute` receives.

    Returns:
        scores: `[m, N]`.

    Raises:
        TypeError: the run was not built from a dataset.

    Cost: N + m backward passes, after the T units of the training. Memory: N + m gradients.
    """
    if training.loss is None or not isinstance(training.inner_batches, Epochs):
        raise TypeError(
            "gradient_cosine needs the loss of each example; build the run by WeightedTraining.of(model, dataset, loss)"
        )
    problem, weights = as_problem(training.problem), training.weights()
    state = training.train()
    parts = trees.split(state.params)
    leaves = [leaf.detach().requires_grad_() for leaf in parts.differentiable]
    model = parts.rebuild(leaves)
    with torch.enable_grad():
        of_queries = problem.outer_loss(state._replace(params=model), weights, queries)
    query_gradients = _unit_rows([_flat_gradient(loss, leaves) for loss in of_queries])
    scores = torch.empty(len(query_gradients), training.examples, dtype=query_gradients.dtype)
    examples = epochs(training.dataset, batch_size=1, shuffle=False).at(training.seed)
    for number in range(training.examples):
        with torch.enable_grad():
            loss = training.loss(model, examples[number]).sum()
        scores[:, number] = query_gradients @ _unit_rows([_flat_gradient(loss, leaves)])[0]
    return scores


def influence_functions(training: WeightedTraining, queries: Any, damping: float = 0.1, products: int = 50) -> Tensor:
    """Score examples by influence functions: −λᵀ ∂²g/∂θ∂w with (H + damping·I) λ = ∇ℓ_q at the trained parameters.

    g is the inner loss over the last epoch, so that every example takes part in it.

    Args:
        training: the run.
        queries: the queries that `attribute` receives.
        damping: added to the diagonal of the Hessian H, which is not positive definite for most networks. The best
            value depends on the loss; try several.
        products: the largest number of products with H for each query.

    Returns:
        scores: `[m, N]`.

    Reference: Koh and Liang, ICML 2017.
    """
    solver = ConjugateGradient(iterations=products, damping=damping)
    batches = training.inner_batches
    count = batches.steps_per_epoch if isinstance(batches, Epochs) else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the inner loop has not come to rest is what the comparison is about
        return scores_by(training, queries, Implicit(solver, batches=count))[0]


def truncated_unrolling(training: WeightedTraining, queries: Any, steps: int | None = None) -> Tensor:
    """Score examples by going back through the last steps of the training alone.

    Args:
        training: the run.
        queries: the queries that `attribute` receives.
        steps: the number of steps; by default one epoch, in which every example appears once.

    Returns:
        scores: `[m, N]`.
    """
    if steps is None:
        batches = training.inner_batches
        steps = batches.steps_per_epoch if isinstance(batches, Epochs) else max(1, len(require_batches(batches)) // 10)
    return scores_by(training, queries, TruncatedReverse(steps))[0]


BASELINES: dict[str, Callable[[WeightedTraining, Any], Tensor]] = {
    "gradient cosine": gradient_cosine,
    "influence functions": influence_functions,
    "truncated unrolling": truncated_unrolling,
}
"""Functions `baseline(training, queries) -> scores [m, N]`, by the names under which `Attribution.lds` reports them."""


def _flat_gradient(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    gradient = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in gradient])


def _unit_rows(rows: Sequence[Tensor]) -> Tensor:
    """Return the rows divided by their norms. A row of zeros stays one."""
    matrix = torch.stack(list(rows))
    norms = matrix.norm(dim=1, keepdim=True)
    return matrix / torch.where(norms > 0, norms, 1.0)
