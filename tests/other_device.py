"""A second device that a CPU plays, to find mistakes that only a GPU would show.

Inside `OtherDevice`, tensors that `put` was called on lie "on privateuseone:0". Their numbers stay in the memory of the
CPU, so everything is computed, but

- `tensor.device` says privateuseone:0, and what is made with that device, or from such tensors, lies there too;
- an operation that mixes such a tensor with a CPU tensor of one or more dimensions is an error, as on a GPU;
- `.numpy()` of such a tensor is an error, as on a GPU;
- each copy to the host is counted, since the host would wait there for the GPU: `.item()`, `float()`, `bool()`,
  `.tolist()`, `.cpu()`, and comparisons that return a bool.

A mode for operations sees plain tensors below `torch.vmap`, `torch.func.jvp` and autograd, so this holds for
derivatives too.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("privateuseone", 0)
CPU = torch.device("cpu")
aten: Any = torch.ops.aten

_MAY_MIX = {
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten.set_.source_Tensor,
}
"""Operations that take tensors of two devices: copies, and a tensor on a GPU with indices on the CPU."""
_TO_HOST = {aten._local_scalar_dense.default: "item", aten.equal.default: "equal", aten.is_nonzero.default: "bool"}
_DEVICE_GETTERS = {Tensor.device.__get__, Tensor.is_cpu.__get__, Tensor.is_cuda.__get__, Tensor.get_device}  # type: ignore[attr-defined]


class MixedDevicesError(AssertionError):
    """An operation had tensors of both devices."""


class OtherDevice(TorchFunctionMode):
    """The mode; `syncs` counts copies to the host by the line of code that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self._there: dict[int, weakref.ref[Any]] = {}
        self._neutral: dict[int, weakref.ref[Any]] = {}
        self.asked_by_python = False
        """Whether Python has called a function without tensors, such as `torch.zeros(3)`, which then runs."""
        self._below = _Operations(self)

    def __enter__(self) -> OtherDevice:
        self._below.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    # -- which tensors are there --------------------------------------------------------------------------------------

    def put(self, tree: Any) -> Any:
        """Return a copy of a tree of tensors on the other device. Modules are changed."""

        def one(value: Any) -> Any:
            if isinstance(value, torch.nn.Module):
                for tensor in (*value.parameters(), *value.buffers()):
                    self.mark(tensor)
                return value
            if isinstance(value, Tensor):
                copied = value.detach().clone()
                self.mark(copied)
                return copied.requires_grad_(value.requires_grad)
            return value

        return pytree.tree_map(one, tree)

    def mark(self, tensor: Tensor) -> None:
        """Let a tensor lie on the other device."""
        self._remember(tensor, self._there)

    def mark_neutral(self, tensor: Tensor) -> None:
        """Let a tensor lie on either device: PyTorch made it where a tensor is that this mode can't know of."""
        self._remember(tensor, self._neutral)

    @staticmethod
    def _remember(tensor: Tensor, known: dict[int, weakref.ref[Any]]) -> None:
        if tensor._is_zerotensor():  # has no storage
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in known:
            known[key] = weakref.ref(storage, lambda _: known.pop(key, None))

    def is_there(self, tensor: Tensor) -> bool:
        """Whether a plain tensor lies on the other device."""
        return not tensor._is_zerotensor() and tensor.untyped_storage()._cdata in self._there

    def is_neutral(self, tensor: Tensor) -> bool:
        """Whether a plain tensor may be mixed with those of either device."""
        return not tensor.ndim or tensor._is_zerotensor() or tensor.untyped_storage()._cdata in self._neutral

    def _inmost_is_there(self, tensor: Tensor) -> bool:
        try:
            return self.is_there(_inmost(tensor))
        except (NotImplementedError, RuntimeError):  # a tensor without storage
            return False

    def noted(self, what: str) -> None:
        """Count a copy to the host."""
        own = [f for f in traceback.extract_stack() if "/bilevel/" in f.filename]
        place = f"{own[-1].filename.rpartition('/bilevel/')[2]}:{own[-1].lineno}" if own else "elsewhere"
        self.syncs[f"{what} at {place}"] += 1

    # -- calls of functions: devices are asked for, or named ----------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func in _DEVICE_GETTERS and first is not None and self._inmost_is_there(first):
            answers = {"device": DEVICE, "is_cpu": False, "is_cuda": False, "get_device": 0}
            name = func.__name__ if func is Tensor.get_device else func.__self__.__name__
            return answers[name]
        if func is Tensor.numpy and first is not None and self._inmost_is_there(first):
            raise TypeError("can't convert a tensor on privateuseone:0 to numpy; use Tensor.cpu() first")
        if func in (Tensor.tolist, Tensor.cpu) and first is not None and self._inmost_is_there(first):
            self.noted(func.__name__)
            with torch._C.DisableTorchFunction(), self._below.aside():
                copied = first.detach().clone() if func is Tensor.tolist else first.clone()
                return copied.tolist() if func is Tensor.tolist else copied
        wanted = self._device_named(func, args, kwargs)
        if not any(isinstance(v, Tensor) for v in pytree.tree_leaves((args, kwargs))):
            before, self.asked_by_python = self.asked_by_python, True
            try:
                result = func(*args, **(kwargs if wanted is None else {**kwargs, "device": CPU}))
            finally:
                self.asked_by_python = before
            return pytree.tree_map_only(Tensor, self._marked, result) if wanted == DEVICE else result
        if wanted is None:
            return func(*args, **kwargs)
        args, kwargs = self._without_device(func, args, kwargs)
        if func in (Tensor.to, Tensor.type_as) and first is not None:
            return self._moved(first, func(*args, **kwargs), wanted)
        result = func(*args, **kwargs)
        if wanted == DEVICE:
            pytree.tree_map_only(Tensor, self._marked, result)
        return result

    def _marked(self, tensor: Tensor) -> Tensor:
        self.mark(_inmost(tensor))
        return tensor

    def _moved(self, before: Tensor, after: Tensor, wanted: torch.device) -> Tensor:
        was = self._inmost_is_there(before)
        if was == (wanted == DEVICE):
            return after
        if was:
            self.noted("to host")
        with torch._C.DisableTorchFunction(), self._below.aside():
            after = after.clone()
        return self._marked(after) if wanted == DEVICE else after

    def _device_named(self, func: Any, args: Any, kwargs: Any) -> torch.device | None:
        """The device that a call asks for."""
        if func in (Tensor.to, Tensor.type_as):
            for value in (*args[1:], kwargs.get("device"), kwargs.get("other")):
                if isinstance(value, Tensor):
                    return DEVICE if self._inmost_is_there(value) else CPU
                if isinstance(value, str | torch.device):
                    return torch.device(value)
            return None
        device = kwargs.get("device")
        return None if device is None else torch.device(device)

    @staticmethod
    def _without_device(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if func in (Tensor.to, Tensor.type_as):
            changed = [
                v.dtype if isinstance(v, Tensor) else v for v in args[1:] if not isinstance(v, str | torch.device)
            ]
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}
            if isinstance(other := kwargs.pop("other", None), Tensor):
                changed.append(other.dtype)
            return (args[0], *(changed or ([] if "dtype" in kwargs else [args[0].dtype]))), kwargs
        return args, {**kwargs, "device": CPU}


