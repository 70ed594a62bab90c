"""An optimiser that updates parameters in place, as in a training loop without this library.

If no derivative is needed, the class's own `step` on ordinary leaf tensors is faster than an update that does not
change its arguments. The numbers are those of `Optimizer.update` up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bilevel import trees
from bilevel.optim.optimizer_state import BucketState, OptimizerState
from bilevel.optim.settings import one_each
from bilevel.optim.update_rule import Optimizer
from bilevel.trees import Tree


class InPlaceOptimizer:
    """An optimiser bound to leaf tensors, whose settings may depend on the meta parameters and the step.

    >>> import torch
    >>> from bilevel.optim.update_rule import optimizer
    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> bound = InPlaceOptimizer(optimizer(torch.optim.SGD, lr=0.5), [theta], theta)
    >>> bound.step([torch.ones(2)], meta=None)
    >>> theta.detach()
    tensor([0.5000, 1.5000])
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], params: Tree) -> None:
        """Bind an optimiser to parameters.

        Args:
            optimizer: the optimiser.
            parameters: leaf tensors, which are updated in place.
            params: the tree whose leaves they are.
        """
        self._optimizer, self._parameters, self._params = optimizer, list(parameters), params
        self._updates = [0] * len(self._parameters)
        self._steps = 0
        self._special = optimizer.meta_settings
        groups: Any = self._parameters
        if any(name in self._special for name in ("lr", "weight_decay")):  # these may differ between parameters
            groups = [{"params": [parameter]} for parameter in self._parameters]
        self._bound = optimizer.bound_to(groups)

    def step(self, gradients: Sequence[Tensor | None], meta: Tree) -> None:
        """Make the next step. A parameter whose gradient is `None` is left unchanged."""
        optimizer = self._optimizer
        if optimizer.clipping.is_on:
            gradients = optimizer.clipping(gradients, meta, self._steps)
        for number, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            parameter.grad = gradient
            self._updates[number] += gradient is not None
        if optimizer.schedule is not None or self._special:
            self._set(optimizer.settings_at(self._steps, meta))
        self._bound.step()
        for parameter in self._parameters:
            parameter.grad = None
        self._steps += 1

    def _set(self, settings: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if name in self._special:
                each = one_each(settings.pop(name), self._parameters, self._params, name)
                for group, value in zip(self._bound.param_groups, each, strict=True):
                    group[name] = float(value)
        settings = {name: trees.map_leaves(_as_number, value) for name, value in settings.items()}
        for group in self._bound.param_groups:
            group.update(settings)

    def state(self) -> OptimizerState:
        """Return the optimiser's memory in the form of `Optimizer.update`. Every parameter has its own bucket."""
        memories = [dict(self._bound.state.get(parameter, {})) for parameter in self._parameters]
        return [
            BucketState((number,), updates, self._optimizer.memory_of(parameter, memory, updates))
            for number, (parameter, memory, updates) in enumerate(
                zip(self._parameters, memories, self._updates, strict=True)
            )
        ]


def can_update_in_place(optimizer: Optimizer, parameters: Sequence[Tensor], meta: Tree, params: Tree) -> bool:
    """Whether `InPlaceOptimizer` takes these parameters and settings.

    PyTorch takes no rate with an entry for each number of a parameter, keeps memories of complex parameters in another
    form, and needs collective calls for parameters that are spread over processes.
    """
    if any(p.is_complex() or trees.is_spread(p) for p in parameters):
        return False
    settings = optimizer.settings_at(0, meta)
    named = [name for name in ("lr", "weight_decay") if name in optimizer.meta_settings]
    if not optimizer.is_pytorchs_own and optimizer.meta_settings:
        return False
    values = [value for name in named for value in one_each(settings[name], parameters, params, name)]
    return all(not isinstance(value, Tensor) or value.ndim == 0 for value in values)


def _as_number(leaf: Any) -> Any:
    return float(leaf) if isinstance(leaf, Tensor) and leaf.ndim == 0 else leaf
