"""Tangents of an inner loop without forward mode: differences of first-order gradients, step by step.

    ∇g's tangent along (y, v) ≈ (∇g(θ + εy, φ + εv) − ∇g(θ − εy, φ − εv)) / 2ε

with ε = ∛(machine epsilon) · ‖(θ, φ)‖/‖(y, v)‖, which balances the O(ε²) of the formula against rounding: a relative
error of about ∛(machine epsilon)², 4e-11 in float64 and 2e-5 in float32, times the third derivative's scale; where the
gradient is computed to less than its dtype's precision, more. The optimiser's update itself is differentiated exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.models.module_view import standing_in
from bilevel.problem import Descent, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.unroll import Slopes, Unroll

Pair = tuple[list[Tensor], list[Tensor]]
"""Tangents of the state and of φ, one tensor for each differentiable leaf."""


def push_forward_by_differences(run: Unroll, directions: list[Tensor]) -> Slopes:
    """What `Unroll.push_forward` gives, from first-order gradients alone, one direction after the other.

    For a `GradientDescent` gradients are differenced; for a `Problem` whole steps. The slope of the outer loss comes
    from its own first-order gradient, exactly. 1 + 2k units a step for k directions.
    """
    vectors = _one_by_one(directions)
    state = run.start()
    tangents = [_difference(lambda _, meta: run.init(meta), state, run.meta, ([], v)) for v in vectors]
    return push_on_by_differences(run, autodiff.Pushed(state, _stacked(tangents)), directions)[0]


def push_on_by_differences(
    run: Unroll, pushed: autodiff.Pushed, directions: list[Tensor]
) -> tuple[Slopes, list[Tensor]]:
    """What `Unroll.push_on` gives: the same from a given state and its tangents."""
    vectors, state, tangents = _one_by_one(directions), pushed.value, _one_by_one(pushed.tangents)
    for t in range(run.steps):
        push = _push_descent if isinstance(run.problem, GradientDescent) else _push_step
        state, tangents = push(run, t, state, list(zip(tangents, vectors, strict=True)))
    value, d, c = _outer_gradients(run, state)
    slopes = [trees.dot(d, y) + trees.dot(c, v) for y, v in zip(tangents, vectors, strict=True)]
    moved = any(bool(trees.whole(part.any())) for y in tangents for part in y)
    return Slopes(value, state, torch.stack(slopes), moved), _stacked(tangents)


def _one_by_one(tensors: list[Tensor]) -> list[list[Tensor]]:
    return [list(each) for each in zip(*tensors, strict=True)]


def _stacked(tangents: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(leaves) for leaves in zip(*tangents, strict=True)]


def _outer_gradients(run: Unroll, state: Tree) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outer loss and its gradients by state and φ."""
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
    return value.detach(), autodiff.fill_zeros(d, state), autodiff.fill_zeros(c, run.meta)


def _push_step(run: Unroll, t: int, state: Tree, pairs: list[Pair]) -> tuple[Tree, list[list[Tensor]]]:
    after = run.descend(state, t, t + 1)
    return after, [_difference(lambda s, m: run.step(t, s, m), state, run.meta, pair) for pair in pairs]


def _push_descent(run: Unroll, t: int, state: Descent, pairs: list[Pair]) -> tuple[Tree, list[list[Tensor]]]:
    problem = run.problem
    assert isinstance(problem, GradientDescent)

    def gradient(params: Tree, meta: Tree) -> list[Tensor]:
        with run.seeded_step(t):
            return problem.gradient(params, meta, run.inner_batches[t])

    found, after, tangents = gradient(state.params, run.meta), None, []
    size = len(trees.split(state.params).differentiable)
    for y, v in pairs:
        bend = _difference(gradient, state.params, run.meta, (y[:size], v))
        # The optimisers work entry by entry, so each process updates its own part of what is spread over several.
        parts = [[trees.local(p).unsqueeze(0) for p in part] for part in (y, bend, v)]
        arguments = [trees.map_leaves(_local, tree) for tree in (state, found)]
        pushed = autodiff.push_forward(problem.apply, [*arguments, run.meta], parts)
        after = trees.map_leaves(_spread_like, pushed.value, state)
        likes = trees.split(after).differentiable
        tangents.append([trees.spread_like(part[0], like) for part, like in zip(pushed.tangents, likes, strict=True)])
    return after, tangents


def _local(leaf: Any) -> Any:
    return trees.local(leaf) if isinstance(leaf, Tensor) else leaf


def _spread_like(leaf: Any, like: Any) -> Any:
    return trees.spread_like(leaf, like) if isinstance(like, Tensor) else leaf


def _difference(function: Callable[[Tree, Tree], Tree], state: Tree, meta: Tree, tangents: Pair) -> list[Tensor]:
    """The central difference of a function of (state, φ) along a pair of tangents."""
    places = (trees.split(state), trees.split(meta))
    points = [*places[0].differentiable[: len(tangents[0])], *places[1].differentiable]
    along = [*tangents[0], *tangents[1]]
    length, speed = (float(trees.squared_norm(ts).sqrt()) for ts in (points, along))
    coarsest = max(torch.finfo(t.dtype).eps for t in points)
    step = coarsest ** (1 / 3) * (length or 1.0) / (speed or 1.0)

    def shifted(sign: int) -> list[Tensor]:
        moved = [p + sign * step * a for p, a in zip(points, along, strict=True)]
        count = len(tangents[0])
        there = places[0].rebuild(moved[:count]) if count else state
        with torch.enable_grad():
            return [t.detach() for t in trees.split(function(there, places[1].rebuild(moved[count:]))).differentiable]

    return [(ahead - behind) / (2 * step) for ahead, behind in zip(shifted(1), shifted(-1), strict=True)]
