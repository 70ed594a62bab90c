"""The outer loss of an estimate as one term of anybody's loss.

An estimate computes ∇h without a graph from the meta parameters to the outer loss. The value of an `Estimate` is the
output of one `torch.autograd.Function` of the meta tensors, whose backward pass multiplies the estimated gradient by
the cotangent. An optimiser, a trainer or a network that computes the meta parameters then needs no other call than
`value.backward()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import MissingDerivativeError


def differentiable_value(value: Tensor, gradients: Sequence[Tensor], meta: Sequence[Tensor]) -> Tensor:
    """Return the value with a graph whose backward pass gives cotangent · gradient to each meta tensor.

    Args:
        value: the outer loss, a scalar or a vector `[m]`, without a graph.
        gradients: for each meta tensor the derivative of the value, `[*value.shape, *tensor.shape]`, without a graph.
        meta: the tensors that the user passed, each of them once.

    Returns:
        The value. It has no graph if no meta tensor requires gradients, or under `torch.no_grad()`.

    >>> phi = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> value = differentiable_value(torch.tensor(5.0), [torch.tensor([3.0, 4.0])], [phi])
    >>> (2 * value).backward()
    >>> phi.grad
    tensor([6., 8.])
    """
    value = value.detach()
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in meta):
        return value
    return _Value.apply(value, len(gradients), *(g.detach() for g in gradients), *meta)  # pyright: ignore[reportReturnType]


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, count: int, *tensors: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        _, count, *tensors = inputs
        ctx.save_for_backward(*tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        refuse_graph_of_backward("the value of an estimate", "estimate")
        (cotangent,) = cotangents
        gradients: Sequence[Tensor] = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 + len(gradients) :]
        found = [
            _product(cotangent, gradient) if needed else None
            for gradient, needed in zip(gradients, wanted, strict=True)
        ]
        return None, None, *[None] * len(gradients), *found


def refuse_graph_of_backward(what: str, source: str) -> None:
    """Raise in a backward pass that is itself recorded, as `create_graph=True` asks.

    Raises:
        MissingDerivativeError: the derivative of the gradient was asked for.
    """
    if torch.is_grad_enabled():
        raise MissingDerivativeError(
            f"backward(create_graph=True) through {what}: the {source} gives a gradient, and the derivative of that "
            "gradient is not known. Call backward() or torch.autograd.grad() without create_graph=True; for a loss "
            "that needs second derivatives of other terms, take the gradients of those terms by a call of their own"
        )


def _product(cotangent: Tensor, gradient: Tensor) -> Tensor:
    """Return Σ_i cotangent_i · gradient_i, in the dtype and on the device of the gradient."""
    cotangent = cotangent.to(device=gradient.device, dtype=gradient.dtype)
    return cotangent * gradient if cotangent.ndim == 0 else torch.tensordot(cotangent, gradient, cotangent.ndim)
