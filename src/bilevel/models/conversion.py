"""Conversion between the values that users pass and trees of tensors.

Modules become views. A tensor that occurs in several places becomes one leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bilevel import trees
from bilevel.models import fsdp
from bilevel.models.buffers import cells_of
from bilevel.models.locks import locked
from bilevel.models.module_view import ModuleView, is_view, modes_of, view_of, views_in
from bilevel.models.parameter_hooks import has_hooks
from bilevel.models.places import Cell, Constant, Layout, ModulesInUse, Place
from bilevel.models.recomputed import Recomputed
from bilevel.models.refusals import refuse_unfit, refuse_unfit_tensor, unwrapped
from bilevel.models.sharing import is_frozen, presented, shared
from bilevel.trees import NAMESPACE, Tree

Initial = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Memory:
    """A rule for which tensors of modules are part of the inner state, in addition to the trained parameters."""

    names: frozenset[str] = frozenset()
    """The names of tensors that an inner loss was observed to update, or that depend on meta."""
    of_normalizations: bool = True
    """Whether all running statistics are part of the state. If not, only those of layers in training mode are."""
    everything: bool = False
    """Whether all tensors are part of the state."""

    def includes(self, name: str, layer: nn.Module, key: str) -> bool:
        """Whether the tensor in this place is part of the inner state."""
        if self.everything or name in self.names:
            return True
        statistics = isinstance(layer, _NormBase) and key in ("running_mean", "running_var", "num_batches_tracked")
        return statistics and layer.running_mean is not None and (self.of_normalizations or layer.training)


def as_tree(value: Tree) -> Tree:
    """Return the value with every `nn.Module` in it replaced by a `ModuleView` of its parameters.

    A tensor with several places in the tree is one parameter.

    >>> as_tree({"net": nn.Linear(2, 1, bias=False), "lr": 0.1})
    {'net': ModuleView(Linear, weight: (1, 2)), 'lr': 0.1}
    """
    return _converted(value, None, lambda tensor: tensor, "meta")


def original_tensors(meta: Tree) -> list[Tensor]:
    """Return the tensors of a tree as the user passed them, in the order of the leaves of `as_tree(meta)`.

    A module stands for its parameters that require gradients. A tensor with several places comes once.

    >>> layer = nn.Linear(2, 1)
    >>> [tensor is parameter for tensor, parameter in zip(original_tensors([layer]), layer.parameters())]
    [True, True]
    """
    found: dict[int, Tensor] = {}
    for leaf in trees.leaves(presented(meta)):
        if isinstance(leaf, nn.Module):
            found.update((id(p), p) for p in unwrapped(leaf).parameters() if p.requires_grad)
        elif isinstance(leaf, Tensor):
            found.setdefault(id(leaf), leaf)
    return list(found.values())


def as_params(value: Tree, memory: Memory, initial: Initial = Tensor.detach) -> tuple[Tree, dict[str, Tensor]]:
    """Split the tensors that a user passes as `params` into the trained parameters and the buffers of the inner state.

    A parameter with `requires_grad=False` is a constant. In a tree with an `nn.Parameter` that requires a gradient,
    plain tensors that do not require gradients are constants as well.

    Args:
        value: the tree of modules and tensors.
        memory: the rule for which tensors of modules are buffers of the inner state.
        initial: a function that returns the value from which a parameter or a buffer starts.

    Returns:
        The tree of trained parameters, and the buffers by name.
    """
    tree = _converted(value, memory, initial, "params")
    buffers = {}
    for view in views_in(tree):
        for holder, key, name in view._layout.memory:
            buffers.setdefault(name, initial(holder[key]))
    return tree, buffers


def _converted(value: Tree, memory: Memory | None, initial: Initial, argument: str) -> Tree:
    if type(presented(value)) is not type(value):
        return value
    paths, leaves, spec = optree.tree_flatten_with_path(value, namespace=NAMESPACE)
    trains = memory is not None and any(isinstance(leaf, nn.Parameter) and leaf.requires_grad for leaf in leaves)
    converted: list[Any] = []
    identities: list[Hashable] = []
    constants: list[bool] = []
    hooked: dict[Hashable, nn.Parameter] = {}
    known: dict[int, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, nn.Module):
            module = unwrapped(leaf)
            with locked(module):
                refuse_unfit(module, argument, trained=memory is not None)
                view = _view(module, ".".join(map(str, path)), memory, initial, known)
            converted.append(view)
            parameters = {name: parameter for parameter, name in view._layout.names.items()}
            identities += [id(parameters[name]) for name in view.named_tensors]
            constants += [False] * len(parameters)
            if memory is not None:
                hooked.update({id(p): p for p in parameters.values() if has_hooks(p)})
            continue
        constant = memory is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()
        constant = constant and (is_frozen(leaf) or (trains and not leaf.requires_grad))
        identities.append(id(leaf) if isinstance(leaf, Tensor) else object())
        constants.append(constant)
        if memory is not None and isinstance(leaf, Tensor):
            refuse_unfit_tensor(leaf, argument)
            if has_hooks(leaf) and not constant:
                hooked[id(leaf)] = leaf  # pyright: ignore[reportArgumentType]
            if isinstance(leaf, nn.Parameter) and not constant:
                leaf = initial(leaf)
        converted.append(leaf)
    return shared(trees.unflatten(spec, converted), identities, constants, hooked)


def _view(module: nn.Module, prefix: str, memory: Memory | None, initial: Initial, known: dict[int, str]) -> ModuleView:
    """Return a view of the module. `known` has the names of the inner state's buffers by the `id` of the tensors."""
    fsdp.reshard(module)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    layout = Layout.of(module, trained)
    recomputed = {layer for inside in module.modules() if isinstance(inside, Recomputed) for layer in inside.modules()}
    for path, layer in module.named_modules():
        for holder in (layer._buffers, layer._parameters, layer.__dict__):
            for key, tensor in holder.items():
                if not isinstance(tensor, Tensor) or tensor in layout.names:
                    continue
                name = ".".join(part for part in (prefix, path, key) if part)
                if memory is not None and layer not in recomputed and memory.includes(name, layer, key):
                    layout.memory.append(Place(holder, key, known.setdefault(id(tensor), name)))
                elif holder is layer._buffers and not fsdp.is_sharded(module):
                    copy = tensor.detach().clone()
                    layout.constants.append(Constant(layer, holder, key, copy, copy._version))
                elif holder is layer._parameters and not tensor.is_inference():
                    layout.frozen.append(Constant(layer, holder, key, tensor, tensor._version))
    values = {name: initial(p) if memory is not None else p.detach() for name, p in trained.items()}
    return view_of(layout, values, {})


