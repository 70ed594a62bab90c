"""Tangents by Hessian-vector products, with one graph of each step's gradient for all chunks of directions.

In forward mode each chunk would compute the inner step again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import CompileError
from bilevel.problem import GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.step_products import push_step_by_hessian_products
from bilevel.unrolling.tangents import Part, TangentRule
from bilevel.unrolling.unroll import Unroll, slopes_along


class SharedSteps(TangentRule):
    """A rule that computes tangents chunk by chunk, from one graph of each step's gradient.

    The cost is T (1 + 2b) units for b directions, for any length of a chunk. The memory is that of the tangents of all
    directions, one graph of a step, and the backward passes of one chunk through it.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        """Set up the rule for chunks with these numbers of directions."""
        self._lengths = list(lengths)

    def parts(self, stacks: list[Tensor]) -> list[Part]:
        return [list(each) for each in zip(*(stack.split(self._lengths) for stack in stacks), strict=True)]

    def stacked(self, parts: list[Part]) -> list[Tensor]:
        return [torch.cat(leaves) for leaves in zip(*parts, strict=True)]

    def start(self, run: Unroll, directions: list[Part]) -> tuple[Tree, list[Part]]:
        _require_shareable(run)
        return run.start(), [run.push_init(vectors).tangents for vectors in directions]

    def step(
        self, run: Unroll, t: int, state: Any, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tree, list[Part]]:
        after = push_step_by_hessian_products(run, _require_shareable(run), t, state, tangents, directions)
        return after, tangents

    def outer_loss(
        self, run: Unroll, state: Tree, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tensor, Tensor]:
        value, d, c = run.outer_cotangents(state)
        parts = zip(tangents, directions, strict=True)
        slopes = [slopes_along(value, [*d, *c], [*y, *vectors]) for y, vectors in parts]
        return value, torch.cat(slopes)


def _require_shareable(run: Unroll) -> GradientDescent:
    """Return the problem.

    Raises:
        TypeError, CompileError: there is no graph of a gradient that the chunks could share.
    """
    problem = run.problem.require_inner_loss(
        'tangents="shared"', "whose second derivatives are symmetric", instead='tangents="exact"'
    )
    if problem.backend is not None:
        raise CompileError(
            f'tangents="shared" takes many products of one graph, and compiled code (compile={problem.backend!r}) has '
            'none to share; take tangents="exact", or compile=False'
        )
    return problem
