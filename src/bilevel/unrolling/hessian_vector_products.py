"""Tangents whose chunks share the inner steps: the graph of a step's gradient is made once and serves all of them.

With g = ∇_θ loss, the gradient's tangent along (y, v) is ∂g/∂θ y + ∂g/∂φ v, the θ part of the Hessian of the loss in
(θ, φ) times (y, v). A Hessian is symmetric, so that product is one backward pass through the graph of ∇_{θ,φ} loss, and
the graph stays for the next chunk. In forward mode each chunk would compute the step again.
"""

from __future__ import annotations

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
    problem = run.problem
    if not isinstance(problem, GradientDescent):
        raise TypeError(
            f'tangents="shared" needs the inner loss, whose second derivatives are symmetric; a '
            f"{type(problem).__name__} has only steps. Describe the problem with bilevel.GradientDescent, or take "
            'tangents="exact"'
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

    def joint(params: trees.Tree, meta: trees.Tree) -> list[Tensor]:
        return problem.joint_gradient(params, meta, batch)

    with run.seeded_step(t):
        shared = autodiff.Transpose(joint, [state.params, run.meta])
    size = len(trees.split(state.params).differentiable)
    gradient, after = shared.value[:size], state
    if not any(bool(g.any()) for g in gradient):
        with run.seeded_step(t):
            problem.gradient(state.params, run.meta, batch)  # says so if the loss does not depend on the parameters
    for number, (y, vectors) in enumerate(zip(tangents, chunks, strict=True)):
        (bend,) = shared.many([*y[:size], *vectors], of=[0])
        pushed = autodiff.push_forward(problem.apply, [state, gradient, run.meta], [y, bend, vectors])
        after, tangents[number] = pushed.value, pushed.tangents
    return after


def _products(cotangent: Tensor, tangents: Tensor) -> Tensor:
    """cotangent · tangent for each of k tangents, `[k]`."""
    return tangents.reshape(len(tangents), -1) @ cotangent.reshape(-1).to(tangents)
