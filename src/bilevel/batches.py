"""Inner batches by random access: an inner step that is computed again receives the same batch.

Users pass `inner_batches` as a sequence of T batches, or as the whole number T if the problem has no data.

A loss receives copies of a batch's containers, so that `batch.pop("labels")` does not change the user's data. The
tensors in them are the user's own. `ChangesInPlace` detects whether a loss wrote into them.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, overload

import numpy as np
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from bilevel import checks


class Batches(Protocol):
    """A sequence of T batches: a list, a map-style `Dataset`, or the result of `batches`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ComputedBatches(Sequence[Any]):
    """Batches that are computed on demand."""

    def __init__(self, get: Callable[[int], Any], steps: int, draws_nothing: bool = False) -> None:
        """`draws_nothing` says that `get` draws no random numbers, or sets the generators itself."""
        self.draws_nothing = draws_nothing
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
    """Return a sequence of `steps` batches that are computed on demand. `get(t)` returns the batch of inner step t.

    An inner step is computed more than once, so `get(t)` must return the same batch at every call. It may draw random
    numbers from torch's, NumPy's and Python's global generators (for augmentation, for example). Inside an estimate
    these numbers are a function of the estimate's seed and of t. A separate generator would give other numbers at every
    call.

    Args:
        get: a function of t = 0, …, steps − 1 that returns the same batch whenever it is called with the same t.
        steps: T, the number of inner steps.

    >>> list(batches(lambda t: t * t, steps=3))
    [0, 1, 4]
    """
    checks.a_function(get, "get", "get(t) for t from 0 to steps - 1")
    return ComputedBatches(get, checks.whole_number(steps, "steps"))


def no_batches(steps: int) -> Sequence[None]:
    """Return the batches of `steps` inner steps of a problem without data. Every batch is `None`.

    Wherever batches are passed, the number itself, `inner_batches=steps`, has the same meaning.
    """
    return ComputedBatches(lambda t: None, checks.whole_number(steps, "steps"), draws_nothing=True)


def require_batches(value: Any) -> Batches:
    """Return the batches that a user passed as `inner_batches`. A whole number T stands for T steps without data.

    Raises:
        TypeError, ValueError: the value has no length or no random access, or is empty. The message says what to pass.
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
            "inner_batches is a function, which does not say how many steps there are; write "
            "bilevel.batches(function, steps=T)"
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


def draws_nothing(inner_batches: Batches) -> bool:
    """Whether no code of the user runs when a batch is read, so that the reading draws no random numbers."""
    return type(inner_batches) in (list, tuple) or getattr(inner_batches, "draws_nothing", False) is True


def with_own_containers(batch: Any) -> Any:
    """Return the batch with copies of its dicts, lists and other mappings. Tensors and other objects are not copied.

    >>> batch = {"x": [1.0]}
    >>> with_own_containers(batch).pop("x"), batch
    ([1.0], {'x': [1.0]})
    """
    kind = type(batch)
    if batch is None or isinstance(batch, Tensor):
        return batch
    if kind is dict:
        return {key: with_own_containers(value) for key, value in batch.items()}
    if kind is list or kind is tuple:
        return kind(map(with_own_containers, batch))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*map(with_own_containers, batch))
    if isinstance(batch, Mapping):  # for example, the result of a tokenizer
        return copy.copy(batch)
    return batch


class ChangesInPlace:
    """A record of the tensors and arrays in a batch, from which later changes in place are detected."""

    def __init__(self, batch: Any, name: str) -> None:
        self._batch, self._name = batch, name
        self._tensors: list[tuple[Tensor, int]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        if batch is not None:
            self._note(batch)

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if not value.is_inference():  # inference tensors have no version count
                self._tensors.append((value, value._version))
        elif isinstance(value, np.ndarray):
            self._arrays.append((value, value.copy()))
        elif isinstance(value, list | tuple):
            for each in value:
                self._note(each)
        else:
            for _, each in _parts(value):
                self._note(each)

    def found(self) -> dict[str, Tensor | np.ndarray]:
        """Return the tensors and arrays that were changed in place since, by name."""
        changed: list[Any] = [tensor for tensor, version in self._tensors if tensor._version != version]
        for array, before in self._arrays:
            if not np.array_equal(array, before, equal_nan=array.dtype.kind in "fc"):
                changed.append(array)
        return dict(self._named(self._batch, self._name, changed)) if changed else {}

    def _named(self, value: Any, name: str, wanted: list[Any]) -> Iterator[tuple[str, Any]]:
        if any(value is each for each in wanted):
            yield name, value
        elif not isinstance(value, Tensor | np.ndarray):
            for place, each in _parts(value):
                yield from self._named(each, name + place, wanted)

    def memory(self) -> set[int]:
        """Return the addresses in memory of all tensors and arrays."""
        return {address(data) for data, _ in (*self._tensors, *self._arrays)}


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Return the items of a container of a batch, or the data in an object's attributes, each with its expression."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", each) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{number}]", each) for number, each in enumerate(value)]
    if hasattr(value, "__dict__") and not callable(value):
        data = (Tensor, np.ndarray, dict, list, tuple)
        return [(f".{key}", each) for key, each in vars(value).items() if isinstance(each, data)]
    return []


def address(data: Tensor | np.ndarray) -> int:
    """Return the address of the first number. For a tensor of a function transform, it is that of the inner tensor."""
    if not isinstance(data, Tensor):
        return data.__array_interface__["data"][0]
    while is_functorch_wrapped_tensor(data):
        data = get_unwrapped(data)
    return data.untyped_storage().data_ptr()


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:  # a tensor without dimensions and an iterable Dataset have __len__, and raise
        return None