# -- the trees that losses are called with -----------------------------------------------------------------------------


def with_buffers(
    tree: Tree, buffers: Mapping[str, Tensor] | tuple[()], outside: bool = False
) -> tuple[Tree, dict[str, Cell]]:
    """Return the tree as the user wrote it, with copies of an inner state's buffers in its modules.

    Args:
        tree: the tree of views and tensors.
        buffers: the buffers of an inner state by name.
        outside: whether the views are called outside of losses. They then have training modes of their own.

    Returns:
        The tree, and the cells of the copies by name.
    """
    tree = presented(tree)
    if not buffers and not outside:
        return tree, {}
    cells = cells_of(buffers) if isinstance(buffers, Mapping) else {}

    def completed(node: Any) -> Any:
        if not is_view(node):
            return node
        return view_of(node._layout, node.named_tensors, cells, modes_of(node.module) if outside else None)

    return optree.tree_map(completed, tree, is_leaf=is_view, namespace=NAMESPACE), cells


def standing_in(*places: Tree) -> AbstractContextManager[Any]:
    """Return the context in which the modules of all views hold the views' tensors, also between calls.

    Activation checkpointing computes layers again in the backward pass, after the call of the view has returned.
    """
    views = views_in(places)
    if len(views) == 1:
        return views[0].standing_in()
    return _all_standing(views) if views else nullcontext()


@contextmanager
def _all_standing(views: list[ModuleView]) -> Iterator[None]:
    with ExitStack() as stack:
        for view in views:
            stack.enter_context(view.standing_in())
        yield


def modules_in_use(*places: Tree) -> ModulesInUse:
    """Context of a loss, or of several losses one after the other; see `ModulesInUse`."""
    return ModulesInUse([view._layout for view in views_in(places)])


# -- the way back ------------------------------------------------------------------------------------------------------


def as_plain_tree(tree: Tree) -> Tree:
    """Return the tree as the user wrote it, with a dict from parameter name to tensor in place of every `ModuleView`.

    The dicts are of class `OrderedDict`, which keeps the order of the view. The leaves of a plain dict are sorted by
    name.
    """
    return optree.tree_map(
        lambda leaf: OrderedDict(leaf.named_tensors) if is_view(leaf) else leaf,
        presented(tree),
        is_leaf=is_view,
        namespace=NAMESPACE,
    )


def written_back(tree: Tree) -> Tree:
    """Copy the tensors of every view into its module. Return the tree with modules in place of the views."""

    def write(node: Any) -> Any:
        if not isinstance(node, ModuleView):
            return node
        parameters = dict(node.module.named_parameters())
        with torch.no_grad():
            for name, tensor in node.named_tensors.items():
                parameters[name].copy_(tensor)
        return node.module

    return optree.tree_map(write, presented(tree), is_leaf=is_view, namespace=NAMESPACE)
