"""Propagation of tangents through one inner step, in forward mode or by Hessian-vector products."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import MissingDerivativeError
from bilevel.problem import Descent, Evaluated, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.inner_loop import InnerLoop


class Pulled(NamedTuple):
    """The products of a cotangent d with the Jacobians of one step."""

    after: Tree
    """θ_{t+1}, computed again."""
    down: list[Tensor | None]
    """d A_t."""
    across: list[Tensor | None]
    """d B_t."""


def push_step(run: InnerLoop, t: int, pushed: autodiff.Pushed, directions: list[Tensor]) -> autodiff.Pushed:
    """Compute θ_{t+1} and A_t y + B_t v for k tangents y of θ_t and directions v.

    The whole step is differentiated in forward mode, or only the update if the gradient is compiled with its tangents.
    If the inner loss has an operation without a forward-mode derivative, the tangents of its gradient are computed by
    Hessian-vector products (`push_step_by_hessian_products`), and those of a `Problem`'s step by two backward passes
    (`autodiff.push_by_double_reverse`).

    Args:
        run: the inner loop.
        t: the number of the step.
        pushed: θ_t and the tangents y, `[k, *leaf.shape]` for each leaf.
        directions: v, `[k, *leaf.shape]` for each leaf of φ.
    """
    problem, state = run.problem.as_gradient_descent, pushed.value

    def step(state: Tree, meta: Tree) -> Tree:
        return run.step(t, state, meta)

    arguments, tangents = [state, run.meta], [pushed.tangents, directions]
    if problem is None:
        return autodiff.push(step, arguments, tangents, run.memory, "step")

    def by_hessian_products() -> autodiff.Pushed:
        moved = [pushed.tangents]
        after = push_step_by_hessian_products(run, problem.eager, t, state, moved, [directions])
        autodiff.note_route("hessian_product_steps", 1.0 + 2.0 * len(directions[0]))
        return autodiff.Pushed(after, moved[0])

    if problem.backend is None:
        return autodiff.push(step, arguments, tangents, run.memory, "step", by_hessian_products)
    if "step" in run.memory.without_forward_mode:
        return by_hessian_products()
    along = pushed.tangents[: len(trees.split(state.params).differentiable)]

    def push_gradient(batch: Any) -> autodiff.Pushed:
        run.require_one_device(t, state, run.meta, batch)
        return problem.push_gradient(state.params, run.meta, batch, along, directions)

    try:
        gradient = run.at_step(t, push_gradient)
    except MissingDerivativeError as error:
        found = by_hessian_products()
        run.memory.without_forward_mode["step"] = str(error)
        return found
    tangents = [pushed.tangents, gradient.tangents, directions, []]
    return _push_update(run, problem, state, gradient.value, (), tangents)


def push_step_by_hessian_products(
    run: InnerLoop,
    problem: GradientDescent,
    t: int,
    state: Descent,
    tangents: list[list[Tensor]],
    chunks: Sequence[list[Tensor]],
) -> Descent:
    """Return θ_{t+1}, and replace each chunk of tangents y of θ_t by A_t y + B_t v, without forward mode.

    With g = ∇_θ loss, the tangent of g along (y, v) is ∂g/∂θ y + ∂g/∂φ v, which is the θ part of the Hessian of the
    loss in (θ, φ) times (y, v). A Hessian is symmetric, so the product is one backward pass through the graph of
    ∇_{θ,φ} loss. The graph is made once for all chunks.

    The tangents of buffers b that modules update to b' (running statistics) come from the same product. With weights w
    for b', the loss becomes L = loss + w · b'. The w part of the Hessian of L at w = 0, times (y, v), is the tangent of
    b'.

    Cost: 1 + 2k units for k directions in all. Memory: the graph of one gradient.
    """

    def joint(params: Tree, buffers: Tree, weights: list[Tensor], meta: Tree) -> Tree:
        def evaluated(batch: Any) -> Evaluated:
            run.require_one_device(t, state, run.meta, batch)
            with run.watched_step(t, params, buffers, weights, meta):
                return problem.evaluate_jointly(params, meta, batch, buffers, weights)

        found = run.at_step(t, evaluated)
        return found.gradient, trees.detach(found.buffers)

    followed = trees.split(state.buffers).differentiable
    weights = [torch.zeros_like(b) for b in followed]
    arguments = [state.params, state.buffers, weights, run.meta]
    shared = autodiff.Transpose(joint, arguments, autodiff.memory_of(problem))
    size, rest = len(trees.split(state.params).differentiable), len(followed)
    (joint_gradient, buffers), after = shared.value, state
    gradient, reached = joint_gradient[:size], [g is not None for g in joint_gradient]
    if not any(reached[:size]) or (t == 0 and followed and not _any_nonzero(gradient)):
        # Raises if the loss does not depend on the parameters; updates of buffers reach them all the same.
        run.at_step(t, lambda batch: problem.gradient(state.params, run.meta, batch, state.buffers))
    for number, (y, vectors) in enumerate(zip(tangents, chunks, strict=True)):
        of_buffers = y[len(y) - rest :]
        # A leaf that the loss does not reach has neither a row nor a column in the Hessian. The last cotangents stand
        # for the outputs `buffers`, which have no graph.
        cotangents = [*itertools.compress([*y[:size], *vectors, *of_buffers], reached), *of_buffers]
        bend, moved = shared.many(cotangents, of=[0, 2])
        bend = list(itertools.compress(bend, reached))
        pushed = _push_update(run, problem, state, gradient, buffers, [y, bend, vectors, moved])
        after, tangents[number] = pushed.value, pushed.tangents
    return after


def _push_update(
    run: InnerLoop,
    problem: GradientDescent,
    state: Descent,
    gradient: Sequence[Tensor | None],
    buffers: Tree,
    tangents: Sequence[Sequence[Tensor]],
) -> autodiff.Pushed:
    """Compute the optimiser's update with a given gradient, and its tangents.

    `tangents` are those of the state, of the entries of the gradient that are not `None`, of φ and of the buffers.
    """
    return autodiff.push(problem.apply, [state, gradient, run.meta, buffers], tangents, run.memory, "update")


def _any_nonzero(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None and bool(t.any()) for t in tensors)
