"""Checks that a step which is computed again gives what it gave before.

Steps are computed more than once: on the way back from kept states, for each chunk of directions, at moved meta
parameters. A loss, step or dataset that remembers something from call to call (a queue of negatives, a running target
in a closure, a counter, an iterator) then is another function each time, and the hypergradient is that of no loop.

`GoingBack` compares every recomputed step with the state that was kept. On a CPU, equal bits end the comparison. At the
first and the last step these are the bits of the whole state. In between they are those of the parameters alone: to
read an optimiser's memory as well would take 3 % of the time of a small network. (After the first step of Adam the
parameters depend on the signs of the gradient alone, so there they would not be enough.) On a GPU flags stay on the
device and are read once for each estimate.

A flag alone is no proof, because the recomputed step builds a graph and the first one did not, and their kernels may
round differently (under bf16 autocast by much). So a step with a flag is computed again from one state: three times as
on the way there, and twice as on the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bilevel import trees
from bilevel.batches import draws_nothing
from bilevel.errors import ReplayError
from bilevel.trees import Tree
from bilevel.unrolling.state_comparison import Parts, disagreement, distances, parts_of, same_bits


class Repeatable(Protocol):
    """An inner loop whose steps can be computed again."""

    @property
    def problem(self) -> Any: ...
    @property
    def inner_batches(self) -> Any: ...
    @property
    def steps(self) -> int: ...
    @property
    def first_step(self) -> int: ...
    def start(self) -> Tree: ...
    def descend(self, state: Tree, start: int = 0, stop: int | None = None) -> Tree: ...


class GoingBack:
    """Compares recomputed steps with kept states, last step first, and raises at the end if one was another step."""

    def __init__(self, run: Repeatable, again: Callable[[int, Tree], Tree]) -> None:
        """`again(t, state)` computes step t as the way back does."""
        self._run, self._again = run, again
        self._parts: Parts | None = None
        self._flags: list[tuple[int, Tensor]] = []

    def compare(self, t: int, before: Tree, kept: Tree, again: Tree) -> None:
        """Note whether step t from `before`, which gave `kept`, gives that again."""
        if self._parts is None:
            self._parts = parts_of(kept)
        inside = 0 < t < self._run.steps - 1
        if _on_cpu(kept) and same_bits(kept, again, parameters_alone=inside):
            return
        self._flags.append((t, disagreement(self._parts, before, kept, again)))

    def finish(self) -> None:
        """Raise if a step was another one when it was computed again."""
        if not self._flags:
            return
        flags = torch.stack([flag for _, flag in self._flags]).tolist()  # the one time that a device is waited for
        suspects = [t for (t, _), (some, _) in zip(self._flags, flags, strict=True) if some]
        if suspects:
            self._run_again(min(suspects))

    @torch.enable_grad()
    def _run_again(self, t: int) -> None:
        """Raise unless the ways in which step t is computed explain that it gave two results."""
        assert self._parts is not None
        run = self._run
        state = run.descend(run.start(), 0, t)
        ways: list[Callable[[], Tree]] = [
            lambda: run.descend(state, t, t + 1),
            lambda: self._again(t, state),
        ]
        results = [(way, ways[way]()) for way in (0, 0, 1, 0, 1)]  # a queue may give two calls in a row the same
        firsts = {0: results[0][1], 1: results[2][1]}
        for way, result in results:
            if _differ(self._parts, state, firsts[way], result):
                raise _changed(run, t, state, firsts[way], result)
        if not _on_cpu(state) and not all(same_bits(firsts[way], result) for way, result in results):
            return  # the kernels of this device add up in any order
        if not bool(disagreement(self._parts, state, firsts[0], firsts[1])[0]):
            raise _changed(run, t)


def compare_values(run: Repeatable, seen: list[tuple[str, Tensor]], kind: str, value: Tensor) -> None:
    """Raise if the inner loop, run once more at the same φ, led to another outer loss, and a step is to blame.

    `kind` says how it was run; each way has its own rounding. On a GPU this waits for the device, once for each run.
    """
    if not seen:
        seen.append((kind, value.detach()))
        return
    kind_before, before = seen[0]
    info = torch.finfo(before.dtype)
    off = (value.detach() - before).abs() > info.eps**0.5 * before.abs().clamp(min=info.tiny)
    if not bool(off.any()):
        return
    if value.ndim:
        value, before = value[off][0], before[off][0]
    _require_same_steps(run)
    if kind == kind_before and value.device.type == "cpu":  # elsewhere, kernels may add up in any order
        raise ReplayError(
            f"the inner loop was run twice, and led to an outer loss of {float(before):.9g} first and of "
            f"{float(value):.9g} then, though each step gives the same when it is computed twice in a row; {_CAUSES}"
        )


@torch.enable_grad()
def require_repeatable(run: Repeatable, t: int, state: Tree, after: Tree) -> None:
    """Raise unless step t from `state`, which gave `after`, gives that again.

    For methods whose ways of computing steps can't be compared with each other. Call it at every step: it computes the
    first and the last one again, once for each problem (two units). The first step alone is not enough, because a queue
    is empty there, and many losses do not depend on their memory where the parameters are zero.
    """
    if t not in (0, run.steps - 1) or _is_known(run):
        return
    again = run.descend(state, t, t + 1)
    if _differ(parts_of(state), state, after, again):
        raise _changed(run, t, state, after, again)
    if t == run.steps - 1:
        _remember(run)


_REPEATABLE: Any = WeakIdKeyDictionary()
"""The problems and datasets, by identity, whose first and last step were computed twice."""


def _checked_objects(run: Repeatable) -> list[object]:
    return [run.problem] if draws_nothing(run.inner_batches) else [run.problem, run.inner_batches]


def _is_known(run: Repeatable) -> bool:
    try:
        return all(each in _REPEATABLE for each in _checked_objects(run))
    except TypeError:  # it has no weak references
        return False


def _remember(run: Repeatable) -> None:
    for each in _checked_objects(run):
        try:
            _REPEATABLE[each] = True
        except TypeError:
            return


@torch.enable_grad()
def _require_same_steps(run: Repeatable) -> None:
    """Compute every step twice from the same state, and raise where the results differ."""
    state = run.start()
    parts = parts_of(state)
    for t in range(run.steps):
        first, second = (run.descend(state, t, t + 1) for _ in range(2))
        if _differ(parts, state, first, second):
            raise _changed(run, t, state, first, second)
        state = first


def _differ(parts: Parts, before: Tree, first: Tree, again: Tree) -> bool:
    return not same_bits(first, again) and bool(disagreement(parts, before, first, again)[1])


def _on_cpu(state: Tree) -> bool:
    return all(not isinstance(leaf, Tensor) or leaf.device.type == "cpu" for leaf in trees.leaves(state))


_CAUSES = (
    "steps are computed more than once, and something that they use changes from call to call. Usual causes: a list or "
    "queue that the loss appends to, a running average or a counter in a closure, an iterator or a random generator of "
    "its own in a dataset. Keep such memory in the inner state (bilevel.Problem takes any tree of tensors as state), "
    "compute it from the batch or from the number of the step, and draw random numbers from the global generators; "
    'Reverse("graph") computes each step once'
)


def _changed(run: Repeatable, t: int, *states: Tree) -> ReplayError:
    """The error; `states` are the one before the step and two results of it, if there are two that differ."""
    how = ""
    if states:
        off, moved = distances(*states)
        how = f": the two states are {off:.3g} apart, and the step itself is {moved:.3g} long"
    number = run.first_step + t
    return ReplayError(
        f"inner step {number} (counted from 0) gave another state when it was computed again{how}; {_CAUSES}", number
    )
