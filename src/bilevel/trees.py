"""Trees of tensors: nested dicts, lists, tuples and named tuples whose leaves are tensors (flattened by `optree`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

Tree: TypeAlias = Any
"""Any nesting of containers around tensors. A single tensor is a tree too."""

NAMESPACE = "bilevel"


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves of a tree, and the spec from which `unflatten` rebuilds the tree."""
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(spec: optree.PyTreeSpec, leaves: Sequence[Any]) -> Tree:
    """Return the tree with this spec and these leaves."""
    return optree.tree_unflatten(spec, leaves)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree, in the order of `flatten`."""
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def map_leaves(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Return the tree with `function` applied to every leaf.

    With further trees in `rest`, the function also receives their leaves at the same places.
    """
    return optree.tree_map(function, tree, *rest, namespace=NAMESPACE)


def named_leaves(tree: Tree, name: str) -> list[tuple[str, Any]]:
    """Return pairs of the expression for a leaf and the leaf, such as `("meta['lr']", tensor)`.

    >>> named_leaves({"lr": 1.0, "layers": [2.0]}, "meta")
    [("meta['layers'][0]", 2.0), ("meta['lr']", 1.0)]
    """
    accessors, values, _ = optree.tree_flatten_with_accessor(tree, namespace=NAMESPACE)
    return [(accessor.codify(name), value) for accessor, value in zip(accessors, values, strict=True)]


def leaves_with_paths(tree: Tree) -> list[tuple[tuple[Any, ...], Any]]:
    """Leaves with the keys and numbers that lead to each of them.

    >>> leaves_with_paths({"lr": 1.0, "layers": [2.0]})
    [(('layers', 0), 2.0), (('lr',), 1.0)]
    """
    paths, values, _ = optree.tree_flatten_with_path(tree, namespace=NAMESPACE)
    return list(zip(paths, values, strict=True))


def is_differentiable(leaf: Any) -> bool:
    """Whether derivatives with respect to this leaf exist, which holds for floating-point and complex tensors."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


@dataclass(frozen=True)
class Split:
    """A tree separated into differentiable tensors, other tensors, and all other leaves (numbers, strings)."""

    differentiable: list[Tensor]
    other: list[Tensor]
    _spec: optree.PyTreeSpec
    rest: tuple[Any, ...]
    """Numbers, strings and all other leaves that are not tensors."""
    _kinds: str

    def without_differentiable(self) -> Split:
        """Return a copy without the differentiable tensors, which are then not kept in memory.

        `rebuild` receives these tensors as an argument in any case.
        """
        return replace(self, differentiable=[])

    def rebuild(self, differentiable: Sequence[Tensor], other: Sequence[Tensor] | None = None) -> Tree:
        """Return the tree with other tensors in place of its own.

        Args:
            differentiable: the new differentiable tensors, in the order of `Split.differentiable`.
            other: the other tensors, in the order of `Split.other`; the old ones by default.
        """
        if not (self.other or self.rest):
            return unflatten(self._spec, differentiable)
        sources = {
            "d": iter(differentiable),
            "o": iter(self.other if other is None else other),
            "r": iter(self.rest),
        }
        return unflatten(self._spec, [next(sources[kind]) for kind in self._kinds])


def split(tree: Tree) -> Split:
    """Separate the leaves of a tree by kind. `Split.rebuild` is the inverse.

    >>> parts = split({"weights": torch.ones(2), "steps": 3, "labels": torch.tensor([1])})
    >>> parts.differentiable, parts.other
    ([tensor([1., 1.])], [tensor([1])])
    >>> parts.rebuild([torch.zeros(2)])
    {'weights': tensor([0., 0.]), 'steps': 3, 'labels': tensor([1])}
    """
    values, spec = flatten(tree)
    kinds = "".join(["d" if is_differentiable(v) else "o" if isinstance(v, Tensor) else "r" for v in values])
    if kinds.count("d") == len(kinds):
        return Split(values, [], spec, (), kinds)
    by_kind: dict[str, list[Any]] = {"d": [], "o": [], "r": []}
    for kind, value in zip(kinds, values, strict=True):
        by_kind[kind].append(value)
    return Split(by_kind["d"], by_kind["o"], spec, tuple(by_kind["r"]), kinds)


def detach(tree: Tree) -> Tree:
    """Return the tree with every tensor detached from the autograd graph. Nothing is copied."""
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def size(tree: Tree) -> int:
    """Return the total number of elements of all tensors of the tree."""
    return sum(leaf.numel() for leaf in leaves(tree) if isinstance(leaf, Tensor))


def summary(tree: Tree) -> str:
    """Describe the tensors of a tree in a few words.

    >>> summary(torch.zeros(2, 3)), summary({"a": torch.zeros(2), "b": torch.zeros(3), "name": "c"})
    ('tensor of shape (2, 3)', '2 tensors with 5 numbers')
    """
    tensors = [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]
    if len(tensors) == 1:
        return f"tensor of shape {tuple(tensors[0].shape)}"
    return f"{len(tensors)} tensors with {sum(t.numel() for t in tensors):,} numbers"


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context manager (and decorator) for the library's own sums, which autocast would round to 3 digits.

    The user's losses and steps are called outside of it, so their autocast is not affected.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Compute the real inner product of two lists of tensors with equal shapes. For complex tensors it is Re Σ āb.

    >>> dot([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
    tensor(11.)
    >>> dot([torch.tensor([1 + 2j])], [torch.tensor([1 + 2j])])
    tensor(5.)
    """
    return torch.stack([whole(_product(a, b).sum()) for a, b in zip(left, right, strict=True)]).sum()


