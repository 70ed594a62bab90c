"""Where kept inner states lie until the way back: on their device, in the host's memory, or on disk.

A store is a stack: states are kept on the way there and taken from the top on the way back. Where they were taken
elsewhere, a thread fetches the one beneath while the top is in use.
"""

from __future__ import annotations

import errno
import os
import tempfile
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
    """States taken elsewhere; the next one is on its way back while the top is in use."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "bilevel-prefetch")
        self._coming: Future[Tree] | None = None

    @abstractmethod
    def _bring_back(self, kept: Any) -> Tree:
        """The state again, of what is remembered of it."""

    def top(self) -> Tree:
        if self._coming is None:
            self._fetch()
        assert self._coming is not None
        return self._coming.result()

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._coming = None
        super().__exit__()

    def _fetch(self) -> None:
        self._coming = self._thread.submit(self._bring_back, self._states[-1]) if self._states else None

    def _wait(self) -> None:
        if self._coming is not None:
            self._coming.result()


class _OnHost(_Elsewhere):
    """States in the host's memory, page-locked if they come from a GPU. Without one, nothing is gained."""

    def push(self, state: Tree) -> None:
        self._wait()
        self._coming = None
        leaves, spec = trees.flatten(state)
        self._states.append((spec, [_to_host(leaf) if isinstance(leaf, Tensor) else (leaf, None) for leaf in leaves]))

    def pop(self) -> None:
        self._wait()
        self._states.pop()
        self._fetch()

    def _bring_back(self, kept: Any) -> Tree:
        spec, leaves = kept
        return trees.unflatten(spec, [leaf if device is None else leaf.to(device) for leaf, device in leaves])


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.device | None]:
    """The tensor in the host's memory, and the device it goes back to."""
    if tensor.device.type == "cpu":
        return tensor, None
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor), tensor.device


class _OnDisk(_Elsewhere):
    """States in a temporary file without a name, which is gone with the process however that ends.

    What is remembered of each must be little, since there may be many: where it starts and its numbers. How its tensors
    follow each other is the same for all of them, and kept once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(prefix="bilevel-", buffering=0)  # noqa: SIM115  (closed in __exit__)
        self._layouts: list[_Layout] = []

    def push(self, state: Tree) -> None:
        self._wait()
        self._coming = None
        leaves, spec = trees.flatten(state)
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
        layout = _Layout(spec, [None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        if not self._layouts or self._layouts[-1] != layout:
            self._layouts.append(layout)
        start = self._file.seek(0, os.SEEK_END)
        for tensor in tensors:
            if tensor is not None:
                self._write(tensor)
        numbers = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        self._states.append((start, len(self._layouts) - 1, numbers))

    def pop(self) -> None:
        self._wait()
        start, layout, _ = self._states.pop()
        self._file.truncate(start)
        if not self._states or self._states[-1][1] != layout:
            self._layouts.pop()
        self._fetch()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._file.close()

    def _bring_back(self, kept: Any) -> Tree:
        start, layout, numbers = kept
        others = iter(numbers)
        self._file.seek(start)
        spec, tensors = self._layouts[layout].spec, self._layouts[layout].tensors
        return trees.unflatten(spec, [next(others) if each is None else self._read(*each) for each in tensors])

    def _write(self, tensor: Tensor) -> None:
        content = memoryview(_bytes_of(tensor.detach().cpu().contiguous()))
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC,
                    f"no space left in {tempfile.gettempdir()} after {self._file.tell() / 2**20:.0f} MiB of inner "
                    "states; set the environment variable TMPDIR to a larger disk, or keep fewer states "
                    "(checkpoints='sqrt' or 'log')",
                ) from error
            raise

    def _read(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        host = torch.empty(shape, dtype=dtype, device="cpu")
        wanted = memoryview(_bytes_of(host))
        while wanted:
            wanted = wanted[self._file.readinto(wanted) :]  # pyright: ignore[reportAttributeAccessIssue]
        return host.to(device)


@dataclass(frozen=True)
class _Layout:
    """How the tensors of a state follow each other; `None` in the places of numbers."""

    spec: Any
    tensors: list[tuple[torch.Size, torch.dtype, torch.device] | None]


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def state_store(offload: Offload) -> StateStore:
    """An empty store of that kind."""
    return {None: StateStore, "cpu": _OnHost, "disk": _OnDisk}[offload]()
