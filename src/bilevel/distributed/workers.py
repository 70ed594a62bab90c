"""Workers: several processes that compute one estimate together, over `torch.distributed`.

Workers are equals that run the same program on the same arguments. The assignment of work follows from numbers that all
workers have (`share`, `bilevel.distributed.work_assignment`), so no worker has to instruct another. Before workers
exchange anything, they *meet*: each one says where it is and whether it failed. An error of one worker thereby becomes
an error of all, with its message. Workers that are at different places in the program get an error as well; without the
meeting they would misread each other's numbers. When a worker does not arrive, the others wait `timeout` seconds.
"""

from __future__ import annotations

import atexit
import importlib
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from bilevel import checks
from bilevel.errors import NonFiniteError, SolverError, WorkerError

Result = TypeVar("Result")

TIMEOUT = 1800.0
"""The default number of seconds that a worker waits for the others."""


@dataclass(frozen=True)
class Workers:
    """This process among the processes that share the work of an estimate.

    `join_workers` makes one for the processes that torchrun started; `Workers.of` makes one for a process group.
    Estimators share their work inside `with workers.sharing():`. `fit` enters it by itself.

    Args:
        rank: the number of this worker, from 0.
        size: the number of workers.
        group: the process group; `None` for the default one. It must have a backend for CPU tensors.
        sharers: the workers that share the work of the estimators, where they differ from all workers. Pass `Workers()`
            if all workers hold one sharded model together, because none of them can then compute anything alone. Pass
            `Workers.of(group)` for the dimension of a device mesh along which the model is repeated. All workers meet
            in any case, and the first one of all writes files.

    >>> Workers().share(3), Workers(rank=1, size=2).share(5)
    (range(0, 3), range(1, 5, 2))
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    sharers: Workers | None = None

    @classmethod
    def of(cls, group: Any = None, sharers: Workers | None = None) -> Workers:
        """Make the workers of an initialised process group, such as one dimension of a device mesh."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group, sharers)

    @property
    def processes(self) -> list[int]:
        """The ranks of the workers in the default group; empty for a single worker."""
        return [] if self.size == 1 else dist.get_process_group_ranks(self.group)

    @property
    def first(self) -> bool:
        """Whether this worker writes files and shows progress."""
        return self.rank == 0

    @contextmanager
    def sharing(self) -> Iterator[Workers]:
        """Context manager in which estimators share their work over these workers; all must make the same calls."""
        token = _CURRENT.set(self if self.sharers is None else self.sharers)
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    def share(self, count: int) -> range:
        """Return the numbers of the parts, out of `count`, that this worker computes."""
        return range(self.rank, count, self.size)

    # -- meeting -----------------------------------------------------------------------------------------------

    def together(self, what: str, function: Callable[[], Result]) -> Result:
        """Call `function()`, and raise on every worker if it failed on any.

        Args:
            what: the name of this place in the program, for messages.
            function: the work of this worker.
        """
        if self.size == 1:
            return function()
        failure: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as error:  # the others must learn of any error
            if getattr(error, _ANNOUNCED, False):
                raise
            failure = error
        self._meet(what, failure)
        return result

    def require_same(self, what: str, content: bytes) -> None:
        """Raise a `WorkerError` unless all workers pass the same bytes."""
        if self.size == 1:
            return
        found = self._meet(what, None, zlib.crc32(content))
        if len(set(found)) > 1:
            other = next(rank for rank, number in enumerate(found) if number != found[0])
            raise _announced(
                WorkerError(
                    f"workers 0 and {other} of {self.size} disagree at {what!r}: all must run the same program with "
                    "the same arguments, and on the same kind of machine, for numbers to agree to the last bit"
                )
            )

    def any(self, what: str, flag: bool) -> bool:
        """Return whether the flag is set on any worker."""
        return flag if self.size == 1 else any(self._meet(what, None, int(flag)))

    def _meet(self, what: str, failure: Exception | None, number: int = 0) -> list[int]:
        """Return the number of every worker, after checking that none failed and all are at the same place."""
        mine = torch.tensor([zlib.crc32(what.encode()), failure is not None, number], device="cpu")
        headers = [torch.empty_like(mine) for _ in range(self.size)]
        with self._at(what):
            dist.all_gather(headers, mine, group=self.group)
        places, failed, numbers = torch.stack(headers).T.tolist()
        if any(failed) or len(set(places)) > 1:
            reports: list[Any] = [None] * self.size
            with self._at(what):
                dist.all_gather_object(reports, (what, _report(failure)), group=self.group)
            raise _announced(failure or self._of_another(reports)) from None
        return numbers

    def _of_another(self, reports: Sequence[tuple[str, tuple[str, str] | None]]) -> Exception:
        """Build the error of this worker from what failed on another one."""
        for rank, (_, report) in enumerate(reports):
            if report is not None:
                name, message = report
                text = f"worker {rank} of {self.size}: {message}"
                kinds = {kind.__name__: kind for kind in (NonFiniteError, SolverError)}
                return kinds[name](text) if name in kinds else WorkerError(f"{text} ({name})")
        where = ", ".join(f"worker {rank} is at {place!r}" for rank, (place, _) in enumerate(reports))
        return WorkerError(
            f"the workers are at different places: {where}; all must make the same calls in the same order"
        )

    # -- communication, after a meeting, between workers that know the sizes of each other's tensors ------------

    def gather(self, what: str, numbers: Tensor) -> Tensor:
        """Gather the numbers `[k]` of each worker into `[size, k]`, in float64."""
        return self.gather_rows(what, numbers.cpu().double())

    def gather_rows(self, what: str, rows: Tensor) -> Tensor:
        """Gather the tensors `[*shape]` of each worker, of one dtype, into `[size, *shape]` on this worker's device."""
        mine = rows.detach().contiguous()
        if self.size == 1:
            return mine.unsqueeze(0)
        everybodys = [torch.empty_like(mine) for _ in range(self.size)]
        with self._at(what):
            dist.all_gather(everybodys, mine, group=self.group)
        return torch.stack(everybodys)

    def broadcast_tensors(self, what: str, tensors: Sequence[Tensor], source: int = 0) -> list[Tensor]:
        """Return the tensors of the worker `source`. Those of all workers have the same shapes and dtypes."""
        if self.size == 1:
            return list(tensors)
        found = [t.detach().contiguous().clone() for t in tensors]
        with self._at(what):
            for tensor in found:
                dist.broadcast(tensor, group=self.group, group_src=source)
        return found

    def sum(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over all workers, with one all-reduce for each dtype. All workers get the same bits."""
        found = [t.detach() for t in tensors]
        if self.size == 1:
            return found
        kinds = dict.fromkeys((t.dtype, t.device) for t in found)
        for kind in kinds:
            members = [i for i, t in enumerate(found) if (t.dtype, t.device) == kind]
            flat = torch.cat([found[i].reshape(-1) for i in members])
            with self._at(what):
                dist.all_reduce(flat, group=self.group)
            parts = flat.split([found[i].numel() for i in members])
            for i, part in zip(members, parts, strict=True):
                found[i] = part.reshape(found[i].shape)
        return found

    def broadcast(self, what: str, content: Result) -> Result:
        """Return the object of the first worker. It must be possible to pickle it."""
        if self.size == 1:
            return content
        carried = [content]
        with self._at(what):
            dist.broadcast_object_list(carried, group=self.group, group_src=0)
        return carried[0]

    @contextmanager
    def _at(self, what: str) -> Iterator[None]:
        """Context manager that turns torch's error of a failed collective into one with the place and the worker."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).split("\n")[0].split(". This is typically")[0]
            late = "imed out" in text or "imeout" in text
            fault = (
                "waited for another worker until the time limit" if late else "lost the connection to another worker"
            )
            advice = (
                "a slow worker needs a longer --timeout (join_workers(timeout=...)); find out why if one hangs"
                if late
                else "it died or was stopped; its own message or that of torchrun says why"
            )
            raise _announced(
                WorkerError(f"worker {self.rank} of {self.size} {fault} at {what!r}: {advice} (torch says: {text})")
            ) from error


_CURRENT: ContextVar[Workers] = ContextVar("workers", default=Workers())  # noqa: B039 (frozen)
_ANNOUNCED = "_known_to_all_workers"


def current() -> Workers:
    """Return the workers that share the work of estimators: this process alone, except inside `Workers.sharing`."""
    return _CURRENT.get()


def join_workers(timeout: float = TIMEOUT) -> Workers:
    """Join the workers that `torchrun` started.

    Where a process group is initialised already, its processes are the workers. Where there is neither, this process
    is the only worker. CPU tensors are sent by gloo and CUDA tensors by NCCL; each worker takes the GPU of its local
    rank.

    Args:
        timeout: the number of seconds that a worker waits for another one at a collective before it raises. A process
            group that is initialised already keeps its own limit.

    Returns:
        This process among the workers.

    Raises:
        WorkerError: another worker did not start in time.
    """
    checks.positive(timeout, "timeout")
    if not joined():
        if not (dist.is_available() and from_environment()):
            return Workers()
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        wait = timedelta(seconds=timeout)
        store, rank, size = next(rendezvous("env://", timeout=wait))
        store = PrefixStore(_name_of_this_start(store, rank, size, timeout), store)
        _import_what_would_hold_the_group()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
        atexit.register(_leave)
    return Workers.of()


def _name_of_this_start(store: Any, rank: int, size: int, timeout: float) -> str:
    """Agree on a name for this start of the group that differs from the names of all earlier starts.

    The agent of torchrun keeps its store when it restarts the workers, and the store still holds the addresses of dead
    workers. With a new name for each start, these addresses are not found. The restart count does not serve as a name,
    because each host counts only its own failures. Instead each process announces a random number, the first process
    proposes the numbers that it sees, and every process must find its own number in the proposal.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"bilevel/here/{rank}", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            store.set("bilevel/proposed", ",".join(store.get(f"bilevel/here/{r}").decode() for r in range(size)))
        proposed = store.get("bilevel/proposed").decode() if store.check(["bilevel/proposed"]) else ""
        if mine in proposed.split(","):
            name = uuid.uuid5(uuid.NAMESPACE_OID, proposed).hex
            store.set(f"bilevel/agreed/{name}/{rank}", "yes")
            if store.check([f"bilevel/agreed/{name}/{r}" for r in range(size)]):
                return name
        time.sleep(0.01)
    raise WorkerError(
        f"worker {rank} of {size} waited {timeout:g} s for the others to start; their messages say why they did not"
    )


def from_environment() -> bool:
    """Return whether torchrun, or a program that sets the same variables, started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank_in_environment() -> int:
    """Return the number of this process among those that torchrun started, or 0 without torchrun."""
    return int(os.environ["RANK"]) if from_environment() else 0


def restarted() -> bool:
    """Return whether torchrun restarted this process after a failure on this host. Other hosts may differ."""
    return from_environment() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def joined() -> bool:
    """Return whether this process belongs to an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def _import_what_would_hold_the_group() -> None:
    """Import `torch.distributed.nn.functional` before there is a process group.

    Functions of this module have the default group as a default argument. An estimate imports the module by itself. If
    that happens after the group is made, the module keeps the group alive, and `_leave` does not end the threads of
    gloo. A thread that releases its last tensors while Python is shutting down then aborts the process ("terminate
    called without an active exception"). About every tenth worker that ended soon after its last collective did so, and
    torchrun treated it as a failure of the whole group.
    """
    importlib.import_module("torch.distributed.nn.functional")


def _leave() -> None:
    """End the threads of the group before Python ends."""
    if joined():
        dist.destroy_process_group()
        time.sleep(0.05)  # if another object, such as a device mesh, holds the group, its threads release tensors now


def _announced(error: Exception) -> Exception:
    setattr(error, _ANNOUNCED, True)
    return error


def known_to_all(error: BaseException) -> bool:
    """Return whether the error was raised on every worker, so that the first one can report it."""
    return bool(getattr(error, _ANNOUNCED, False))


def _report(failure: Exception | None) -> tuple[str, str] | None:
    return None if failure is None else (type(failure).__name__, str(failure))
