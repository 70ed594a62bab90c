"""Modules that are built from meta parameters, and the derivatives of their parameters.

`nn.Parameter(f(meta))` is a leaf, because PyTorch drops the graph of its data. `load_state_dict`, `copy.deepcopy` and
`vector_to_parameters` drop it as well: they copy values under `torch.no_grad()` or through `.data`. While a user's
`params(meta)` runs, `Origins` records the tensor from which each parameter got its values. An inner state starts from
that tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Origins(TorchFunctionMode):
    """Context that records, for each tensor without a graph, the tensor with a graph from which its values came."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, Tensor] = {}
        self._owners: dict[int, Tensor] = {}
        """The tensor whose `.data` a tensor is, by the `id` of the latter."""
        self._kept: list[Tensor] = []
        """All recorded tensors. They are kept so that Python does not reuse their `id`."""

    def __enter__(self) -> Origins:
        _RECORDING.origins.append(self)
        _install()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _uninstall()
        _RECORDING.origins.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if name == "__set__" and func == _SET_DATA and torch._C._are_functorch_transforms_active():
            with torch.no_grad():  # function transforms do not allow setting .data
                args[0].copy_(args[1])
            self.remember(args[0], args[1])
            return None
        result = func(*args, **kwargs)
        if not isinstance(first, Tensor):
            return result
        if name == "__get__" and func == _GET_DATA:
            self.remember(result, first)
            self._owners[id(result)] = first
        elif name == "__set__" and func == _SET_DATA:
            self.remember(first, args[1])
        elif name in _SAME_VALUES and id(first) in self._sources:
            with torch.enable_grad():
                self.remember(result, func(self._sources[id(first)], *args[1:], **kwargs))
        elif name == "copy_" and isinstance(args[1], Tensor):
            with torch.enable_grad():
                self.remember(self._owners.get(id(first), first), self.source(args[1]).expand(first.shape))
        elif name == "module_load":  # from load_state_dict, which then swaps the contents of two parameters
            self.remember(result, args[1])
            self.remember(first, args[1])
        elif _writes(name):
            self._forget(first)
        return result

    def remember(self, tensor: Tensor, source: Tensor) -> None:
        """Record that the values of a tensor come from a source. A source that is a parameter has no graph and is not
        recorded.
        """
        source = self.source(source)
        if isinstance(source, nn.Parameter):
            self._forget(tensor)
        else:
            self._sources[id(tensor)] = source
        self._kept += [tensor, source]

    def _forget(self, tensor: Tensor) -> None:
        for each in (tensor, self._owners.get(id(tensor), tensor)):
            self._sources.pop(id(each), None)

    def source(self, tensor: Tensor) -> Tensor:
        """Return the tensor with a graph from which this tensor got its values. Return the tensor itself if there is
        none on record.
        """
        return self._sources.get(id(tensor), tensor)

    def initial(self, tensor: Tensor) -> Tensor:
        """Return the tensor from which an inner state starts: a module's tensor, with the graph of its source.

        A parameter that was written to after it was made (`nn.init.zeros_`) no longer has a source and is a constant.
        Buffers and attributes have graphs of their own.
        """
        source = self._sources.get(id(tensor))
        constant = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
        if source is None or not _may_have_derivative(source) or source.shape != tensor.shape:
            return constant
        source = source.to(device=tensor.device, dtype=tensor.dtype)
        return source if torch.equal(_values(source), _values(tensor)) else constant


_SAME_VALUES = frozenset({"clone", "detach", "contiguous", "view_as", "reshape", "view", "__getitem__", "to", "double"})
_GET_DATA = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_SET_DATA = Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def _may_have_derivative(tensor: Tensor) -> bool:
    return tensor.requires_grad or _functorch.is_functorch_wrapped_tensor(tensor)


def _values(tensor: Tensor) -> Tensor:
    """Return the values of a tensor outside of all function transforms."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach()


# -- nn.Parameter(...) -------------------------------------------------------------------------------------------------


class _Recording(threading.local):
    """The active contexts of this thread; the innermost is the last."""

    def __init__(self) -> None:
        self.origins: list[Origins] = []


_RECORDING = _Recording()
_NEW = nn.Parameter.__new__
_INSTALLING = threading.Lock()
_contexts = 0


def _recording_new(cls: type[nn.Parameter], data: Any = None, *args: Any, **kwargs: Any) -> nn.Parameter:
    made = _NEW(cls, data, *args, **kwargs)
    if isinstance(data, Tensor):
        for origins in _RECORDING.origins:
            origins.remember(made, data)
    return made


def _install() -> None:
    """Replace `nn.Parameter.__new__`, which no mode can intercept, as long as any thread has an active context."""
    global _contexts
    with _INSTALLING:
        _contexts += 1
        nn.Parameter.__new__ = staticmethod(_recording_new)  # pyright: ignore[reportAttributeAccessIssue]


def _uninstall() -> None:
    global _contexts
    with _INSTALLING:
        _contexts -= 1
        if _contexts == 0:
            nn.Parameter.__new__ = staticmethod(_NEW)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def convertible() -> Iterator[None]:
    """Context in which `module.to(device)` and `.double()` replace the parameters of a module.

    By default PyTorch sets the parameters' `.data`, which function transforms do not allow.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
