"""Stopped gradients, replayed while a function is evaluated at moved arguments.

What a user takes from `.detach()`, from `.data` or from a block under `torch.no_grad()` is a constant for derivatives,
and moves all the same when the arguments of the function move. A finite difference of (0.7 t − t.detach())² therefore
is not its derivative. A `Tape` records these tensors at the unmoved point, and hands them out again at moved ones.

A custom `autograd.Function` may have another backward pass than the derivative of its forward pass, on purpose (a
straight-through estimator). At a moved point its output is replaced by the linear function that its backward pass
stands for, y + J (x' − x), which has the derivative that automatic differentiation uses.

Numbers that leave PyTorch (`.item()`, `.numpy()`), and gradients taken inside a loss without `create_graph=True`, are
not replayed. The tape notes where they are, and whether they moved.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_MOST_BYTES = 2**30
_BOOKKEEPING = tuple(
    str(Path(torch.__file__).parent / part)
    for part in ("utils/checkpoint.py", "distributed", "autograd/graph.py", "autograd/function.py")
)
"""Code of PyTorch that works outside of the graph and has a derivative all the same: activation checkpoints, sharded
modules, and custom functions, whose `forward` runs without gradients."""
_OWN_CODE = tuple(str(Path(file).parent) for file in (torch.__file__, optree.__file__, str(Path(__file__).parent)))


class AnotherPathError(RuntimeError):
    """The user's function took another path at a moved point, so what was recorded cannot be replayed."""


class Tape:
    """The stopped gradients of a function, in the order in which they came up."""

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._position = 0
        self._bytes = 0
        self._replaying = False
        self.paused = False
        """Whether the code of a custom function is running, whose operations are not looked at one by one."""
        self.replayed: dict[str, None] = {}
        """The places in the user's code of stopped gradients that moved, and that were replayed."""
        self.not_replayed: dict[str, None] = {}
        """The places of numbers taken out of PyTorch, or gradients without a graph, that moved."""

    @property
    def is_full(self) -> bool:
        """Whether there was more than 1 GiB to record, so that nothing can be replayed."""
        return self._bytes > _MOST_BYTES

    @property
    def holds_any(self) -> bool:
        """Whether anything has been recorded."""
        return bool(self._entries) or self.is_full

    def clear(self) -> None:
        """Forget what was recorded."""
        self._entries.clear()
        self._bytes = 0

    def rewind(self) -> None:
        """Start a replay from the beginning."""
        self._position, self._replaying = 0, True

    @contextmanager
    def running(self, custom_functions: bool = True) -> Iterator[None]:
        """Context of a call of the user's function, which is recorded, or replayed after `rewind`.

        Without `custom_functions`, these are evaluated at moved points as they are, which needs no derivative of their
        backward passes.
        """
        with _custom_functions_seen_by(self) if custom_functions else nullcontext(), _Stops(self):
            yield

    # -- what the mode does ---------------------------------------------------------------------------------------

    def _next(self, value: Any) -> Any:
        """Record the value, or return what was recorded in its place."""
        if self.is_full:
            return value
        if not self._replaying:
            self._entries.append(value)
            self._bytes += sum(t.nbytes for t in value if isinstance(t, Tensor)) if isinstance(value, tuple) else 0
            if self.is_full:
                self._entries.clear()
            return value
        if self._position >= len(self._entries) or not _alike(self._entries[self._position], value):
            raise AnotherPathError("the function took another path at a moved point")
        self._position += 1
        return self._entries[self._position - 1]

    def stopped(self, results: tuple[Any, ...], where: str) -> tuple[Any, ...]:
        """Record or replay tensors without a graph."""
        recorded = self._next(tuple(_constant(r) for r in results))
        if self._replaying and not all(map(_equal, recorded, results)):
            self.replayed[where] = None
        return tuple(r.clone() if isinstance(r, Tensor) else r for r in recorded)

    def noted(self, results: tuple[Any, ...], where: str) -> None:
        """Note whether results that are not replayed have moved."""
        recorded = self._next(tuple(_constant(r) for r in results))
        if self._replaying and not all(map(_equal, recorded, results)):
            self.not_replayed[where] = None

    def linear(self, apply: Any, args: tuple[Any, ...]) -> Any:
        """The outputs of a custom function, which are linear in its inputs at a moved point."""
        self.paused = True
        try:
            result = apply(*args)
            if not torch.is_grad_enabled():
                return result
            return self._linear(apply, args, result)
        finally:
            self.paused = False

    def _linear(self, apply: Any, args: tuple[Any, ...], result: Any) -> Any:
        outputs = result if isinstance(result, tuple) else (result,)
        moving = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        now = tuple(_constant(args[i]) for i in moving)
        recorded = self._next((*now, *(_constant(y) for y in outputs)))
        if not self._replaying or self.is_full:
            return result
        points, values = recorded[: len(moving)], recorded[len(moving) :]
        moves = [x - x0 for x, x0 in zip(now, points, strict=True)]
        pushed = _pushed(apply, args, moving, points, moves)
        replaced = []
        for y, y0, change in zip(outputs, values, pushed, strict=True):
            if not isinstance(y, Tensor) or not y.is_floating_point():
                replaced.append(y)
                continue
            target = y0 if change is None else y0 + change
            if not torch.allclose(target, y.detach(), rtol=1e-6, atol=0.0, equal_nan=True):
                replaced.append(y + (target - y).detach())
            else:
                replaced.append(y)
        return tuple(replaced) if isinstance(result, tuple) else replaced[0]


