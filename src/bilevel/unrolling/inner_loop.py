"""The inner loop of one problem at one φ, run plainly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel import randomness, trees
from bilevel.batches import Batches
from bilevel.models.module_view import modules_in, refuse_running_statistics
from bilevel.problem import BlackBox, GradientDescent, Unrollable, require_scalar
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Carried:
    """Where one window of an inner loop ended, for the next to go on from. Part of every `Estimate`."""

    state: Tree
    """The inner state at the border."""
    steps: int
    """Inner steps taken until there since the history began."""
    tangents: list[Tensor] | None = None
    """Of the state along b directions, `[b, *leaf.shape]`; `None` if nothing is known of how it came to depend on φ:
    a history of tangents then begins at this state, with zeros."""
    labels: list[Tensor] | None = None
    """What the tangents' slopes multiply, `[b, *leaf.shape]` for each leaf of φ, if not the directions themselves."""
    first_norm: float = 0.0
    """Length of the first window's tangents, with labels."""


@dataclass(frozen=True)
class InnerLoop:
    """A problem, a point φ, the batches and the seed. Every method may be called again, and again gives the same
    numbers.
    """

    problem: Unrollable | BlackBox
    meta: Tree
    inner_batches: Batches
    outer_batch: Any
    seed: int
    carried: Carried | None = None
    """The window before, if this is not the first one of its history."""

    @property
    def steps(self) -> int:
        """T, the number of inner steps; 0 for a black box."""
        return 0 if isinstance(self.problem, BlackBox) else len(self.inner_batches)

    @property
    def meta_size(self) -> int:
        """N, the number of meta parameters."""
        return trees.size(self.meta)

    @property
    def first_step(self) -> int:
        """The number of this window's first step in its history."""
        return 0 if self.carried is None else self.carried.steps

    # -- the three functions of the problem, seeded ------------------------------------------------------------

    def init(self, meta: Tree) -> Tree:
        """θ_0, or where the window before ended (a constant then), or the whole solve of a black box."""
        if self.carried is not None:
            return self.carried.state
        start = self.problem.solve if isinstance(self.problem, BlackBox) else self.problem.init
        with randomness.torch_seeded(self.seed, randomness.INIT):
            return start(meta)

    def step(self, t: int, state: Tree, meta: Tree) -> Tree:
        """θ_{t+1} from θ_t, for t from 0 to T − 1."""
        assert not isinstance(self.problem, BlackBox)
        batch = self.inner_batches[t]
        self.require_one_device(t, state, meta)
        with self.seeded_step(t):
            after = self.problem.step(state, meta, batch)
        if t == 0:
            argument_checks.same_structure(state, after)
        return after

    def require_one_device(self, t: int, state: Tree, meta: Tree) -> None:
        """Raise, at the first step, unless all that it needs is on one device."""
        if t == 0:
            argument_checks.one_device(meta=meta, inner_state=state, inner_batch=self.inner_batches[t])

    @property
    def eager(self) -> Self:
        """The same inner loop, not compiled."""
        return replace(self, problem=self.problem.eager) if isinstance(self.problem, GradientDescent) else self

    def seeded_step(self, t: int) -> AbstractContextManager[None]:
        """Inside, torch draws the random numbers of inner step t of this window."""
        return randomness.torch_seeded(self.seed, randomness.STEP, self.first_step + t)

    def outer_loss(self, state: Tree, meta: Tree) -> Tensor:
        """The outer loss at a state."""
        with randomness.torch_seeded(self.seed, randomness.OUTER):
            return require_scalar(self.problem.outer_loss(state, meta, self.outer_batch), "outer_loss")

    # -- plain -------------------------------------------------------------------------------------------------
    # Nothing here requires gradients, so no graph is kept. Gradients stay enabled all the same: a user's step or
    # solver may take gradients of its own with torch.autograd.

    @torch.enable_grad()
    def start(self) -> Tree:
        """θ_0 at φ, without a graph."""
        state = self.init(self.meta)
        for module in modules_in(state):
            refuse_running_statistics(module, "params")
        argument_checks.whole_at_each_worker(state)
        if not isinstance(self.problem, BlackBox) and not trees.split(state).differentiable:
            raise TypeError(
                f"init returned {state!r} ({type(state).__name__}); the inner state must hold a floating-point tensor, "
                "such as torch.tensor(0.0) for one number"
            )
        return trees.detach(state)

    @torch.enable_grad()
    def descend(self, state: Tree, start: int = 0, stop: int | None = None) -> Tree:
        """θ_stop from θ_start, without a graph; one unit per step."""
        for t in range(start, self.steps if stop is None else stop):
            state = trees.detach(self.step(t, state, self.meta))
        return state

    @torch.enable_grad()
    def value(self) -> tuple[Tensor, Tree]:
        """The outer loss h and the final state."""
        state = self.descend(self.start())
        return self.outer_loss(state, self.meta).detach(), state

    def values(self, metas: Iterable[Tree]) -> Iterator[tuple[Tensor, Tree]]:
        """The outer loss and the final state at each of several φ, one after the other; a black box with `solve_all`
        solves for all of them at once.
        """
        problem = self.problem
        if not isinstance(problem, BlackBox) or problem.solve_all is None:
            for meta in metas:
                yield self.at(meta).value()
            return
        metas = list(metas)
        with torch.enable_grad(), randomness.torch_seeded(self.seed, randomness.INIT):
            states = list(problem.solve_all(metas))
        if len(states) != len(metas):
            raise ValueError(f"solve_all returned {len(states)} states for {len(metas)} points; one for each is needed")
        for meta, solved in zip(metas, states, strict=True):
            state = trees.detach(solved)
            with torch.enable_grad():
                value = self.outer_loss(state, meta).detach()
            yield value, state

    def at(self, meta: Tree) -> Self:
        """The same inner loop at another φ."""
        return replace(self, meta=meta)
