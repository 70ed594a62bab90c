"""Hooks that users registered on parameters (`parameter.register_hook`), applied to inner gradients.

In a backward pass PyTorch calls such a hook with the parameter's gradient, and goes on with what the hook returns. Here
the hooks are part of the optimiser's update, so every method differentiates them like the update itself.
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
    """Whether a parameter's gradient is changed, or looked at, by hooks."""
    return isinstance(parameter, nn.Parameter) and bool(parameter._backward_hooks)


def are_registered(params: Tree) -> bool:
    """Whether a parameter of the tree has hooks."""
    return type(params) is Shared and bool(params.sources.hooked)


def applied(params: Tree, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients after the hooks, in the order in which these were registered.

    `tensors` are the current values of the parameters, which a hook sees in their places. A hook may work in place: it
    is given a copy.

    Raises:
        ValueError: a hook works under `torch.no_grad()` or through `.data`, which hides its derivative, or returns
            something else than a gradient of the parameter's shape.
    """
    if not are_registered(params):
        return list(gradients)
    found = list(gradients)
    hooked = params.sources.hooked
    current = {id(parameter): tensors[number] for number, parameter in hooked}
    for number, parameter in hooked:
        for hook in list((parameter._backward_hooks or {}).values()):
            before = found[number]
            if before is None:  # as in PyTorch: without a gradient, a hook is not called
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
    """Context of a hook: parameters have their current values, and what hides a derivative is refused."""

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