def _pushed(
    apply: Any, args: tuple[Any, ...], moving: Sequence[int], points: Sequence[Tensor], moves: Sequence[Tensor]
) -> list[Tensor | None]:
    """J (x' − x) for each output, where J is the transpose of the function's backward pass at x."""
    inputs = [p.clone().requires_grad_() for p in points]
    there = list(args)
    for i, x in zip(moving, inputs, strict=True):
        there[i] = x
    with torch.enable_grad():
        result = apply(*there)
        outputs = result if isinstance(result, tuple) else (result,)
        pushed: list[Tensor | None] = []
        for y in outputs:
            if not (isinstance(y, Tensor) and y.requires_grad):
                pushed.append(None)
                continue
            u = torch.zeros_like(y, requires_grad=True)
            back = torch.autograd.grad(y, inputs, u, create_graph=True, retain_graph=True, allow_unused=True)
            pairs = [(b, m) for b, m in zip(back, moves, strict=True) if b is not None and b.requires_grad]
            if not pairs:
                pushed.append(None)
                continue
            bs, ms = zip(*pairs, strict=True)
            (found,) = torch.autograd.grad(bs, u, ms, retain_graph=True, allow_unused=True)
            pushed.append(None if found is None else found.detach())
    return pushed


class _Stops(TorchFunctionMode):
    """Hands operations that stop a gradient to a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tape.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is functional.gumbel_softmax and _is_hard(args, kwargs):
            return self._hard_gumbel_softmax(args, kwargs)
        stopping = func in _DETACHING
        first = args[0] if args and isinstance(args[0], Tensor) else None
        version = first._version if first is not None and not torch.is_grad_enabled() else 0
        result = func(*args, **kwargs)
        if func in _NUMBERS:
            if isinstance(result, float | list):
                self._tape.noted((torch.tensor(result),), f"{_where()} ({name.strip('_')})")
            return result
        if func is torch.autograd.grad and not kwargs.get("create_graph", False):
            results = tuple(result)
            self._tape.noted(results, f"{_where()} (torch.autograd.grad without create_graph=True)")
            return result
        if not stopping and torch.is_grad_enabled():
            return result
        if name in ("__get__", "__set__") and not stopping:
            return result
        if first is not None and not stopping and first._version != version and not _is_bookkeeping():  # in place
            (value,) = self._tape.stopped((first,), f"{_where()} (torch.no_grad)")
            if self._tape._replaying and not self._tape.is_full:
                first.copy_(value)
            return result
        in_place = not stopping and _IN_PLACE.fullmatch(name) is not None
        if in_place and isinstance(first, Tensor) and isinstance(result, Tensor) and result is not first:
            # The write went into a buffer of the inner state, which got a new tensor. Later writes must find it.
            if _is_bookkeeping():
                return result
            (value,) = self._tape.stopped((result,), f"{_where()} (torch.no_grad)")
            return result.copy_(value) if self._tape._replaying and not self._tape.is_full else result
        results = result if type(result) in (tuple, list) else (result,)
        if not any(isinstance(r, Tensor) and (r.is_floating_point() or r.dtype == torch.int64) for r in results):
            return result
        if not stopping and any(r is a for r in results for a in args):
            return result
        if not stopping and any(isinstance(r, Tensor) and r._is_view() for r in results):
            return result
        if _is_bookkeeping():
            return result
        how = name.strip("_") if name != "__get__" else "data"
        found = self._tape.stopped(tuple(results), f"{_where()} ({how if stopping else 'torch.no_grad'})")
        if not self._tape._replaying or self._tape.is_full:
            return result
        return found[0] if result is results[0] else type(result)(found)

    def _hard_gumbel_softmax(self, args: Any, kwargs: Any) -> Tensor:
        """PyTorch's own straight-through function: hard − soft.detach() + soft, inside of which no mode can look."""
        named = {**dict(zip(_GUMBEL, args, strict=False)), **kwargs}
        before = torch.get_rng_state()
        soft = functional.gumbel_softmax(**{**named, "hard": False})
        torch.set_rng_state(before)
        hard = functional.gumbel_softmax(**named)
        (off,) = self._tape.stopped((hard - soft,), f"{_where()} (gumbel_softmax)")
        return soft + off.detach()


