"""Checks that a step which is computed again gives what it gave before.

Steps are computed more than once: on the way back from kept states, for each chunk of directions, at moved meta
parameters. A loss, step or dataset that remembers something from call to call (a queue of negatives, a running target
in a closure, a counter, an iterator) then is another function each time, and the hypergradient is that of no loop.

`GoingBack` compares every recomputed step with the state that was kept. On a CPU, equal bits end the comparison; on a
GPU the flags stay on the device and are read once for each estimate. A flag alone is no proof, because the recomputed
step builds a graph and the first one did not, and their kernels may round differently (under bf16 autocast by much). So
a step with a flag is computed three times more from one state: twice as on the way there, and once as on the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from bilevel import trees
from bilevel.batches import draws_nothing
from bilevel.errors import ReplayError
from bilevel.problem import BlackBox
from bilevel.trees import Tree
from bilevel.unrolling.inner_loop import InnerLoop
from bilevel.unrolling.state_comparison import Parts, disagreement, distances, parts_of, same_bits


class GoingBack:
    """Compares recomputed steps with kept states, last step first, and raises at the end if one was another step."""

    def __init__(self, run: InnerLoop, again: Callable[[int, Tree], Tree]) -> None:
        """`again(t, state)` computes step t as the way back does."""
        self._run, self._again = run, again
        self._parts: Parts | None = None
        self._flags: list[tuple[int, Tensor]] = []

    def compare(self, t: int, before: Tree, kept: Tree, again: Tree) -> None:
        """Note whether step t from `before`, which gave `kept`, gives that again."""
        if self._parts is None:
            self._parts = parts_of(kept)
        on_cpu = all(not isinstance(leaf, Tensor) or leaf.device.type == "cpu" for leaf in trees.leaves(kept))
        if on_cpu and same_bits(kept, again):
            return
        self._flags.append((t, disagreement(self._parts, before, kept, again)))

    def finish(self) -> None:
        """Raise if a step was another one when it was computed again."""
        if not self._flags:
            return
        flags = torch.stack([flag for _, flag in self._flags]).tolist()  # the one time that a device is waited for
        suspects = [(t, every) for (t, _), (some, every) in zip(self._flags, flags, strict=True) if some]
        if not suspects:
            return
        t = min(t for t, _ in suspects)
        self._run_again(t, certain=any(every for _, every in suspects))

    @torch.enable_grad()
    def _run_again(self, t: int, certain: bool) -> None:
        assert self._parts is not None
        run = self._run
        state = run.descend(run.start(), 0, t)
        first, second = (run.descend(state, t, t + 1) for _ in range(2))
        if _differ(self._parts, state, first, second):
            raise _changed(run, t, state, first, second)
        if not same_bits(first, second):
            return  # the kernels themselves add up in any order
        on_the_way_back = self._again(t, state)
        if certain and not _differ(self._parts, state, first, on_the_way_back):
            raise _changed(run, t, state)


def compare_values(run: InnerLoop, seen: list[tuple[str, Tensor]], kind: str, value: Tensor) -> None:
    """Raise if the inner loop, run once more at the same φ, led to another outer loss, and a step is to blame.

    `kind` says how it was run; each way has its own rounding. On a GPU this waits for the device, once for each run.
    """
    if not seen:
        seen.append((kind, value.detach()))
        return
    kind_before, before = seen[0]
    tolerance = torch.finfo(before.dtype).eps ** 0.5 * max(abs(float(before)), float(torch.finfo(before.dtype).tiny))
    if not abs(float(value) - float(before)) > tolerance:
        return
    repeatable = _require_same_steps(run)
    if repeatable and kind == kind_before:
        raise ReplayError(
            f"the inner loop was run twice, and led to an outer loss of {float(before):.9g} first and of "
            f"{float(value):.9g} then, though each step gives the same when it is computed twice in a row; {_CAUSES}"
        )


@torch.enable_grad()
def require_repeatable(run: InnerLoop, state: Tree, first: Tree) -> None:
    """Raise unless step 0 from `state`, which gave `first`, gives that again: one unit, once for each problem.

    For methods that compute steps in ways that can't be compared with each other.
    """
    if isinstance(run.problem, BlackBox) or _is_known(run):
        return
    again = run.descend(state, 0, 1)
    if _differ(parts_of(state), state, first, again):
        raise _changed(run, 0, state, first, again)
    _remember(run)


_REPEATABLE: WeakSet[object] = WeakSet()
"""Problems and datasets whose first step was computed twice."""


def _checked_objects(run: InnerLoop) -> list[object]:
    return [run.problem] if draws_nothing(run.inner_batches) else [run.problem, run.inner_batches]


def _is_known(run: InnerLoop) -> bool:
    try:
        return all(each in _REPEATABLE for each in _checked_objects(run))
    except TypeError:  # it has no hash or no weak references
        return False


def _remember(run: InnerLoop) -> None:
    for each in _checked_objects(run):
        try:
            _REPEATABLE.add(each)
        except TypeError:
            return


@torch.enable_grad()
def _require_same_steps(run: InnerLoop) -> bool:
    """Compute every step twice from the same state and raise where they differ; return whether all bits agree."""
    state = run.start()
    parts, repeatable = parts_of(state), True
    for t in range(run.steps):
        first, second = (run.descend(state, t, t + 1) for _ in range(2))
        if _differ(parts, state, first, second):
            raise _changed(run, t, state, first, second)
        repeatable = repeatable and same_bits(first, second)
        state = first
    return repeatable


def _differ(parts: Parts, before: Tree, first: Tree, again: Tree) -> bool:
    return not same_bits(first, again) and bool(disagreement(parts, before, first, again)[0])


_CAUSES = (
    "steps are computed more than once, and something that they use changes from call to call. Usual causes: a list or "
    "queue that the loss appends to, a running average or a counter in a closure, an iterator or a random generator of "
    "its own in a dataset. Keep such memory in the inner state (bilevel.Problem takes any tree of tensors as state), "
    "compute it from the batch or from the number of the step, and draw random numbers from the global generators; "
    'Reverse("graph") computes each step once'
)


def _changed(run: InnerLoop, t: int, before: Tree, first: Tree | None = None, again: Tree | None = None) -> ReplayError:
    how = ""
    if first is not None and again is not None:
        off, moved = distances(before, first, again)
        how = f": the two states are {off:.3g} apart, and the step itself is {moved:.3g} long"
    number = run.first_step + t
    return ReplayError(
        f"inner step {number} (counted from 0) gave another state when it was computed again{how}; {_CAUSES}", number
    )
