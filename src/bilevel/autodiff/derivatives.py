"""Derivatives of functions from trees to trees: tangents pushed forward, cotangents pulled back, Jacobian products.

Directions and tangents of k at once carry a leading axis of length k: `[k, *leaf.shape]` for every leaf.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.autograd_function import custom_function_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from bilevel import trees
from bilevel.errors import MissingDerivativeError
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


@contextmanager
def differentiable_kernels(modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Inside, PyTorch takes kernels that have forward-mode and second derivatives, where it has a choice.

    Fused attention and the fused transformer layer have neither; nor have the fused recurrent kernels (oneDNN on
    CPU, cuDNN on GPU), which are switched off only if one of the modules is recurrent, because convolutions share the
    switch. On leaving, everything is as before.
    """
    fast_transformer = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(layer, nn.RNNBase) for module in modules for layer in module.modules()):
            # Their own context managers would also set, and warn about, precisions that do not matter here.
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_transformer)
        yield


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


class RefuseOnceDifferentiable(TorchFunctionMode):
    """Inside, a custom `autograd.Function` whose backward is marked `@once_differentiable` is refused.

    PyTorch should raise when such a function is differentiated twice, which hypergradients need. But where the gradient
    that comes in is a constant, and inside of function transforms, it drops the second derivative without a word.
    The search costs some time, so it is made at one inner step of many.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found: Iterator[type[torch.autograd.Function]] = iter(())
        if func is custom_function_call:
            found = iter([args[0]])
        elif func is torch.autograd.grad:
            outputs = [args[0]] if isinstance(args[0], Tensor) else args[0]
            inputs = [args[1]] if isinstance(args[1], Tensor) else args[1]
            found = _custom_functions_between(outputs, inputs)
        for function in found:
            if getattr(function.backward, "__code__", None) is _MARKED:
                raise MissingDerivativeError(
                    f"the custom autograd.Function {function.__name__!r} is marked @once_differentiable, and "
                    "hypergradients need the derivative of the inner gradient too; write its backward in "
                    "differentiable operations, without the mark, or take ZerothOrder(...)"
                )
        return func(*args, **(kwargs or {}))


_MARKED = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def _custom_functions_between(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Iterator[type[torch.autograd.Function]]:
    """The custom functions in the graph that leads from inputs to outputs."""
    seen = {None, *(t.grad_fn for t in inputs)}
    nodes = [t.grad_fn for t in outputs]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        assert node is not None
        if hasattr(node, "_forward_cls"):
            yield node._forward_cls  # pyright: ignore[reportAttributeAccessIssue]
        nodes += [following for following, _ in node.next_functions]


@contextmanager
def named_missing_derivatives(directions: int = 1) -> Iterator[None]:
    """Turn PyTorch's reports of derivatives it does not have into one kind of error that says what to do instead.

    `directions` is the number carried at once: from two on it is done by `torch.vmap`, which has its own gaps.
    """
    try:
        yield
    except MissingDerivativeError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        if found := re.search(r"in-place operation \(aten::(\w+).*captured Tensor", str(error)):
            raise ValueError(
                f"a loss or step changes a tensor from outside in place ({found[1]}), so a step computed again would "
                "give something else; write the new value into a tensor of its own, or, if it is the buffer of a "
                "layer, put that layer in eval mode"
            ) from error
        advice = _advice(error, directions)
        if advice is None:
            raise
        raise MissingDerivativeError(advice) from error


_FORWARD_MODE = (
    "which Forward, ForwardGradient and forward-over-reverse products need; take Reverse() or ZerothOrder(...)"
)


def _advice(error: Exception, directions: int) -> str | None:
    message, version = str(error), f"torch {torch.__version__}"
    function = _custom_function(error)
    lacks_jvp = function is not None and function.jvp is torch.autograd.Function.jvp
    if "saved tensor hooks" in message:
        return (
            "activation checkpointing (torch.utils.checkpoint, gradient_checkpointing_enable) computes layers again in "
            "the backward pass, and that can't be differentiated; switch it off (Reverse('sqrt') and ForwardGradient "
            "keep the activations of one inner step alone), wrap layers in bilevel.Recomputed(layer) to keep less, or "
            "take ForwardGradient(..., tangents='difference') or ZerothOrder(...)"
        )
    if found := re.search(r"forward AD with (\w+)", message):
        return (
            f"the operation {found[1]!r} has no forward-mode derivative in {version}, {_FORWARD_MODE}, or write that "
            "operation in terms of others"
        )
    if found := re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", message):
        return (
            f"the operation {found[1]!r} has no derivative in {version}, and hypergradients need that of the inner "
            "gradient too; take ZerothOrder(...), or write the operation in terms of others"
        )
    if function is not None and "setup_context" in message:
        return (
            f"the custom autograd.Function {function.__name__!r} saves for its derivative in forward(ctx, ...), which "
            "function transforms do not take; give it a static method setup_context(ctx, inputs, output), and forward "
            "without ctx"
        )
    if function is not None and lacks_jvp and ("jvp function" in message or "vmap" in message):
        return (
            f"the custom autograd.Function {function.__name__!r} has no forward-mode derivative, {_FORWARD_MODE}, or "
            "give it a static method jvp"
        )
    if directions > 1 and ("vmap" in message or "atching rule not implemented" in message):
        return (
            f"{directions} directions are carried at once by torch.vmap, which does not take this model ({message}); "
            "take them one by one with chunk_size=1"
        )
    return None


def _custom_function(error: Exception) -> type[torch.autograd.Function] | None:
    """The user's `autograd.Function` in which the error came up, if it was in one."""
    apply = inspect.unwrap(torch.autograd.Function.apply).__code__
    inside = [frame.f_locals["cls"] for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is apply]
    return inside[-1] if inside else None
