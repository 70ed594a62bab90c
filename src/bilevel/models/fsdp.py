"""Modules sharded by `fully_shard` (FSDP2), called with other parameters than their own.

Such a module gathers a layer's parameters just before the layer is computed, and frees them behind it. Its hooks look
at the parameters that they know, and at nothing that stands in for them; and they leave gradients in `.grad`, once. So
for another point θ, of which each process has its shards, the shards are copied into the module's own for the time of a
call, and again for the time of its backward pass. Before and after that the module is as the user left it.

Every process of the module's mesh makes the same call with the same inputs. Beside the shards of θ, one more copy of
the module's own is held during a call.
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
    if fsdp is None:  # where it was never imported, nothing is sharded
        return []
    return [layer for layer in module.modules() if isinstance(layer, fsdp.FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Free layers that are whole: after a forward pass the root stays so, at the point where that was made."""
    for layer in _sharded_layers(module):
        layer.reshard()


def call(module: nn.Module, tensors: Mapping[nn.Parameter, Tensor], args: Any, kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with these tensors in the places of its parameters.

    First derivatives in reverse mode exist, by the tensors and by the arguments; no others.
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
    """Inside, sharded layers of the module may be looked at, and a call is an error: it would be made with their own
    parameters, whatever stands in for them.
    """

    def refuse(layer: nn.Module, *_: Any) -> None:
        raise ValueError(
            f"a method or property of {type(module).__name__} calls its layer {type(layer).__name__}, to which "
            "fully_shard was applied; with a sharded module, losses call the module itself, model(...), and its "
            "forward does the rest"
        )

    hooks = [layer.register_forward_pre_hook(refuse, prepend=True) for layer in _sharded_layers(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Call:
    """One call of a sharded module, with a graph of its own."""

    def __init__(
        self, module: nn.Module, tensors: Mapping[nn.Parameter, Tensor], leaves: Sequence[Any], spec: TreeSpec
    ) -> None:
        self.module, self.tensors = module, {p: t.detach() for p, t in tensors.items()}
        self._spec = spec
        # Fresh leaves: their gradients are collected in `.grad`.
        self._leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        self._inputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def forward(self, recorded: bool) -> list[Tensor]:
        """The tensors of the result."""
        with self._in_place():
            args, kwargs = tree_unflatten(self._leaves, self._spec)
            with torch.set_grad_enabled(recorded):
                result = self.module(*args, **kwargs)
        self._result, self._result_spec = tree_flatten(result)
        self._outputs = [x for x in self._result if isinstance(x, Tensor)]
        return self._outputs

    def result(self, outputs: Sequence[Tensor]) -> Any:
        """What the module returned, with other tensors."""
        given = iter(outputs)
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self._result]
        self._result = []
        return tree_unflatten(leaves, self._result_spec)

    def backward(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients by the parameters' tensors, then by the inputs; the graph is freed."""
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
        """Inside, the module's shards are those of this call."""
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
    """A call in the graph of those around it."""

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
    """In place, unseen by autograd: each of these changes is undone before anybody else looks."""
    with torch.no_grad(), _unsafe_preserve_version_counter(tuple(targets)):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
