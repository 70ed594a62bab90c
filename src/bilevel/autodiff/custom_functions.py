"""Custom `torch.autograd.Function` classes in a loss: which of them have the derivatives that hypergradients need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch.overrides import TorchFunctionMode

from bilevel.errors import MissingDerivativeError


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
