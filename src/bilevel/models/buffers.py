"""Tensors that a module updates while it computes, such as BatchNorm's running statistics, as part of the inner state.

An inner step is a pure function of the state, so the module's own tensors are never written to. A loss is computed with
copies of these tensors, each held by a `Cell`. When the module writes a value, by assignment or in place, the value
becomes the new value of the cell. The values of all cells become the `buffers` of the next state.

Function transforms cannot follow a write in place. `Writes` therefore replaces it by an operation that makes a new
tensor, and passes the new tensor to all later operations that read the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.models.batch_norm import NORMALIZATIONS
from bilevel.models.places import Cell


class Writes(TorchFunctionMode):
    """Context in which an in-place write into the tensor of a cell gives the cell a new tensor instead."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        super().__init__()
        self._cells: dict[int, Cell] = {}
        self._stale: dict[int, Cell] = {}
        """The cell of each tensor that was written to, by the tensor's `id`."""
        self._kept: dict[Cell, list[Tensor]] = {}
        """All tensors that were ever the value of a cell. They are kept so that Python does not reuse their `id`."""
        for cell in cells:
            self._note(cell, cell.value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._stale:
            args = tuple(self._latest(argument) for argument in args)
            kwargs = {name: self._latest(argument) for name, argument in kwargs.items()}
        name = getattr(func, "__name__", "")
        if func in NORMALIZATIONS:
            return self._normalized(func, args, kwargs)
        if name.endswith("_") or name == "__get__":
            cell = self._cell(args[0]) if args else None
            if cell is not None:
                if name == "__get__":
                    return self._attribute(cell, func, args)
                if _writes(name):
                    return self._written(cell, name, func, args[1:], kwargs)
            elif args and isinstance(args[0], list | tuple) and any(map(self._cell, args[0])):
                raise ValueError(
                    f"{name} updates several tensors of a module at once, in place, which derivatives do not follow; "
                    "update one after the other"
                )
        target = self._cell(kwargs.get("out"))
        if target is not None:
            return self._replace(target, func(*args, **{**kwargs, "out": None}))
        if name == "detach":
            cell, result = self._cell(args[0]), func(*args, **kwargs)
            if cell is not None:
                self._note(cell, result)
            return result
        return func(*args, **kwargs)

    def _cell(self, value: Any) -> Cell | None:
        return self._cells.get(id(value))

    def _note(self, cell: Cell, value: Tensor) -> None:
        self._cells[id(value)] = cell
        self._kept.setdefault(cell, []).append(value)

    def _latest(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            cell = self._stale.get(id(argument))
            return argument if cell is None else cell.value
        if type(argument) in (list, tuple):
            return type(argument)(self._latest(each) for each in argument)
        return argument

    def _replace(self, cell: Cell, value: Tensor) -> Tensor:
        """Give the cell a new value, with the dtype and shape of the old value as after a write in place."""
        old = cell.value
        value = value.to(old.dtype)
        if value.shape != old.shape:
            value = value.expand(old.shape).clone()
        for each in self._kept[cell]:
            self._stale[id(each)] = cell
        self._note(cell, value)
        cell.replace(value)
        return value

    def _attribute(self, cell: Cell, func: Any, args: Any) -> Any:
        """Return an attribute of the cell's tensor. Writes into its `.data` are writes into the cell."""
        found = func(*args)
        if func == _DATA and isinstance(found, Tensor):
            self._note(cell, found)
        return found

    def _written(self, cell: Cell, name: str, func: Any, rest: Any, kwargs: Any) -> Tensor | None:
        before = cell.value
        if name == "__setitem__":
            copy = before.clone()
            func(copy, *rest)
            self._replace(cell, copy)
            return None
        if name == "__set__":  # .data = ...
            self._replace(cell, rest[0].detach().clone())
            return None
        if name == "copy_":
            return self._replace(cell, rest[0].clone())
        if name == "zero_":
            return self._replace(cell, torch.zeros_like(before))
        plain = name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
        if name in _NO_COUNTERPART or not hasattr(Tensor, plain):
            copy = before.clone()
            func(copy, *rest, **kwargs)
            return self._replace(cell, copy)
        return self._replace(cell, getattr(Tensor, plain)(before, *rest, **kwargs))

    def _normalized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute a normalisation and update the running statistics, which are in cells, out of place."""
        normalization = NORMALIZATIONS[func]
        named = normalization.arguments(args, kwargs)
        mean, var = self._cell(named.get("running_mean")), self._cell(named.get("running_var"))
        if mean is None or var is None:
            return func(*args, **kwargs)
        found = normalization.out_of_place(**named)
        if found.mean is not mean.value:
            self._replace(mean, found.mean)
            self._replace(var, found.var)
        return found.output


_DATA = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_"})
_NO_COUNTERPART = frozenset({"fill_", "fill_diagonal_", "random_", "bernoulli_", "set_", "resize_"})
_OPERATORS = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "pow", "mod"))
_OPERATORS |= frozenset({"__iand__", "__ior__", "__ixor__", "__setitem__", "__set__"})


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    return name in _OPERATORS or (name not in _HARMLESS and not name.startswith("__"))


def cells_of(buffers: Mapping[str, Tensor]) -> dict[str, Cell]:
    """Make a cell with a copy of each of an inner state's buffers."""
    return {name: Cell(tensor.clone()) for name, tensor in buffers.items()}


def values_of(cells: Mapping[str, Cell]) -> dict[str, Tensor]:
    """Return the values of cells, as the buffers of an inner state."""
    return {name: cell.value for name, cell in cells.items()}
