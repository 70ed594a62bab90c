"""The number of bytes of live tensors, counted exactly, storage by storage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of all storages that were made inside it and are still alive.

    The mode works below functorch and autograd, so it counts tangents, saved activations and batched tensors at their
    real sizes. Tensors without memory are not counted: the zero tensors without storage in forward mode, and tensors on
    device "meta". Memory that an operation uses only while it runs, and memory outside of PyTorch, are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """The number of bytes that are alive."""
        self.peak = 0
        """The largest number of bytes that were alive at the same time."""
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in _tensors(args)}
        for output in _tensors(result if isinstance(result, tuple | list) else (result,)):
            if output.device.type != "meta" and not output._is_zerotensor():
                self._note(output, given)
        return result

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in given:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Context in which collecting garbage takes as long as what was made inside of it asks for.

    A collection visits every object of the process, which are millions once a few large packages are imported, and a
    plan makes dozens of collections. What is alive at the beginning is set aside until the end, by `gc.freeze`. If the
    program has set objects aside itself, these stay where they are, and collections take as long as they would.
    """
    gc.collect()
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


@contextmanager
def counting() -> Iterator[LiveBytes]:
    """Context that counts live bytes with the cyclic garbage collector switched off.

    A tensor that only the garbage collector could free counts as alive.

    >>> import torch
    >>> with counting() as live:
    ...     a = torch.ones(1000) + torch.ones(1000)
    >>> live.now, live.peak
    (4000, 12000)
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with LiveBytes() as live:
            yield live
    finally:
        if enabled:
            gc.enable()
