"""Modules sharded by `fully_shard` (FSDP2), called with other parameters than their own.

A sharded module gathers a layer's parameters just before the layer is computed, and frees them after it. Its hooks use
the module's own parameters, so no other tensors can take their place, and they leave gradients in `.grad`, once. To
compute at another point θ, of which each process has its shards, this module copies the shards into the module's own
parameters during a call, and again during its backward pass. Before and after that the module is unchanged.

Every process of the module's mesh makes the same call with the same inputs. During a call, one copy of the module's own
shards is held in addition to the shards of θ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bilevel import trees
from bilevel.autodiff.modes import without_modes
from bilevel.errors import MissingDerivativeError


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module, or to a layer of it."""
    return bool(_sharded_layers(module))


def _sharded_layers(module: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # FSDP was never imported, so nothing is sharded
        return []
    return [layer for layer in module.modules() if isinstance(layer, fsdp.FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters of layers. After a forward pass the root layer keeps its parameters of that pass."""
    for layer in _sharded_layers(module):
        layer.reshard()


def call(module: nn.Module, tensors: Mapping[nn.Parameter, Tensor], args: Any, kwargs: Any) -> Any:
    """Compute `module(*args, **kwargs)` with these tensors in place of its parameters.

    The result has first derivatives in reverse mode, with respect to the tensors and the arguments, and no others.

    Raises:
        MissingDerivativeError: another derivative is required.
        ValueError: `fully_shard` was applied to layers of the module and not to the module itself.
    """
    if torch._C._are_functorch_transforms_active():
        raise MissingDerivativeError(_FIRST_ORDER.format(type(module).__name__))
    whole = module in _sharded_layers(module)
    for parameter, tensor in tensors.items():
        if not (whole and trees.is_spread(parameter) and trees.is_spread(tensor)):
            raise ValueError(
                f"fully_shard was applied to layers of {type(module).__name__} and not to all of it; after the layers, "
                "write fully_shard(model) too, without ignored_params"
            )
    leaves, spec = tree_flatten((args, kwargs))
    inside = _Call(module, tensors, leaves, spec)
    found = _AsOneOperation.apply(inside, *tensors.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
    return inside.result(found)


@contextmanager
def uncalled(module: nn.Module) -> Iterator[None]:
    """Context in which sharded layers of the module may be inspected and must not be called.

    A call would be computed with the layers' own parameters.

    Raises:
        ValueError: a sharded layer is called.
    """

    def refuse(layer: nn.Module, *_: Any) -> None:
        raise ValueError(
            f"a method or property of {type(module).__name__} calls its layer {type(layer).__name__}, to which "
            "fully_shard was applied; with a sharded module, a loss must call the module itself, "
            "model(...), and the module's forward must contain that method's computation"
        )

    hooks = [layer.register_forward_pre_hook(refuse, prepend=True) for layer in _sharded_layers(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Call:
    """One call of a sharded module, with its own autograd graph."""

    def __init__(
        self, module: nn.Module, tensors: Mapping[nn.Parameter, Tensor], leaves: Sequence[Any], spec: TreeSpec
    ) -> None:
        self.module, self.tensors = module, {p: t.detach() for p, t in tensors.items()}
        self._spec = spec
        # These are new leaves, because their gradients are collected in `.grad`.
        self._leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        self._inputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def forward(self, recorded: bool) -> list[Tensor]:
        """Compute the call. Return the tensors of the result."""
        with self._in_place():
            args, kwargs = tree_unflatten(self._leaves, self._spec)
            with torch.set_grad_enabled(recorded):
                result = self.module(*args, **kwargs)
        self._result, self._result_spec = tree_flatten(result)
        self._outputs = [x for x in self._result if isinstance(x, Tensor)]
        return self._outputs

    def result(self, outputs: Sequence[Tensor]) -> Any:
        """Return the module's result with these tensors in it."""
        given = iter(outputs)
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self._result]
        self._result = []
        return tree_unflatten(leaves, self._result_spec)

    def backward(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Compute the gradients with respect to the parameters and then the inputs, and free the graph."""
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(self._outputs, cotangents, strict=True)
            if output.requires_grad and cotangent is not None
        ]
        self._outputs = []
        if not pairs:
            return [None] * (len(self.tensors) + len(self._inputs))
        kept = [parameter.grad for parameter in self.tensors]
        for parameter in self.tensors:
            parameter.grad = None
        try:
            with self._in_place(), torch.enable_grad():
                torch.autograd.backward([output for output, _ in pairs], [cotangent for _, cotangent in pairs])
            return [t.grad for t in (*self.tensors, *self._inputs)]
        finally:
            for parameter, gradient in zip(self.tensors, kept, strict=True):
                parameter.grad = gradient

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Context in which the module holds the shards of this call."""
        with without_modes():
            yield from self._exchanged()

    def _exchanged(self) -> Iterator[None]:
        reshard(self.module)
        shards = [trees.local(parameter.detach()) for parameter in self.tensors]
        own = [shard.clone() for shard in shards]
        _copy([trees.local(tensor) for tensor in self.tensors.values()], shards)
        try:
            yield
        finally:
            reshard(self.module)
            _copy(own, shards)


class _AsOneOperation(torch.autograd.Function):
    """A call as one operation in the graph of the surrounding computation."""

    @staticmethod
    def forward(ctx: Any, inside: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004 (for autograd)
        recorded = any(ctx.needs_input_grad)
        ctx.inside = inside
        outputs = inside.forward(recorded)
        returned = tuple(output.detach() for output in outputs)
        constant = (new for new, old in zip(returned, outputs, strict=True) if not old.requires_grad)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return returned

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            raise MissingDerivativeError(_FIRST_ORDER.format(type(ctx.inside.module).__name__))
        return None, *ctx.inside.backward(cotangents)


_FIRST_ORDER = (
    "{}, sharded by fully_shard, has first derivatives in reverse mode only; take ForwardGradient(..., "
    'tangents="difference") or ZerothOrder(...)'
)


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy in place without raising version counts. Each of these changes is undone before other code can see it."""
    with torch.no_grad(), _unsafe_preserve_version_counter(tuple(targets)):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
