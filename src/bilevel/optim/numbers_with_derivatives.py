"""Python numbers that keep a reference to the tensor they were taken from.

`tensor.item()` returns a number, and PyTorch accepts only numbers in many places (`add_(x, alpha=…)`). A `TensorNumber`
is such a number. Arithmetic with a `TensorNumber` returns a `TensorNumber` whose tensor is computed by the same
operation. `DifferentiableStep` can therefore use the tensor in place of the number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TensorNumber(float):
    """A float together with the float64 tensor without dimensions whose value it is.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> y = 1 - 2 * TensorNumber(x)
    >>> y, torch.autograd.grad(y.tensor, x)
    (-5.0, (tensor(-2.),))
    """

    tensor: Tensor

    def __new__(cls, tensor: Tensor) -> TensorNumber:
        with torch._C.DisableTorchFunction():
            number = super().__new__(cls, tensor.detach().item())
        number.tensor = tensor.reshape(()).double().clone()  # a view would look like the meta parameter itself
        return number

    def __neg__(self) -> TensorNumber:
        return TensorNumber(-self.tensor)

    def __abs__(self) -> TensorNumber:
        return TensorNumber(self.tensor.abs())


class SettingNumber(TensorNumber):
    """A setting of an optimiser with a derivative. Comparisons treat it as different from 0 even if it is 0.

    Optimisers write `if weight_decay != 0:` to skip work, and the derivative comes from the work that they would skip.
    """

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return float(self) == other and other != 0

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = TensorNumber.__hash__


def tensor_of(value: Any) -> Any:
    """Return the tensor of a `TensorNumber`, and anything else as it is."""
    return value.tensor if isinstance(value, TensorNumber) else value


def _binary(operation: Callable[[Any, Any], Any], swapped: bool) -> Callable[[TensorNumber, Any], Any]:
    def method(self: TensorNumber, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented  # the tensor's own method computes the result
        pair = tensor_of(other), self.tensor
        return TensorNumber(operation(*(pair if swapped else reversed(pair))))

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(TensorNumber, f"__{_name}__", _binary(getattr(operator, _name), swapped=False))
    setattr(TensorNumber, f"__r{_name}__", _binary(getattr(operator, _name), swapped=True))
