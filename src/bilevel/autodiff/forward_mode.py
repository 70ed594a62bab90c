"""Forward mode: the value of a function of trees and its derivatives along k directions, in one pass.

Directions and tangents have a leading axis of length k: `[k, *leaf.shape]` for every leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import trees
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.autodiff.reverse_mode import start_graph
from bilevel.autodiff.substitution import Memory, run_user_code
from bilevel.randomness import PROCESS_WIDE
from bilevel.trees import Tree


class Pushed(NamedTuple):
    """A function's value and its directional derivatives along k directions."""

    value: Tree
    tangents: list[Tensor]
    """One tensor `[k, *leaf.shape]` for each differentiable leaf of `value`."""


def push_forward(
    function: Callable[..., Tree],
    arguments: Sequence[Tree],
    tangents: Sequence[Sequence[Tensor]],
    memory: Memory | None = None,
) -> Pushed:
    """Return `function(*arguments)` and its derivatives along k directions at once, in forward mode.

    The value is computed once for any k. The cost is that of one evaluation and k tangents. Random numbers in the
    function are the same for all directions. `torch.no_grad()`, `.detach()` and `.data` stop derivatives as in reverse
    mode.

    Args:
        function: a function from trees to a tree.
        arguments: the trees at which it is evaluated.
        tangents: a list for every argument, with one `[k, *leaf.shape]` tensor for each differentiable leaf.
        memory: the known properties of the operations of the problem to which the function belongs.

    Returns:
        The value, and one tangent `[k, *leaf.shape]` for each of its differentiable leaves.

    Raises:
        MissingDerivativeError: an operation has no forward-mode derivative. `bilevel.autodiff.push` then takes another
            route.

    >>> pushed = push_forward(lambda x: x**2, [torch.tensor(3.0)], [[torch.tensor([1.0, 10.0])]])
    >>> pushed.value, pushed.tangents
    (tensor(9.), [tensor([ 6., 60.])])
    """
    parts = [trees.split(argument) for argument in arguments]
    primals = tuple(tuple(map(_with_places, part.differentiable)) for part in parts)
    directions = tuple(tuple(tangent) for tangent in tangents)
    result: list[trees.Split] = []

    def flat(*inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        output = function(*(part.rebuild(tensors) for part, tensors in zip(parts, inputs, strict=True)))
        result[:] = [trees.split(output)]
        # Each output is a new tensor, because an output that is itself an input would keep the tangent of the input.
        return tuple(t.view_as(t) for t in result[0].differentiable), tuple(result[0].other)

    def one_direction(*direction: Sequence[Tensor]) -> Any:
        return torch.func.jvp(flat, primals, direction, has_aux=True)

    count = directions[0][0].shape[0]

    def all_directions() -> Any:
        if count == 1:
            value, tangent, other = one_direction(*(tuple(t[0] for t in group) for group in directions))
            return value, [t.unsqueeze(0) for t in tangent], other
        batched = torch.vmap(one_direction, out_dims=(None, 0, None), randomness="same")  # pyright: ignore[reportArgumentType]
        return batched(*directions)

    with PROCESS_WIDE, named_missing_derivatives(count), torch.enable_grad():
        value, tangent, other = run_user_code(
            all_directions, memory, forward_mode=True, plainly=lambda: function(*map(start_graph, arguments))
        )
    value, other, tangent = ([t.detach() for t in tensors] for tensors in (value, other, tangent))
    return Pushed(result[0].rebuild(value, other), tangent)


def _with_places(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it is expanded: forward mode needs a place in memory for each number."""
    expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if expanded else tensor
