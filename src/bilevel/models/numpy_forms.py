"""Meta parameters as NumPy arrays and plain numbers: tensors inside, and the user's own form on the way out."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from bilevel import trees
from bilevel.models.sharing import presented
from bilevel.trees import NAMESPACE, Tree


def as_tensors(meta: Tree) -> Tree:
    """Return the tree with tensors in place of floating-point NumPy arrays and plain numbers.

    An array keeps its dtype, and a Python number gets PyTorch's default dtype. Arrays are copied.

    >>> as_tensors({"rates": np.array([0.1, 0.2]), "decay": 0.5})
    {'rates': tensor([0.1000, 0.2000], dtype=torch.float64), 'decay': tensor(0.5000)}
    """
    if not _any_number(meta):
        return meta
    return trees.map_leaves(lambda leaf: torch.tensor(leaf) if _is_number(leaf) else leaf, meta)


def in_form_of(meta: Tree, tree: Tree) -> Tree:
    """Return a tree of tensors with NumPy arrays and plain numbers where `meta` has them.

    >>> in_form_of({"rates": np.array([0.1, 0.2]), "decay": 0.5}, {"rates": torch.zeros(2), "decay": torch.tensor(2.0)})
    {'rates': array([0., 0.], dtype=float32), 'decay': 2.0}
    """
    if not _any_number(meta):
        return tree
    return optree.tree_map(_in_form, meta, presented(tree), namespace=NAMESPACE)


def _in_form(form: Any, value: Any) -> Any:
    if not (_is_number(form) and isinstance(value, Tensor)):
        return value
    array = value.detach().cpu().numpy().copy()
    return array if isinstance(form, np.ndarray) else array[()] if isinstance(form, np.floating) else float(array)


def _any_number(tree: Tree) -> bool:
    return any(_is_number(leaf) for leaf in trees.leaves(tree))


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind == "f" and leaf.dtype.itemsize <= 8
    return isinstance(leaf, float | np.floating)  # np.float64 is a float as well
