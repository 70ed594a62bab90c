"""Which inner states are kept until the way back, and the way back through all of them.

Keeping c states, the start among them, and computing what lies between again, a stretch of length

    ℓ ≤ β(c, r) = C(c + r, c)

can be gone back through with every step computed at most r times besides its differentiation, and no schedule does it
for a longer one (Griewank, 1992; "revolve", Griewank and Walther, 2000, Proposition 1). So one number says everything:
all states are c = T with r = 1; about √(2T) of them need r = 2; about log₂T of them, r of the order of log T.

The package `checkpoint_schedules` (Firedrake, LGPL) has these schedules and many more, as streams of actions for a
solver that owns its time loop and its tape. What is needed here is one formula, `next_kept`; the rest (states as trees,
where they lie, what is differentiated at once) would have to be written around its actions all the same. Its `Revolve`
computes as many steps as this one, for every T up to 500 and every number of states that was tried.
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
    """Raise unless this says how many states are kept."""
    whole = isinstance(checkpoints, int) and not isinstance(checkpoints, bool)
    if checkpoints not in ("all", "sqrt", "log", "graph") and not (whole and checkpoints >= 1):
        raise ValueError(
            f'checkpoints={checkpoints!r}: there are "all", "sqrt", "log", "graph", or a number of states >= 1'
        )


def slots(checkpoints: Checkpoints, steps: int) -> int:
    """How many states are kept at once, from 1 to T.

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
    """r: how often a step is computed at most, besides its differentiation, when `count` states are kept.

    >>> repetitions(1000, 1000), repetitions(1000, 44), repetitions(1000, 10)
    (1, 2, 4)
    """
    return next(r for r in range(1, steps + 1) if math.comb(count + r, count) >= steps) if steps > 1 else 1


def steps_computed(steps: int, count: int) -> int:
    """How many plain steps are made in all: the way there, and what is computed again on the way back."""
    r = repetitions(steps, count)
    # Each of β(c, j) − β(c, j − 1) steps is computed j times, for j < r, the rest r times; and the last one of all,
    # which is kept by nobody and differentiated at once, is computed once on the way there.
    return r * steps - math.comb(count + r, r - 1) + 1


def next_kept(length: int, count: int) -> int:
    """How far after the start of a stretch of at least 2 steps the next state is kept, in one of `count` slots, of
    which the start's own is one; with no other, how far the stretch's last state is.

    The part from there on has one slot less, the part before it one repetition less.
    """
    if count == 1:
        return length - 1
    r = repetitions(length, count)
    return max(1, min(math.comb(count + r - 1, count), length - math.comb(count + r - 2, count - 1)))


class Trail:
    """The way to θ_T and back. A context manager, in which `descend` is called, then `backwards`."""

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
        """θ_T."""
        self._keep(0, self._run.start())
        last = self._run.steps - 1
        self._next_to_last = self._reach(last)
        return self._run.descend(self._next_to_last, last)

    def backwards(self) -> Iterator[tuple[int, Tree]]:
        """(t, θ_t) from T − 1 down to 0."""
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
        """θ_t from the state kept last. Others on the way are kept while there is room; θ_t itself is used at once."""
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
