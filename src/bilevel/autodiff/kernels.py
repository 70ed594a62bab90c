"""The kernels of PyTorch that can be differentiated in forward mode and twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.randomness import PROCESS_WIDE


@contextmanager
def differentiable_kernels(modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Context in which PyTorch takes kernels that have forward-mode and second derivatives, where it has a choice.

    Fused attention and the fused transformer layer have neither; nor have the fused recurrent kernels (oneDNN on
    CPU, cuDNN on GPU), which are switched off only if one of the modules is recurrent, because convolutions share the
    switch. The switches belong to the process: the first thread that comes switches them, the last one that leaves
    puts them back as they were.
    """
    recurrent = any(isinstance(layer, nn.RNNBase) for module in modules for layer in module.modules())
    wanted = [_ATTENTION, _RECURRENT] if recurrent else [_ATTENTION]
    with PROCESS_WIDE:
        for switch in wanted:
            switch.enter()
    try:
        yield
    finally:
        with PROCESS_WIDE:
            for switch in reversed(wanted):
                switch.leave()


class _Switch:
    """Settings of the process that several contexts want at a time."""

    def __init__(self, set_up: Callable[[ExitStack], None]) -> None:
        self._set_up, self._contexts, self._stack = set_up, 0, ExitStack()

    def enter(self) -> None:
        """Set them, if nobody has."""
        if self._contexts == 0:
            self._set_up(self._stack)
        self._contexts += 1

    def leave(self) -> None:
        """Put them back, if nobody else wants them."""
        self._contexts -= 1
        if self._contexts == 0:
            self._stack.close()


def _unfused_attention(stack: ExitStack) -> None:
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _unfused_recurrence(stack: ExitStack) -> None:
    # Their own context managers would also set, and warn about, precisions that do not matter here.
    for backend in (torch.backends.mkldnn, torch.backends.cudnn):
        stack.callback(setattr, backend, "enabled", backend.enabled)
        backend.enabled = False  # pyright: ignore[reportAttributeAccessIssue]


_ATTENTION, _RECURRENT = _Switch(_unfused_attention), _Switch(_unfused_recurrence)
