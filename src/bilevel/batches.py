"""Inner batches by random access: an inner step that is computed again receives the same batch.

Users pass `inner_batches` as a sequence of T batches, or as the whole number T if the problem has no data.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, overload

from bilevel import checks


class Batches(Protocol):
    """A sequence of T batches: a list, a map-style `Dataset`, or the result of `batches`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class _Computed(Sequence[Any]):
    def __init__(self, get: Callable[[int], Any], steps: int) -> None:
        self._get = get
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._steps))]
        if not -self._steps <= index < self._steps:
            raise IndexError(f"batch {index} of {self._steps}")
        return self._get(index % self._steps)


def batches(get: Callable[[int], Any], steps: int) -> Sequence[Any]:
    """Return `steps` batches that are computed on demand: `get(t)` gives the batch of inner step t.

    Args:
        get: called with t = 0, …, steps − 1. It has to return the same batch whenever it is called with the same t.
        steps: T, the number of inner steps.

    >>> list(batches(lambda t: t * t, steps=3))
    [0, 1, 4]
    """
    checks.a_function(get, "get", "get(t) for t from 0 to steps - 1")
    return _Computed(get, checks.whole_number(steps, "steps"))


def no_batches(steps: int) -> Sequence[None]:
    """Return the batches of `steps` inner steps of a problem without data: every batch is `None`.

    The number itself, `inner_batches=steps`, means the same everywhere.
    """
    return _Computed(lambda t: None, checks.whole_number(steps, "steps"))


def require_batches(value: Any) -> Batches:
    """Return the batches that a user passed as `inner_batches`; a whole number T stands for T steps without data.

    Raises:
        TypeError, ValueError: the value has no length or no random access, or is empty; the message says what to pass.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return no_batches(checks.whole_number(value, "inner_batches"))
    if isinstance(value, Mapping):
        raise TypeError(
            f"inner_batches is a {type(value).__name__}, which is one batch; a sequence with a batch for each inner "
            "step is needed: [batch] * T for T steps on the same one"
        )
    if callable(value) and not hasattr(value, "__getitem__"):
        raise TypeError(
            "inner_batches is a function, whose number of steps nobody knows; write bilevel.batches(function, steps=T)"
        )
    steps = _length(value)
    if steps is None or not hasattr(value, "__getitem__"):
        raise TypeError(
            f"inner_batches is {value!r} ({type(value).__name__}); steps are computed more than once, so a sequence "
            "with a length and random access is needed: a list (write list(...) around a DataLoader or a generator), a "
            "Dataset, bilevel.batches(function, steps=T), or the whole number T for T steps without data"
        )
    if steps == 0:
        raise ValueError(
            "inner_batches is empty: one batch for each inner step is needed, or the whole number T for T steps "
            "without data"
        )
    return cast(Batches, value)


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:  # a tensor without dimensions and an iterable Dataset have __len__, and raise
        return None
