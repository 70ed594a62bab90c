"""Trees in which a tensor has several places, or a place has a tensor that is not trained.

A parameter is a tensor and not a place: a weight that two modules of a tree share, or that stands twice in a tree, is
one parameter, with one derivative. And a parameter with `requires_grad=False` is a constant. A `Shared` is such a tree:
to everybody who flattens it, it has each parameter once and no constants; `presented` is the tree as the user wrote it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
from torch import Tensor, nn

from bilevel import trees
from bilevel.trees import NAMESPACE, Tree


@dataclass(frozen=True, eq=False)
class Sources:
    """Where the leaves of a tree come from: the number of a tensor, or a constant."""

    spec: optree.PyTreeSpec
    numbers: tuple[int | None, ...]
    """For each leaf of the presented tree the number of its tensor, `None` for a constant."""
    constants: tuple[Any, ...]
    """For each leaf of the presented tree the constant, or `None`."""
    names: tuple[str, ...]
    """The path of each tensor's first place."""
    hooked: tuple[tuple[int, nn.Parameter], ...] = ()
    """The numbers of the tensors on whose parameters hooks are registered."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources) and (self.spec, self.numbers) == (other.spec, other.numbers)

    def __hash__(self) -> int:
        return hash((self.spec, self.numbers))


@dataclass(frozen=True)
class Shared:
    """A tree whose leaves are the parameters of another one, each of them once."""

    tensors: tuple[Tensor, ...]
    sources: Sources

    @property
    def tree(self) -> Tree:
        """The tree as the user wrote it."""
        sources = self.sources
        leaves = [
            constant if number is None else self.tensors[number]
            for number, constant in zip(sources.numbers, sources.constants, strict=True)
        ]
        return trees.unflatten(sources.spec, leaves)


def _flatten_shared(shared: Shared) -> tuple[tuple[Tensor, ...], Sources, tuple[str, ...]]:
    return shared.tensors, shared.sources, shared.sources.names


def _unflatten_shared(sources: Sources, tensors: Any) -> Shared:
    return Shared(tuple(tensors), sources)


optree.register_pytree_node(
    Shared,  # pyright: ignore[reportArgumentType]  (optree's types ask for a Collection)
    _flatten_shared,  # pyright: ignore[reportArgumentType]
    _unflatten_shared,  # pyright: ignore[reportArgumentType]
    path_entry_type=optree.MappingEntry,
    namespace=NAMESPACE,
)


def presented(tree: Tree) -> Tree:
    """The tree as the user wrote it: shared tensors in all their places, and the constants."""
    return tree.tree if type(tree) is Shared else tree


def leaves_once(tree: Tree, like: Tree) -> list[Any]:
    """The leaves of a tree as users see it, one for each parameter of `like`, the same tree with parameters once."""
    leaves = trees.leaves(tree)
    if type(like) is not Shared:
        return leaves
    return [leaves[like.sources.numbers.index(number)] for number in range(len(like.tensors))]


def is_frozen(leaf: Any) -> bool:
    """Whether the user said that a tensor is not trained: an `nn.Parameter` with `requires_grad=False`, or an
    `nn.Buffer`. A plain tensor says nothing, since it has `requires_grad=False` by default.
    """
    return (isinstance(leaf, nn.Parameter) and not leaf.requires_grad) or isinstance(leaf, nn.Buffer)


def shared(
    tree: Tree,
    identities: Sequence[Hashable],
    constant: Sequence[bool],
    hooked: Mapping[Hashable, nn.Parameter],
) -> Tree:
    """The tree itself if all its leaves are different parameters without hooks, else a `Shared`.

    Args:
        tree: with views in place of modules.
        identities: one for each leaf; equal ones mark the places of one tensor.
        constant: one for each leaf.
        hooked: the parameters with hooks, by identity.
    """
    if len(set(identities)) == len(identities) and not any(constant) and not hooked:
        return tree
    leaves, spec = trees.flatten(tree)
    paths = [".".join(str(entry) for entry in path) for path in optree.tree_paths(tree, namespace=NAMESPACE)]
    numbers: list[int | None] = []
    first: dict[Hashable, int] = {}
    tensors: list[Any] = []
    names: list[str] = []
    for leaf, identity, fixed, path in zip(leaves, identities, constant, paths, strict=True):
        if fixed:
            numbers.append(None)
            continue
        if identity not in first:
            first[identity] = len(tensors)
            tensors.append(leaf)
            names.append(path)
        numbers.append(first[identity])
    constants = tuple(leaf if fixed else None for leaf, fixed in zip(leaves, constant, strict=True))
    places = tuple((first[identity], parameter) for identity, parameter in hooked.items())
    return Shared(tuple(tensors), Sources(spec, tuple(numbers), constants, tuple(names), places))
