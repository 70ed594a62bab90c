"""Tangents pushed forward through an inner loop: one loop over the steps, with a rule for what a step does to them.

For directions v `[k, *leaf.shape]` of the leaves of φ,

    y_0 = B_0 v,   y_{t+1} = A_t y_t + B_t v,   slope = d y_T + c v = ∇h · v,

with A_t, B_t the Jacobians of a step by θ and φ, and d, c the derivatives of the outer loss by θ_T and φ. There are
three rules: `ForwardMode` here, `FiniteDifferences` and `SharedSteps` in files of their own.
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
"""Tangents of a state, or directions, that a rule handles together: one tensor for each leaf."""


class Slopes(NamedTuple):
    """The result of pushing k directions through the inner loop."""

    value: Tensor
    """The outer loss h."""
    state: Tree
    """θ_T."""
    slopes: Tensor
    """∇h · v for every direction, `[k]`; for m outer losses `[k, m]`."""
    moved: bool
    """Whether any direction moves the final state at all."""


class TangentRule(ABC):
    """A way to get tangents from the initial state through the inner steps to the outer loss.

    Outside, the tangents of all directions are stacked, `[k, *leaf.shape]` for each leaf. Inside, a rule handles them
    in parts of its choice.
    """

    @abstractmethod
    def parts(self, stacks: list[Tensor]) -> list[Part]:
        """Cut stacks into parts."""

    @abstractmethod
    def stacked(self, parts: list[Part]) -> list[Tensor]:
        """Put parts together to stacks."""

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
    """Pushes all tangents at once through a whole step, by forward-mode differentiation."""

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
    """Return the outer loss h and its slopes along k directions `[k, *leaf.shape]`, in one pass through the steps.

    Memory with `FORWARD_MODE`: one state and k tangents of it, whatever T.
    """
    vectors = rule.parts(directions)
    state, tangents = rule.start(run, vectors)
    return _through(run, rule, state, tangents, vectors)[0]


def push_on(
    run: Unroll, state: Tree, tangents: list[Tensor], directions: list[Tensor], rule: TangentRule = FORWARD_MODE
) -> tuple[Slopes, list[Tensor]]:
    """Return the same from a given θ_0 and its tangents y_0, and the tangents y_T as well."""
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
