"""Locks of modules. A call replaces a module's tensors, so threads that use the same layer wait for each other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, tuple[int, Any]] = WeakKeyDictionary()
"""The number of each layer's lock, and the lock."""
_NUMBERS = itertools.count()
_MAKING = threading.Lock()


class ModuleLock:
    """The locks of all layers of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @cached_property
    def by_layer(self) -> dict[int, Any]:
        """The locks by their numbers."""
        return dict(_lock_of(layer) for layer in self.module.modules())


def _lock_of(layer: nn.Module) -> tuple[int, Any]:
    with _MAKING:
        if layer not in _LOCKS:
            _LOCKS[layer] = next(_NUMBERS), threading.RLock()
        return _LOCKS[layer]


class _Held(threading.local):
    """The modules whose layers this thread has locked."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


_HELD = _Held()


@contextmanager
def held(locks: Sequence[ModuleLock]) -> Iterator[None]:
    """Context during which other threads that use one of the modules, or a layer of it, wait.

    Locks are acquired in the order of their numbers, so that two threads cannot block each other.
    """
    new = [lock for lock in locks if not any(lock.module is module for module in _HELD.modules)]
    if not new:
        yield
        return
    numbered = {number: lock for each in new for number, lock in each.by_layer.items()}
    with ExitStack() as stack:
        for number in sorted(numbered):
            stack.enter_context(numbered[number])
        before = _HELD.modules
        _HELD.modules = [*before, *(lock.module for lock in new)]
        try:
            yield
        finally:
            _HELD.modules = before


def locked(module: nn.Module) -> Any:
    """Context during which no other thread uses the module, or a layer of it."""
    return held([ModuleLock(module)])
