"""Layers that compute their activations again when they are needed, to save memory inside one inner step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel import randomness, trees
from bilevel.errors import MissingDerivativeError
from bilevel.trees import Tree


class Recomputed(nn.Module):
    """A layer that stores only its inputs until its first or second derivatives are computed.

    `torch.utils.checkpoint` frees a layer's activations after the forward pass. Every hypergradient contains a backward
    pass that is differentiated again, and that backward pass stores all activations. With this class, that backward
    pass also stores only its inputs and is computed again when it is differentiated.

    Let x be the layer's inputs and parameters, y = f(x), and w the cotangents. The layer stores x, and its backward
    pass stores (x, w). A second derivative builds the graph of this one layer and frees it. The graph of an inner step
    then takes the memory of its largest layer and of the tensors between layers. Time and memory are measured in
    `benchmarks/results/products.md`. Dropout draws the same numbers every time.

    In forward mode the layer is computed without recomputation and saves no memory. The inner gradient stores its
    activations and their tangents until its own backward pass.

    Args:
        layer: a module that is a function of its inputs and parameters. All tensors that need derivatives must be
            arguments (in any nesting), and its result must consist of tensors.

    Raises:
        MissingDerivativeError: a third derivative is required.

    >>> import torch, bilevel
    >>> layers = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()) for _ in range(4)]
    >>> blocks = [bilevel.experimental.Recomputed(layer) for layer in layers]
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda model, meta, batch: (model(meta) - 1).square().mean(),
    ...     outer_loss=lambda model, meta, batch: model(torch.ones(3)).sum(),
    ...     params=torch.nn.Sequential(*blocks),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
    ... )
    >>> bilevel.Reverse()(problem, torch.zeros(3), 5).grad.shape
    torch.Size([3])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
            return self.layer(*args, **kwargs)
        inputs, parameters = trees.split((args, kwargs)), dict(self.layer.named_parameters())
        call = _Call(self.layer, list(parameters), replace(inputs, differentiable=[]), len(inputs.differentiable))
        return call.rebuilt(_Layer.apply(call, *inputs.differentiable, *parameters.values()))


class _Call:
    """One call of a layer as a function from tensors to tensors, which gives the same result when it is repeated.

    Autograd stores and frees the differentiable tensors.
    """

    def __init__(self, layer: nn.Module, names: list[str], inputs: trees.Split, count: int) -> None:
        self._layer, self._names, self._inputs, self._count = layer, names, inputs, count
        self._modes = _modes(layer)
        self._random = randomness.generator_states()
        self._output: trees.Split | None = None

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the output for the first time. The random number generators advance."""
        args, kwargs = self._inputs.rebuild(tensors[: self._count])
        parameters = dict(zip(self._names, tensors[self._count :], strict=True))
        parts = trees.split(functional_call(self._layer, parameters, args, kwargs))
        self._output = replace(parts, differentiable=[])
        return parts.differentiable

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the output again, with the random numbers and the training modes of the first time."""
        modes = _modes(self._layer)
        _switch(self._modes)
        try:
            with randomness.replayed(self._random):
                return self.first(tensors)
        finally:
            _switch(modes)

    def rebuilt(self, tensors: Sequence[Tensor]) -> Tree:
        """Return the layer's output with these tensors in it."""
        assert self._output is not None
        return self._output.rebuild(tensors)

    def gradients(
        self, tensors: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor], differentiable: bool
    ) -> list[Tensor | None]:
        """Compute cotangentsᵀ · ∂output/∂tensor for the tensors that need it; `None` for the others."""
        outputs = self.again(tensors)
        pairs = [(y, w) for y, w in zip(outputs, cotangents, strict=True) if y.requires_grad]
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        if not (pairs and wanted):
            return [None] * len(tensors)
        outputs, weights = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=differentiable, allow_unused=True))
        return [next(found) if need else None for need in needed]


class _Layer(torch.autograd.Function):
    """Compute y = f(x) and store x."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return tuple(call.first(tensors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        return None, *_Backward.apply(ctx.call, needed, *ctx.saved_tensors, *cotangents)


class _Backward(torch.autograd.Function):
    """Compute wᵀ ∂f/∂x and store x and w."""

    @staticmethod
    def forward(ctx: Any, call: _Call, needed: Sequence[bool], *values: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call, ctx.needed = call, needed
        ctx.save_for_backward(*values)
        tensors, cotangents = _recording(values[: len(needed)]), values[len(needed) :]
        with torch.enable_grad():
            return tuple(call.gradients(tensors, needed, cotangents, differentiable=False))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise MissingDerivativeError(
                "a Recomputed layer has first and second derivatives, and a third was asked for; use the layer itself"
            )
        values = _recording(ctx.saved_tensors)
        tensors, cotangents = values[: len(ctx.needed)], values[len(ctx.needed) :]
        with torch.enable_grad():
            found = ctx.call.gradients(tensors, ctx.needed, cotangents, differentiable=True)
        wanted = [v for v, need in zip(values, ctx.needs_input_grad[2:], strict=True) if need]
        pairs = [(g, u) for g, u in zip(found, directions, strict=True) if g is not None and u is not None]
        pairs = [(g, u) for g, u in pairs if g.requires_grad]
        if not (pairs and wanted):
            return None, None, *(None for _ in values)
        gradients, weights = zip(*pairs, strict=True)
        second = iter(torch.autograd.grad(gradients, wanted, weights, allow_unused=True))
        return None, None, *(next(second) if need else None for need in ctx.needs_input_grad[2:])


def _recording(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def _modes(layer: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in layer.modules()]


def _switch(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
