"""Checks that a step gives the same state when it is computed again.

Steps are computed more than once: in the backward pass from kept states, for each chunk of directions, and at moved
meta parameters. A loss, step or dataset that keeps data from call to call (a queue of negatives, a running target in a
closure, a counter, an iterator) is then a different function at each call, and the hypergradient would be wrong.

`GoingBack` compares every recomputed step with the state that was kept. On a CPU the comparison ends if all bits are
equal. At the first and the last step these are the bits of the whole state. At other steps they are the bits of the
parameters only, because reading an optimiser's memory as well would take 3 % of the time of a small network. (After the
first step of Adam the parameters depend only on the signs of the gradient, so at that step the parameters would not be
sufficient.) On a GPU flags stay on the device and are read once for each estimate.

A flag alone does not prove that a step changed. The recomputed step builds a graph and the first one did not, and their
kernels may round differently (by much under bf16 autocast). Therefore a step with a flag is computed again from one
state: three times as in the forward pass, and twice as in the backward pass.
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
    """The interface of an inner loop whose steps can be computed again."""

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
    """A comparison of recomputed steps with kept states, from the last step to the first."""

    def __init__(self, run: Repeatable, again: Callable[[int, Tree], Tree]) -> None:
        """Set up the comparison.

        Args:
            run: the inner loop.
            again: a function of t and a state that computes step t as in the backward pass.
        """
        self._run, self._again = run, again
        self._parts: dict[int, Parts] = {}
        """By the number of tensors, which grows where an optimiser begins to keep something in a later step."""
        self._bits: bool | None = None
        """Whether bits can be compared without a wait for a device."""
        self._flags: list[tuple[int, Tensor]] = []

    def compare(self, t: int, before: Tree, kept: Tree, again: Tree) -> None:
        """Compare two results of step t, and store a flag if they differ.

        Args:
            t: the number of the step.
            before: the state before the step.
            kept: the state after the step in the forward pass.
            again: the state after the step when it was computed again.
        """
        if self._bits is None:  # a state stays on its devices
            self._bits = _on_cpu(kept)
        inside = 0 < t < self._run.steps - 1
        if self._bits and same_bits(kept, again, parameters_alone=inside):
            return
        self._flags.append((t, disagreement(self._parts_of(kept), before, kept, again)))

    def _parts_of(self, state: Tree) -> Parts:
        count = len(trees.split(state).differentiable)
        if count not in self._parts:
            self._parts[count] = parts_of(state)
        return self._parts[count]

    def finish(self) -> None:
        """Raise a ReplayError if a step gave another state when it was computed again."""
        if not self._flags:
            return
        flags = torch.stack([flag for _, flag in self._flags]).tolist()  # this waits for the device, once
        suspects = [t for (t, _), (some, _) in zip(self._flags, flags, strict=True) if some]
        if suspects:
            self._run_again(min(suspects))

    @torch.enable_grad()
    def _run_again(self, t: int) -> None:
        """Raise a ReplayError unless the two ways of computing step t explain that it gave two results."""
        run = self._run
        state = run.descend(run.start(), 0, t)
        ways: list[Callable[[], Tree]] = [
            lambda: run.descend(state, t, t + 1),
            lambda: self._again(t, state),
        ]
        results = [(way, ways[way]()) for way in (0, 0, 1, 0, 1)]  # with a queue, two calls in a row may agree
        firsts = {0: results[0][1], 1: results[2][1]}
        for way, result in results:
            if _differ(self._parts_of(result), state, firsts[way], result):
                raise _changed(run, t, state, firsts[way], result)
        if not _on_cpu(state) and not all(same_bits(firsts[way], result) for way, result in results):
            return  # the kernels of this device add up in an arbitrary order
        if not bool(disagreement(self._parts_of(firsts[0]), state, firsts[0], firsts[1])[0]):
            raise _changed(run, t)


def compare_values(run: Repeatable, seen: list[tuple[str, Tensor]], kind: str, value: Tensor) -> None:
    """Raise if the inner loop gave another outer loss when it was run again at the same φ, because of a step.

    On a GPU this waits for the device, once for each run.

    Args:
        run: the inner loop.
        seen: a list with the kind and the outer loss of the first run. The first call adds them.
        kind: the way in which the inner loop was run. Each way has its own rounding.
        value: the outer loss of this run.

    Raises:
        ReplayError: a step gives another state when it is computed again, or two runs of the same kind on a CPU differ.
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
    if kind == kind_before and value.device.type == "cpu":  # on other devices, kernels may add up in arbitrary order
        raise ReplayError(
            f"the inner loop was run twice, and gave an outer loss of {float(before):.9g} and then of "
            f"{float(value):.9g}, although each step gives the same when it is computed twice in a row; {_CAUSES}"
        )


@torch.enable_grad()
def require_repeatable(run: Repeatable, t: int, state: Tree, after: Tree) -> None:
    """Raise a ReplayError unless step t from `state` gives `after` again.

    It is for methods that compute steps in ways that can't be compared with each other. Call it at every step. It
    computes the first and the last step again, once for each problem (two units). The first step is not sufficient,
    because a queue is empty there, and because many losses do not depend on their memory if the parameters are zero.
    """
    if t not in (0, run.steps - 1) or _is_known(run):
        return
    again = run.descend(state, t, t + 1)
    if _differ(parts_of(after), state, after, again):
        raise _changed(run, t, state, after, again)
    if t == run.steps - 1:
        _remember(run)


_REPEATABLE: Any = WeakIdKeyDictionary()
"""The problems and datasets, by identity, whose first and last steps have been computed twice."""


def _checked_objects(run: Repeatable) -> list[object]:
    return [run.problem] if draws_nothing(run.inner_batches) else [run.problem, run.inner_batches]


def _is_known(run: Repeatable) -> bool:
    try:
        return all(each in _REPEATABLE for each in _checked_objects(run))
    except TypeError:  # an object has no weak references
        return False


def _remember(run: Repeatable) -> None:
    for each in _checked_objects(run):
        try:
            _REPEATABLE[each] = True
        except TypeError:
            return


@torch.enable_grad()
def _require_same_steps(run: Repeatable) -> None:
    """Compute every step twice from the same state. Raise a ReplayError if the results differ."""
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
    """Return the error. `states` are the state before the step and two results that differ, or nothing."""
    how = ""
    if states:
        off, moved = distances(*states)
        how = f": the two states are {off:.3g} apart, and the step itself is {moved:.3g} long"
    number = run.first_step + t
    return ReplayError(
        f"inner step {number} (counted from 0) gave another state when it was computed again{how}; {_CAUSES}", number
    )
