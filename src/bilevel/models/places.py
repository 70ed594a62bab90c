"""The places in which a module holds its tensors, and contexts that put other tensors there.

A place is a dictionary and a key: `layer._parameters["weight"]`, `layer._buffers["running_mean"]`, or an attribute in
`layer.__dict__`. A call with other tensors puts them into the places, calls the module, and then restores the module's
own tensors, also after an error. The layers are locked meanwhile, and a second thread that uses one of them waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilevel.autodiff.missing import OutsideUpdateError
from bilevel.models import fsdp
from bilevel.models.locks import ModuleLock, held

Holder = dict[str, Any]
"""One of the dictionaries of a layer."""


class Place(NamedTuple):
    """A place for a tensor in a layer, and the name of the tensor to be put there."""

    holder: Holder
    key: str
    name: str


class Constant(NamedTuple):
    """A tensor of a module that no loss may write to. It is a copy of a buffer, or a frozen parameter itself."""

    layer: nn.Module
    holder: Holder
    key: str
    tensor: Tensor
    version: int | None
    """The tensor's version count when the layout was made; `None` if writes are not watched."""

    @property
    def changed(self) -> bool:
        """Whether the tensor was written to."""
        return self.version is not None and self.tensor._version != self.version


class Cell:
    """The current value of a tensor that a module updates while it computes, and the places of the tensor."""

    __slots__ = ("places", "value")

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.places: list[Place] = []

    def replace(self, value: Tensor) -> None:
        """Set the value of the cell, and put it into the places that hold the old value."""
        for holder, key, _ in self.places:
            if holder.get(key) is self.value:
                holder[key] = value
        self.value = value


@dataclass(eq=False)
class Layout:
    """The places of one module. They are found once and used at every call."""

    module: nn.Module
    names: dict[nn.Parameter, str]
    """The parameters that are replaced by other tensors, and the names of these tensors."""
    trained: list[Place]
    memory: list[Place] = field(default_factory=list)
    """The places of tensors that the module updates. Their values are part of the inner state."""
    constants: list[Constant] = field(default_factory=list)
    """Copies of the buffers that are not known to be updated. A loss receives these copies."""
    frozen: list[Constant] = field(default_factory=list)
    """The parameters that are not trained, with their version counts."""
    strays: list[tuple[nn.Module, str, str]] = field(default_factory=list)
    """Constants that a loss replaced although it must not: the layer, the key, and a description."""
    root: Layout | None = None
    _children: dict[nn.Module, Layout] = field(default_factory=dict)
    lists: list[tuple[Holder, str]] = field(default_factory=list)
    """Attributes in which a call of the module collects the tensors that replace its parameters."""
    watched: list[nn.Module] = field(default_factory=list)
    """Layers with backward hooks."""
    compiled: bool = False
    """Whether a layer was wrapped by `torch.compile`."""
    sharded: bool = False
    """Whether `fully_shard` was applied to the module, or to a layer of it."""
    layers: list[nn.Module] = field(init=False)
    """The module and all modules in it."""
    lock: ModuleLock = field(init=False)

    def __post_init__(self) -> None:
        self.sharded = fsdp.is_sharded(self.module)
        self.lock = self.root.lock if self.root else ModuleLock(self.module)
        self.layers = layers = list(self.module.modules())
        recurrent = [layer.__dict__ for layer in layers if isinstance(layer, nn.RNNBase)]
        self.lists = [(holder, key) for holder in recurrent for key in _LISTS if key in holder]
        self.watched = [layer for layer in layers if layer._backward_hooks]
        self.compiled = any(type(layer).__name__ == "OptimizedModule" or layer._compiled_call_impl for layer in layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and other.module is self.module

    def __hash__(self) -> int:
        return id(self.module)

    @classmethod
    def of(cls, module: nn.Module, names: Iterable[str]) -> Layout:
        """Find the places of the parameters with these names. Tied weights may have other names as well."""
        wanted = set(names)
        known = module.named_parameters(remove_duplicate=False)
        parameters = {parameter: name for name, parameter in known if name in wanted}
        return cls(module, parameters, _places_of(module, parameters))

    def of_layer(self, layer: nn.Module) -> Layout:
        """Return the layout of a module inside this one."""
        if layer not in self._children:
            holders = {id(holder) for each in layer.modules() for holder in (each._buffers, each.__dict__)}
            holders |= {id(each._parameters) for each in layer.modules()}
            inside = {p: name for name, p in layer.named_parameters() if p in self.names}
            self._children[layer] = Layout(
                layer,
                inside,
                _places_of(layer, inside),
                [place for place in self.memory if id(place.holder) in holders],
                [each for each in self.constants if id(each.holder) in holders],
                [],
                self.strays,
                self.root or self,
            )
        return self._children[layer]

    def forget_layers(self) -> None:
        """Discard the layouts of modules inside this one, which are then found again."""
        self._children = {}

    def renamed(self, tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """Rename tensors from the names in this layout to the names in the layout of a module inside this one."""
        return {name: tensors[self.names[parameter]] for parameter, name in layout.names.items()}


def _places_of(module: nn.Module, parameters: Mapping[nn.Parameter, str]) -> list[Place]:
    """Return every place in which a layer holds one of the parameters. A layer with several names is listed once."""
    return [
        Place(layer._parameters, key, parameters[parameter])
        for layer in module.modules()
        for key, parameter in layer._parameters.items()
        if parameter is not None and parameter in parameters
    ]


# -- standing in -----------------------------------------------------------------------------------------------------


class standing:  # noqa: N801  (a context manager, named like a function)
    """Context in which a module holds other tensors. Its own tensors are restored at the end.

    A value that the module assigns to its memory meanwhile (`self.average = ...`) becomes the value of the cell.
    Entered once.
    """

    __slots__ = ("_as_written", "_cells", "_held", "_layout", "_swaps", "_tensors")

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], cells: Mapping[str, Cell]) -> None:
        self._layout, self._tensors, self._cells = layout, tensors, cells
        self._held = held([layout.lock])
        self._swaps: list[tuple[Holder, str, Any]] = []
        self._as_written = _as_written(layout)

    def __enter__(self) -> None:
        self._held.__enter__()
        try:
            self._as_written.__enter__()
            try:
                self._exchange()
            except BaseException:
                self._put_back()
                self._as_written.__exit__(None, None, None)
                raise
        except BaseException:
            self._held.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._put_back()
        finally:
            try:
                self._as_written.__exit__(None, None, None)
            finally:
                self._held.__exit__()

    def _exchange(self) -> None:
        layout, tensors, cells, swaps = self._layout, self._tensors, self._cells, self._swaps
        for holder, key, name in layout.trained:
            swaps.append((holder, key, holder[key]))
            holder[key] = tensors[name]
        if cells:
            for place in layout.memory:
                swaps.append((place.holder, place.key, place.holder[place.key]))
                cells[place.name].places.append(place)
                place.holder[place.key] = cells[place.name].value
        for constant in layout.constants:
            swaps.append((constant.holder, constant.key, constant.holder.get(constant.key)))
            constant.holder[constant.key] = constant.tensor
        swaps += [(holder, key, holder[key]) for holder, key in layout.lists]
        for layer in layout.watched:
            swaps.append((layer.__dict__, "_backward_hooks", layer._backward_hooks))
            layer.__dict__["_backward_hooks"] = _observing(layer)

    def _put_back(self) -> None:
        layout, cells = self._layout, self._cells
        if cells:
            for place in layout.memory:
                cell, found = cells[place.name], place.holder.get(place.key)
                cell.places = [each for each in cell.places if each is not place]
                if isinstance(found, Tensor) and found is not cell.value:
                    cell.value = found
        for constant in layout.constants:
            if constant.holder.get(constant.key) is not constant.tensor:
                layout.strays.append((constant.layer, constant.key, ""))
            elif constant.changed:
                layout.strays.append((constant.layer, constant.key, " in place"))
        for holder, key, own in self._swaps:
            holder[key] = own


