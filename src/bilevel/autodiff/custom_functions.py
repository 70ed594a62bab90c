"""Verification of the custom `torch.autograd.Function` classes in a loss.

A hypergradient differentiates the backward pass of a custom function. PyTorch raises an error if such a derivative is
known not to exist. It is silently wrong if a function saves intermediate results, computes in NumPy, or is marked
`@once_differentiable` and receives a constant gradient. Every class is therefore verified at its first use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bilevel import randomness
from bilevel.errors import MissingDerivativeError

Function = type[torch.autograd.Function]
_MARKED = torch.autograd.function.once_differentiable(lambda ctx: None).__code__
_VERIFIED: set[Any] = set()
_LOCK = threading.RLock()


def require_two_derivatives(function: Function) -> None:
    """Raise MissingDerivativeError for a custom function whose backward pass is marked `@once_differentiable`."""
    if getattr(function.backward, "__code__", None) is _MARKED:
        raise MissingDerivativeError(
            f"the custom autograd.Function {function.__name__!r} is marked @once_differentiable, and "
            "hypergradients need the derivative of the inner gradient too; write its backward in "
            "differentiable operations, without the mark, or take ZerothOrder(...)"
        )


def between(outputs: Any, inputs: Any = ()) -> Iterator[Function]:
    """Yield the custom functions in the graph between inputs and outputs."""
    outputs, inputs = ([t] if isinstance(t, Tensor) else t for t in (outputs, inputs))
    seen: set[Any] = {None}
    seen.update([t.grad_fn for t in inputs if isinstance(t, Tensor)])
    nodes: list[Any] = [t.grad_fn for t in outputs if isinstance(t, Tensor) and t.grad_fn not in seen]
    seen.update(nodes)
    while nodes:
        node = nodes.pop()
        if isinstance(node, BackwardCFunction):
            yield node._forward_cls  # pyright: ignore[reportAttributeAccessIssue]
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)


def check(outputs: Any, inputs: Any, run: Callable[[], Any]) -> None:
    """Raise unless every custom function between inputs and outputs has the derivatives that hypergradients need.

    Args:
        outputs: the results of the user's code.
        inputs: the tensors from which the results were computed.
        run: runs the code that calls the functions again. It is called once for each class.

    Raises:
        MissingDerivativeError: the derivatives of a function are missing or do not agree.
    """
    for function in set(between(outputs, inputs)):
        require_two_derivatives(function)
        if not is_verified(function):
            with torch.enable_grad():
                verify(function, run)


def is_verified(function: Function) -> bool:
    """Whether a class needs no verification, because it has been verified or is part of PyTorch or of this package."""
    return function.__module__.split(".")[0] in ("torch", "bilevel") or _key(function) in _VERIFIED


def verify(function: Function, run: Callable[[], Any]) -> None:
    """Compare the derivatives of a custom function with each other, on the inputs with which `run` calls it.

    With y = f(x), backward b(x, u) and random u, r, e, the function s(x, u) = ⟨b(x, u), r⟩ must satisfy

        ⟨∂s/∂u, u⟩ = s   and   ⟨∂s/∂x, e⟩ = (s(x + εe) − s(x − εe)) / 2ε,

    and a forward-mode derivative must be the transpose of b. b itself is not compared with the derivative of f, because
    a straight-through estimator differs from it on purpose. If the differences for two values of ε do not agree (at a
    kink, or for a random function), the second condition is not applied. A class that is defined again at every call is
    verified once.

    Raises:
        MissingDerivativeError: the derivatives do not agree.
    """
    if _get_current_dispatch_mode() is not None:  # this is tracing for compilation, where tensors have no values
        return
    calls: list[tuple[Any, ...]] = []
    with _LOCK, _recorded(function, calls), randomness.replayed(randomness.generator_states()):
        run()
    if is_verified(function):
        return
    if calls:
        _compare(function, calls[0])
    _VERIFIED.add(_key(function))


def _key(function: Function) -> Any:
    return tuple(getattr(part, "__code__", part) for part in (function.forward, function.backward, function.jvp))


@contextmanager
def _recorded(function: Function, calls: list[tuple[Any, ...]]) -> Iterator[None]:
    """Context manager in which the inputs of a custom function are recorded."""
    own = "forward" in vars(function)
    descriptor, forward = vars(function).get("forward"), function.forward
    with_context = function.setup_context is torch.autograd.Function.setup_context

    def noted(*args: Any) -> Any:
        calls.append(args[1:] if with_context else args)
        return forward(*args)

    function.forward = staticmethod(noted)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            function.forward = descriptor  # type: ignore[method-assign]
        else:
            del function.forward


class _Probe:
    """A custom function at recorded inputs x, with random cotangents u, weights r and directions e."""

    def __init__(self, function: Function, args: tuple[Any, ...]) -> None:
        self._function, self._args = function, args
        self._moving = [i for i, a in enumerate(args) if _is_real(a) and a.requires_grad]
        self._random = randomness.generator_states()
        self.points = [self._precise(args[i].detach()) for i in self._moving]
        self.eps = max((torch.finfo(p.dtype).eps for p in self.points), default=0.0)
        self._generator = torch.Generator().manual_seed(0)
        self.r = [self._normal(p) for p in self.points]
        self.e = [self._normal(p) * (float(p.norm()) / max(p.numel(), 1) ** 0.5 or 1.0) for p in self.points]
        outputs = self.outputs(_recording(self.points)) if self.points else []
        self.u = [self._normal(y) for y in outputs]
        self.usable = any(y.requires_grad for y in outputs)

    def outputs(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Compute f(x). Return its floating-point outputs."""
        args = [a.detach() if isinstance(a, Tensor) else a for a in self._args]
        for i, x in zip(self._moving, xs, strict=True):
            args[i] = x.view_as(x)  # a function may work in place, which autograd does not allow on a leaf
        with randomness.replayed(self._random):
            found = self._function.apply(*args)
        return [y for y in (found if isinstance(found, tuple) else (found,)) if _is_real(y)]

    def backward(self, xs: Sequence[Tensor], us: Sequence[Tensor]) -> list[Tensor]:
        """Compute b(x, u), with a graph."""
        pairs = [(y, u) for y, u in zip(self.outputs(xs), us, strict=True) if y.requires_grad]
        outputs, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(xs), weights, create_graph=True, allow_unused=True)
        return _filled(found, xs)

    def s(self, step: float) -> float:
        """Compute ⟨b(x + step · e, u), r⟩."""
        moved = [p + step * e for p, e in zip(self.points, self.e, strict=True)]
        return _number(_dot(self.backward(_recording(moved), self.u), self.r))

    def difference(self, step: float) -> float:
        """Compute the central difference of s along e."""
        return (self.s(step) - self.s(-step)) / (2 * step)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, dtype=torch.float64).to(like)

    @staticmethod
    def _precise(t: Tensor) -> Tensor:
        return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t.clone()


