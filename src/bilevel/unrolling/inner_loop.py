"""The inner loop of one problem at one φ, computed without derivatives."""

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
    """The end of one window of a stream, where the next window starts. It is the field `carried` of an `Estimate`."""

    state: Tree
    """The inner state at the end of the window."""
    steps: int
    """The number of inner steps since the stream began."""
    memory: Tree = None
    """The estimator's own memory for the next window: dicts, lists and tuples of tensors and numbers.

    Each estimator defines the content of its memory, and checkpoint files store it unchanged. With `None`, there is no
    memory, and the estimator starts its history at this state."""
    agreed: bool = False
    """Whether all workers already hold exactly the same state and memory. If not, `fit` sends those of the first worker
    to all others."""


@dataclass(frozen=True)
class InnerLoop:
    """An inner loop: a problem, a point φ, the batches and the seed.

    Every method may be called several times, and gives the same numbers every time.
    """

    problem: BilevelProblem
    meta: Tree
    inner_batches: Batches
    outer_batch: Any
    seed: int
    carried: WindowEnd | None = None
    """The end of the previous window, if this is not the first window of a stream."""

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
        """The memory that an estimator stored at the end of the previous window, or `None`."""
        return None if self.carried is None else self.carried.memory

    def window_end(self, state: Tree, memory: Tree = None, agreed: bool = False) -> WindowEnd:
        """Return the end of this window.

        Args:
            state: the final inner state.
            memory: the memory of the estimator for the next window.
            agreed: whether all workers hold exactly the same state and memory.
        """
        return WindowEnd(trees.detach(state), self.first_step + self.steps, trees.detach(memory), agreed)

    # -- the three functions of the problem, seeded ------------------------------------------------------------

    def init(self, meta: Tree) -> Tree:
        """Return θ_0. It is the end of the previous window, as a constant, if there is one.

        For a black box it is the result of the whole solve.
        """
        if self.carried is not None:
            return self.carried.state
        start, passed = self.problem.init, self._as_passed(meta)

        def function(_: None) -> Tree:
            # Without a function of the user's own, no operation in `init` needs a replacement.
            plain = self.problem.is_black_box or self.problem.modules is not None
            return start(passed) if plain else self._differentiated(start, passed)

        with watched_once(self.problem, INIT, self.meta, [meta]):
            return randomness.evaluate(function, self.seed, randomness.INIT)

    def step(self, t: int, state: Tree, meta: Tree) -> Tree:
        """Compute θ_{t+1} from θ_t, for t from 0 to T − 1."""
        # A `GradientDescent` itself runs its loss under the rules of `_differentiated`.
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
        """Raise a ValueError, at the first step, unless all tensors of the step are on one device."""
        if t == 0:
            argument_checks.one_device(meta=meta, inner_state=state, inner_batch=batch)

    def at_step(self, t: int, function: Callable[[Any], Result]) -> Result:
        """Return `function(batch of step t)`, with the random numbers of step t of this window.

        The batch is read once for each call of the function.

        Raises:
            ValueError: the function wrote into data that the next reading of the batch would return again.
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
        """Context manager that warns, at the first step of each problem, of tensors read from outside of arguments."""
        if t or self.problem.backend is not None:
            return nullcontext()
        return watched_once(self.problem, STEP, self.meta, arguments)

    def _fetch(self, t: int) -> Any:
        """Read the batch of step t, with its own random stream."""
        if draws_nothing(self.inner_batches):
            return self.inner_batches[t]
        return randomness.evaluate(lambda _: self.inner_batches[t], self.seed, randomness.BATCH, self.first_step + t)

    @property
    def eager(self) -> Self:
        """The same inner loop without compiled code."""
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
        """Return φ in the form that the problem's functions accept.

        A `GradientDescent` itself converts φ for the user's functions.
        """
        return meta if self.problem.presents_meta else presented(meta)

    @property
    def memory(self) -> autodiff.Memory:
        """The known properties of the derivatives of the problem's operations."""
        return autodiff.memory_of(self.problem)

    def _differentiated(self, function: Callable[..., Any], *arguments: Tree) -> Any:
        """Return `function(*arguments)`. If a graph is recorded, operations that lack derivatives are replaced."""
        if not autodiff.has_graph(arguments[:-1] or arguments):
            return function(*arguments)
        return autodiff.run_user_code(lambda: function(*arguments), self.memory)

    # -- plain -------------------------------------------------------------------------------------------------
    # No tensor here requires gradients, so no graph is kept. Gradients stay enabled, because a step or solver of the
    # user may itself take gradients with torch.autograd.

    @torch.enable_grad()
    def start(self) -> Tree:
        """Compute θ_0 at φ, without a graph."""
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
        """Compute θ_stop from θ_start, without a graph. The cost is one unit per step."""
        for t in range(start, self.steps if stop is None else stop):
            state = trees.detach(self.step(t, state, self.meta))
        return state

    def final_state(self, seen: Callable[[list[Tensor | None]], None] | None = None) -> Tree:
        """Compute θ_T, without a graph.

        At the first call for each problem, the first and the last step are computed twice and compared.

        `seen` is given the inner gradient of each step, if the problem has an inner loss.

        Raises:
            ReplayError: a step gave another state when it was computed again.
        """
        state, descent = self.start(), self.problem.as_gradient_descent
        for t in range(self.steps):
            watched = nullcontext() if seen is None or descent is None else descent.gradients_seen_by(seen)
            with watched:
                before, state = state, self.descend(state, t, t + 1)
            require_repeatable(self, t, before, state)
        return state

    @torch.enable_grad()
    def value(self) -> tuple[Tensor, Tree]:
        """Compute the outer loss h and the final state."""
        state = self.final_state()
        return self.outer_loss(state, self.meta).detach(), state

    def values(self, metas: Iterable[Tree]) -> Iterator[tuple[Tensor, Tree]]:
        """Yield the outer loss and the final state at each of several φ, one after the other.

        A black box with `solve_all` solves for all of them at once.
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
        """Return the same inner loop at another φ."""
        return replace(self, meta=meta)


def _kept_in_structure(state: Tree) -> Tree:
    """Return the part of a state whose structure no step may change. The layout of an optimiser's memory may change."""
    return state._replace(optimizer=[]) if isinstance(state, Descent) else state
