"""The sixth part of a check: operations of the inner loss that lack a derivative, by the layer that calls them.

Each function of PyTorch that the loss calls with a tensor that requires gradients is called once more by itself, in
forward mode and for a second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from bilevel import trees
from bilevel.autodiff import composites
from bilevel.checking.subject import Subject, described
from bilevel.report.findings import Finding, Verdict
from bilevel.unrolling.plain_loop import PlainLoop

PART = "operations"


def cover_operations(subject: Subject) -> Iterator[Finding]:
    """Yield a row for each operation that lacks a derivative, or one row that says that none does."""
    plain = subject.plain(in_double=False)
    if isinstance(plain, str):
        yield Finding(PART, "forward mode and second derivatives", Verdict.NOT_CHECKED, plain)
        return
    try:
        copied = plain.start()
        probe = _Probe()
        with _named_layers(copied.value, probe), probe:
            _loss(plain)
    except Exception as error:
        yield Finding(PART, "forward mode and second derivatives", Verdict.UNJUDGED, described(error))
        return
    for name, layer in probe.without_forward_mode.items():
        replaced = any(_name(f) == name for f in composites.FORWARD_MODE)
        how = "a composite form takes its place" if replaced else "Hessian-vector products take its place"
        found = f"{name} in {layer or 'the loss'} has no forward-mode derivative"
        yield Finding(PART, name, Verdict.RIGHT, f"{found}; {how}", "Reverse() does not need it")
    for name, layer in probe.without_second_derivative.items():
        if any(_name(f) == name for f in composites.SECOND_DERIVATIVE):
            found = f"{name} in {layer or 'the loss'} has no second derivative; a composite form takes its place"
            yield Finding(PART, name, Verdict.RIGHT, found)
            continue
        found = f"{name} in {layer or 'the loss'} has no second derivative in torch {torch.__version__}"
        advice = "take ForwardGradient(tangents='difference') or ZerothOrder, or write it in other operations"
        yield Finding(PART, name, Verdict.UNJUDGED, found, advice)
    if not (probe.without_forward_mode or probe.without_second_derivative):
        found = f"all {len(probe.seen)} functions of the inner loss have both"
        yield Finding(PART, "forward mode and second derivatives", Verdict.RIGHT, found)


def _loss(plain: PlainLoop) -> None:
    params = plain.params
    assert params is not None
    with torch.enable_grad(), plain._stream(1), plain._modes():
        plain._inner_loss(params, plain.run._fetch(0))


class _Probe(TorchFunctionMode):
    """Calls each function once more by itself, to see which derivatives it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        """The layers that are being called, the innermost last."""
        self.seen: set[str] = set()
        self.without_forward_mode: dict[str, str] = {}
        self.without_second_derivative: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        inputs = [t for t in _tensors([*args, *kwargs.values()]) if t.requires_grad and t.is_floating_point()]
        key = f"{name} {self.layers[-1:]}"
        wanted = inputs and torch.is_grad_enabled() and key not in self.seen and not name.startswith("__")
        if wanted and not name.endswith("_") and not torch._C._are_functorch_transforms_active():
            self.seen.add(key)
            with torch.random.fork_rng(devices=[]):
                self._probe(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _probe(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        layer = self.layers[-1] if self.layers else ""
        try:
            with forward_ad.dual_level():
                func(*_replaced(args, _dual), **_replaced(kwargs, _dual))
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" in str(error) or "jvp" in str(error):
                self.without_forward_mode.setdefault(name, layer)
        inputs: list[Tensor] = []

        def leaf(tensor: Tensor) -> Tensor:
            inputs.append(tensor.detach().clone().requires_grad_())
            return inputs[-1]

        try:
            found = func(*_replaced(args, leaf), **_replaced(kwargs, leaf))
            outputs = [t for t in _tensors([found]) if t.requires_grad]
            if not outputs:
                return
            weights = [torch.ones_like(t, requires_grad=True) for t in outputs]
            first = torch.autograd.grad(outputs, inputs, weights, create_graph=True, allow_unused=True)
            kept = [g for g in first if g is not None and g.requires_grad]
            if kept:
                torch.autograd.grad([g.sum() for g in kept], [*inputs, *weights], allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            if "not implemented" in str(error) or "once_differentiable" in str(error):
                self.without_second_derivative.setdefault(name, layer)


@contextmanager
def _named_layers(tree: Any, probe: _Probe) -> Iterator[None]:
    """Context in which the probe knows which layer is being called."""
    handles = []
    for leaf in trees.leaves(tree):
        if isinstance(leaf, nn.Module):
            for path, layer in leaf.named_modules():

                def enter(layer: nn.Module, args: Any, path: str = path) -> None:
                    probe.layers.append(path or type(layer).__name__)

                def leave(layer: nn.Module, args: Any, output: Any) -> None:
                    probe.layers.pop()

                handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dual(tensor: Tensor) -> Tensor:
    return forward_ad.make_dual(tensor.detach().clone(), torch.ones_like(tensor))


def _replaced(value: Any, make: Any) -> Any:
    if isinstance(value, Tensor):
        return make(value) if value.requires_grad and value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_replaced(each, make) for each in value)
    if type(value) is dict:
        return {key: _replaced(each, make) for key, each in value.items()}
    return value


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
