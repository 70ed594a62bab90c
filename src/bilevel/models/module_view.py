"""`nn.Module`s as trees of tensors that can still be called."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module

from bilevel.models import fsdp
from bilevel.trees import NAMESPACE, Tree


class ModuleView:
    """A module whose parameters are held outside of it: a tree of tensors, used like the module itself.

    Losses receive one wherever the user handed over an `nn.Module`. What is reached through it is computed with
    `named_tensors`: calls `view(x)`, submodules `view.encoder(x)` and `view.layers[0](x)`, methods, properties, and
    iterators such as `view.parameters()`; other attributes, such as `view.config`, are the module's own. Parameters
    with `requires_grad=False` are not part of the tree: they stay in the module as constants, and so do buffers.

    >>> layer = nn.Linear(2, 1)
    >>> view = ModuleView(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> view(torch.tensor([3.0, 4.0]))
    tensor([7.])
    """

    module: nn.Module
    named_tensors: dict[str, Tensor]

    def __init__(self, module: nn.Module, named_tensors: Mapping[str, Tensor] | None = None) -> None:
        fsdp.reshard(module)
        if named_tensors is None:
            named_tensors = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
        known = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        for name in named_tensors:
            if name not in known:
                raise ValueError(f"{type(module).__name__} has no parameter {name!r}; it has: {', '.join(known)}")
        self._hold(module, named_tensors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if fsdp.is_sharded(self.module):
            fsdp.reshard(self.module)  # a loss may have called it too, past this view
            return fsdp.call(self.module, self._tensor_of_each_parameter(), args, kwargs)
        return functional_call(self.module, self._tensor_of_each_slot(), args, kwargs, tie_weights=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in self.__dict__:
            raise AttributeError(name)
        on_class = inspect.getattr_static(type(self.module), name, None)
        if isinstance(on_class, functools.cached_property):  # computed afresh: a cache would outlive these tensors
            return self._evaluate(on_class.func)
        if isinstance(on_class, property):
            return self._evaluate(lambda module: getattr(module, name))
        value = getattr(self.module, name)
        if inspect.ismethod(value) and value.__self__ is self.module:
            return functools.partial(self._call_method, name)
        return self._viewed(value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a ModuleView cannot be changed: set {name!r} on the module before it is handed over")

    def __getitem__(self, key: Any) -> Any:
        return self._evaluate(lambda module: module[key])  # pyright: ignore[reportIndexIssue]

    def __iter__(self) -> Iterator[Any]:
        return self._evaluate(iter)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self.module)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self.named_tensors.items())
        return f"ModuleView({type(self.module).__name__}{', ' * bool(shapes)}{shapes})"

    def _hold(self, module: nn.Module, named_tensors: Mapping[str, Tensor]) -> None:
        self.__dict__.update(module=module, named_tensors=dict(named_tensors))

    def _call_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(lambda module: getattr(module, name)(*args, **kwargs))

    def _evaluate(self, access: Callable[[nn.Module], Any]) -> Any:
        """`access(module)`, computed while the view's tensors stand in the places of the parameters."""
        inside = {f"module.{slot}": tensor for slot, tensor in self._tensor_of_each_slot().items()}
        with fsdp.uncalled(self.module):
            return self._viewed(functional_call(_Access(self.module, access), inside, (), tie_weights=False))

    def _tensor_of_each_parameter(self) -> dict[nn.Parameter, Tensor]:
        """A parameter that goes by several names (tied weights) is meant by any of them."""
        return {
            parameter: self.named_tensors[name]
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if name in self.named_tensors
        }

    def _tensor_of_each_slot(self) -> dict[str, Tensor]:
        """Every place in which a layer holds one of the parameters, once, even if the layer goes by several names.

        (`functional_call` would tie weights itself. But it fills the slots of a layer with two names twice, and then
        leaves the module with the second filling.)
        """
        tensors = self._tensor_of_each_parameter()
        return {
            f"{path}.{name}" if path else name: tensors[parameter]
            for path, layer in self.module.named_modules()
            for name, parameter in layer._parameters.items()
            if parameter is not None and parameter in tensors
        }

    def _viewed(self, value: Any) -> Any:
        """The value with the view's tensors for parameters, and views for modules that share them."""
        tensors = self._tensor_of_each_parameter()

        def viewed(value: Any) -> Any:
            if isinstance(value, nn.Parameter):
                return tensors.get(value, value)
            if isinstance(value, nn.Module):
                return _view(value, {n: tensors[p] for n, p in value.named_parameters() if p in tensors})
            if isinstance(value, _Iterated):
                return iter([viewed(each) for each in value.items])
            if type(value) in (list, tuple):
                return type(value)(viewed(each) for each in value)
            if type(value) is dict:
                return {key: viewed(each) for key, each in value.items()}
            return value

        return viewed(value)


class _Access(nn.Module):
    """A module whose forward pass reads another module; `functional_call` reaches forward passes only."""

    def __init__(self, module: nn.Module, access: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.module = module
        self.access = access

    def forward(self) -> Any:
        result = self.access(self.module)
        if isinstance(result, Iterator):  # lazy: it would read the module's own parameters later
            return _Iterated(list(result))
        return list(result) if isinstance(result, KeysView | ValuesView | ItemsView) else result


@dataclass
class _Iterated:
    """What an iterator gave."""

    items: list[Any]


def _view(module: nn.Module, named_tensors: Mapping[str, Tensor]) -> ModuleView:
    view = ModuleView.__new__(ModuleView)
    view._hold(module, named_tensors)
    return view


def _flatten_view(view: ModuleView) -> tuple[tuple[Tensor, ...], tuple[nn.Module, tuple[str, ...]], tuple[str, ...]]:
    names = tuple(view.named_tensors)
    return tuple(view.named_tensors.values()), (view.module, names), names


def _unflatten_view(metadata: tuple[nn.Module, tuple[str, ...]], tensors: Any) -> ModuleView:
    module, names = metadata
    return _view(module, dict(zip(names, tensors, strict=True)))


optree.register_pytree_node(
    ModuleView,  # pyright: ignore[reportArgumentType]  (optree's types ask for a Collection)
    _flatten_view,  # pyright: ignore[reportArgumentType]
    _unflatten_view,  # pyright: ignore[reportArgumentType]
    path_entry_type=optree.MappingEntry,  # in errors: params['0.weight']
    namespace=NAMESPACE,
)


def as_tree(value: Tree) -> Tree:
    """The value with every `nn.Module` in it replaced by a `ModuleView` of its parameters.

    >>> as_tree({"net": nn.Linear(2, 1, bias=False), "lr": 0.1})
    {'net': ModuleView(Linear, weight: (1, 2)), 'lr': 0.1}
    """
    return optree.tree_map(
        lambda leaf: ModuleView(leaf) if isinstance(leaf, nn.Module) else leaf, value, namespace=NAMESPACE
    )


def as_plain_tree(tree: Tree) -> Tree:
    """The tree with every `ModuleView` replaced by a dict from parameter name to tensor.

    An `OrderedDict`, because the leaves of a plain one are sorted by name, and would not come in the view's order.
    """
    return optree.tree_map(
        lambda leaf: OrderedDict(leaf.named_tensors) if isinstance(leaf, ModuleView) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, ModuleView),
        namespace=NAMESPACE,
    )


def modules_in(tree: Tree) -> list[nn.Module]:
    """The modules behind the views in a tree."""
    return [view.module for view in views_in(tree)]


def views_in(tree: Tree) -> list[ModuleView]:
    """The views in a tree."""
    found: list[ModuleView] = []

    def note(node: Any) -> bool:
        if isinstance(node, ModuleView):
            found.append(node)
        return False

    optree.tree_leaves(tree, is_leaf=note, namespace=NAMESPACE)
    return found


@contextmanager
def standing_in(*places: Tree) -> Iterator[None]:
    """Inside, the tensors of every view stand in the places of its module's parameters, also between calls.

    Activation checkpointing computes layers again in the backward pass, when a view's own call is over.
    """
    with ExitStack() as stack:
        for view in views_in(places):
            stack.enter_context(_reparametrize_module(view.module, view._tensor_of_each_slot()))
        yield


def refuse_running_statistics(module: nn.Module, name: str) -> None:
    """Raise when a layer would update buffers in place while it is differentiated."""
    for path, layer in module.named_modules():
        if layer.training and getattr(layer, "running_mean", None) is not None:
            raise ValueError(
                f"layer {path!r} of {name} is a {type(layer).__name__} that updates running statistics in place, which "
                "no derivative can follow; write torch.func.replace_all_batch_norm_modules_(model) to normalise with "
                "the batch alone, build it with track_running_stats=False, or put that layer in eval mode"
            )


@contextmanager
def left_as_they_were(*places: Tree) -> Iterator[None]:
    """Inside, the modules behind views may be switched with `train()` and `eval()`; on leaving, they are switched back.

    Steps are computed more than once, in any order, so nothing that a loss does to its modules may reach beyond it.
    A buffer that was changed in place cannot be put back when it took part in a derivative; that is an error, and so is
    one that was replaced, since a module that remembers means it to last.
    """
    layers = [layer for place in places for module in modules_in(place) for layer in module.modules()]
    modes = [(layer, layer.training) for layer in layers]
    versions = [
        (layer, name, buffer, buffer._version)
        for layer in layers
        for name, buffer in layer.named_buffers(recurse=False)
        if not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for layer, training in modes:
            if layer.training != training:
                layer.training = training
        replaced = [(layer, name) for layer, name, buffer, _ in versions if layer._buffers.get(name) is not buffer]
        for layer, name, buffer, _ in versions:
            layer._buffers[name] = buffer
    changed = [(layer, name, " in place") for layer, name, buffer, version in versions if buffer._version != version]
    for layer, name, how in [*changed, *((layer, name, "") for layer, name in replaced)]:
        raise ValueError(
            f"{type(layer).__name__} changed its buffer {name!r}{how} while a loss was computed, so a step "
            "computed again would give something else; put that layer in eval mode, or take one without such memory"
        )


@contextmanager
def convertible() -> Iterator[None]:
    """Inside, `module.to(device)` and `.double()` exchange parameters, since transforms forbid setting their data."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def written_back(tree: Tree) -> Tree:
    """Copy the tensors of every view into its module; the tree with the modules themselves in place of the views."""

    def write(node: Any) -> Any:
        if not isinstance(node, ModuleView):
            return node
        parameters = dict(node.module.named_parameters())
        with torch.no_grad():
            for name, tensor in node.named_tensors.items():
                parameters[name].copy_(tensor)
        return node.module

    return optree.tree_map(write, tree, is_leaf=lambda node: isinstance(node, ModuleView), namespace=NAMESPACE)
