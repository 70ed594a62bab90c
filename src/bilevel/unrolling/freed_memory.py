"""What becomes of freed memory on a CPU: glibc hands it back to the system, and takes it anew a moment later.

glibc returns large blocks, and what is free at the top of its heap, as soon as they lie beyond two thresholds, which
start at 128 KiB. An inner loop frees the temporaries of one step and wants as much for the next one, so the system
clears the same pages thousands of times over: a third of the time of (FG)²U on a small model.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_IN_HEAP = 32 * 2**20
"""Larger blocks are handed back at once, as before. glibc itself goes up to here, as it sees larger ones freed."""
KEPT = 256 * 2**20
"""At most so much free memory stays at the top of the heap."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB that it has freed, for its next tensors. True if that was done.

    For programs that train on a CPU, once, at the start: `bilevel run` and `bilevel plan` do so; a library should not
    decide it for the rest of your program, so `fit` does not. It holds for the whole process and is not taken back.
    False, and nothing is done, where the C library is not glibc (macOS, Windows, Alpine), and where you have set
    glibc's own variables (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`). Another allocator,
    such as a preloaded jemalloc, does not heed it. Tensors on a GPU have an allocator of their own.

    Cost: memory that would have been free for other processes; the peak of resident memory may rise a little.
    What it gains: `python benchmarks/allocator.py`, benchmarks/results/allocator.md.

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
    """Whether whoever started the process has decided already."""
    variables = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    return any(name in os.environ for name in variables) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def _glibc() -> Any:
    """The C library, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
