"""One inner loop with derivatives: run with tangents, or backwards with cotangents.

Notation, here and in the estimators: A_t = ∂θ_t/∂θ_{t−1} and B_t = ∂θ_t/∂φ of one step, Z_t = dθ_t/dφ,
d = ∂outer/∂θ_T, c = ∂outer/∂φ; so ∇h = d Z_T + c.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.batches import no_batches, require_batches
from bilevel.errors import NoDependenceError
from bilevel.models.module_view import as_tree
from bilevel.problem import BlackBox, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.diagnosis import require_dependence, require_finite
from bilevel.unrolling.inner_loop import Carried, InnerLoop
from bilevel.unrolling.step_products import Product, pull_back_step, push_step


class Slopes(NamedTuple):
    """What pushing k directions through the inner loop gives."""

    value: Tensor
    state: Tree
    slopes: Tensor
    """∇h · v for every direction, `[k]`."""
    moved: bool
    """Whether any direction moves the final state at all."""


@dataclass(frozen=True)
class Unroll(InnerLoop):
    """An inner loop and the ways derivatives take through it. Made by `unroll`, which checks what the user passed."""

    # -- forward: tangents -------------------------------------------------------------------------------------

    def push_forward(self, directions: list[Tensor]) -> Slopes:
        """The outer loss h and its slopes along k directions v, `[k, *leaf.shape]` for each leaf of φ, in one pass.

        y_0 = B_0 v, y_t = A_t y_{t−1} + B_t v, slope = d y_T + c v. Memory: one state and k tangents of it, whatever T.
        """
        return self.push_on(self.push_init(directions), directions)[0]

    def push_on(self, pushed: autodiff.Pushed, directions: list[Tensor]) -> tuple[Slopes, list[Tensor]]:
        """The same from a given θ_0 and its tangents y_0; and the tangents y_T."""
        with torch.no_grad():
            for t in range(self.steps):
                pushed = push_step(self, t, pushed, directions)
            moved = any(bool(tangent.any()) for tangent in pushed.tangents)
            outer = autodiff.push_forward(self.outer_loss, [pushed.value, self.meta], [pushed.tangents, directions])
        return Slopes(outer.value, pushed.value, outer.tangents[0], moved), pushed.tangents

    def push_init(self, directions: list[Tensor]) -> autodiff.Pushed:
        """θ_0 and its tangents B_0 v.

        An initial state without φ, such as a freshly built network, is made outside of forward mode, inside which
        modules can't be moved or cast.
        """
        plain = autodiff.Transpose(self.init, [self.meta])
        if plain.connected:
            return autodiff.push_forward(self.init, [self.meta], [directions])
        count = len(directions[0])
        tangents = [t.new_zeros(count, *t.shape) for t in trees.split(plain.value).differentiable]
        return autodiff.Pushed(plain.value, tangents)

    # -- backward: cotangents ----------------------------------------------------------------------------------

    def outer_cotangents(self, state: Tree) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The outer loss h at a final state, d = ∂outer/∂θ_T and c = ∂outer/∂φ."""
        value, (d, c) = autodiff.pull_back(self.outer_loss, [state, self.meta])
        if all(part is None for part in d):
            raise NoDependenceError(
                "outer_loss does not depend on the inner state, so no inner step has an effect on it; compute it from "
                "the parameters or state it is given (for a module: call the model passed to outer_loss, not one from "
                "outside), and keep .detach(), .item() and torch.no_grad() out of it"
            )
        derivatives = autodiff.fill_zeros(d, state), autodiff.fill_zeros(c, self.meta)
        require_finite(self, value, state, derivatives)
        return value, *derivatives

    def pull_back(
        self, trail: Iterable[tuple[int, Tree]], d: list[Tensor], product: Product = "reverse"
    ) -> list[Tensor]:
        """Σ_t d_t B_t over a trail of (t, θ_t) that runs backwards; `d` is changed in place.

        From the last step down: sum ← sum + d B_t, d ← d A_t, each a vector-Jacobian product of one step. `d` ends as
        the cotangent of the trail's first state. Memory: the graph of one step.
        """
        total = [torch.zeros_like(leaf) for leaf in trees.leaves(self.meta)]
        for number, (t, state) in enumerate(trail):
            with autodiff.RefuseOnceDifferentiable() if number == 0 else nullcontext():
                down, across = pull_back_step(self, t, state, d, product)
            d[:] = autodiff.fill_zeros(down, state)
            _accumulate(total, across)
        return total

    def pull_back_init(self, d: list[Tensor], total: list[Tensor]) -> None:
        """Add d B_0 to the total: what the initial state's dependence on φ contributes."""
        _, (across,) = autodiff.pull_back(self.init, [self.meta], d)
        _accumulate(total, across)

    def add_explicit(self, through: list[Tensor], c: list[Tensor], from_start: bool = True) -> list[Tensor]:
        """∇h = d Z_T + c from both parts; an error if nothing can come through the inner loop."""
        if not any(bool(part.any()) for part in through):
            require_dependence(self, from_start)
        return [inner + outer for inner, outer in zip(through, c, strict=True)]

    # -- connections -------------------------------------------------------------------------------------------

    def require_connections(self, moved: bool, slopes: Tensor, state: Tree) -> None:
        """Raise where tangents or slopes are zero because something is not connected."""
        if not moved:
            require_dependence(self)
        if not bool(slopes.any()):
            self.outer_cotangents(state)


def unroll(
    problem: Any, meta: Any, inner_batches: Any, outer_batch: Any, seed: int, carried: Carried | None = None
) -> Unroll:
    """Check what was passed to an estimator and gather it."""
    randomness.check_seed(seed)
    argument_checks.outside_of_inference_mode()
    argument_checks.problem(problem)
    if isinstance(problem, BlackBox):
        if inner_batches is not None:
            raise ValueError("a BlackBox takes no inner_batches: its solve(meta) is the whole inner loop; pass None")
        if carried is not None:
            raise ValueError("a BlackBox solves from the beginning each time, so nothing can be carried into it")
        inner_batches = no_batches(1)
    if isinstance(problem, GradientDescent):
        problem.check_compiled_again()
    meta = as_tree(meta)
    argument_checks.meta_parameters(meta)
    argument_checks.one_device(meta=meta, outer_batch=outer_batch)
    argument_checks.finite(meta)
    return Unroll(problem, trees.detach(meta), require_batches(inner_batches), outer_batch, seed, carried)


def _accumulate(c: list[Tensor], parts: list[Tensor | None]) -> None:
    for i, part in enumerate(parts):
        if part is not None:
            c[i] = c[i] + part
