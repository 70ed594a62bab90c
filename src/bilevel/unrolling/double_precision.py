"""A problem computed in double precision, whatever dtype its tensors and its user's code have.

Finite differences need about 16 digits. So a check casts the parameters and φ to float64 and runs the user's functions
under `InDouble`, a mode in which all floating-point tensors that an operation meets are promoted: data from a closure,
constants of a module, and explicit casts such as `x.float()`. Random numbers are drawn in the user's dtype and are then
cast, because PyTorch draws other numbers in float64 than in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import trees
from bilevel.models.conversion import Memory
from bilevel.models.discovery import Discovered
from bilevel.problem import BilevelProblem, GradientDescent, Problem
from bilevel.trees import Tree

_LOW = frozenset({torch.float32, torch.float16, torch.bfloat16})


class InDouble(TorchFunctionMode):
    """Context in which every operation computes in float64.

    Args:
        dtype: the dtype in which random numbers are drawn, before they are cast.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _CASTS:
            return args[0].to(torch.float64, **_without_dtype(kwargs))
        if name in _DRAWS:
            return self._drawn(name, func, args, kwargs)
        if func == _DTYPE:  # what a module compares with the dtype of its parameters
            found = func(*args)
            return torch.float64 if found in _LOW else found
        if name in ("__get__", "__set__", "set_default_dtype", "get_default_dtype"):
            return func(*args, **kwargs)
        writes = _writes(name)
        kept = args[:1] if writes else ()
        promoted = (*kept, *(_promoted(a) for a in args[len(kept) :]))
        kwargs = {key: value if key == "out" else _promoted(value) for key, value in kwargs.items()}
        result = func(*promoted, **kwargs)
        return result if writes or "out" in kwargs else _promoted_results(result)

    def _drawn(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name in _SAMPLED:
            return _promoted_results(func(_to(args[0], self._dtype), *args[1:], **kwargs))
        if name.endswith("_like"):
            return func(_to(args[0], self._dtype), *args[1:], **_without_dtype(kwargs)).double()
        if name.endswith("_"):
            rest = dict(kwargs)
            target = args[0] if args else rest.pop("tensor")  # the functions of torch.nn.init name their arguments
            if not target.is_floating_point():
                return func(*args, **kwargs)
            drawn = func(torch.empty_like(target, dtype=self._dtype, requires_grad=False), *args[1:], **rest)
            with torch.no_grad():
                return target.copy_(drawn)
        return _promoted_results(func(*args, **kwargs))


_DTYPE: Any = vars(torch._C.TensorBase)["dtype"].__get__
_CASTS = frozenset({"float", "half", "bfloat16"})
_SAMPLED = frozenset({"bernoulli", "multinomial", "poisson"})
"""Functions whose first argument has the probabilities."""
_DRAWS = _SAMPLED | frozenset(
    {"rand_like", "randn_like", "rand", "randn", "normal", "normal_", "uniform_", "exponential_", "log_normal_"}
)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__"))


def _without_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "dtype"}


def _to(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


def _promoted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _LOW else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _LOW else value
    if type(value) in (list, tuple):
        return type(value)(map(_promoted, value))
    return value


def _promoted_results(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _LOW and value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(map(_promoted_results, value))
    return value


def lowest_dtype(*places: Tree) -> torch.dtype:
    """Return the coarsest floating-point dtype in trees of tensors; float64 if there is none.

    >>> lowest_dtype({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.bfloat16)})
    torch.bfloat16
    """
    found = [leaf.dtype for tree in places for leaf in trees.leaves(tree) if trees.is_differentiable(leaf)]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def as_double(tree: Tree) -> Tree:
    """Return a tree with its floating-point tensors in float64, with their graphs."""
    parts = trees.split(tree)
    return parts.rebuild([t.double() if t.is_floating_point() else t for t in parts.differentiable])


def problem_in_double(problem: BilevelProblem, dtype: torch.dtype) -> BilevelProblem:
    """Return the same problem computed in float64, without compiled code. Its φ must be in float64 too.

    Args:
        problem: a `GradientDescent`, or a problem given by its three functions.
        dtype: the dtype in which its random numbers are drawn.
    """

    def promoted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with InDouble(dtype):
                return function(*arguments)

        return call

    descent = problem.as_gradient_descent
    if descent is None:
        return Problem(lambda meta: as_double(problem.init(meta)), promoted(problem.step), promoted(problem.outer_loss))
    twin: Any = copy.copy(descent.eager)
    twin._eager = twin
    twin._discovered = descent._discovered if descent.is_examined else Discovered()
    twin.inner_loss, twin._outer_loss = promoted(descent.inner_loss), promoted(descent._outer_loss)

    def initial(meta: Tree, memory: Memory) -> tuple[Tree, dict[str, Tensor]]:
        params, buffers = GradientDescent._initial(twin, meta, memory)
        return as_double(params), as_double(buffers)

    twin._initial = initial
    return twin
