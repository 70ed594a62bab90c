"""Selection of those kernels of PyTorch that have forward-mode and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.randomness import PROCESS_WIDE


@contextmanager
def differentiable_kernels(modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Context in which PyTorch uses kernels that have forward-mode and second derivatives, if there is a choice.

    Fused attention and the fused transformer layer have neither. The fused recurrent kernels (oneDNN on CPU, cuDNN on
    GPU) have neither, too. They are switched off only if one of the modules is recurrent, because convolutions share
    the switch. The switches apply to the whole process. The first thread that enters the context sets them, and the
    last thread that leaves it restores them.
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
    """Settings of the process that several contexts need at the same time."""

    def __init__(self, set_up: Callable[[ExitStack], None]) -> None:
        self._set_up, self._contexts, self._stack = set_up, 0, ExitStack()

    def enter(self) -> None:
        """Set the settings, unless another context has already set them."""
        if self._contexts == 0:
            self._set_up(self._stack)
        self._contexts += 1

    def leave(self) -> None:
        """Restore the settings, unless another context still needs them."""
        self._contexts -= 1
        if self._contexts == 0:
            self._stack.close()


def _unfused_attention(stack: ExitStack) -> None:
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _unfused_recurrence(stack: ExitStack) -> None:
    # PyTorch's own context managers would also set precisions, with a warning, and precisions are irrelevant here.
    for backend in (torch.backends.mkldnn, torch.backends.cudnn):
        stack.callback(setattr, backend, "enabled", backend.enabled)
        backend.enabled = False  # pyright: ignore[reportAttributeAccessIssue]


_ATTENTION, _RECURRENT = _Switch(_unfused_attention), _Switch(_unfused_recurrence)
