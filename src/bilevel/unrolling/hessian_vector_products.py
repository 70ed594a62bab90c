"""Tangents whose chunks share the inner steps: the graph of a step's gradient is made once and serves all of them.

With g = ∇_θ loss, the gradient's tangent along (y, v) is ∂g/∂θ y + ∂g/∂φ v, the θ part of the Hessian of the loss in
(θ, φ) times (y, v). A Hessian is symmetric, so that product is one backward pass through the graph of ∇_{θ,φ} loss, and
the graph stays for the next chunk. In forward mode each chunk would compute the step again.

Buffers b that modules update to b' (running statistics) are followed by the same product: with weights w of theirs, the
loss becomes L = loss + w · b', and the w part of the Hessian of L at w = 0, times (y, v), is the tangent of b'.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import CompileError
from bilevel.problem import Descent, GradientDescent
from bilevel.unrolling.unroll import Slopes, Unroll


def push_forward_sharing_steps(run: Unroll, chunks: Sequence[list[Tensor]]) -> Slopes:
    """What `Unroll.push_forward` gives for all chunks of directions together.

    T (1 + 2b) units for b directions, whatever their number a chunk. Memory: the tangents of all of them, one graph of
    a step, and the backward passes of one chunk through it.
    """
    problem = run.problem.require_inner_loss(
        'tangents="shared"', "whose second derivatives are symmetric", instead='tangents="exact"'
    )
    if problem.backend is not None:
        raise CompileError(
            f'tangents="shared" takes many products of one graph, and compiled code (compile={problem.backend!r}) has '
            'none to share; take tangents="exact", or compile=False'
        )
    state = run.start()
    tangents = [run.push_init(vectors).tangents for vectors in chunks]
    for t in range(run.steps):
        with autodiff.RefuseOnceDifferentiable() if t == 0 else nullcontext():
            state = _push_step(run, problem, t, state, tangents, chunks)
    value, d, c = run.outer_cotangents(state)
    slopes = [
        sum(_products(part, ys) for part, ys in zip([*d, *c], [*y, *vectors], strict=True))
        for y, vectors in zip(tangents, chunks, strict=True)
    ]
    moved = any(bool(part.any()) for y in tangents for part in y)
    return Slopes(value, state, torch.cat([s for s in slopes if isinstance(s, Tensor)]), moved)


def _push_step(
    run: Unroll,
    problem: GradientDescent,
    t: int,
    state: Descent,
    tangents: list[list[Tensor]],
    chunks: Sequence[list[Tensor]],
) -> Descent:
    """The next state; the tangents are moved on in place."""
    batch = run.inner_batches[t]

    def joint(params: trees.Tree, buffers: trees.Tree, weights: list[Tensor], meta: trees.Tree) -> trees.Tree:
        found = problem.evaluate_jointly(params, meta, batch, buffers, weights)
        return found.gradient, trees.detach(found.buffers)

    followed = trees.split(state.buffers).differentiable
    weights = [torch.zeros_like(b) for b in followed]
    with run.seeded_step(t):
        shared = autodiff.Transpose(joint, [state.params, state.buffers, weights, run.meta])
    size, rest = len(trees.split(state.params).differentiable), len(followed)
    (joint_gradient, buffers), after = shared.value, state
    gradient, reached = joint_gradient[:size], [g is not None for g in joint_gradient]
    if not any(g is not None and bool(g.any()) for g in gradient):
        with run.seeded_step(t):  # says so if the loss does not depend on the parameters
            problem.gradient(state.params, run.meta, batch, state.buffers)
    for number, (y, vectors) in enumerate(zip(tangents, chunks, strict=True)):
        of_buffers = y[len(y) - rest :]
        # A leaf that the loss does not reach has neither a row nor a column in the Hessian. The last cotangents stand
        # for the outputs `buffers`, which have no graph.
        cotangents = [*itertools.compress([*y[:size], *vectors, *of_buffers], reached), *of_buffers]
        bend, moved = shared.many(cotangents, of=[0, 2])
        bend = list(itertools.compress(bend, reached))
        pushed = autodiff.push_forward(problem.apply, [state, gradient, run.meta, buffers], [y, bend, vectors, moved])
        after, tangents[number] = pushed.value, pushed.tangents
    return after


def _products(cotangent: Tensor, tangents: Tensor) -> Tensor:
    """cotangent · tangent for each of k tangents, `[k]`."""
    return tangents.reshape(len(tangents), -1) @ cotangent.reshape(-1).to(tangents)
