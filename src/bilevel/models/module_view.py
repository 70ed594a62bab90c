"""A view of an `nn.Module`: a tree of tensors that can be called like the module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import optree
from torch import Tensor, nn

from bilevel.models import fsdp
from bilevel.models.buffers import Writes
from bilevel.models.locks import held, locked
from bilevel.models.places import Cell, Layout, standing
from bilevel.models.sharing import presented
from bilevel.trees import NAMESPACE, Tree


class ModuleView:
    """A module whose parameters are held outside of it: a tree of tensors, used like the module itself.

    Losses receive a view wherever the user passed an `nn.Module`. Calls `view(x)`, submodules `view.encoder(x)` and
    `view.layers[0](x)`, methods, properties, and iterators such as `view.parameters()` are computed with
    `named_tensors`. Other attributes, such as `view.config`, are the module's own.

    Parameters with `requires_grad=False` are not part of the tree. They stay in the module as constants. Buffers that
    the module updates, such as running statistics, are part of the inner state, and the view of a final state computes
    with them. `net.load_state_dict(estimate.state.params.state_dict())` copies parameters and buffers into a module.

    The view of a final state has training modes of its own: `estimate.state.params.eval()` leaves the module as it is,
    so that the next inner loop trains in the modes in which the module was handed over. Inside a loss, `eval()` and
    `train()` act until the end of that loss.

    Several threads may use one module. Each waits until the losses of the others are computed.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> view = ModuleView(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> view(torch.tensor([3.0, 4.0]))
    tensor([7.])
    """

    module: nn.Module
    named_tensors: dict[str, Tensor]

    def __init__(self, module: nn.Module, named_tensors: Mapping[str, Tensor] | None = None) -> None:
        with locked(module):
            fsdp.reshard(module)
            if named_tensors is None:
                named_tensors = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
            known = [name for name, _ in module.named_parameters(remove_duplicate=False)]
            for name in named_tensors:
                if name not in known:
                    raise ValueError(f"{type(module).__name__} has no parameter {name!r}; it has: {', '.join(known)}")
            self._hold(Layout.of(module, named_tensors), named_tensors, {}, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._layout.sharded:
            fsdp.reshard(self.module)  # a loss may also have called the module itself
            tensors = {parameter: self.named_tensors[name] for parameter, name in self._layout.names.items()}
            return fsdp.call(self.module, tensors, args, kwargs)
        with self.standing_in():
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in self.__dict__:
            raise AttributeError(name)
        if name == "training" and self._modes is not None:
            return self._modes[self.module]
        on_class = inspect.getattr_static(type(self.module), name, None)
        if isinstance(on_class, functools.cached_property):  # not cached, because the cache would outlive these tensors
            return self._evaluate(on_class.func)
        if isinstance(on_class, property):
            return self._evaluate(lambda module: getattr(module, name))
        with held([self._layout.lock]):
            value = getattr(self.module, name)
        if inspect.ismethod(value) and value.__self__ is self.module:
            return functools.partial(self._call_method, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return self._evaluate(lambda module: getattr(module, name))
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

    def standing_in(self) -> AbstractContextManager[Any]:
        """Context in which the module holds the view's tensors in place of its own."""
        there = standing(self._layout, self.named_tensors, self._cells)
        if self._modes is None:
            return there
        stack = ExitStack()
        if any(cell.value.requires_grad for cell in self._cells.values()):
            stack.enter_context(Writes(self._cells.values()))
        stack.enter_context(there)
        stack.enter_context(_own_modes(self._modes))
        return stack

    def _hold(
        self,
        layout: Layout,
        named_tensors: Mapping[str, Tensor],
        cells: Mapping[str, Cell],
        modes: dict[nn.Module, bool] | None,
    ) -> None:
        self.__dict__.update(
            module=layout.module,
            named_tensors=dict(named_tensors),
            _layout=layout,
            _cells=dict(cells),
            _modes=modes,
        )

    def _call_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(lambda module: getattr(module, name)(*args, **kwargs))

    def _evaluate(self, access: Callable[[nn.Module], Any]) -> Any:
        """Compute `access(module)` while the module holds the view's tensors in place of its own."""
        with fsdp.uncalled(self.module), self.standing_in():
            result = access(self.module)
            if isinstance(result, Iterator):  # an iterator would read the module's own tensors later
                result = _Iterated(list(result))
            elif isinstance(result, KeysView | ValuesView | ItemsView):
                result = list(result)
        return self._viewed(result)

    def _viewed(self, value: Any) -> Any:
        """Replace parameters in a value by the view's tensors, and modules that share parameters by views."""
        names, tensors = self._layout.names, self.named_tensors

        def viewed(value: Any) -> Any:
            if isinstance(value, nn.Parameter):
                return tensors[names[value]] if value in names else value
            if isinstance(value, nn.Module):
                layout = self._layout.of_layer(value)
                return view_of(layout, self._layout.renamed(tensors, layout), self._cells, self._modes)
            if isinstance(value, _Iterated):
                return iter([viewed(each) for each in value.items])
            if type(value) in (list, tuple):
                return type(value)(viewed(each) for each in value)
            if type(value) is dict:
                return {key: viewed(each) for key, each in value.items()}
            return value

        return viewed(value)


@dataclass
class _Iterated:
    """The items of an iterator."""

    items: list[Any]


def view_of(
    layout: Layout,
    named_tensors: Mapping[str, Tensor],
    cells: Mapping[str, Cell],
    modes: dict[nn.Module, bool] | None = None,
) -> ModuleView:
    """Return a view with a layout that is already known.

    With `modes`, from `modes_of`, it is a view that users keep and call outside of losses. `eval()` and `train()` then
    change the view's own modes and leave the module as it is, since the next inner loop trains in the module's modes.
    Running statistics with a derivative are updated as in a loss, since PyTorch's own kernels do not take them.
    """
    view = ModuleView.__new__(ModuleView)
    view._hold(layout, named_tensors, cells, modes)
    return view


def modes_of(module: nn.Module) -> dict[nn.Module, bool]:
    """Return whether each layer of a module is in training mode."""
    return {layer: layer.training for layer in module.modules()}


@contextmanager
def _own_modes(modes: dict[nn.Module, bool]) -> Iterator[None]:
    """Context in which layers have these modes. Changes are written into `modes`, and the layers' own are restored."""
    before = {layer: layer.training for layer in modes}
    for layer, training in modes.items():
        layer.training = training
    try:
        yield
    finally:
        for layer, training in before.items():
            modes[layer] = layer.training
            layer.training = training


def _flatten_view(view: ModuleView) -> tuple[tuple[Tensor, ...], tuple[Layout, tuple[str, ...]], tuple[str, ...]]:
    names = tuple(view.named_tensors)
    return tuple(view.named_tensors.values()), (view._layout, names), names


def _unflatten_view(metadata: tuple[Layout, tuple[str, ...]], tensors: Any) -> ModuleView:
    layout, names = metadata
    return view_of(layout, dict(zip(names, tensors, strict=True)), {})


optree.register_pytree_node(
    ModuleView,  # pyright: ignore[reportArgumentType]  (optree's types ask for a Collection)
    _flatten_view,  # pyright: ignore[reportArgumentType]
    _unflatten_view,  # pyright: ignore[reportArgumentType]
    path_entry_type=optree.MappingEntry,  # in errors: params['0.weight']
    namespace=NAMESPACE,
)


def is_view(node: Any) -> bool:
    """Whether a node of a tree is a view."""
    return isinstance(node, ModuleView)


def views_in(tree: Tree) -> list[ModuleView]:
    """Return the views in a tree."""
    if type(tree) is ModuleView:
        return [tree]
    if isinstance(tree, Tensor):
        return []
    if type(tree) is tuple or type(tree) is list:
        return [view for part in tree for view in views_in(part)]
    found: list[ModuleView] = []

    def note(node: Any) -> bool:
        if isinstance(node, ModuleView):
            found.append(node)
        elif not isinstance(node, Tensor) and (inside := presented(node)) is not node:
            found.extend(views_in(inside))
        return False

    optree.tree_leaves(tree, is_leaf=note, namespace=NAMESPACE)
    return found


def modules_in(tree: Tree) -> list[nn.Module]:
    """Return the modules behind the views in a tree."""
    return [view.module for view in views_in(tree)]