_LISTS = ("_flat_weights", "_flat_weight_refs")
"""Attributes in which recurrent layers hold their weights a second time."""


def _as_written(layout: Layout) -> AbstractContextManager[Any]:
    """Context in which layers wrapped by `torch.compile` run without compilation.

    The inner gradient is differentiated again, and PyTorch cannot do that with compiled code.
    """
    return torch.compiler.set_stance("force_eager") if layout.compiled else nullcontext()


def _observing(layer: nn.Module) -> OrderedDict[int, Any]:
    """Return the backward hooks of a layer, each of which may read gradients and must not change them.

    Function transforms do not accept backward hooks, so the hooks are called in ordinary backward passes only.
    """
    hooks: OrderedDict[int, Any] = OrderedDict()
    if torch._C._are_functorch_transforms_active():
        return hooks

    def observing(hook: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if hook(*args) is not None:
                raise ValueError(
                    f"a hook from register_full_backward_hook on a {type(layer).__name__} changes gradients, and the "
                    "derivative of what it does is not known; it may read gradients and return None. To change the "
                    "gradient of a parameter write parameter.register_hook with a differentiable function"
                )

        return call

    hooks.update((key, observing(hook)) for key, hook in layer._backward_hooks.items())
    return hooks


# -- losses -----------------------------------------------------------------------------------------------------------


class ModulesInUse:
    """A context manager for losses, which can be used several times. It locks modules and restores their modes.

    Steps are computed more than once and in any order, so no change that a loss makes to its modules may remain. At the
    end of the context, the modules have the training modes that they had when this object was made.

    Raises:
        OutsideUpdateError: a loss changed a tensor of a module that is not part of the inner state. It is raised at the
            end.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._layouts = layouts
        self._locks = [layout.lock for layout in layouts]
        self._modes = [(layer, layer.training) for layout in layouts for layer in layout.layers]
        self._held: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = held(self._locks)
        context.__enter__()
        self._held.append(context)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for layer, training in self._modes:
            if layer.training != training:
                layer.training = training
        strays = [stray for layout in self._layouts for stray in layout.strays]
        strays += [(c.layer, c.key, " in place") for layout in self._layouts for c in layout.frozen if c.changed]
        for layout in self._layouts:
            layout.strays.clear()
        self._held.pop().__exit__(None, None, None)
        for layer, key, how in strays if kind is None else ():
            raise OutsideUpdateError(
                f"{type(layer).__name__} changed its tensor {key!r}{how} while a loss was computed, which it does not "
                "at the initial parameters (or it belongs to a module in meta), so a step computed again would give "
                "something else; let every inner step update it, put that layer in eval mode, or take one without "
                "such memory"
            )
