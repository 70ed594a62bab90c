"""A mode that makes the `step` of an arbitrary optimiser differentiable.

Optimisers update parameters in place, under `torch.no_grad()`, through `.data` or `.detach()`, and by fused and
`_foreach_` operations. Each of these either hides the update from autograd or raises an error. The update itself is a
differentiable function of the parameters, the gradients and the memory. Inside `DifferentiableStep` the same calls
compute the same numbers by operations that autograd and the function transforms can differentiate:

- `torch.no_grad()` and `torch.set_grad_enabled(False)` have no effect. `.data`, `.detach()` and `.detach_()` return the
  tensor itself, so writing into the result writes into the tensor. `parameter.data = x` copies x into the parameter.
- `x.op_(…)` and `op(…, out=x)` compute the result out of place and then copy it into x. Arguments that an operation
  may keep for its derivative are copied first, because a later line may write into them.
- `_foreach_` operations are computed tensor by tensor.
- `.item()` returns a `TensorNumber` if the tensor may have a derivative. Every operation uses the tensor in place of
  the number: `x.add(y, alpha=a)` is computed as x + a·y.
- √x is computed as √max(x, 100·tiny). The derivative of √ at 0 is infinite, and one such entry would make everything
  NaN. In float32 the value differs by at most 1e-18.

The mode does not follow numbers that leave PyTorch through `float(…)`, `.tolist()` or NumPy.
`bilevel.optim.verification` finds steps whose derivative is wrong for that reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from bilevel.optim.numbers_with_derivatives import TensorNumber

_ARITHMETIC = {
    "__neg__": "neg",
    "__abs__": "abs",
    "__matmul__": "matmul",
    **{f"__{r}{name}__": f"{r * (name == 'sub')}{name}" for name in ("add", "sub", "mul", "pow") for r in ("", "r")},
    **dict.fromkeys(("__truediv__", "__rtruediv__", "__div__", "__rdiv__", "divide", "true_divide"), "div"),
}
"""The operation that each method for a Python operator stands for."""
_UNCHANGED = frozenset({"copy_", "zero_", "fill_", "set_", "resize_", "squeeze_", "unsqueeze_", "t_", "transpose_"})
"""In-place operations that save nothing for a derivative."""
_KEEPING_PRECISION = frozenset({"add", "sub", "rsub", "mul", "div", "pow", "rpow", "addcmul", "addcdiv"})
"""Operations in which a float64 number does not change the dtype of the other tensors."""
_FACTOR = {"add": "alpha", "sub": "alpha", "addcmul": "value", "addcdiv": "value"}


class DifferentiableStep(TorchFunctionMode):
    """Context in which in-place updates under `torch.no_grad()` can be differentiated, in reverse and in forward mode.

    Every tensor that the step may write into must be a copy to which there is no other reference.

    >>> x = torch.ones(2, requires_grad=True)
    >>> y = x.clone()
    >>> with DifferentiableStep(), torch.no_grad():
    ...     _ = y.mul_(3.0)
    >>> torch.autograd.grad(y.sum(), x)
    (tensor([3., 3.]),)
    """

    def __init__(self, without_gradient: Collection[Tensor] = ()) -> None:
        """Set up the context.

        Args:
            without_gradient: parameters whose `grad` is `None`. PyTorch would warn when the `grad` of a copy is read.
        """
        super().__init__()
        self._without_gradient = {id(parameter) for parameter in without_gradient}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._C._set_grad_enabled:
            return None
        name, attribute = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if attribute is Tensor.data:
            return args[0] if name == "__get__" else args[0].copy_(args[1])
        if attribute is Tensor.grad and name == "__get__" and id(args[0]) in self._without_gradient:
            return None
        if attribute is Tensor.is_leaf:  # a constructor requires leaves, and copies with a derivative are no leaves
            return True
        if name in ("detach", "detach_", "requires_grad_"):
            return args[0]
        if name in ("__float__", "__int__", "__array__", "numpy", "tolist"):
            return func(args[0].detach(), *args[1:], **kwargs)
        if name == "item" and _may_have_derivative(args[0]):
            return TensorNumber(args[0])
        if name.startswith("_foreach_"):
            return _one_by_one(name.removeprefix("_foreach_"), args, kwargs)
        if name.endswith("_") and not name.endswith("__") and _exists(name[:-1]):
            if name in _UNCHANGED:
                return func(*args, **kwargs)
            function = getattr(Tensor, name[:-1], None) or getattr(torch, name[:-1])
            return _copied_into(args[0], _computed(name[:-1], function, args, kwargs))
        if isinstance(kwargs.get("out"), Tensor):
            target = kwargs.pop("out")
            return _copied_into(target, _computed(name, func, args, kwargs))
        return _computed(name, func, args, kwargs)


def _one_by_one(name: str, args: Any, kwargs: Any) -> list[Tensor] | None:
    """Compute a `_foreach_` operation tensor by tensor. Arguments that are lists hold one value for each tensor."""
    count, in_place, name = len(args[0]), name.endswith("_"), name.removesuffix("_")
    with_factors = name in ("addcmul", "addcdiv")  # these also accept a vector with one factor for each tensor

    def of(i: int, value: Any) -> Any:
        one_each = isinstance(value, list | tuple) or (with_factors and isinstance(value, Tensor) and value.ndim == 1)
        return value[i] if one_each and len(value) == count else value

    found = []
    for i in range(count):
        each = [of(i, value) for value in args]
        named = {key: of(i, value) for key, value in kwargs.items() if value is not None}
        if with_factors and len(each) == 4:
            named["value"] = each.pop()
        if "scalars" in named:
            named["value"] = named.pop("scalars")
        if name in ("copy", "zero"):
            getattr(each[0], f"{name}_")(*each[1:])
            continue
        result = _computed(name, _for_one_tensor(name, each), each, named)
        found.append(_copied_into(each[0], result) if in_place else result)
    return None if in_place else found


def _for_one_tensor(name: str, arguments: list[Any]) -> Callable[..., Tensor]:
    if name == "norm":
        return torch.linalg.vector_norm
    if name in ("maximum", "minimum") and not isinstance(arguments[1], Tensor):
        return {"maximum": torch.clamp_min, "minimum": torch.clamp_max}[name]
    return getattr(torch, name)


def _computed(name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Compute an operation that changes nothing in place, with tensors for the numbers that have a derivative."""
    known = _ARITHMETIC.get(name, name)
    if any(isinstance(value, TensorNumber) for value in (*args, *kwargs.values())):
        like = None if known in _KEEPING_PRECISION else next((arg for arg in args if isinstance(arg, Tensor)), None)
        args = [_as_tensor(value, like) for value in args]
        kwargs = {key: _as_tensor(value, like) for key, value in kwargs.items()}
    if not _keeps_arguments(known):
        return func(*args, **kwargs)
    args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    kwargs = {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    if known in _FACTOR and isinstance(factor := kwargs.get(_FACTOR[known]), Tensor):
        x, *others = args
        product = (
            others[0] if len(others) == 1 else others[0] * others[1] if known == "addcmul" else others[0] / others[1]
        )
        return x - factor * product if known == "sub" else x + factor * product
    if known == "sqrt" or (known == "pow" and isinstance(args[1], float) and args[1] == 0.5):
        return args[0].clamp(min=100 * torch.finfo(args[0].dtype).tiny).sqrt().clone()
    result = func(*args, **kwargs)
    return result.clone() if isinstance(result, Tensor) else result


def _as_tensor(value: Any, like: Tensor | None) -> Any:
    if not isinstance(value, TensorNumber):
        return value
    return value.tensor if like is None else value.tensor.to(dtype=like.dtype, device=like.device)


def _may_have_derivative(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and (tensor.requires_grad or is_functorch_wrapped_tensor(tensor))


def _copied_into(target: Tensor, result: Tensor) -> Tensor:
    target.copy_(result)
    return target


def _exists(name: str) -> bool:
    return hasattr(Tensor, name) or hasattr(torch, name)


@functools.cache
def _keeps_arguments(name: str) -> bool:
    """Whether an operation computes new tensors, and may save its arguments or its result for the derivative.

    A view shares the memory of its argument and must receive the argument itself. PyTorch's schemas declare which
    operations may return a view.
    """
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return not any(each.alias_info is not None and not each.alias_info.is_write for s in schemas for each in s.returns)
