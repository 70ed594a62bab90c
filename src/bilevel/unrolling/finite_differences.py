"""Tangents without forward mode, by differences of first-order gradients, step by step.

    ∇g's tangent along (y, v) ≈ (∇g(θ + εy, φ + εv) − ∇g(θ − εy, φ − εv)) / 2ε

with ε = ∛(machine epsilon) · ‖(θ, φ)‖/‖(y, v)‖, which balances the O(ε²) error of the formula against rounding. The
relative error is about ∛(machine epsilon)², 4e-11 in float64 and 2e-5 in float32, times the third derivative's scale.
It is larger if the gradient is computed with less than its dtype's precision. The optimiser's update itself is
differentiated exactly.

What an inner loss takes from `detach()`, from `.data` or from a block under `torch.no_grad()` is a constant for
derivatives. It is recorded at (θ, φ) and replayed at the moved points, so that a stop-gradient means here what it means
in the other methods. Three things are evaluated at the moved points as they are, and differences then do not stop: a
custom `autograd.Function`, the steps of a `Problem`, and losses that are compiled or spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.problem import Descent, Evaluated, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.first_order import outer_gradients
from bilevel.unrolling.held_stops import HeldStops
from bilevel.unrolling.replay import require_repeatable
from bilevel.unrolling.tangents import Part, TangentRule
from bilevel.unrolling.unroll import Unroll

Pair = tuple[list[Tensor], list[Tensor]]
"""Tangents of the state and of φ, one tensor for each differentiable leaf."""


class FiniteDifferences(TangentRule):
    """A rule that computes one tangent after the other by central differences.

    For a `GradientDescent` the differences are those of gradients, and for a `Problem` those of whole steps. The slope
    of the outer loss is computed exactly from its first-order gradient. The cost is 1 + 2k units per step for k
    directions.
    """

    def parts(self, stacks: list[Tensor]) -> list[Part]:
        return [list(each) for each in zip(*stacks, strict=True)]

    def stacked(self, parts: list[Part]) -> list[Tensor]:
        return [torch.stack(leaves) for leaves in zip(*parts, strict=True)]

    def start(self, run: Unroll, directions: list[Part]) -> tuple[Tree, list[Part]]:
        state = run.start()
        return state, [_difference(lambda _, meta: run.init(meta), state, run.meta, ([], v)) for v in directions]

    def step(
        self, run: Unroll, t: int, state: Tree, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tree, list[Part]]:
        pairs = list(zip(tangents, directions, strict=True))
        if (problem := run.problem.as_gradient_descent) is None:
            after, moved = _push_step(run, t, state, pairs)
        else:
            after, moved = _push_descent(run, problem, t, state, pairs)
        require_repeatable(run, t, state, after)
        return after, moved

    def outer_loss(
        self, run: Unroll, state: Tree, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tensor, Tensor]:
        value, d, c = outer_gradients(run, state)
        run.same_value("differences", value)
        pairs = zip(tangents, directions, strict=True)
        if not value.ndim:
            return value, torch.stack([trees.dot(d, y) + trees.dot(c, v) for y, v in pairs])
        return value, torch.stack(
            [torch.stack([trees.dot([t[j] for t in (*d, *c)], [*y, *v]) for j in range(len(value))]) for y, v in pairs]
        )


def _push_step(run: Unroll, t: int, state: Tree, pairs: list[Pair]) -> tuple[Tree, list[list[Tensor]]]:
    after = run.descend(state, t, t + 1)
    return after, [_difference(lambda s, m: run.step(t, s, m), state, run.meta, pair) for pair in pairs]


def _push_descent(
    run: Unroll, problem: GradientDescent, t: int, state: Descent, pairs: list[Pair]
) -> tuple[Tree, list[list[Tensor]]]:
    stops = HeldStops(problem, state)

    def evaluated(moved: tuple[Tree, Tree], meta: Tree) -> Evaluated:
        return run.at_step(t, lambda batch: stops.problem.evaluate(moved[0], meta, batch, moved[1]))

    def reached(moved: tuple[Tree, Tree], meta: Tree) -> tuple[list[Tensor], Tree]:
        """Return the buffers, and the entries of the gradient that the loss reaches at the state itself."""
        gradient, buffers = evaluated(moved, meta)
        filled = autodiff.fill_zeros(gradient, moved[0])
        return [g for g, there in zip(filled, found.gradient, strict=True) if there is not None], buffers

    here = (state.params, state.buffers)
    found, after, tangents = evaluated(here, run.meta), None, []
    stops.recorded()
    size, rest = len(found.gradient), len(trees.split(state.buffers).differentiable)
    count = sum(g is not None for g in found.gradient)
    for y, v in pairs:
        moving = ([*y[:size], *y[len(y) - rest :]], v)
        bend = _difference(reached, here, run.meta, moving, stops.pair)
        # The optimisers work entry by entry, so each process updates its own part of a tensor that is spread over
        # several.
        parts = [[trees.local(p).unsqueeze(0) for p in part] for part in (y, bend[:count], v, bend[count:])]
        arguments = [trees.map_leaves(_local, tree) for tree in (state, found.gradient, run.meta, found.buffers)]
        pushed = autodiff.push_forward(problem.apply, arguments, parts)
        after = pushed.value
        if any(trees.is_spread(leaf) for leaf in trees.leaves(state)):  # each parameter then has its own memory
            after = trees.map_leaves(_spread_like, pushed.value, state)
        likes = trees.split(after).differentiable
        tangents.append([trees.spread_like(part[0], like) for part, like in zip(pushed.tangents, likes, strict=True)])
    return after, tangents


def _local(leaf: Any) -> Any:
    return trees.local(leaf) if isinstance(leaf, Tensor) else leaf


def _spread_like(leaf: Any, like: Any) -> Any:
    return trees.spread_like(leaf, like) if isinstance(like, Tensor) else leaf


def _both(function: Callable[[int], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return function(1), function(-1)


def _difference(
    function: Callable[[Tree, Tree], Tree],
    state: Tree,
    meta: Tree,
    tangents: Pair,
    both: Callable[[Callable[[int], list[Tensor]]], tuple[list[Tensor], list[Tensor]]] = _both,
) -> list[Tensor]:
    """Compute the central difference of a function of (state, φ) along a pair of tangents.

    `both` evaluates a function of the sign for both signs.
    """
    places = (trees.split(state), trees.split(meta))
    points = [*places[0].differentiable[: len(tangents[0])], *places[1].differentiable]
    along = [*tangents[0], *tangents[1]]
    length, speed = (trees.squared_norm(ts).sqrt().double() for ts in (points, along))
    coarsest = max(torch.finfo(t.dtype).eps for t in points)
    # Lengths stay on the device, because reading one would wait for it at every step.
    step = coarsest ** (1 / 3) * length.where(length > 0, 1.0) / speed.where(speed > 0, 1.0)

    def shifted(sign: int) -> list[Tensor]:
        moved = [p + sign * step * a for p, a in zip(points, along, strict=True)]
        count = len(tangents[0])
        there = places[0].rebuild(moved[:count]) if count else state
        with torch.enable_grad():
            return [t.detach() for t in trees.split(function(there, places[1].rebuild(moved[count:]))).differentiable]

    return [(ahead - behind) / (2 * step) for ahead, behind in zip(*both(shifted), strict=True)]