@without_autocast()
def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Compute the real inner products `[k]` of a list of tensors with each of k lists.

    Args:
        left: the list of tensors.
        right: the k lists, stacked to `[k, *leaf.shape]` for each tensor of `left`.

    >>> dots([torch.tensor([1.0, 2.0])], [torch.tensor([[3.0, 4.0], [0.0, 1.0]])])
    tensor([11.,  2.])
    """
    products = []
    for a, b in zip(left, right, strict=True):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(b.device, dtype), b.to(dtype)
        if b.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        products.append(b.reshape(len(b), -1) @ a.reshape(-1))
    return functools.reduce(torch.add, products)


def _product(a: Tensor, b: Tensor) -> Tensor:
    a, b = _wide(a), _wide(b)
    return (a.conj() * b).real if a.is_complex() or b.is_complex() else a * b


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor, in float32 if it has half precision, because in float16 the square of 256 is infinite."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor with all numbers of a `DTensor`, which is spread over processes.

    Any other tensor is returned itself.
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """Return the part of a `DTensor` that this process holds. Any other tensor is returned itself."""
    shard = getattr(tensor, "to_local", None)
    return tensor if shard is None else shard()


def is_spread(leaf: Any) -> bool:
    """Whether a leaf is a `DTensor`, which is spread over processes."""
    return isinstance(leaf, Tensor) and hasattr(leaf, "to_local")


def holders(leaf: Any) -> list[int]:
    """Return the ranks of the processes over which a leaf is spread; an empty list if it is whole."""
    return leaf.device_mesh.mesh.flatten().tolist() if is_spread(leaf) else []


def spread_like(shard: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is spread over processes in the same way as `like`. This is the inverse of `local`."""
    if not is_spread(like):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the squared Euclidean norm of a list of tensors."""
    return dot(tensors, tensors)


def all_finite(tree: Tree) -> bool:
    """Whether no differentiable leaf contains NaN or infinity. It waits once for each device, however many leaves."""
    tensors = [leaf for leaf in leaves(tree) if is_differentiable(leaf)]
    if all(leaf.device.type == "cpu" and type(leaf) in (Tensor, torch.nn.Parameter) for leaf in tensors):
        # NaN and infinity make a sum NaN or infinite. So does overflow, and then each number is looked at.
        tensors = [leaf for leaf in tensors if leaf.is_complex() or not math.isfinite(leaf.detach().sum().item())]
    flags: dict[torch.device, list[Tensor]] = {}
    for leaf in tensors:
        flag = whole(torch.isfinite(leaf).all())
        flags.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(each).all()) for each in flags.values())
