"""Propagation of tangents through an inner loop: one loop over the steps, with a rule for the tangents of one step.

For directions v `[k, *leaf.shape]` of the leaves of φ,

    y_0 = B_0 v,   y_{t+1} = A_t y_t + B_t v,   slope = d y_T + c v = ∇h · v,

with A_t, B_t the Jacobians of a step with respect to θ and φ, and d, c the derivatives of the outer loss with respect
to θ_T and φ. There are three rules: `ForwardMode` in this file, and `FiniteDifferences` and `SharedSteps` in their own
files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.trees import Tree
from bilevel.unrolling.step_products import push_step
from bilevel.unrolling.unroll import Unroll

Part = list[Tensor]
"""Tangents of a state, or directions, that a rule handles together. There is one tensor for each leaf."""


class Slopes(NamedTuple):
    """The result of the propagation of k directions through the inner loop."""

    value: Tensor
    """The outer loss h."""
    state: Tree
    """θ_T."""
    slopes: Tensor
    """∇h · v for every direction, `[k]`; for m outer losses `[k, m]`."""
    moved: bool
    """Whether any direction moves the final state at all."""


class TangentRule(ABC):
    """A way to propagate tangents from the initial state through the inner steps to the outer loss.

    Other code has the tangents of all directions as stacks, `[k, *leaf.shape]` for each leaf. A rule divides them into
    parts of its choice.
    """

    @abstractmethod
    def parts(self, stacks: list[Tensor]) -> list[Part]:
        """Divide stacks into parts."""

    @abstractmethod
    def stacked(self, parts: list[Part]) -> list[Tensor]:
        """Combine parts to stacks. This is the inverse of `parts`."""

    @abstractmethod
    def start(self, run: Unroll, directions: list[Part]) -> tuple[Tree, list[Part]]:
        """Return θ_0 and its tangents B_0 v."""

    @abstractmethod
    def step(
        self, run: Unroll, t: int, state: Tree, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tree, list[Part]]:
        """Return θ_{t+1} and its tangents A_t y + B_t v. `tangents` may be changed in place."""

    @abstractmethod
    def outer_loss(
        self, run: Unroll, state: Tree, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tensor, Tensor]:
        """Return the outer loss and the slopes d y + c v, `[k]`; `[k, m]` for m outer losses."""


class ForwardMode(TangentRule):
    """A rule that computes all tangents of a whole step at once, by forward-mode differentiation."""

    def parts(self, stacks: list[Tensor]) -> list[Part]:
        return [stacks]

    def stacked(self, parts: list[Part]) -> list[Tensor]:
        (part,) = parts
        return part

    def start(self, run: Unroll, directions: list[Part]) -> tuple[Tree, list[Part]]:
        begun = run.push_init(directions[0])
        return begun.value, [begun.tangents]

    @torch.no_grad()
    def step(
        self, run: Unroll, t: int, state: Any, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tree, list[Part]]:
        pushed = push_step(run, t, autodiff.Pushed(state, tangents[0]), directions[0])
        return pushed.value, [pushed.tangents]

    @torch.no_grad()
    def outer_loss(
        self, run: Unroll, state: Tree, tangents: list[Part], directions: list[Part]
    ) -> tuple[Tensor, Tensor]:
        pushed = run.push_outer(autodiff.Pushed(state, tangents[0]), directions[0])
        run.same_value(f"forward, {len(directions[0][0])} directions", pushed.value)
        return pushed.value, pushed.tangents[0]


FORWARD_MODE = ForwardMode()


def push_forward(run: Unroll, directions: list[Tensor], rule: TangentRule = FORWARD_MODE) -> Slopes:
    """Compute the outer loss h and its slopes along k directions, in one pass through the steps.

    With `FORWARD_MODE` the memory is that of one state and its k tangents, for any T.

    Args:
        run: the inner loop.
        directions: k directions, `[k, *leaf.shape]` for each leaf of φ.
        rule: the rule for the tangents.
    """
    vectors = rule.parts(directions)
    state, tangents = rule.start(run, vectors)
    return _through(run, rule, state, tangents, vectors)[0]


def push_on(
    run: Unroll, state: Tree, tangents: list[Tensor], directions: list[Tensor], rule: TangentRule = FORWARD_MODE
) -> tuple[Slopes, list[Tensor]]:
    """Compute the outer loss h and its slopes from a given θ_0 and its tangents y_0.

    Args:
        run: the inner loop.
        state: θ_0.
        tangents: y_0, `[k, *leaf.shape]` for each differentiable leaf of θ_0.
        directions: k directions, `[k, *leaf.shape]` for each leaf of φ.
        rule: the rule for the tangents.

    Returns:
        The slopes, and the tangents y_T.
    """
    slopes, parts = _through(run, rule, state, rule.parts(tangents), rule.parts(directions))
    return slopes, rule.stacked(parts)


def _through(
    run: Unroll, rule: TangentRule, state: Tree, tangents: list[Part], directions: list[Part]
) -> tuple[Slopes, list[Part]]:
    for t in range(run.steps):
        state, tangents = rule.step(run, t, state, tangents, directions)
    value, slopes = rule.outer_loss(run, state, tangents, directions)
    moved = any(bool(trees.whole(leaf.any())) for part in tangents for leaf in part)
    return Slopes(value, state, slopes, moved), tangents
