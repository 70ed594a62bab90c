"""Comparison of two results of one inner step within rounding errors.

The last bits of a recomputed step may differ. PyTorch uses other formulas for some gradients if they will be
differentiated again, and some kernels on a GPU add up in an arbitrary order. With θ the state before the step, θ' its
first result and θ" its second result, the two results agree if

    ‖θ" − θ'‖ ≤ √ε ‖θ' − θ‖ + 4 ε ‖θ'‖,

where ε is the machine epsilon of the state's dtype. The first term allows the update to lose half of its digits by
cancellation inside the loss. The second term is the rounding of the new state itself.

The parameters, and each kind of number that an optimiser keeps (such as all momentum buffers), are compared separately.
Adam divides by the size of the gradient. If a gradient is zero up to rounding, the parameters' updates differ visibly
while the moments agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel import trees
from bilevel.problem import Descent
from bilevel.trees import Tree

_foreach_sub: Any = torch._foreach_sub  # pyright: ignore[reportPrivateImportUsage]
_foreach_norm: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""Integer types by the size, in bytes, of the numbers whose bits are compared as integers."""
_LARGE = 4096
"""The number of entries from which on the bits of a tensor are compared as integers."""
_ROUNDINGS = 4.0
"""The rounding of a state that is accepted, in multiples of its size times the machine epsilon."""


@dataclass(frozen=True)
class Parts:
    """The numbers of a state by kind."""

    of_leaf: list[int]
    """The number of the part of each differentiable leaf; 0 for parameters."""
    epsilons: list[float]
    """The machine epsilon of the coarsest dtype of each part."""


def parts_of(state: Tree) -> Parts:
    """Return the part to which each differentiable leaf of a state belongs."""
    paths, values, _ = optree.tree_flatten_with_path(state, namespace=trees.NAMESPACE)
    numbers: dict[str, int] = {}
    of_leaf, epsilons = [], []
    for path, leaf in zip(paths, values, strict=True):
        if not trees.is_differentiable(leaf):
            continue
        name = ""
        if isinstance(state, Descent):
            words = [str(step) for step in path if not isinstance(step, int)]
            name = "params" if _starts_with(path, "params") else (words[-1] if words else "")
        number = numbers.setdefault(name, len(numbers))
        if number == len(epsilons):
            epsilons.append(0.0)
        of_leaf.append(number)
        epsilons[number] = max(epsilons[number], torch.finfo(leaf.dtype).eps)
    return Parts(of_leaf, epsilons)


def _starts_with(path: tuple[object, ...], field: str) -> bool:
    return bool(path) and path[0] in (field, Descent._fields.index(field))


def same_bits(left: Tree, right: Tree, parameters_alone: bool = False) -> bool:
    """Whether the tensors of two states are equal: all tensors, or only the parameters of a `Descent`.

    On other devices than a CPU this waits for the device, once for each tensor.
    """
    if parameters_alone and isinstance(left, Descent) and isinstance(right, Descent):
        left, right = left.params, right.params
    return all(_same_bits(a, b) for a, b in zip(_tensors(left), _tensors(right), strict=True))


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left is right:
        return True
    if left.numel() >= _LARGE and left.is_contiguous() and right.is_contiguous() and left.shape == right.shape:
        # torch.equal compares integers about twice as fast as floats.
        integers = _INTEGERS[left.itemsize]
        if torch.equal(left.detach().view(-1).view(integers), right.detach().view(-1).view(integers)):
            return True
    return torch.equal(left, right)  # 0 and −0 are equal


def disagreement(parts: Parts, before: Tree, first: Tree, again: Tree) -> Tensor:
    """Return two flags on the states' device: whether any part disagrees, and whether rounding can't be the reason.

    Rounding can be the reason if the parameters disagree, and the optimiser's memory agrees within rounding but not
    exactly. Nothing is read from the device. The cost is four passes over the state.

    Args:
        parts: the parts of the state.
        before: the state before the step.
        first: the first result of the step.
        again: the second result of the step.
    """
    kept, new = _tensors(first), _tensors(again)
    off, moved = _foreach_sub(new, kept), _moved(before, first)
    norms = [_foreach_norm(tensors) for tensors in (off, moved, kept)]
    device = norms[0][0].device
    squares = torch.stack([torch.stack([n.to(device, torch.float64) for n in each]) for each in norms]).square()
    index = torch.tensor(parts.of_leaf, device=device)
    sums = squares.new_zeros(3, len(parts.epsilons)).index_add(1, index, squares).sqrt()
    epsilon = torch.tensor(parts.epsilons, dtype=torch.float64, device=device)
    over = sums[0] > epsilon.sqrt() * sums[1] + _ROUNDINGS * epsilon * sums[2]
    others_agree = (sums[0, 1:] == 0).all()
    return torch.stack([over.any(), over[1:].any() | (over[0] & others_agree)])


def _moved(before: Tree, first: Tree) -> list[Tensor]:
    """Return by how much a step moved each tensor. What an optimiser keeps may begin in that step, at zero."""
    start, kept = _tensors(before), _tensors(first)
    if len(start) != len(kept) and isinstance(before, Descent):
        start = _tensors(before.params)
    count = len(start)
    return [*_foreach_sub(kept[:count], start), *kept[count:]]


def distances(before: Tree, first: Tree, again: Tree) -> tuple[float, float]:
    """Return the distance between the two results, and the distance by which the step moved the state."""
    kept, new = _tensors(first), _tensors(again)
    off = [b.double() - a.double() if not a.is_complex() else b - a for a, b in zip(kept, new, strict=True)]
    return _norm(off), _norm(_moved(before, first))


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(t).double() for t in tensors]).square().sum().sqrt())


def _tensors(state: Tree) -> list[Tensor]:
    return [trees.local(leaf) for leaf in trees.leaves(state) if trees.is_differentiable(leaf)]
