"""Gradients for methods that differentiate nothing twice, so that fused kernels and activation checkpointing work."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.models.conversion import standing_in
from bilevel.problem import Descent, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.unroll import Unroll


def outer_gradients(run: Unroll, state: Tree) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the outer loss at a state, and its gradients by the state and by φ.

    Raises:
        NoDependenceError: the outer loss does not depend on the state.
    """
    parts = (trees.split(state), trees.split(run.meta))
    tensors = [[t.detach().requires_grad_() for t in part.differentiable] for part in parts]
    there, meta = (part.rebuild(ts) for part, ts in zip(parts, tensors, strict=True))
    with torch.enable_grad():
        value = run.outer_loss(there, meta)
    if not value.requires_grad:
        run.outer_cotangents(state)  # says what is wrong
    with standing_in(there, meta):
        found = iter(torch.autograd.grad(value, [*tensors[0], *tensors[1]], allow_unused=True))
    d, c = ([next(found) for _ in ts] for ts in tensors)
    if all(part is None for part in d):
        run.outer_cotangents(state)
    return value.detach(), autodiff.fill_zeros(d, state), autodiff.fill_zeros(c, run.meta)


def objective_by_meta(run: Unroll, problem: GradientDescent, state: Descent, batches: int) -> list[Tensor] | None:
    """Return ∂/∂φ of what the inner loop descends on, at a state, as the mean over the last `batches` batches.

    `None` if the objective does not depend on φ on any of these batches.
    """
    each = [
        run.at_step(t, lambda batch: problem.objective_by_meta(state, run.meta, batch))
        for t in range(run.steps - batches, run.steps)
    ]
    if all(part is None for parts in each for part in parts):
        return None
    return [torch.stack(parts).mean(0) for parts in zip(*(autodiff.fill_zeros(e, run.meta) for e in each), strict=True)]
