"""Another program as the inner solver, run in several processes at once, with a time limit and further attempts."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bilevel import checks, trees
from bilevel.errors import SolverError
from bilevel.trees import Tree

_LAST_WORDS = 300
"""The number of characters of a failed program's messages that an error message contains."""


@dataclass(frozen=True)
class FailedAttempt:
    """A run of the program that gave no result."""

    meta: Tree
    attempt: int
    """The number of the attempt, counted from 1."""
    reason: str


class OutsideProgram:
    """An inner solver for `BlackBox` that runs a program for each evaluation, in its own folder.

    Failed attempts are kept in `failures`, and `started` counts all attempts. An evaluation without a result raises
    `SolverError`. With `fit(..., update=bilevel.OuterUpdate(max_backtracks=…))` the outer step is then halved.

    Args:
        command: `command(meta, folder) -> argv` writes the program's input files into the (empty) folder and returns
            the command line. The program runs inside that folder.
        read: `read(folder) -> state` returns the inner state from the program's output files. The program's standard
            output is in the file `stdout`. An attempt counts as failed if `read` raises an error.
        workers: the number of programs that run at the same time. Each program may use several threads in addition.
        time_limit: the number of seconds after which an attempt is ended, with all processes that it started.
        attempts: the number of runs of the program for one evaluation, before the evaluation counts as failed.

    >>> import sys, torch, bilevel
    >>> program = OutsideProgram(
    ...     command=lambda meta, folder: [sys.executable, "-c", f"print({float(meta)} ** 2)"],
    ...     read=lambda folder: torch.tensor(float((folder / "stdout").read_text()), dtype=torch.float64),
    ...     workers=2,
    ... )
    >>> problem = bilevel.BlackBox(program.solve, lambda state, meta, batch: state, program.solve_all)
    >>> bilevel.ZerothOrder(1, step_size=0.5)(problem, torch.tensor(3.0)).grad
    tensor(6.)
    """

    def __init__(
        self,
        command: Callable[[Tree, Path], Sequence[str]],
        read: Callable[[Path], Tree],
        workers: int = 1,
        time_limit: float = 600.0,
        attempts: int = 2,
    ) -> None:
        checks.a_function(command, "command", "command(meta, folder)")
        checks.a_function(read, "read", "read(folder)")
        self._command, self._read = command, read
        self._workers = checks.whole_number(workers, "workers")
        self._time_limit = checks.positive(time_limit, "time_limit")
        self._attempts = checks.whole_number(attempts, "attempts")
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self.failures: list[FailedAttempt] = []
        self.started = 0

    def solve(self, meta: Tree) -> Tree:
        """Compute the state at one point.

        Raises:
            SolverError: all attempts failed.
        """
        return self.solve_all([meta])[0]

    def solve_all(self, metas: Sequence[Tree]) -> list[Tree]:
        """Compute the states at several points, in their order.

        Raises:
            SolverError: all attempts at one of the points failed.
        """
        self._stopped = False
        pool = ThreadPoolExecutor(self._workers)
        try:
            return [future.result() for future in [pool.submit(self._evaluate, meta) for meta in metas]]
        except (
            BaseException
        ):  # all attempts of one evaluation failed, or the user interrupts: the other evaluations are not needed
            with self._lock:
                self._stopped = True
                for process in self._running:
                    _end(process)
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _evaluate(self, meta: Tree) -> Tree:
        reason = ""
        for attempt in range(1, self._attempts + 1):
            try:
                return self._attempt(meta)
            except SolverError as error:
                reason = str(error)
                with self._lock:
                    if self._stopped:
                        break
                    self.failures.append(FailedAttempt(meta, attempt, reason))
        point = ", ".join(f"{name} = {leaf}" for name, leaf in trees.named_leaves(meta, "meta"))
        raise SolverError(f"the outside program gave no result in {self._attempts} attempts at {point}: {reason}")

    def _attempt(self, meta: Tree) -> Tree:
        with tempfile.TemporaryDirectory(prefix="bilevel-") as name:
            folder = Path(name)
            argv = [str(word) for word in self._command(meta, folder)]
            self._run(argv, folder)
            try:
                state = self._read(folder)
            except Exception as error:  # the user's function may raise any error for a wrong file
                reason = f"its result cannot be read ({type(error).__name__}: {error})"
                raise SolverError(f"{reason}{_messages(folder)}") from error
            if not trees.all_finite(state):
                raise SolverError(f"its result holds NaN or infinity{_messages(folder)}")
            return state

    def _run(self, argv: list[str], folder: Path) -> None:
        """Run the program to its end in its own session, so that all processes that it started can be ended with it."""
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            with self._lock:
                if self._stopped:
                    raise SolverError("not started, because another evaluation failed")
                self.started += 1
                try:
                    process = subprocess.Popen(
                        argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                    )
                except OSError as error:
                    raise SolverError(f"{argv[0]} cannot be started: {error}") from error
                self._running.add(process)
            try:
                code = process.wait(self._time_limit)
            except subprocess.TimeoutExpired:
                raise SolverError(f"it did not return within {self._time_limit:g} s{_messages(folder)}") from None
            finally:
                with self._lock:
                    _end(process)
                    self._running.discard(process)
                process.wait()
        if code:
            raise SolverError(f"it ended with exit code {code}{_messages(folder)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and everything that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _messages(folder: Path) -> str:
    said = (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip()[-_LAST_WORDS:]
    return f"; it said: {said}" if said else ""
