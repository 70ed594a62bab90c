"""Copies of what a user handed over, as they would train it without this library: modules stay modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bilevel import trees
from bilevel.models import fsdp
from bilevel.models.parameter_hooks import has_hooks
from bilevel.models.refusals import unwrapped
from bilevel.models.sharing import is_frozen
from bilevel.trees import NAMESPACE, Tree


class NoPlainLoopError(Exception):
    """There is no plain PyTorch loop for this problem; the message says why."""


Slot = tuple[dict[str, Any], str]
"""A dictionary of a layer and a key in it."""


@dataclass
class PlainCopy:
    """A deep copy of a user's tree, and the tensors in it that the library has as leaves, in the library's order."""

    value: Tree
    """The tree in the user's own form."""
    names: list[str]
    tensors: list[Tensor]
    originals: list[int]
    """The identities of the tensors that were copied."""
    slots: Mapping[str, Slot]
    """The places of all tensors in the layers of modules, by the names that an inner state gives them."""
    modes: list[tuple[nn.Module, bool]] = field(default_factory=list)
    """The layers, and whether each was in training mode."""

    def set(self, values: Sequence[Tensor]) -> None:
        """Give the tensors other values, in place."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)

    def read(self, name: str) -> Tensor:
        """Return the current value of a buffer, by the name that an inner state gives it."""
        holder, key = self.slots[name]
        return holder[key].detach().clone()

    def write(self, name: str, value: Tensor) -> None:
        """Set a buffer."""
        holder, key = self.slots[name]
        tensor = holder[key]
        if tensor.grad_fn is not None:
            holder[key] = value.clone()
            return
        with torch.no_grad():
            tensor.copy_(value)

    def reset_modes(self) -> None:
        """Switch all layers to the modes that they were copied in."""
        for layer, training in self.modes:
            layer.training = training


def plain_copy(tree: Tree, trained: bool, dtype: torch.dtype | None = None, hooks: bool = True) -> PlainCopy:
    """Return a deep copy of a tree with modules and tensors.

    Args:
        tree: in the user's own form.
        trained: whether an inner loop trains it; its trained tensors then require gradients.
        dtype: a dtype into which its floating-point tensors are cast; `None` to leave them.
        hooks: whether the hooks of parameters are registered at the copies too.

    Raises:
        NoPlainLoopError: something in the tree cannot be copied.
    """
    paths, leaves, spec = optree.tree_flatten_with_path(tree, namespace=NAMESPACE)
    trains = any(isinstance(leaf, nn.Parameter) and leaf.requires_grad for leaf in leaves)
    memo: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in memo:
            memo[id(leaf)] = _copied(leaf, dtype)
    value = []
    for leaf in leaves:
        if isinstance(leaf, nn.Module):
            value.append(_copied_module(unwrapped(leaf), memo, dtype))
        else:
            value.append(memo.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf)
    found = PlainCopy(trees.unflatten(spec, value), [], [], [], {}, [])
    slots: dict[str, Slot] = {}
    known: dict[int, str] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    for path, leaf, copied in zip(paths, leaves, value, strict=True):
        prefix = ".".join(map(str, path))
        if isinstance(leaf, nn.Module):
            module = unwrapped(leaf)
            names = [name for name, p in module.named_parameters() if p.requires_grad]
            own, copies = dict(module.named_parameters()), dict(copied.named_parameters())
            for name in names:
                _add(found, ".".join(part for part in (prefix, name) if part), own[name], copies[name], pairs)
            _note_slots(module, copied, prefix, slots, known)
            found.modes += [(layer, layer.training) for layer in copied.modules()]
        elif trees.is_differentiable(leaf):
            constant = trained and (is_frozen(leaf) or (trains and not leaf.requires_grad))
            if not constant:
                _add(found, prefix or "params", leaf, copied, pairs)
                if trained and not copied.requires_grad:
                    copied.requires_grad_()
    found.slots = slots
    if hooks and trained:
        _register_hooks(pairs)
    return found


def _add(found: PlainCopy, name: str, own: Tensor, copied: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    if id(own) not in found.originals:
        found.names.append(name)
        found.tensors.append(copied)
        found.originals.append(id(own))
        pairs.append((own, copied))


def _copied(leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
    if trees.is_spread(leaf):
        raise NoPlainLoopError("a tensor is spread over several processes")
    plain = leaf.detach().clone()
    plain = plain.to(dtype) if dtype is not None and plain.is_floating_point() else plain
    return nn.Parameter(plain, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else plain


def _copied_module(module: nn.Module, memo: dict[int, Any], dtype: torch.dtype | None) -> nn.Module:
    if fsdp.is_sharded(module):
        raise NoPlainLoopError(f"{type(module).__name__} is sharded over several processes")
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # whatever the user's own __deepcopy__ raises
        raise NoPlainLoopError(f"{type(module).__name__} cannot be deep-copied ({error})") from error
    if dtype is not None:
        try:
            copied.to(dtype)
        except Exception as error:
            raise NoPlainLoopError(f"{type(module).__name__} cannot be cast to {dtype} ({error})") from error
    return copied


def _note_slots(
    module: nn.Module, copied: nn.Module, prefix: str, slots: dict[str, Slot], known: dict[int, str]
) -> None:
    copies = dict(copied.named_modules())
    for path, layer in module.named_modules():
        other = copies[path]
        for holder, there in (
            (layer._buffers, other._buffers),
            (layer._parameters, other._parameters),
            (layer.__dict__, other.__dict__),
        ):
            for key, tensor in holder.items():
                if isinstance(tensor, Tensor) and isinstance(there.get(key), Tensor):
                    name = ".".join(part for part in (prefix, path, key) if part)
                    slots.setdefault(known.setdefault(id(tensor), name), (there, key))


def _register_hooks(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Register the hooks of parameters at their copies. A hook that reads a parameter reads its copy."""
    current = {id(own): copied for own, copied in pairs}

    def moved(hook: Any) -> Any:
        def call(gradient: Tensor) -> Any:
            with _InPlaceOf(current):
                return hook(gradient)

        return call

    for own, copied in pairs:
        if has_hooks(own):
            for hook in list((own._backward_hooks or {}).values()):
                copied.register_hook(moved(hook))


class _InPlaceOf(TorchFunctionMode):
    """Context in which operations meet copies in place of a user's parameters."""

    def __init__(self, copies: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(self._copies.get(id(argument), argument) for argument in args)
        return func(*args, **(kwargs or {}))
