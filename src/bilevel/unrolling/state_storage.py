"""Storage of inner states for the backward pass: on their device, in the host's memory, or on disk.

A store is a stack. States are pushed in the forward pass and popped in the backward pass. The next state is fetched
while the top one is in use: by a thread from the disk, and by a second stream of a GPU from the host's memory.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
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
        self._states: list[Any] = []

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


class _AtOnce:
    """Copies between the host and a device that are complete when `copy` returns."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy each second tensor to the first one."""
        for destination, source in pairs:
            destination.copy_(source)

    def wait(self, copied: Any) -> None:
        """Let the device wait for the end of a copy."""


class _Beside:
    """Copies between page-locked memory of the host and a GPU, on a stream beside the one that computes.

    The host waits for neither. Memory of the GPU may be used again only after `wait`. Page-locked memory needs no such
    care: PyTorch's allocator gives a block out again only when the copies from and to it are over.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy each second tensor to the first one, after what has been computed so far; return an event for `wait`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let everything that is computed from now on wait for the end of a copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)


def _copies_for(device: torch.device) -> _AtOnce | _Beside:
    return _Beside(device) if device.type == "cuda" else _AtOnce()


@dataclass
class _Moved:
    """A state of which the tensors of a device are being copied, or have been copied."""

    spec: Any
    leaves: list[Any]
    """The leaves, with the copies in place of the tensors that they are copies of."""
    devices: list[torch.device | None]
    """The device on which each leaf belongs; `None` for numbers and for tensors of the host."""
    copied: list[tuple[torch.device, Any]]
    """What `wait` takes, for each device."""
    originals: list[Any] | None
    """The leaves that are copied, until it is known that the device has read them."""


class _OnHost(StateStore):
    """A stack of states in the host's memory. Tensors that are there already are kept as they are.

    A GPU copies while it computes, and the host waits for no copy. The states pushed last stay on the GPU. Memory of an
    earlier one is given up by letting the computation wait for the end of its copy, which has had two steps of time.
    The next state for the way back is copied while the step from the top one is differentiated.
    """

    stay = 2
    """The number of states pushed last that stay on the device."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[torch.device, _AtOnce | _Beside] = {}
        self._coming: _Moved | None = None

    def push(self, state: Tree) -> None:
        self._drop_what_comes()
        leaves, spec = trees.flatten(state)
        devices = [leaf.device if isinstance(leaf, Tensor) and leaf.device.type != "cpu" else None for leaf in leaves]
        hosts = [
            leaf if device is None else _host_memory_for(leaf) for leaf, device in zip(leaves, devices, strict=True)
        ]
        self._states.append(_Moved(spec, hosts, devices, self._copied(hosts, leaves, devices), leaves))
        if len(self._states) > self.stay:
            self._let_go(self._states[-1 - self.stay])

    def top(self) -> Tree:
        kept: _Moved = self._states[-1]
        if kept.originals is not None:
            return trees.unflatten(kept.spec, kept.originals)
        if self._coming is None:
            self._fetch()
        assert self._coming is not None
        self._wait(self._coming)
        return trees.unflatten(kept.spec, self._coming.leaves)

    def pop(self) -> None:
        self._drop_what_comes()
        self._let_go(self._states.pop())
        if self._states and self._states[-1].originals is None:
            self._fetch()

    def __exit__(self, *error: object) -> None:
        self._drop_what_comes()
        for kept in self._states:
            self._let_go(kept)
        super().__exit__(*error)

    def _fetch(self) -> None:
        """Begin to copy the state kept last to its devices."""
        kept: _Moved = self._states[-1]
        leaves = [
            host if device is None else torch.empty_like(host, device=device, pin_memory=False)
            for host, device in zip(kept.leaves, kept.devices, strict=True)
        ]
        copied = self._copied(leaves, kept.leaves, kept.devices)
        self._coming = _Moved(kept.spec, leaves, kept.devices, copied, kept.leaves)

    def _drop_what_comes(self) -> None:
        if self._coming is not None:
            self._let_go(self._coming)
            self._coming = None

    def _let_go(self, moved: _Moved) -> None:
        """Give up the memory that was copied from, on the device after the end of the copy."""
        if moved.originals is not None:
            self._wait(moved)
            moved.originals = None

    def _wait(self, moved: _Moved) -> None:
        for device, copied in moved.copied:
            self._copies[device].wait(copied)

    def _copied(
        self, to: Sequence[Any], from_: Sequence[Any], devices: Sequence[torch.device | None]
    ) -> list[tuple[torch.device, Any]]:
        """Copy the leaves that belong on a device."""
        pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for destination, source, device in zip(to, from_, devices, strict=True):
            if device is not None:
                pairs.setdefault(device, []).append((destination, source))
        for device in pairs:
            if device not in self._copies:
                self._copies[device] = _copies_for(device)
        return [(device, self._copies[device].copy(each)) for device, each in pairs.items()]


def _host_memory_for(tensor: Tensor) -> Tensor:
    """Return memory of the host like a tensor, page-locked for a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


class _OnDisk(StateStore):
    """A stack of states in a temporary file without a name, which disappears with the process in any case.

    A thread reads the next state while the top one is in use.

    There may be many states, so the entry of each is small: its position in the file, and its numbers. The layout of
    the tensors is the same for all states and is stored once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "bilevel-prefetch")
        self._coming: Future[Tree] | None = None
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

    def top(self) -> Tree:
        if self._coming is None:
            self._fetch()
        assert self._coming is not None
        return self._coming.result()

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._coming = None
        super().__exit__(*error)
        self._file.close()

    def _fetch(self) -> None:
        self._coming = self._thread.submit(self._bring_back, self._states[-1]) if self._states else None

    def _wait(self) -> None:
        if self._coming is not None:
            self._coming.result()

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
