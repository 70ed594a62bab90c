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

    For a vector of m outer losses the gradients are `[m, *leaf.shape]`.

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
    flat = [*tensors[0], *tensors[1]]
    with standing_in(there, meta):
        rows = [
            torch.autograd.grad(h, flat, allow_unused=True, retain_graph=value.ndim > 0)
            for h in (value.unbind() if value.ndim else [value])
        ]
    if all(part is None for row in rows for part in row[: len(tensors[0])]):
        run.outer_cotangents(state)
    filled = [autodiff.zeros_where_none(row, flat) for row in rows]
    found = iter(torch.stack(each) if value.ndim else each[0] for each in zip(*filled, strict=True))
    d, c = ([next(found) for _ in ts] for ts in tensors)
    return value.detach(), d, c


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
