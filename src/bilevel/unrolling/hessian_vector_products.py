"""Pushes tangents by Hessian-vector products: the graph of a step's gradient is made once and serves all chunks.

With g = ∇_θ loss, the gradient's tangent along (y, v) is ∂g/∂θ y + ∂g/∂φ v, the θ part of the Hessian of the loss in
(θ, φ) times (y, v). A Hessian is symmetric, so that product is one backward pass through the graph of ∇_{θ,φ} loss, and
the graph stays for the next chunk. In forward mode each chunk would compute the step again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import CompileError
from bilevel.problem import GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.tangents import Part, TangentRule
from bilevel.unrolling.unroll import Unroll


class SharedSteps(TangentRule):
    """Pushes tangents chunk by chunk through one graph of each step's gradient.

    T (1 + 2b) units for b directions, whatever the length of a chunk. Memory: the tangents of all directions, one graph
    of a step, and the backward passes of one chunk through it.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        """Take the number of directions in each chunk."""
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
        problem, batch = _require_shareable(run), run.inner_batches[t]

        def joint(params: Tree, meta: Tree) -> list[Tensor]:
            return problem.joint_gradient(params, meta, batch)

        with autodiff.RefuseOnceDifferentiable() if t == 0 else nullcontext():
            with run.seeded_step(t):
                shared = autodiff.Transpose(joint, [state.params, run.meta])
            size = len(trees.split(state.params).differentiable)
            gradient, after = shared.value[:size], state
            if not any(bool(g.any()) for g in gradient):
                with run.seeded_step(t):
                    problem.gradient(state.params, run.meta, batch)  # raises if the loss does not depend on θ
            for number, (y, vectors) in enumerate(zip(tangents, directions, strict=True)):
                (bend,) = shared.many([*y[:size], *vectors], of=[0])
                pushed = autodiff.push_forward(problem.apply, [state, gradient, run.meta], [y, bend, vectors])
                after, tangents[number] = pushed.value, pushed.tangents
        return after, tangents

    def outer_loss(
        self, run: Unroll, state: Tree, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tensor, Tensor]:
        value, d, c = run.outer_cotangents(state)
        slopes = [
            sum(_products(part, ys) for part, ys in zip([*d, *c], [*y, *vectors], strict=True))
            for y, vectors in zip(tangents, directions, strict=True)
        ]
        return value, torch.cat([s for s in slopes if isinstance(s, Tensor)])


def _require_shareable(run: Unroll) -> GradientDescent:
    """Return the problem, or raise if there is no graph of a gradient that chunks could share."""
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
    return problem


def _products(cotangent: Tensor, tangents: Tensor) -> Tensor:
    """Return cotangent · tangent for each of k tangents, `[k]`."""
    return tangents.reshape(len(tangents), -1) @ cotangent.reshape(-1).to(tangents)
