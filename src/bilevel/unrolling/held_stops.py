"""The stop-gradients of an inner loss, held while a difference of its gradients is taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from bilevel import trees
from bilevel.problem import GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.stopped_gradients import AnotherPathError, Tape

Result = TypeVar("Result")


class HeldStops:
    """An inner loss whose stop-gradients keep, at two moved points, the values that they had at the first evaluation.

    Evaluate `problem` at the point itself, say so by `recorded`, and then call `pair`. Without the point itself, the
    values are those at the first of the two moved points, which differ by O(ε) for a distance of ε.

    A loss without stop-gradients costs nothing at the moved points. Losses that are compiled, and parameters that are
    spread over processes, are evaluated as they are.
    """

    def __init__(self, problem: GradientDescent, state: Tree) -> None:
        self._own = self.problem = problem
        self._tape: Tape | None = None
        self._is_recorded = False
        if problem.backend is None and not any(map(trees.is_spread, trees.leaves(state))):
            self._tape = Tape()
            twin: Any = copy.copy(problem)
            twin._eager, twin.inner_loss = twin, self._inner_loss
            self.problem = twin

    def _inner_loss(self, *arguments: Any) -> Any:
        assert self._tape is not None
        if not self._is_recorded:
            self._tape.clear()  # of what an evaluation recorded that was broken off
        elif not self._tape.holds_any:
            return self._own.inner_loss(*arguments)
        with self._tape.running(custom_functions=False):
            return self._own.inner_loss(*arguments)

    def recorded(self) -> None:
        """Say that `problem` was evaluated at the point itself."""
        self._is_recorded = True

    def pair(self, function: Callable[[int], Result]) -> tuple[Result, Result]:
        """Return `function(1)` and `function(-1)`, which evaluate `problem` at the two moved points."""
        try:
            return self._at(function, 1), self._at(function, -1)
        except AnotherPathError:
            why = "takes another path at a moved point"
        if self._tape is not None and self._tape.is_full:
            why = "stops more than 1 GiB of gradients"
        warnings.warn(
            f"inner_loss {why}, so what it takes from .detach() or under torch.no_grad() could not be held, and a "
            "difference includes its change; take a method without differences, which stops there: "
            'ForwardGradient(tangents="exact" or "shared"), HessianFree(mixed="exact") or Reverse()',
            stacklevel=2,
        )
        self._tape, self.problem = None, self._own
        return function(1), function(-1)

    def _at(self, function: Callable[[int], Result], sign: int) -> Result:
        if self._tape is not None and self._is_recorded:
            self._tape.rewind()
        result = function(sign)
        self._is_recorded = True
        if self._tape is not None and self._tape.is_full:
            raise AnotherPathError
        return result
