"""Whether a GPU rounds the factors of float32 products to TF32, which results have to say.

TensorFloat-32 keeps 10 of the 23 bits of the fraction, so products have relative errors of about 5e-4 in place of 6e-8.
PyTorch's default is to use it in the convolutions of cuDNN, and not in matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

GPUS = ("cuda",)
"""The types of devices that have TF32."""


def tf32_settings() -> str:
    """Return the settings of PyTorch in words.

    >>> before = torch.backends.cuda.matmul.fp32_precision
    >>> torch.backends.cuda.matmul.fp32_precision = "tf32"
    >>> tf32_settings()
    'matrix products on, convolutions on'
    >>> torch.backends.cuda.matmul.fp32_precision = before
    """
    # The older names (`allow_tf32`) raise where a program has set both kinds.
    of = {
        "matrix products": torch.backends.cuda.matmul.fp32_precision,
        "convolutions": torch.backends.cudnn.conv.fp32_precision,  # pyright: ignore[reportAttributeAccessIssue]
    }
    return ", ".join(f"{what} {'on' if precision == 'tf32' else 'off'}" for what, precision in of.items())


def stated_for(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Return the settings as an entry `tf32` of a result, or nothing if no tensor is a float32 tensor on a GPU."""
    affected = any(t.device.type in GPUS and t.dtype in (torch.float32, torch.complex64) for t in tensors)
    return {"tf32": tf32_settings()} if affected else {}


def gpu_and_tf32() -> dict[str, str]:
    """Return the name of the current GPU and the settings, as part of what numbers depend on; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "tf32": tf32_settings()}