_GUMBEL = ("logits", "tau", "hard", "eps", "dim")


def _is_hard(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("hard", args[2] if len(args) > 2 else False))


_IN_PLACE = re.compile(r"__i\w+__|[a-z]\w*[a-z0-9]_")
"""The names of operations in place."""
_DETACHING = frozenset({torch.detach, Tensor.detach, Tensor.data.__get__})  # pyright: ignore[reportAttributeAccessIssue]
_NUMBERS = frozenset({Tensor.item, Tensor.tolist, Tensor.__float__})

_LOCK = threading.RLock()


@contextmanager
def _custom_functions_seen_by(tape: Tape) -> Iterator[None]:
    """Context in which calls of custom functions are handed to a tape, in this thread."""
    base: Any = torch.autograd.Function
    original, thread = base.__dict__["apply"], threading.get_ident()
    busy = False

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal busy
        own = original.__get__(None, cls)
        foreign = cls.__module__.split(".")[0] not in ("torch", "bilevel")
        inside = threading.get_ident() != thread or torch._C._are_functorch_transforms_active()
        if busy or kwargs or inside or not foreign:
            return own(*args, **kwargs)
        busy = True
        try:
            return tape.linear(own, args)
        finally:
            busy = False

    with _LOCK:
        base.apply = classmethod(apply)
        try:
            yield
        finally:
            base.apply = original


def _constant(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    with torch._C.DisableTorchFunction():
        return value.detach().clone()


def _alike(recorded: Any, value: Any) -> bool:
    return len(recorded) == len(value) and all(
        getattr(a, "shape", None) == getattr(b, "shape", None) for a, b in zip(recorded, value, strict=True)
    )


def _equal(recorded: Any, value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    value = _constant(value)
    return recorded.dtype == value.dtype and torch.equal(recorded, value)


def _is_bookkeeping() -> bool:
    """Whether the operation is part of what PyTorch does behind a function that has a derivative."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_BOOKKEEPING):
            return True
        frame = frame.f_back
    return False


def _where() -> str:
    """The file and line of the user's code that is running."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_CODE):
        frame = frame.f_back
    return "somewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
