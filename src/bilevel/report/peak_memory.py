"""The most memory that was held while something ran."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATM = Path("/proc/self/statm")


class PeakMemory:
    """Inside, memory is watched; afterwards `peak` is the most that was held above what was held on entering.

    On a GPU it is what torch allocated there. On a CPU it is the process's resident memory, looked at every
    millisecond, where Linux tells it; memory that the allocator kept from before and used again does not count.
    """

    peak: int | None = None

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
