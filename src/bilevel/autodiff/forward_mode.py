"""Forward mode: the value of a function of trees and its derivatives along k directions, in one pass.

Directions and tangents carry a leading axis of length k: `[k, *leaf.shape]` for every leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import trees
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.trees import Tree


class Pushed(NamedTuple):
    """A function's value and its directional derivatives along k directions."""

    value: Tree
    tangents: list[Tensor]
    """One for each differentiable leaf of `value`, `[k, *leaf.shape]`."""


def push_forward(
    function: Callable[..., Tree], arguments: Sequence[Tree], tangents: Sequence[Sequence[Tensor]]
) -> Pushed:
    """`function(*arguments)` and its derivative along k directions at once, in forward mode.

    The value is computed once, whatever k: the cost is that of one evaluation and k tangents. `tangents` holds, for
    every argument, a list with one `[k, *leaf.shape]` tensor for each differentiable leaf. Inside, random draws are
    the same for all directions, and `torch.no_grad()` stops derivatives as it does in reverse mode.

    >>> pushed = push_forward(lambda x: x**2, [torch.tensor(3.0)], [[torch.tensor([1.0, 10.0])]])
    >>> pushed.value, pushed.tangents
    (tensor(9.), [tensor([ 6., 60.])])
    """
    parts = [trees.split(argument) for argument in arguments]
    primals = tuple(tuple(part.differentiable) for part in parts)
    directions = tuple(tuple(tangent) for tangent in tangents)
    result: list[trees.Split] = []

    def flat(*inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        output = function(*(part.rebuild(tensors) for part, tensors in zip(parts, inputs, strict=True)))
        result[:] = [trees.split(output)]
        # A fresh tensor for each: an output that *is* an input would leave with the input's own tangent.
        return tuple(t.view_as(t) for t in result[0].differentiable), tuple(result[0].other)

    def one_direction(*direction: Sequence[Tensor]) -> Any:
        return torch.func.jvp(flat, primals, direction, has_aux=True)

    count = directions[0][0].shape[0]
    with named_missing_derivatives(count), torch.enable_grad(), _NoGradStopsTangents():
        if count == 1:
            value, tangent, other = one_direction(*(tuple(t[0] for t in group) for group in directions))
            tangent = [t.unsqueeze(0) for t in tangent]
        else:
            batched = torch.vmap(one_direction, out_dims=(None, 0, None), randomness="same")  # pyright: ignore[reportArgumentType]
            value, tangent, other = batched(*directions)
    value, other, tangent = ([t.detach() for t in tensors] for tensors in (value, other, tangent))
    return Pushed(result[0].rebuild(value, other), tangent)


class _NoGradStopsTangents(TorchFunctionMode):
    """PyTorch has a switch for either mode of differentiation, and `torch.no_grad()` throws that of reverse mode alone.

    A user who computes targets or weights under `no_grad` means them to be constants. Inside, they are; entered with
    gradients enabled.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])  # pyright: ignore[reportAttributeAccessIssue]
        return result
