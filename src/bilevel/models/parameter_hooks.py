"""Hooks that users registered on parameters (`parameter.register_hook`), applied to inner gradients.

In a backward pass PyTorch calls such a hook with the parameter's gradient, and replaces the gradient by the tensor that
the hook returns. In this library the hooks are part of the optimiser's update, and every method differentiates them
together with the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bilevel.models.sharing import Shared
from bilevel.trees import Tree


def has_hooks(parameter: Any) -> bool:
    """Whether hooks are registered that change or read a parameter's gradient."""
    return isinstance(parameter, nn.Parameter) and bool(parameter._backward_hooks)


def are_registered(params: Tree) -> bool:
    """Whether a parameter of the tree has hooks."""
    return type(params) is Shared and bool(params.sources.hooked)


def applied(params: Tree, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Apply the hooks to the gradients, in the order in which the hooks were registered.

    A hook may write in place into the gradient that it receives, which is a copy.

    Args:
        params: the tree of parameters.
        tensors: the current values of the parameters. A hook that reads a parameter reads its current value.
        gradients: the gradient of each parameter, or `None`, for which no hook is called.

    Returns:
        The gradient of each parameter after its hooks.

    Raises:
        ValueError: a hook works under `torch.no_grad()` or through `.data`, which hides its derivative, or does not
            return a gradient of the parameter's shape and dtype.
    """
    if not are_registered(params):
        return list(gradients)
    found = list(gradients)
    hooked = params.sources.hooked
    current = {id(parameter): tensors[number] for number, parameter in hooked}
    for number, parameter in hooked:
        for hook in list((parameter._backward_hooks or {}).values()):
            before = found[number]
            if before is None:  # PyTorch does not call a hook without a gradient either
                break
            gradient = before.clone()
            with _Watched(params.sources.names[number], current):
                result = hook(gradient)
            found[number] = _checked(params.sources.names[number], gradient, result)
    return found


def _checked(name: str, gradient: Tensor, result: Any) -> Tensor:
    if result is None:
        return gradient
    if not isinstance(result, Tensor) or result.shape != gradient.shape or result.dtype != gradient.dtype:
        what = f"{tuple(result.shape)}, {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"a hook on parameter {name!r} returned {what} for a gradient of {tuple(gradient.shape)}, "
            f"{gradient.dtype}; a hook must return a gradient of the same shape and dtype, or None"
        )
    return result


class _Watched(TorchFunctionMode):
    """Context of a hook, in which parameters have their current values and operations that hide a derivative raise."""

    def __init__(self, name: str, current: dict[int, Tensor]) -> None:
        super().__init__()
        self._name, self._current = name, current

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        no_grad = func is torch._C._set_grad_enabled and not args[0]
        if no_grad or func in _DATA:
            how = "under torch.no_grad()" if no_grad else "through .data"
            raise ValueError(
                f"a hook on parameter {self._name!r} works {how}, so the derivative of what it does to the gradient is "
                "lost; write it in differentiable operations, such as lambda grad: grad * mask (or call .detach() on "
                "what is meant to be a constant)"
            )
        args = tuple(self._current.get(id(argument), argument) for argument in args)
        return func(*args, **(kwargs or {}))


_DATA = (Tensor.data.__get__, Tensor.data.__set__)  # pyright: ignore[reportAttributeAccessIssue]
