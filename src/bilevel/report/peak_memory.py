"""A measurement of the largest amount of memory that was held while a block ran."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATM = Path("/proc/self/statm")


class PeakMemory:
    """Context manager that measures the peak memory of its block.

    On a GPU it counts what torch allocated there. On a CPU it reads the resident memory of the process every
    millisecond, which Linux alone provides. Memory that the allocator kept from before and used again does not count.
    """

    peak: int | None = None
    """The bytes at the peak, above those held at the start; `None` if the system does not report them."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif _STATM.exists():
            self._before = self._most = _resident()
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated() - self._before
        elif _STATM.exists():
            self._over.set()
            self._thread.join()
            self.peak = max(self._most, _resident()) - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self._most = max(self._most, _resident())


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
