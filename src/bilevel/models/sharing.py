"""Trees in which a tensor has several places, or a place has a tensor that is not trained.

A parameter is a tensor and not a place. A weight that two modules of a tree share, or that occurs twice in a tree, is
one parameter with one derivative. A parameter with `requires_grad=False` is a constant. A `Shared` represents such a
tree. When it is flattened, it has each parameter once and no constants. `presented` returns the tree as the user wrote
it.
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
    """The origin of each leaf of a tree: the number of a tensor, or a constant."""

    spec: optree.PyTreeSpec
    numbers: tuple[int | None, ...]
    """The number of the tensor at each leaf of the presented tree; `None` for a constant."""
    constants: tuple[Any, ...]
    """The constant at each leaf of the presented tree; `None` for a tensor that is trained."""
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
    """A tree whose leaves are the parameters of another tree, each of them once."""

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
    """Return the tree as the user wrote it, with shared tensors in all their places and with the constants."""
    return tree.tree if type(tree) is Shared else tree


def leaves_once(tree: Tree, like: Tree) -> list[Any]:
    """Return one leaf for each parameter of `like`, from a tree in the form in which users see it.

    Args:
        tree: a tree with the structure that users see, in which a shared parameter has several leaves.
        like: the tree in which each parameter occurs once.
    """
    leaves = trees.leaves(tree)
    if type(like) is not Shared:
        return leaves
    return [leaves[like.sources.numbers.index(number)] for number in range(len(like.tensors))]


def is_frozen(leaf: Any) -> bool:
    """Whether the user marked a tensor as not trained.

    Such a tensor is an `nn.Parameter` with `requires_grad=False`, or an `nn.Buffer`. A plain tensor is not marked,
    because it has `requires_grad=False` by default.
    """
    return (isinstance(leaf, nn.Parameter) and not leaf.requires_grad) or isinstance(leaf, nn.Buffer)


def shared(
    tree: Tree,
    identities: Sequence[Hashable],
    constant: Sequence[bool],
    hooked: Mapping[Hashable, nn.Parameter],
) -> Tree:
    """Return the tree itself if all its leaves are different parameters without hooks, else a `Shared`.

    Args:
        tree: the tree, with views in place of modules.
        identities: an identity for each leaf. Leaves with equal identities are places of one tensor.
        constant: whether each leaf is a constant.
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
