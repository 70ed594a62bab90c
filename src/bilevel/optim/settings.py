"""The settings of an optimiser class: their names, and their values for single parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.models.module_view import ModuleView
from bilevel.trees import Tree


@functools.lru_cache(maxsize=256)  # signatures are slow to read
def settings_of(algorithm: type[torch.optim.Optimizer]) -> Mapping[str, Any]:
    """Return the names of the settings that a class takes, with their defaults.

    A constructor with `**kwargs` is assumed to pass them on to the class that it inherits from.

    >>> list(settings_of(torch.optim.Adadelta))[:4]
    ['lr', 'rho', 'eps', 'weight_decay']
    """
    found: dict[str, Any] = {}
    for each in algorithm.__mro__:
        if "__init__" not in each.__dict__ or each is torch.optim.Optimizer or each is object:
            continue
        parameters = list(inspect.signature(each.__init__).parameters.values())[1:]
        hands_on = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = {p.name: p.default for p in parameters if p.name != "params" and p.kind not in variable}
        found = {**named, **found}
        if not hands_on:
            break
    return found


def one_each(value: Any, parameters: Sequence[Tensor], params: Tree, name: str) -> list[Any]:
    """Return the value of a setting for each parameter.

    Args:
        value: one value for all parameters, a list with one value for each, or a tree that matches `params`.
        parameters: the parameters.
        params: the tree whose leaves the parameters are.
        name: the name of the setting in error messages.

    Returns:
        One value for each parameter, in their order.

    Raises:
        ValueError: the value does not match the parameters, or a tensor does not match the shape of its parameter.
    """
    if isinstance(params, ModuleView) and isinstance(value, Mapping) and value.keys() == params.named_tensors.keys():
        values = [value[parameter_name] for parameter_name in params.named_tensors]
    elif isinstance(value, list | tuple) and len(value) == len(parameters):
        values = list(value)
    elif isinstance(value, Tensor | float | int):
        values = [value] * len(parameters)
    elif trees.flatten(value)[1] == trees.flatten(params)[1]:
        values = trees.leaves(value)
    else:
        names = list(params.named_tensors) if isinstance(params, ModuleView) else trees.flatten(params)[1]
        raise ValueError(
            f"{name} gave {value!r} for {len(parameters)} parameters; it must give one value for all of them, a list "
            f"with one for each, or a tree that matches them: {names}"
        )
    for each, parameter in zip(values, parameters, strict=True):
        if isinstance(each, Tensor) and each.shape not in (torch.Size(), parameter.shape):
            raise ValueError(
                f"{name} gave a tensor of shape {tuple(each.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}; a scalar is needed, or the parameter's own shape; for one value per "
                "parameter write list(...) around a vector"
            )
    return values
