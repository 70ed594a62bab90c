"""The inner loop of one problem at one φ, run plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.batches import Batches
from bilevel.models.sharing import presented
from bilevel.problem import BilevelProblem, Descent, require_scalar
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class WindowEnd:
    """The end of one window of a stream, from which the next window goes on. Every `Estimate` has one, as `carried`."""

    state: Tree
    """The inner state at the end of the window."""
    steps: int
    """The number of inner steps since the stream began."""
    memory: Tree = None
    """What the estimator itself carries on, besides the inner state: dicts, lists and tuples of tensors and numbers.

    Each estimator decides what its memory holds, and checkpoints store it as it is. `None` is no memory: an estimator
    that finds none begins its history at this state."""
    agreed: bool = False
    """Whether several workers hold the same state and memory to the last bit already. If not, `fit` sends all of them
    the first worker's."""


@dataclass(frozen=True)
class InnerLoop:
    """A problem, a point φ, the batches and the seed. Every method may be called again, and again gives the same
    numbers.
    """

    problem: BilevelProblem
    meta: Tree
    inner_batches: Batches
    outer_batch: Any
    seed: int
    carried: WindowEnd | None = None
    """The end of the window before, if this is not the first window of a stream."""

    @property
    def steps(self) -> int:
        """T, the number of inner steps; 0 for a black box."""
        return self.problem.steps_of(self.inner_batches)

    @property
    def meta_size(self) -> int:
        """N, the number of meta parameters."""
        return trees.size(self.meta)

    @property
    def first_step(self) -> int:
        """The number of this window's first step, counted from the beginning of the stream."""
        return 0 if self.carried is None else self.carried.steps

    @property
    def carried_memory(self) -> Tree:
        """What an estimator stored at the end of the window before; `None` if there is nothing."""
        return None if self.carried is None else self.carried.memory

    def window_end(self, state: Tree, memory: Tree = None, agreed: bool = False) -> WindowEnd:
        """Return the end of this window, given its final state and what the estimator wants to find in the next one."""
        return WindowEnd(trees.detach(state), self.first_step + self.steps, trees.detach(memory), agreed)

    # -- the three functions of the problem, seeded ------------------------------------------------------------

    def init(self, meta: Tree) -> Tree:
        """θ_0, or where the window before ended (a constant then), or the whole solve of a black box."""
        if self.carried is not None:
            return self.carried.state
        with randomness.torch_seeded(self.seed, randomness.INIT):
            start = self.problem.init
            if self.problem.is_black_box:
                return start(self._as_passed(meta))
            return self._differentiated(start, self._as_passed(meta))

    def step(self, t: int, state: Tree, meta: Tree) -> Tree:
        """θ_{t+1} from θ_t, for t from 0 to T − 1."""
        batch = self.inner_batches[t]
        self.require_one_device(t, state, meta)
        with self.seeded_step(t):
            # A `GradientDescent` runs its loss in this way itself.
            step, passed = self.problem.step, self._as_passed(meta)
            own = self.problem.as_gradient_descent is not None
            after = step(state, passed, batch) if own else self._differentiated(step, state, passed, batch)
        if t == 0:
            argument_checks.same_structure(_kept_in_structure(state), _kept_in_structure(after))
        return after

    def require_one_device(self, t: int, state: Tree, meta: Tree) -> None:
        """Raise, at the first step, unless all that it needs is on one device."""
        if t == 0:
            argument_checks.one_device(meta=meta, inner_state=state, inner_batch=self.inner_batches[t])

    @property
    def eager(self) -> Self:
        """The same inner loop, not compiled."""
        return replace(self, problem=self.problem.eager)

    def seeded_step(self, t: int) -> AbstractContextManager[None]:
        """Inside, torch draws the random numbers of inner step t of this window."""
        return randomness.torch_seeded(self.seed, randomness.STEP, self.first_step + t)

    def outer_loss(self, state: Tree, meta: Tree) -> Tensor:
        """The outer loss at a state."""
        with randomness.torch_seeded(self.seed, randomness.OUTER):
            value = self._differentiated(self.problem.outer_loss, state, self._as_passed(meta), self.outer_batch)
        return require_scalar(value, "outer_loss")

    def _as_passed(self, meta: Tree) -> Tree:
        """φ as the problem's functions take it; a `GradientDescent` itself hands it to the user's functions."""
        return meta if self.problem.as_gradient_descent is not None else presented(meta)

    @property
    def memory(self) -> autodiff.Memory:
        """What has been learned about the derivatives of the problem's operations."""
        return autodiff.memory_of(self.problem)

    def _differentiated(self, function: Callable[..., Any], *arguments: Tree) -> Any:
        """Return `function(*arguments)`, with operations replaced that lack derivatives, if a graph is recorded."""
        if not autodiff.has_graph(arguments[:-1] or arguments):
            return function(*arguments)
        return autodiff.run_user_code(lambda: function(*arguments), self.memory)

    # -- plain -------------------------------------------------------------------------------------------------
    # Nothing here requires gradients, so no graph is kept. Gradients stay enabled all the same: a user's step or
    # solver may take gradients of its own with torch.autograd.

    @torch.enable_grad()
    def start(self) -> Tree:
        """θ_0 at φ, without a graph."""
        state = self.init(self.meta)
        argument_checks.whole_at_each_worker(state)
        if not self.problem.is_black_box and not trees.split(state).differentiable:
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
        if (solve_all := self.problem.solve_all) is None:
            for meta in metas:
                yield self.at(meta).value()
            return
        metas = list(metas)
        with torch.enable_grad(), randomness.torch_seeded(self.seed, randomness.INIT):
            states = list(solve_all([presented(meta) for meta in metas]))
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


def _kept_in_structure(state: Tree) -> Tree:
    """The part of a state whose structure no step may change; the layout of an optimiser's memory may."""
    return state._replace(optimizer=[]) if isinstance(state, Descent) else state
