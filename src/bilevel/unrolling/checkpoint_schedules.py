"""Schedules for reverse mode: which inner states are kept for the backward pass, and which are computed again.

If c states are kept, including the start, and the states between them are computed again, a sequence of

    ℓ ≤ β(c, r) = C(c + r, c)

steps can be traversed backwards with every step computed at most r times in addition to its differentiation. No
schedule can do so for a longer sequence (Griewank, 1992; "revolve", Griewank and Walther, 2000, Proposition 1). A
schedule is therefore determined by c: all states are c = T with r = 1; about √(2T) states need r = 2; about log₂T
states need r of the order of log T.

The package `checkpoint_schedules` (Firedrake, LGPL) has these schedules and many more, as streams of actions for a
solver with its own time loop and tape. This module needs only one formula, `next_kept`. The rest (states as trees,
their storage, and what is differentiated at once) would have to be written in any case. `Revolve` of that package
computes as many steps as this module, for every T up to 500 and every number of states that was tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from bilevel.trees import Tree
from bilevel.unrolling.inner_loop import InnerLoop
from bilevel.unrolling.state_storage import Offload, state_store

Checkpoints: TypeAlias = Literal["all", "sqrt", "log"] | int


def check(checkpoints: Any) -> None:
    """Raise a ValueError unless the value is a valid setting for the number of kept states."""
    whole = isinstance(checkpoints, int) and not isinstance(checkpoints, bool)
    if checkpoints not in ("all", "sqrt", "log", "graph") and not (whole and checkpoints >= 1):
        raise ValueError(
            f'checkpoints={checkpoints!r}: there are "all", "sqrt", "log", "graph", or a number of states >= 1'
        )


def slots(checkpoints: Checkpoints, steps: int) -> int:
    """Return the number of states that are kept at the same time, from 1 to T.

    >>> [slots(c, 1000) for c in ("all", "sqrt", "log", 7)]
    [1000, 44, 10, 7]
    """
    if checkpoints == "all":
        count = steps
    elif checkpoints == "sqrt":
        count = next(c for c in range(1, steps + 2) if math.comb(c + 2, 2) >= steps)
    elif checkpoints == "log":
        count = math.ceil(math.log2(max(steps, 2)))
    else:
        count = checkpoints
    return max(1, min(count, steps))


def repetitions(steps: int, count: int) -> int:
    """Return r, the largest number of times that a step is computed if `count` states are kept.

    The differentiation of the step is not counted.

    >>> repetitions(1000, 1000), repetitions(1000, 44), repetitions(1000, 10)
    (1, 2, 4)
    """
    return next(r for r in range(1, steps + 1) if math.comb(count + r, count) >= steps) if steps > 1 else 1


def steps_computed(steps: int, count: int) -> int:
    """Return the total number of steps without derivatives, in the forward pass and again in the backward pass."""
    r = repetitions(steps, count)
    # For each j < r, β(c, j) − β(c, j − 1) steps are computed j times, and the remaining steps r times. The last step
    # is computed once in the forward pass; its result is not kept, and it is differentiated at once.
    return r * steps - math.comb(count + r, r - 1) + 1


def next_kept(length: int, count: int) -> int:
    """Return the distance from the start of a sequence of at least 2 steps to the next state that is kept.

    The part after that state has one slot fewer, and the part before it one repetition fewer. If the start has the only
    slot, the result is the distance to the last state of the sequence.

    Args:
        length: the number of steps in the sequence.
        count: the number of slots for states, including that of the start.
    """
    if count == 1:
        return length - 1
    r = repetitions(length, count)
    return max(1, min(math.comb(count + r - 1, count), length - math.comb(count + r - 2, count - 1)))


class Trail:
    """The forward pass to θ_T, and the states in backward order. A context in which to call `descend`, then
    `backwards`.
    """

    def __init__(self, run: InnerLoop, checkpoints: Checkpoints, offload: Offload = None) -> None:
        self._run = run
        self._count = slots(checkpoints, run.steps)
        self._store = state_store(offload)
        self._kept: list[int] = []
        self._next_to_last: Tree = None

    def __enter__(self) -> Trail:
        self._store.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._store.__exit__(*error)

    def descend(self) -> Tree:
        """Compute θ_T, and keep states."""
        self._keep(0, self._run.start())
        last = self._run.steps - 1
        self._next_to_last = self._reach(last)
        return self._run.descend(self._next_to_last, last)

    def backwards(self) -> Iterator[tuple[int, Tree]]:
        """Yield (t, θ_t) for t from T − 1 down to 0."""
        state, self._next_to_last = self._next_to_last, None
        for t in reversed(range(self._run.steps)):
            if state is None:
                state = self._reach(t)
            if self._kept[-1] == t:
                self._kept.pop()
                self._store.pop()
            yield t, state
            state = None

    def _reach(self, t: int) -> Tree:
        """Compute θ_t from the state kept last. Keep states before it if there are free slots, and not θ_t itself."""
        state = self._store.top()
        while self._kept[-1] < t:
            start, room = self._kept[-1], self._count - len(self._kept)
            following = start + next_kept(t + 1 - start, room + 1)
            state = self._run.descend(state, start, min(following, t))
            if following >= t:
                break
            self._keep(following, state)
        return state

    def _keep(self, t: int, state: Tree) -> None:
        self._store.push(state)
        self._kept.append(t)
