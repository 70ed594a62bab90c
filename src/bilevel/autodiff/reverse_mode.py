"""Reverse mode: gradients of losses, and the transposed Jacobian of a function of trees, kept as a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bilevel import trees
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.trees import Tree


def gradient(
    loss: Callable[[Sequence[Tensor]], Tensor],
    tensors: Sequence[Tensor],
    differentiable: bool,
    during: Callable[[Sequence[Tensor]], AbstractContextManager[None]] = lambda tensors: nullcontext(),
) -> list[Tensor] | None:
    """∂loss/∂tensors, to be differentiated again in forward mode, or in reverse mode if `differentiable`; `None` if the
    loss depends on none of them.

    Under function transforms `torch.func.grad` is needed; outside of them `torch.autograd.grad` costs less, takes more
    models (activation checkpointing, for one), and keeps no graph where nobody wants one. But it can't tell a result
    that depends on what was recorded from one that depends on the tensors alone, if these were not recorded.

    `during` gives the context of the backward pass, in which activation checkpointing computes layers again.

    >>> gradient(lambda x: (x[0] ** 3).sum(), [torch.tensor([1.0, 2.0])], differentiable=False)
    [tensor([ 3., 12.])]
    """
    recorded = all(t.requires_grad for t in tensors)
    if torch._C._are_functorch_transforms_active() or (differentiable and not recorded):
        connected = []

        def noted(tensors: Sequence[Tensor]) -> Tensor:
            value = loss(tensors)
            connected.append(value.requires_grad)
            return value

        found = torch.func.grad(noted)(tuple(tensors))
        return list(found) if connected[0] else None
    # Fresh tensors: one that also is a meta parameter would bring the gradient with respect to that along.
    inputs = [t.view_as(t) if differentiable else t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        value = loss(inputs)
    if not value.requires_grad:
        return None
    with during(inputs):
        found = torch.autograd.grad(value, inputs, create_graph=differentiable, allow_unused=True)
    if all(g is None for g in found):
        return None
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


class Transpose:
    """The transposed Jacobian of a function at a point, ready to be applied to many cotangents.

    The function is evaluated once, keeping its graph; each product is one backward pass through it. For the gradient
    of a scalar the Jacobian is a Hessian, which is symmetric, so these are Hessian-vector products as well.

    >>> cube = Transpose(lambda x, y: x**3 + y, [torch.tensor(2.0), torch.tensor(1.0)])
    >>> cube.value, cube([torch.tensor(1.0)]), cube([torch.tensor(2.0)], of=[0])
    (tensor(9.), [[tensor(12.)], [tensor(1.)]], [[tensor(24.)]])
    """

    def __init__(self, function: Callable[..., Tree], arguments: Sequence[Tree]) -> None:
        parts = [trees.split(argument) for argument in arguments]
        self._inputs = [[t.detach().requires_grad_() for t in part.differentiable] for part in parts]
        # Activation checkpointing would compute layers again when the graph is used, with others' parameters in them.
        without = torch.autograd.graph.disable_saved_tensors_hooks("saved tensor hooks are used")
        with torch.enable_grad(), named_missing_derivatives(), without:
            output = function(*(part.rebuild(ts) for part, ts in zip(parts, self._inputs, strict=True)))
        self._outputs = trees.split(output).differentiable
        self.value: Tree = trees.detach(output)
        self.connected = any(t.requires_grad for t in self._outputs)
        """Whether the value depends on the arguments at all."""

    def __call__(
        self, cotangents: Sequence[Tensor | None], of: Sequence[int] | None = None, keep: bool = True
    ) -> list[list[Tensor | None]]:
        """cotangentᵀ · ∂value/∂argument, a list of leaves for each argument (for those numbered in `of`).

        `None` as a cotangent counts as zero; `None` in the result marks a leaf that the value does not depend on.
        With `keep=False` the graph is freed.
        """
        groups = [self._inputs[i] for i in (range(len(self._inputs)) if of is None else of)]
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(self._outputs, cotangents, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        wanted = [t for group in groups for t in group]
        if not (pairs and wanted):
            return [[None for _ in group] for group in groups]
        outputs, weights = zip(*pairs, strict=True)
        with named_missing_derivatives():
            found = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, retain_graph=keep))
        return [[next(found) for _ in group] for group in groups]

    def many(self, cotangents: Sequence[Tensor], of: Sequence[int]) -> list[list[Tensor]]:
        """The same for k cotangents at once, `[k, *leaf.shape]` each; the graph stays, and zeros are filled in."""
        groups = [self._inputs[i] for i in of]
        wanted = [t for group in groups for t in group]
        count = len(cotangents[0])
        pairs = [(o, c) for o, c in zip(self._outputs, cotangents, strict=True) if o.requires_grad]
        found: list[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            outputs, weights = zip(*pairs, strict=True)
            single = count == 1
            with named_missing_derivatives(count):
                given = torch.autograd.grad(
                    outputs,
                    wanted,
                    [w[0] if single else w for w in weights],
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=not single,
                )
            found = [None if g is None else g.unsqueeze(0) if single else g for g in given]
        filled = iter(t.new_zeros(count, *t.shape) if g is None else g for g, t in zip(found, wanted, strict=True))
        return [[next(filled).detach() for _ in group] for group in groups]


def pull_back(
    function: Callable[..., Tree], arguments: Sequence[Tree], cotangents: Sequence[Tensor | None] | None = None
) -> tuple[Tree, list[list[Tensor | None]]]:
    """`function(*arguments)`, and for every argument cotangentᵀ · Jacobian, in reverse mode.

    `cotangents` has one entry for each differentiable leaf of the value; left out, the value must be a scalar and its
    gradient is taken. Results as in `Transpose`, whose graph is freed.

    >>> pull_back(lambda x, y: 3 * x, [torch.tensor(2.0), torch.tensor(5.0)])
    (tensor(6.), [[tensor(3.)], [None]])
    """
    transpose = Transpose(function, arguments)
    if cotangents is None:
        cotangents = [torch.ones_like(transpose.value)]
    return transpose.value, transpose(cotangents, keep=False)


def fill_zeros(tensors: Sequence[Tensor | None], tree: Tree) -> list[Tensor]:
    """Zeros of the right shape in place of `None`, for the differentiable leaves of a tree."""
    shapes = trees.split(tree).differentiable
    return [torch.zeros_like(s) if t is None else t for t, s in zip(tensors, shapes, strict=True)]


def start_graph(tree: Tree) -> Tree:
    """The same values in tensors that record what is computed from them."""
    return trees.map_leaves(
        lambda leaf: leaf.detach().requires_grad_() if trees.is_differentiable(leaf) else leaf, tree
    )


def has_graph(tree: Tree) -> bool:
    """Whether any tensor of the tree was computed from tensors that record, through whatever derivatives, even zeros.

    >>> phi = start_graph(torch.tensor(-1.0))
    >>> has_graph(phi.relu()), has_graph(phi.detach())
    (True, False)
    """
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in trees.leaves(tree))
