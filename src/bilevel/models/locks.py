"""Locks of modules. A call replaces a module's tensors, so threads that use the same layer wait for each other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
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

    @cached_property
    def in_order(self) -> list[Any]:
        """The locks in the order in which they are taken."""
        return [lock for _, lock in sorted(self.by_layer.items())]


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


class held:  # noqa: N801  (a context manager, named like a function)
    """Context during which other threads that use one of the modules, or a layer of it, wait.

    Locks are acquired in the order of their numbers, so that two threads cannot block each other. Entered once.
    """

    __slots__ = ("_before", "_locks", "_taken")

    def __init__(self, locks: Sequence[ModuleLock]) -> None:
        self._locks = locks

    def __enter__(self) -> None:
        before = self._before = _HELD.modules
        new = [lock for lock in self._locks if not any(lock.module is module for module in before)]
        if not new:
            self._taken: Sequence[Any] = ()
            return
        if len(new) == 1:
            taken = new[0].in_order
        else:
            numbered = {number: lock for each in new for number, lock in each.by_layer.items()}
            taken = [numbered[number] for number in sorted(numbered)]
        for count, lock in enumerate(taken):
            try:
                lock.acquire()
            except BaseException:  # an interruption
                for each in taken[:count]:
                    each.release()
                raise
        self._taken = taken
        _HELD.modules = [*before, *(lock.module for lock in new)]

    def __exit__(self, *_: object) -> None:
        _HELD.modules = self._before
        for lock in reversed(self._taken):
            lock.release()


def locked(module: nn.Module) -> held:
    """Context during which no other thread uses the module, or a layer of it."""
    return held([ModuleLock(module)])
