"""A setting of glibc that keeps freed memory in the process on a CPU, so that it can be used again at once.

glibc returns large blocks, and free memory at the top of its heap, to the system when they exceed two thresholds, which
are initially 128 KiB. An inner loop frees the temporary tensors of one step and needs the same amount for the next
step, so the system clears the same pages thousands of times. This takes a third of the time of (FG)²U on a small model.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGEST_IN_HEAP = 32 * 2**20
"""The size above which blocks are still returned at once. glibc itself raises its threshold up to this size."""
KEPT = 256 * 2**20
"""The largest amount of free memory that stays at the top of the heap."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB of freed memory for its next tensors.

    Call it once, at the start of a program that trains on a CPU. `bilevel run` and `bilevel plan` call it. `fit` does
    not, because a library should not make this decision for your whole program. The setting applies to the whole
    process and is not undone.

    Another allocator, such as a preloaded jemalloc, ignores the setting. Tensors on a GPU have their own allocator.

    Cost: the kept memory is not available to other processes, and the peak of resident memory may rise a little. The
    gain in speed is measured by `python benchmarks/allocator.py`; see `benchmarks/results/allocator.md`.

    Returns:
        Whether the setting was made. It is not made if the C library is not glibc (macOS, Windows, Alpine), or if you
        have set glibc's own variables (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`).

    >>> import bilevel
    >>> kept = bilevel.keep_freed_memory()
    """
    if _users_own_settings():
        return False
    library = _glibc()
    return library is not None and bool(
        library.mallopt(_MMAP_THRESHOLD, LARGEST_IN_HEAP) and library.mallopt(_TRIM_THRESHOLD, KEPT)
    )


def _users_own_settings() -> bool:
    """Whether glibc's own variables for these settings are set."""
    variables = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    return any(name in os.environ for name in variables) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def _glibc() -> Any:
    """Return the C library if it is glibc, else `None`."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
