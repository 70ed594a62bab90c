"""The inner loop of one problem at one φ, run plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.batches import Batches, ChangesInPlace, draws_nothing, with_own_containers
from bilevel.models.sharing import presented
from bilevel.problem import BilevelProblem, Descent, require_losses
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.outside_reads import INIT, OUTER, STEP, watched_once
from bilevel.unrolling.replay import require_repeatable

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")


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
        """θ_0, or the state where the window before ended (a constant then), or the whole solve of a black box."""
        if self.carried is not None:
            return self.carried.state
        start, passed = self.problem.init, self._as_passed(meta)

        def function(_: None) -> Tree:
            return start(passed) if self.problem.is_black_box else self._differentiated(start, passed)

        with watched_once(self.problem, INIT, self.meta, [meta]):
            return randomness.evaluate(function, self.seed, randomness.INIT)

    def step(self, t: int, state: Tree, meta: Tree) -> Tree:
        """θ_{t+1} from θ_t, for t from 0 to T − 1."""
        # A `GradientDescent` runs its loss under the rules of `_differentiated` itself.
        step, passed = self.problem.step, self._as_passed(meta)
        own = self.problem.presents_meta

        def function(batch: Any) -> Tree:
            self.require_one_device(t, state, meta, batch)
            watched = self.watched_step(t, state, meta)
            with argument_checks.left_as_given(state=state, meta=meta), watched:
                return step(state, passed, batch) if own else self._differentiated(step, state, passed, batch)

        after = self.at_step(t, function)
        if t == 0:
            argument_checks.same_structure(_kept_in_structure(state), _kept_in_structure(after))
        return after

    def require_one_device(self, t: int, state: Tree, meta: Tree, batch: Any) -> None:
        """Raise, at the first step, unless everything that it needs is on one device."""
        if t == 0:
            argument_checks.one_device(meta=meta, inner_state=state, inner_batch=batch)

    def at_step(self, t: int, function: Callable[[Any], Result]) -> Result:
        """`function(batch of step t)`, with the random numbers of step t of this window.

        The batch is read once for each call of the function. Raises if the function wrote into data that the next
        reading of the batch would give again.
        """
        given: list[Any] = []

        def fetched() -> Any:
            given[:] = [self._fetch(t)]
            given.append(ChangesInPlace(given[0], "batch"))
            return with_own_containers(given[0])

        with argument_checks.nothing_kept(self.first_step + t):
            result = randomness.evaluate(function, self.seed, randomness.STEP, self.first_step + t, given=fetched)
        changed = given[1].found()
        if changed:
            again = ChangesInPlace(self._fetch(t), "batch").memory()
            argument_checks.batch_left_as_given(changed, again, f"the batch of inner step {t}")
        return result

    def watched_step(self, t: int, *arguments: Tree) -> AbstractContextManager[None]:
        """Context manager that warns, at the first step for each problem, of what is read from outside of arguments."""
        if t or self.problem.backend is not None:
            return nullcontext()
        return watched_once(self.problem, STEP, self.meta, arguments)

    def _fetch(self, t: int) -> Any:
        """The batch of step t, read while a random stream of its own is set."""
        if draws_nothing(self.inner_batches):
            return self.inner_batches[t]
        return randomness.evaluate(lambda _: self.inner_batches[t], self.seed, randomness.BATCH, self.first_step + t)

    @property
    def eager(self) -> Self:
        """The same inner loop, not compiled."""
        return replace(self, problem=self.problem.eager)

    def outer_loss(self, state: Tree, meta: Tree) -> Tensor:
        """Compute the outer loss at a state: a scalar, or a vector `[m]` of m outer losses."""
        kept = ChangesInPlace(self.outer_batch, "outer_batch")

        def function(batch: Any) -> Tensor:
            with watched_once(self.problem, OUTER, self.meta, [state, meta]):
                value = self._differentiated(self.problem.outer_loss, state, self._as_passed(meta), batch)
                return require_losses(value, "outer_loss")

        value = randomness.evaluate(
            function,
            self.seed,
            randomness.OUTER,
            given=lambda: with_own_containers(self.outer_batch),
        )
        argument_checks.batch_left_as_given(kept.found(), kept.memory(), "outer_batch")
        return value

    def _as_passed(self, meta: Tree) -> Tree:
        """φ as the problem's functions take it; a `GradientDescent` itself hands it to the user's functions."""
        return meta if self.problem.presents_meta else presented(meta)

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
    # Nothing here requires gradients, so no graph is kept. Gradients stay enabled all the same, because a step or
    # solver of the user may take gradients of its own with torch.autograd.

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

    def final_state(self) -> Tree:
        """θ_T, without a graph. The first time for each problem, two steps are computed twice and must give the same.

        Raises:
            ReplayError: a step gave another state when it was computed again.
        """
        state = self.start()
        for t in range(self.steps):
            before, state = state, self.descend(state, t, t + 1)
            require_repeatable(self, t, before, state)
        return state

    @torch.enable_grad()
    def value(self) -> tuple[Tensor, Tree]:
        """The outer loss h and the final state."""
        state = self.final_state()
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
        with torch.enable_grad():
            states = randomness.evaluate(
                lambda _: list(solve_all([presented(meta) for meta in metas])), self.seed, randomness.INIT
            )
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
