"""Several processes at one estimate: who does which part, and how the parts come together, over `torch.distributed`.

Workers are equals that run the same program on the same arguments. Who does what follows from numbers that all of them
have (`share`, `bilevel.distributed.work_assignment`), so nobody has to tell anybody what to do. Before anything is
exchanged, the
workers *meet*: each says where it is and whether it failed. So an error of one becomes an error of all, with its
message, and workers that have lost step are told so instead of reading each other's numbers as something else. A
worker that does not come at all ends the wait of the others after `timeout` seconds.
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
"""Seconds that a worker waits for the others, by default."""


@dataclass(frozen=True)
class Workers:
    """This process among those that share the work; made by `join_workers`, or for a process group of one's own.

    Estimators share their work inside `with workers.sharing():`, and `fit` does so by itself.

    Args:
        rank: this worker's number.
        size: how many there are.
        group: the process group, `None` for the default one. It must have a backend for CPU tensors.
        sharers: those who share the estimators' work, where they are not all of these: `Workers()` if these hold one
            sharded model together, so that none of them can do anything without the others; `Workers.of(group)` for the
            dimension of a device mesh along which the model is repeated. All the same meet, and the first one of all
            writes.

    >>> Workers().share(3), Workers(rank=1, size=2).share(5)
    (range(0, 3), range(1, 5, 2))
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    sharers: Workers | None = None

    @classmethod
    def of(cls, group: Any = None, sharers: Workers | None = None) -> Workers:
        """The ranks of an initialised process group, such as one dimension of a device mesh."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group, sharers)

    @property
    def processes(self) -> list[int]:
        """Their ranks in the default group."""
        return [] if self.size == 1 else dist.get_process_group_ranks(self.group)

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    @contextmanager
    def sharing(self) -> Iterator[Workers]:
        """Inside, estimators spread their work over these workers, all of whom must make the same calls."""
        token = _CURRENT.set(self if self.sharers is None else self.sharers)
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    def share(self, count: int) -> range:
        """Which of `count` parts are this worker's."""
        return range(self.rank, count, self.size)

    # -- meeting -----------------------------------------------------------------------------------------------

    def together(self, what: str, function: Callable[[], Result]) -> Result:
        """`function()`, and an error on every worker if it failed on any; `what` names the place in messages."""
        if self.size == 1:
            return function()
        failure: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as error:  # whatever it is, the others must hear of it
            if getattr(error, _ANNOUNCED, False):
                raise
            failure = error
        self._meet(what, failure)
        return result

    def require_same(self, what: str, content: bytes) -> None:
        """Raise unless all workers have the same bytes here."""
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
        """Whether the flag is set on any worker."""
        return flag if self.size == 1 else any(self._meet(what, None, int(flag)))

    def _meet(self, what: str, failure: Exception | None, number: int = 0) -> list[int]:
        """Every worker's number, once it is known that nobody failed and all are at the same place."""
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
        """What went wrong elsewhere, as an error here."""
        for rank, (_, report) in enumerate(reports):
            if report is not None:
                name, message = report
                text = f"worker {rank} of {self.size}: {message}"
                kinds = {kind.__name__: kind for kind in (NonFiniteError, SolverError)}
                return kinds[name](text) if name in kinds else WorkerError(f"{text} ({name})")
        where = ", ".join(f"worker {rank} is at {place!r}" for rank, (place, _) in enumerate(reports))
        return WorkerError(f"the workers have lost step: {where}; all must make the same calls in the same order")

    # -- exchange: after a meeting, by workers who know each other's sizes ------------------------------------

    def gather(self, what: str, numbers: Tensor) -> Tensor:
        """Everybody's numbers `[size, k]` from this worker's `[k]`, in float64."""
        return self.gather_rows(what, numbers.cpu().double())

    def gather_rows(self, what: str, rows: Tensor) -> Tensor:
        """Everybody's tensors `[size, *shape]`, of one shape and dtype, on the device where this worker's is."""
        mine = rows.detach().contiguous()
        if self.size == 1:
            return mine.unsqueeze(0)
        everybodys = [torch.empty_like(mine) for _ in range(self.size)]
        with self._at(what):
            dist.all_gather(everybodys, mine, group=self.group)
        return torch.stack(everybodys)

    def broadcast_tensors(self, what: str, tensors: Sequence[Tensor], source: int = 0) -> list[Tensor]:
        """The tensors of one worker, the first one by default; everybody's have the same shapes and dtypes."""
        if self.size == 1:
            return list(tensors)
        found = [t.detach().contiguous().clone() for t in tensors]
        with self._at(what):
            for tensor in found:
                dist.broadcast(tensor, group=self.group, group_src=source)
        return found

    def sum(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all workers, bit for bit the same on each of them: one all-reduce for each dtype."""
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
        """What the first worker has: any object that can be pickled."""
        if self.size == 1:
            return content
        carried = [content]
        with self._at(what):
            dist.broadcast_object_list(carried, group=self.group, group_src=0)
        return carried[0]

    @contextmanager
    def _at(self, what: str) -> Iterator[None]:
        """Torch's reports of a collective that failed, with the place and the worker."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).split("\n")[0].split(". This is typically")[0]
            late = "imed out" in text or "imeout" in text
            fault = "waited in vain for another one" if late else "lost another one"
            advice = (
                "a slow one needs a longer --timeout (join_workers(timeout=...)), one that hangs must be looked into"
                if late
                else "it died or was stopped, and its own message, or torchrun's, says why"
            )
            raise _announced(
                WorkerError(f"worker {self.rank} of {self.size} {fault} at {what!r}: {advice} (torch says: {text})")
            ) from error


_CURRENT: ContextVar[Workers] = ContextVar("workers", default=Workers())  # noqa: B039 (frozen)
_ANNOUNCED = "_known_to_all_workers"


def current() -> Workers:
    """Those who share the work of estimators here; this process alone unless inside `Workers.sharing`."""
    return _CURRENT.get()


def join_workers(timeout: float = TIMEOUT) -> Workers:
    """The workers that `torchrun` started, or those of a process group that is there already; else this process alone.

    Args:
        timeout: seconds to wait for another worker at a collective, before it is an error; of a process group that is
            there already, its own counts.

    CPU tensors go over gloo, CUDA tensors over NCCL, where each worker takes the GPU of its local rank.
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
    """A name that all processes of this start of the group agree on, and no earlier start had.

    torchrun's agent keeps its store over restarts, and in it the addresses of workers that are dead: under a name of
    their own, nobody finds them. The restart count is no such name, since each host counts only its own failures. So
    each process announces a number of its own, the first one proposes those it sees, and all must find theirs there.
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
    raise WorkerError(f"worker {rank} of {size} waited {timeout:g} s for the others to start; their messages say why")


def from_environment() -> bool:
    """Whether torchrun, or whoever sets the same variables, started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank_in_environment() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ["RANK"]) if from_environment() else 0


def restarted() -> bool:
    """Whether torchrun started this process again after a failure on this host; ask whether `any` worker was."""
    return from_environment() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def joined() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def _import_what_would_hold_the_group() -> None:
    """Import the module of torch whose functions have the group as a default argument, while there is none.

    Imported later, as an estimate does by itself, it holds the group for ever, and `_leave` doesn't end gloo's threads.
    One that lets go of its last tensors while Python is shutting down then aborts the process ("terminate called
    without an active exception"): every tenth worker or so that left soon after its last collective, and torchrun took
    it for a failure of the whole group.
    """
    importlib.import_module("torch.distributed.nn.functional")


def _leave() -> None:
    """End the group's threads, before Python ends."""
    if joined():
        dist.destroy_process_group()
        time.sleep(0.05)  # where something else holds a group, a device mesh say, its threads let go of tensors now


def _announced(error: Exception) -> Exception:
    setattr(error, _ANNOUNCED, True)
    return error


def known_to_all(error: BaseException) -> bool:
    """Whether the error was raised on every worker, so that the first one can report it."""
    return bool(getattr(error, _ANNOUNCED, False))


def _report(failure: Exception | None) -> tuple[str, str] | None:
    return None if failure is None else (type(failure).__name__, str(failure))
