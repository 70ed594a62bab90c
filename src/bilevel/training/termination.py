"""Interruption of a run by signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bilevel.errors import Terminated


@dataclass
class Stop:
    """A record of whether this process has been asked to stop, and by which exception."""

    asked: type[BaseException] | None = None

    @contextmanager
    def as_such(self) -> Iterator[None]:
        """Context in which errors caused by the interruption are reported as the interruption.

        Python raises the exception of a signal wherever it runs. In a function that is called by PyTorch's own code, as
        inside `torch.func` transforms, PyTorch turns the exception into a `RuntimeError`.
        """
        try:
            yield
        except Exception as error:
            if self.asked is None:
                raise
            raise self.asked() from error


@contextmanager
def stopping_raises() -> Iterator[Stop]:
    """Context in which SIGTERM raises `Terminated`, as Ctrl-C raises `KeyboardInterrupt`. A second SIGTERM is ignored.

    Schedulers and torchrun send SIGTERM some seconds before they kill a process. Python handles signals only in its
    main thread, and only after a collective of torch.distributed that is in progress has ended.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def terminated(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.asked = Terminated
        raise Terminated

    def interrupted(*_: Any) -> None:
        stop.asked = KeyboardInterrupt
        raise KeyboardInterrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, terminated)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
