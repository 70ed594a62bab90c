"""Inner batches by random access, so that whoever recomputes step t sees the batch of step t."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, overload

from bilevel import checks


class Batches(Protocol):
    """A sequence of T batches: a list, a map-style `Dataset`, or what `batches` makes."""

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
    """`steps` batches, computed on demand: `get(t)` gives the batch of inner step t, the same at every call.

    >>> list(batches(lambda t: t * t, steps=3))
    [0, 1, 4]
    """
    checks.a_function(get, "get", "get(t) for t from 0 to steps - 1")
    return _Computed(get, checks.whole_number(steps, "steps"))


def no_batches(steps: int) -> Sequence[None]:
    """`steps` inner steps of a problem that takes no data: every batch is `None`."""
    return _Computed(lambda t: None, checks.whole_number(steps, "steps"))


def require_batches(value: Any) -> Batches:
    """The value, if it has a length and random access; else an error that says what to write."""
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
            "Dataset, bilevel.batches(function, steps=T), or bilevel.no_batches(T) for a loss without data"
        )
    if steps == 0:
        raise ValueError(
            "inner_batches is empty: one batch for each inner step is needed, or bilevel.no_batches(T) for T steps "
            "without data"
        )
    return cast(Batches, value)


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:  # a tensor without dimensions and an iterable Dataset have __len__, and raise
        return None
