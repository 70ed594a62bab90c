"""Find out which tensors of a user's modules an inner loss updates, by computing the loss once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.models.buffers import Writes
from bilevel.models.module_view import is_view, view_of
from bilevel.models.places import Cell
from bilevel.models.sharing import presented
from bilevel.trees import NAMESPACE, Tree


class Discovered:
    """The names of tensors that calls of a problem's functions showed to be part of its inner state."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.complete = False

    def add(self, names: Iterable[str]) -> None:
        """Add names to the known names."""
        self.names |= frozenset(names)


def updated_tensors(params: Tree, tensors: Mapping[str, Tensor], loss: Callable[[Tree], Any]) -> list[str]:
    """Return the names of the tensors of modules that `loss(params)` assigns or writes to.

    Nothing is written into the module's own tensors. Buffers are copied. Frozen parameters are not copied, because they
    may be large. Writes into them are intercepted, except writes through a view of a part of one.
    """
    copied = {name: not isinstance(tensor, nn.Parameter) for name, tensor in tensors.items()}
    before = {name: tensor.detach() for name, tensor in tensors.items()}
    cells = {
        name: Cell(before[name].clone() if copied[name] else before[name].view_as(tensor))
        for name, tensor in tensors.items()
    }
    handed_out = {name: cell.value for name, cell in cells.items()}
    tree = optree.tree_map(
        lambda node: view_of(node._layout, node.named_tensors, cells) if is_view(node) else node,
        presented(params),
        is_leaf=is_view,
        namespace=NAMESPACE,
    )
    with torch.enable_grad(), Writes(cells.values()):
        loss(tree)

    def updated(name: str) -> bool:
        value = cells[name].value
        return value is not handed_out[name] or (copied[name] and not torch.equal(value, before[name]))

    return [name for name in tensors if updated(name)]
