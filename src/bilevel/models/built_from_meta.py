"""Modules that are built from meta parameters, with the derivative of their parameters kept.

`nn.Parameter(f(meta))` is a leaf: PyTorch cuts the graph of its data. So do `load_state_dict`, `copy.deepcopy` and
`vector_to_parameters`, which copy values under `torch.no_grad()` or through `.data`. While a user's `params(meta)`
runs, `Origins` remembers the tensor from which each parameter got its values. An inner state starts from that tensor.
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
    """Context that remembers, for tensors without a graph, the tensors with one of which they hold the values."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, Tensor] = {}
        self._owners: dict[int, Tensor] = {}
        """The tensors of which others are `.data`."""
        self._kept: list[Tensor] = []
        """All tensors above, so that no identity is used again."""

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
            with torch.no_grad():  # transforms forbid setting data
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
        elif name == "module_load":  # load_state_dict, which then exchanges the contents of two parameters
            self.remember(result, args[1])
            self.remember(first, args[1])
        elif _writes(name):
            self._forget(first)
        return result

    def remember(self, tensor: Tensor, source: Tensor) -> None:
        """Note that the values of a tensor come from a source, unless that is a parameter, which has no graph."""
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
        """The tensor with a graph that has the values of this one, as far as is known; else the tensor itself."""
        return self._sources.get(id(tensor), tensor)

    def initial(self, tensor: Tensor) -> Tensor:
        """What an inner state starts from: the values of a module's tensor, with the graph of their source.

        A parameter that was written to since then (`nn.init.zeros_`) has no source any more; it is a constant. Buffers
        and attributes have graphs of their own.
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
    """The values of a tensor outside of all function transforms."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach()


# -- nn.Parameter(...) -------------------------------------------------------------------------------------------------


class _Recording(threading.local):
    """The contexts of this thread, the innermost last."""

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
    """Exchange `nn.Parameter.__new__`, which no mode can intercept, while there is a context in any thread."""
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
    """Context in which `module.to(device)` and `.double()` exchange parameters.

    Function transforms forbid setting their data, which is what PyTorch does by default.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
