"""The choice of kernels: those that have the derivatives which hypergradients need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiable_kernels(modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Inside, PyTorch takes kernels that have forward-mode and second derivatives, where it has a choice.

    Fused attention and the fused transformer layer have neither; nor have the fused recurrent kernels (oneDNN on
    CPU, cuDNN on GPU), which are switched off only if one of the modules is recurrent, because convolutions share the
    switch. On leaving, everything is as before.
    """
    fast_transformer = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(layer, nn.RNNBase) for module in modules for layer in module.modules()):
            # Their own context managers would also set, and warn about, precisions that do not matter here.
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_transformer)
        yield
