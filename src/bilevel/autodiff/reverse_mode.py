"""Reverse mode: gradients of losses, and products with the transposed Jacobian of a function of trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.autodiff import custom_functions
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.autodiff.substitution import Memory, loss_code, own_gradient, run_user_code
from bilevel.trees import Tree


def gradient(
    loss: Callable[[Sequence[Tensor]], Tensor],
    tensors: Sequence[Tensor],
    differentiable: bool,
    during: Callable[[Sequence[Tensor]], AbstractContextManager[None]] = lambda tensors: nullcontext(),
    memory: Memory | None = None,
) -> list[Tensor | None] | None:
    """Return ∂loss/∂tensors, or `None` if the loss depends on none of them.

    An entry is `None` if the graph of the loss does not contain the tensor, as `.grad` is after `loss.backward()`. A
    tensor that the loss reaches with a derivative of zero has an entry of zeros.

    Under function transforms the gradient is computed inside `torch.func.vjp`. Without function transforms it is
    computed by `torch.autograd.grad`, which costs less, supports more models (activation checkpointing, for example),
    and stores no graph unless one is needed.

    Args:
        loss: the user's loss as a function of the tensors.
        tensors: the point at which the gradient is computed.
        differentiable: whether the gradient will be differentiated again in reverse mode. Under function transforms it
            can always be differentiated.
        during: returns the context of the backward pass, in which activation checkpointing computes layers again.
        memory: the known properties of the operations of the problem to which the loss belongs.

    >>> gradient(lambda x: (x[0] ** 3).sum(), [torch.tensor([1.0, 2.0]), torch.zeros(1)], differentiable=False)
    [tensor([ 3., 12.]), None]
    """
    if torch._C._are_functorch_transforms_active():
        return _gradient_inside_vjp(loss, tensors, memory)
    # These are new tensors. The gradient at a tensor that is also a meta parameter would include the latter's gradient.
    inputs = [t.view_as(t) if differentiable and t.requires_grad else t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        if differentiable:
            with loss_code():
                value = run_user_code(lambda: loss(inputs), memory, history=[t for t in inputs if not t.is_leaf])
            custom_functions.check(value, inputs, lambda: loss(inputs))
        else:
            value = loss(inputs)
    if not value.requires_grad:
        return None
    with during(inputs):
        found = torch.autograd.grad(value, inputs, create_graph=differentiable, allow_unused=True)
    if all(g is None for g in found):
        return None
    if differentiable and not all(t.requires_grad for t in tensors):
        found = _recorded_alone(found, [t for t in inputs if t.is_leaf])
    return list(found)


def _gradient_inside_vjp(
    loss: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor], memory: Memory | None
) -> list[Tensor | None] | None:
    """Compute the result of `gradient` under function transforms.

    `torch.func.grad` would return zeros for a tensor that the loss does not reach. `torch.func.vjp` adds the same level
    of differentiation. Its own backward pass is never run, because the backward pass inside replaces it.
    """
    reached: list[bool] = []

    def differentiated(*tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        reached.clear()
        with loss_code():
            value = run_user_code(lambda: loss(tensors), memory, forward_mode=True)
        if not value.requires_grad:
            return value, ()
        # With a graph, the transforms around this one can record the backward pass.
        found = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        reached.extend(g is not None for g in found)
        return value, tuple(g for g in found if g is not None)

    with own_gradient():
        _, _, found = torch.func.vjp(differentiated, *tensors, has_aux=True)  # pyright: ignore[reportAssignmentType]
    if not found:
        return None
    remaining = iter(found)
    return [next(remaining) if connected else None for connected in reached]


def _recorded_alone(results: Sequence[Tensor | None], fresh: Sequence[Tensor]) -> list[Tensor | None]:
    """Detach the results that depend on no recording tensors other than `fresh`, which are used nowhere else."""
    ours = {id(t) for t in fresh}
    reaches: dict[Any, bool] = {None: False}

    def reaches_others(result: Tensor) -> bool:
        nodes, seen = [result.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node in seen or reaches.get(node) is False:
                continue
            seen.add(node)
            assert node is not None
            variable = getattr(node, "variable", None)
            if reaches.get(node) or (variable is not None and id(variable) not in ours):
                reaches[result.grad_fn] = True
                return True
            nodes += [following for following, _ in node.next_functions]
        reaches.update(dict.fromkeys(seen, False))
        return False

    return [t if t is None or reaches_others(t) else t.detach() for t in results]


class Transpose:
    """The transposed Jacobian of a function at a point, which can be applied to many cotangents.

    The function is evaluated once, and its graph is kept. Each product is one backward pass through that graph. The
    Jacobian of the gradient of a scalar is a Hessian. It is symmetric, and the products are then Hessian-vector
    products.

    >>> cube = Transpose(lambda x, y: x**3 + y, [torch.tensor(2.0), torch.tensor(1.0)])
    >>> cube.value, cube([torch.tensor(1.0)]), cube([torch.tensor(2.0)], of=[0])
    (tensor(9.), [[tensor(12.)], [tensor(1.)]], [[tensor(24.)]])
    """

    def __init__(self, function: Callable[..., Tree], arguments: Sequence[Tree], memory: Memory | None = None) -> None:
        self._memory = Memory() if memory is None else memory
        parts = [trees.split(argument) for argument in arguments]
        self._inputs = [[t.detach().requires_grad_() for t in part.differentiable] for part in parts]
        # Activation checkpointing would compute layers again when the graph is used, with other parameters in them.
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
        """Compute cotangentᵀ · ∂value/∂argument.

        Args:
            cotangents: one tensor for each differentiable leaf of the value. `None` counts as zero.
            of: the numbers of the arguments; by default all.
            keep: whether the graph is kept for further products.

        Returns:
            For each argument, a list with one tensor for each leaf. `None` marks a leaf on which the value does not
            depend.
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
        """Compute the products for k cotangents at once.

        The graph is kept.

        Args:
            cotangents: `[k, *leaf.shape]` for each differentiable leaf of the value.
            of: the numbers of the arguments.

        Returns:
            For each argument, a list with `[k, *leaf.shape]` for each leaf; zeros where the value does not depend on
            it.
        """
        count = len(cotangents[0])
        return [
            [t.new_zeros(count, *t.shape) if g is None else g for g, t in zip(found, self._inputs[i], strict=True)]
            for found, i in zip(self.many_or_none(cotangents, of), of, strict=True)
        ]

    def many_or_none(
        self, cotangents: Sequence[Tensor], of: Sequence[int] | None = None, at_once: int | None = None
    ) -> list[list[Tensor | None]]:
        """Return the same for k cotangents, `[k, *leaf.shape]` each, `at_once` of them at a time. The graph stays.

        `None` in the result marks a leaf that the value does not depend on.
        """
        groups = [self._inputs[i] for i in (range(len(self._inputs)) if of is None else of)]
        wanted = [t for group in groups for t in group]
        pairs = [(o, c) for o, c in zip(self._outputs, cotangents, strict=True) if o.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            outputs, weights = zip(*pairs, strict=True)
            found = many_products(outputs, wanted, weights, self._memory, at_once)
        remaining = iter(g if g is None else g.detach() for g in found)
        return [[next(remaining) for _ in group] for group in groups]


def many_products(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    memory: Memory,
    at_once: int | None = None,
) -> list[Tensor | None]:
    """Compute weightᵀ · ∂outputs/∂inputs for k weights.

    The graph is kept. All k products, or `at_once` of them at a time, are computed in one backward pass by
    `torch.vmap`, or one by one if an operation does not support it.

    Args:
        outputs: the results of a computation with a graph.
        inputs: tensors of that graph.
        weights: `[k, *output.shape]` for each output.
        at_once: how many weights share a backward pass; `None` for all.
        memory: the known properties of the operations of the problem. It records whether `torch.vmap` failed.

    Returns:
        `[k, *input.shape]` for each input, or `None` if the outputs do not depend on it.
    """
    count = len(weights[0])
    if at_once is not None and at_once < count:
        starts = range(0, count, at_once)
        parts = [many_products(outputs, inputs, [w[i : i + at_once] for w in weights], memory) for i in starts]
        return [None if each[0] is None else torch.cat(list(each)) for each in zip(*parts, strict=True)]  # type: ignore[arg-type]

    def one(i: int) -> Sequence[Tensor | None]:
        return torch.autograd.grad(outputs, inputs, [w[i] for w in weights], retain_graph=True, allow_unused=True)

    with named_missing_derivatives():
        if count > 1 and not memory.one_by_one:
            try:
                return list(
                    torch.autograd.grad(
                        outputs, inputs, list(weights), retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError, TypeError, ValueError):  # for an operation without a right batching rule
                one(0)  # raises again unless vmap caused the error
                memory.one_by_one = True
        rows = [one(i) for i in range(count)]
    return [None if row[0] is None else torch.stack(list(row)) for row in zip(*rows, strict=True)]  # type: ignore[arg-type]


def pull_back_many(
    function: Callable[..., Tree],
    arguments: Sequence[Tree],
    cotangents: Sequence[Tensor] | None = None,
    memory: Memory | None = None,
    at_once: int | None = None,
) -> tuple[Tree, list[list[Tensor | None]]]:
    """Return `function(*arguments)`, and for every argument k cotangentsᵀ · Jacobian, `[k, *leaf.shape]` for each leaf.

    The function is evaluated once. Its graph serves all cotangents, in one backward pass for every `at_once` of them.

    Args:
        function: a function from trees to a tree.
        arguments: the trees at which it is evaluated.
        cotangents: `[k, *leaf.shape]` for each differentiable leaf of the value. Without them the value must be a
            vector `[k]`, and the gradients of its entries are taken.
        memory: what is known about the problem that the function belongs to.
        at_once: how many cotangents share a backward pass; `None` for all.

    >>> pull_back_many(lambda x: x**2, [torch.tensor([2.0, 3.0])])
    (tensor([4., 9.]), [[tensor([[4., 0.],
            [0., 6.]])]])
    """
    transpose = Transpose(function, arguments, memory)
    if cotangents is None:
        cotangents = [torch.eye(len(transpose.value)).to(transpose.value)]
    return transpose.value, transpose.many_or_none(cotangents, at_once=at_once)


def pull_back(
    function: Callable[..., Tree], arguments: Sequence[Tree], cotangents: Sequence[Tensor | None] | None = None
) -> tuple[Tree, list[list[Tensor | None]]]:
    """Compute `function(*arguments)`, and cotangentᵀ · Jacobian for every argument, in reverse mode.

    The graph is freed.

    Args:
        function: a function from trees to a tree.
        arguments: the trees at which it is evaluated.
        cotangents: one tensor for each differentiable leaf of the value. By default the value must be a scalar, and its
            gradient is computed.

    Returns:
        The value and the products, in the form of the result of `Transpose`.

    >>> pull_back(lambda x, y: 3 * x, [torch.tensor(2.0), torch.tensor(5.0)])
    (tensor(6.), [[tensor(3.)], [None]])
    """
    transpose = Transpose(function, arguments)
    if cotangents is None:
        cotangents = [torch.ones_like(transpose.value)]
    return transpose.value, transpose(cotangents, keep=False)


def fill_zeros(tensors: Sequence[Tensor | None], tree: Tree, count: int | None = None) -> list[Tensor]:
    """Replace `None` by zeros of the right shape. There is one entry for each differentiable leaf of the tree.

    With a count the tensors have a leading axis, `[count, *leaf.shape]`, and so have the zeros.
    """
    filled = zeros_where_none(tensors, trees.split(tree).differentiable)
    return [
        z if t is not None or count is None else z.expand(count, *z.shape) for t, z in zip(tensors, filled, strict=True)
    ]


def zeros_where_none(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Replace `None` by zeros with the shape, dtype and device of the entry of `like`.

    >>> zeros_where_none([None, torch.ones(1)], [torch.ones(2), torch.ones(1)])
    [tensor([0., 0.]), tensor([1.])]
    """
    return [torch.zeros_like(t) if g is None else g for g, t in zip(tensors, like, strict=True)]


def placed_where_reached(
    tensors: Sequence[Tensor | None], gradient: Sequence[Tensor | None], like: Sequence[Tensor]
) -> list[Tensor]:
    """Put each tensor in the place of the corresponding entry of a gradient that is not `None`, and zeros elsewhere.

    >>> placed_where_reached([torch.ones(1)], [None, torch.ones(1)], [torch.ones(2), torch.ones(1)])
    [tensor([0., 0.]), tensor([1.])]
    """
    remaining = iter(tensors)
    return zeros_where_none([None if g is None else next(remaining) for g in gradient], like)


def start_graph(tree: Tree) -> Tree:
    """Return the same values in new tensors that record the operations on them."""
    return trees.map_leaves(
        lambda leaf: leaf.detach().requires_grad_() if trees.is_differentiable(leaf) else leaf, tree
    )


def has_graph(tree: Tree) -> bool:
    """Return whether any tensor of the tree was computed from recording tensors, even if its derivatives are zero.

    >>> phi = start_graph(torch.tensor(-1.0))
    >>> has_graph(phi.relu()), has_graph(phi.detach())
    (True, False)
    """
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in trees.leaves(tree))
