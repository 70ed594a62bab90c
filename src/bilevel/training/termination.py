"""Being asked to stop."""

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
    """Whether this process has been asked to stop, and how."""

    asked: type[BaseException] | None = None

    @contextmanager
    def as_such(self) -> Iterator[None]:
        """Inside, what stopping makes of the work is reported as stopping.

        Signals are taken wherever Python runs. Raised in a function that PyTorch's own code has called, as inside of
        `torch.func` transforms, the exception comes out as a `RuntimeError`.
        """
        try:
            yield
        except Exception as error:
            if self.asked is None:
                raise
            raise self.asked() from error


@contextmanager
def stopping_raises() -> Iterator[Stop]:
    """Inside, SIGTERM raises `Terminated` as Ctrl-C raises `KeyboardInterrupt`; the second SIGTERM is ignored.

    Schedulers and torchrun send it some seconds before they kill. Python takes signals in its main thread only, and not
    before a collective of torch.distributed that has begun comes to an end.
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