def _compare(function: Function, args: tuple[Any, ...]) -> None:
    if any(isinstance(a, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(a) for a in args):  # pyright: ignore[reportAttributeAccessIssue]
        return
    with torch.enable_grad():
        probe = _Probe(function, args)
        if not probe.usable:
            return
        xs, us = _recording(probe.points), _recording(probe.u)
        backward = probe.backward(xs, us)
        s = _dot(backward, probe.r)
        found = torch.autograd.grad(s, [*xs, *us], allow_unused=True) if s.requires_grad else [None] * len([*xs, *us])
        by_x = _number(_dot(_filled(found[: len(xs)], xs), probe.e))
        by_u = _number(_dot(_filled(found[len(xs) :], us), probe.u))
        size, eps, expected = _size(backward, probe.r), probe.eps, _number(s)
        if abs(by_u - expected) > eps**0.5 * max(size, abs(expected)):
            raise _wrong(
                function,
                f"its backward is linear in the incoming gradient and gives {expected:.6g}, where its derivative with "
                f"respect to that gradient gives {by_u:.6g}",
            )
        coarse, fine = (probe.difference(factor * eps ** (1 / 3)) for factor in (4, 1))
        noise = 10 * (abs(coarse - fine) + eps ** (2 / 3) * size)
        if abs(by_x - fine) > eps**0.25 * abs(fine) + noise:
            raise _wrong(
                function,
                f"along a random direction its backward changes by {fine:.6g}, and the derivative of its backward is "
                f"{by_x:.6g}",
            )
        if function.jvp is not torch.autograd.Function.jvp:
            _compare_forward_mode(probe, function)


def _compare_forward_mode(probe: _Probe, function: Function) -> None:
    """Raise if the forward-mode derivative of a function is not the transpose of its backward pass."""
    backward = probe.backward(_recording(probe.points), probe.u)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, e) for p, e in zip(probe.points, probe.e, strict=True)]
        tangents = [forward_ad.unpack_dual(y).tangent for y in probe.outputs(duals)]
    pushed, pulled = _number(_dot(_filled(tangents, probe.u), probe.u)), _number(_dot(backward, probe.e))
    if abs(pushed - pulled) > probe.eps**0.5 * max(_size(backward, probe.e), abs(pushed)):
        raise _wrong(
            function, f"along a random direction its jvp gives {pushed:.6g}, and its backward gives {pulled:.6g}"
        )


def _recording(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies that record the operations on them."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def _number(t: Tensor) -> float:
    return t.detach().item()


def _filled(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tensors, like, strict=True)]


def _size(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(_number(a.norm() * b.norm()) for a, b in zip(left, right, strict=True))


def _wrong(function: Function, what: str) -> MissingDerivativeError:
    return MissingDerivativeError(
        f"the derivatives of the custom autograd.Function {function.__name__!r} do not agree: {what}. Hypergradients "
        "need the derivative of backward, so compute in it, by differentiable PyTorch operations, from inputs and "
        "outputs saved with ctx.save_for_backward (intermediate results lose their graph there), or take "
        "ZerothOrder(...)"
    )


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum().double() for a, b in zip(left, right, strict=True)]).sum()
