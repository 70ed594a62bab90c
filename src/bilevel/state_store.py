"""Where kept inner states lie until the way back: on their device, in the host's memory, or on disk.

A store is a stack: states are kept on the way there and taken from the top on the way back. Where they were taken
elsewhere, a thread fetches the one beneath while the top is in use.
"""

from __future__ import annotations

import errno
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bilevel import trees
from bilevel.trees import Tree

Offload: TypeAlias = Literal["cpu", "disk"] | None
OFFLOADS = ("cpu", "disk")


class StateStore:
    """A stack of states, each where it is. A context manager: on leaving, nothing is kept any more."""

    def __init__(self) -> None:
        self._states: list[Tree] = []

    def push(self, state: Tree) -> None:
        """Keep a state."""
        self._states.append(state)

    def top(self) -> Tree:
        """The state kept last, which remains."""
        return self._states[-1]

    def pop(self) -> None:
        """Forget the state kept last."""
        self._states.pop()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._states.clear()


class _Elsewhere(StateStore, ABC):
    """States taken elsewhere; for every tensor, `_take` says how to get it back."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "bilevel-prefetch")
        self._coming: Future[Tree] | None = None

    @abstractmethod
    def _take(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Copy a tensor elsewhere; the function brings it back."""

    def push(self, state: Tree) -> None:
        self._wait()
        self._coming = None
        leaves, spec = trees.flatten(state)
        self._states.append((spec, [self._take(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]))

    def top(self) -> Tree:
        if self._coming is None:
            self._coming = self._thread.submit(_bring_back, *self._states[-1])
        return self._coming.result()

    def pop(self) -> None:
        self._wait()
        self._states.pop()
        self._coming = self._thread.submit(_bring_back, *self._states[-1]) if self._states else None

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._coming = None
        super().__exit__()

    def _wait(self) -> None:
        if self._coming is not None:
            self._coming.result()


def _bring_back(spec: Any, leaves: list[Any]) -> Tree:
    return trees.unflatten(spec, [leaf() if callable(leaf) else leaf for leaf in leaves])


class _OnHost(_Elsewhere):
    """States in the host's memory, page-locked if they come from a GPU. Without one, nothing is gained."""

    def _take(self, tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.device.type == "cpu":
            return lambda: tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
        device = tensor.device
        return lambda: host.to(device)


class _OnDisk(_Elsewhere):
    """States in a temporary file without a name, which is gone with the process however that ends."""

    def __init__(self) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(prefix="bilevel-", buffering=0)  # noqa: SIM115  (closed in __exit__)
        self._starts: list[int] = []

    def push(self, state: Tree) -> None:
        self._wait()
        self._starts.append(self._file.seek(0, os.SEEK_END))
        super().push(state)

    def pop(self) -> None:
        self._wait()
        self._file.truncate(self._starts.pop())
        super().pop()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._file.close()

    def _take(self, tensor: Tensor) -> Callable[[], Tensor]:
        place = self._file.tell()
        content = memoryview(_bytes_of(tensor.detach().cpu().contiguous()))
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC,
                    f"no space left in {tempfile.gettempdir()} after {place / 2**20:.0f} MiB of inner states; set the "
                    "environment variable TMPDIR to a larger disk, or keep fewer states (checkpoints='sqrt' or 'log')",
                ) from error
            raise
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device

        def bring_back() -> Tensor:
            host = torch.empty(shape, dtype=dtype)
            self._file.seek(place)
            wanted = memoryview(_bytes_of(host))
            while wanted:
                wanted = wanted[self._file.readinto(wanted) :]  # pyright: ignore[reportAttributeAccessIssue]
            return host.to(device)

        return bring_back


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def state_store(offload: Offload) -> StateStore:
    """An empty store of that kind."""
    return {None: StateStore, "cpu": _OnHost, "disk": _OnDisk}[offload]()
