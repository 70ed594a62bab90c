"""Being asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bilevel.errors import Terminated


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, as Ctrl-C raises `KeyboardInterrupt`; the second one is ignored.

    Schedulers and torchrun send it some seconds before they kill. Python takes signals in its main thread only, and not
    before a collective of torch.distributed that has begun comes to an end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
