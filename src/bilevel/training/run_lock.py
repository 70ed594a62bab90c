"""The lock of a run's folder: one run at a time, and a killed run can be resumed at once."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"
OWNER = ".running.json"


class RunLock:
    """The right of one process to write into a folder.

    It is a lock of the operating system (`filelock`), which ends with the process, however that ends. Beside it, the
    file `.running.json` says which process it is. On file systems without locks, such as some network drives, that file
    is all there is. Then a process of this machine that still exists is taken for the owner, and one of another machine
    is warned of.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            FileExistsError: another process is writing into the folder.
            OSError: the folder cannot be written to.
        """
        self._folder = folder
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise _in_use(folder, _owner(folder)) from None
        except NotImplementedError:
            self._without_locks(folder)
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
        (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")

    @staticmethod
    def _without_locks(folder: Path) -> None:
        owner = _owner(folder)
        if owner is not None and owner["host"] == socket.gethostname() and _exists(owner["process"]):
            raise _in_use(folder, owner)
        other = "" if owner is None else f" {_described(owner)} was writing into it, or was killed while it did."
        warnings.warn(
            f"the file system of {folder} has no locks, so a second run in this folder is noticed on this machine "
            f"alone.{other} See to it that one run at a time uses it",
            stacklevel=6,
        )

    def release(self) -> None:
        """Give the folder back; a folder that was made for this run and is empty is removed."""
        with suppress(OSError):
            (self._folder / OWNER).unlink(missing_ok=True)
            (self._folder / LOCK).unlink(missing_ok=True)
        self._lock.release()
        if self._made:
            with suppress(OSError):  # not empty
                self._folder.rmdir()


def _in_use(folder: Path, owner: dict[str, Any] | None) -> FileExistsError:
    who = "another process" if owner is None else _described(owner)
    return FileExistsError(
        f"{folder} is in use: {who} is writing a run into it. Wait until it has ended, or take another folder"
    )


def _described(owner: dict[str, Any]) -> str:
    return f"process {owner['process']} on {owner['host']}, started on {owner['since']},"


def _owner(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return {name: found[name] for name in ("host", "process", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _exists(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