def _inmost(tensor: Tensor) -> Tensor:
    """The plain tensor inside of function transforms."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


class _Operations(TorchDispatchMode):
    """Refuses operations on tensors of both devices, and marks results."""

    def __init__(self, other: OtherDevice) -> None:
        super().__init__()
        self._other = other
        self._aside = 0

    def aside(self) -> _Aside:
        """Context in which operations are not looked at."""
        return _Aside(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        there = [self._other.is_there(v) for v in given]
        if any(there):
            if func in _TO_HOST:
                self._other.noted(_TO_HOST[func])
            strangers = [v for v, t in zip(given, there, strict=True) if not (t or self._other.is_neutral(v))]
            if strangers and func not in _MAY_MIX:
                raise MixedDevicesError(
                    f"{func}: tensors on {DEVICE} and on the CPU {[tuple(s.shape) for s in strangers]}"
                )
        result = func(*args, **kwargs)
        if not any(there) and not self._other.asked_by_python and all(map(self._other.is_neutral, given)):
            for value in pytree.tree_leaves(result):
                if isinstance(value, Tensor):
                    self._other.mark_neutral(value)
        if there and (there[0] if func in _MAY_MIX else any(there)):
            for value in pytree.tree_leaves(result):
                if isinstance(value, Tensor):
                    self._other.mark(value)
        return result


class _Aside:
    def __init__(self, operations: _Operations) -> None:
        self._operations = operations

    def __enter__(self) -> None:
        self._operations._aside += 1

    def __exit__(self, *_: Any) -> None:
        self._operations._aside -= 1
