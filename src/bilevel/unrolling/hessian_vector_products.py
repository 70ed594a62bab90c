"""Tangents of all chunks of directions pushed together, by Hessian-vector products that share one graph of each step.

In forward mode each chunk would compute the inner step again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel import trees
from bilevel.errors import CompileError
from bilevel.unrolling.step_products import push_step_by_hessian_products
from bilevel.unrolling.unroll import Slopes, Unroll


def push_forward_sharing_steps(run: Unroll, chunks: Sequence[list[Tensor]]) -> Slopes:
    """Return what `Unroll.push_forward` returns, for all chunks of directions together.

    Cost: T (1 + 2b) units for b directions, whatever the size of a chunk. Memory: the tangents of all directions, one
    graph of a step, and the backward passes of one chunk through it.
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
        state = push_step_by_hessian_products(run, problem, t, state, tangents, chunks)
    value, d, c = run.outer_cotangents(state)
    slopes = [trees.dots([*d, *c], [*y, *vectors]) for y, vectors in zip(tangents, chunks, strict=True)]
    moved = any(bool(part.any()) for y in tangents for part in y)
    return Slopes(value, state, torch.cat(slopes), moved)
