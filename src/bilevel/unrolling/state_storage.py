"""Storage of inner states for the backward pass: on their device, in the host's memory, or on disk.

A store is a stack. States are pushed in the forward pass and popped in the backward pass. For states in the host's
memory or on disk, a thread fetches the next state while the top one is in use.
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
    """A stack of states on their own device. It is a context manager, which discards all states at its end."""

    def __init__(self) -> None:
        self._states: list[Tree] = []

    def push(self, state: Tree) -> None:
        """Keep a state."""
        self._states.append(state)

    def top(self) -> Tree:
        """Return the state kept last, without removing it."""
        return self._states[-1]

    def pop(self) -> None:
        """Remove the state kept last."""
        self._states.pop()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._states.clear()


class _Elsewhere(StateStore, ABC):
    """A stack of states in another place. The next state is fetched while the top one is in use."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "bilevel-prefetch")
        self._coming: Future[Tree] | None = None

    @abstractmethod
    def _bring_back(self, kept: Any) -> Tree:
        """Return a state on its device from its entry in the stack."""

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
    """A stack of states in the host's memory, page-locked if they come from a GPU. Without a GPU, it saves nothing."""

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
    """Return the tensor in the host's memory, and the device to which it will be returned."""
    if tensor.device.type == "cpu":
        return tensor, None
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor), tensor.device


class _OnDisk(_Elsewhere):
    """A stack of states in a temporary file without a name, which disappears with the process in any case.

    There may be many states, so the entry of each is small: its position in the file, and its numbers. The layout of
    the tensors is the same for all states and is stored once.
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
    """The order of the tensors of a state, with `None` in the places of numbers."""

    spec: Any
    tensors: list[tuple[torch.Size, torch.dtype, torch.device] | None]


def _bytes_of(tensor: Tensor) -> Any:
    """Return a view of the memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def state_store(offload: Offload) -> StateStore:
    """Return an empty store of this kind."""
    return {None: StateStore, "cpu": _OnHost, "disk": _OnDisk}[offload]()
