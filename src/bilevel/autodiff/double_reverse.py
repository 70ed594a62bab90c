"""Tangents computed by reverse mode only, as the transpose of a transposed Jacobian product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel import trees
from bilevel.autodiff.forward_mode import Pushed
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.autodiff.reverse_mode import many_products
from bilevel.autodiff.substitution import Memory, run_user_code
from bilevel.trees import Tree


def push_by_double_reverse(
    function: Callable[..., Tree],
    arguments: Sequence[Tree],
    tangents: Sequence[Sequence[Tensor]],
    memory: Memory | None = None,
) -> Pushed:
    """Compute the result of `push_forward` for operations with two backward passes and no forward-mode derivative.

    With the Jacobian J of the function at x, the product uᵀ J is linear in u, so its transposed derivative with respect
    to u, applied to a tangent v, is J v. One backward pass with a graph gives the product for an arbitrary u, and one
    backward pass through that graph gives J v for each direction.

    The cost is one evaluation and one backward pass with their graphs, and one backward pass for each of k directions.

    Reference: Townsend, "A new trick for calculating Jacobian vector products", 2017.

    >>> pushed = push_by_double_reverse(lambda x: x**2, [torch.tensor(3.0)], [[torch.tensor([1.0, 10.0])]])
    >>> pushed.value, pushed.tangents
    (tensor(9.), [tensor([ 6., 60.])])
    """
    memory = Memory() if memory is None else memory
    parts = [trees.split(argument) for argument in arguments]
    inputs = [[t.detach().requires_grad_() for t in part.differentiable] for part in parts]
    count = len(tangents[0][0])
    without = torch.autograd.graph.disable_saved_tensors_hooks("saved tensor hooks are used")
    with torch.enable_grad(), named_missing_derivatives(), without:
        output = run_user_code(
            lambda: function(*(part.rebuild(ts) for part, ts in zip(parts, inputs, strict=True))), memory
        )
        outputs = trees.split(output).differentiable
        recorded = [i for i, t in enumerate(outputs) if t.requires_grad]
        pushed = [t.new_zeros(count, *t.shape) for t in outputs]
        cotangents = [torch.zeros_like(outputs[i], requires_grad=True) for i in recorded]
        flat = [t for group in inputs for t in group]
        directions = [v for group in tangents for v in group]
        products = (
            torch.autograd.grad([outputs[i] for i in recorded], flat, cotangents, create_graph=True, allow_unused=True)
            if recorded
            else []
        )
        pairs = [(p, v) for p, v in zip(products, directions, strict=False) if p is not None and p.requires_grad]
        if pairs:
            found = many_products([p for p, _ in pairs], cotangents, [v for _, v in pairs], memory)
            for i, tangent in zip(recorded, found, strict=True):
                if tangent is not None:
                    pushed[i] = tangent.detach()
    return Pushed(trees.detach(output), pushed)
