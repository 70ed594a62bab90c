"""The settings of an optimiser class: their names, and their values for single parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel import trees
from bilevel.models.module_view import ModuleView
from bilevel.models.sharing import Shared, presented
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


def of_meta_and_step(function: Callable[..., Any]) -> Callable[[Tree, int], Any]:
    """Return a setting as a function of the meta parameters and the number of the step.

    A function with two required positional parameters is called with both, and any other with the meta parameters.

    >>> of_meta_and_step(lambda meta: meta)(5.0, 3), of_meta_and_step(lambda meta, step: meta * step)(5.0, 3)
    (5.0, 15.0)
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return lambda meta, step: function(meta)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    if len(required) == 2:
        return function
    if len(required) > 2:
        raise ValueError(
            f"the setting {function!r} needs {len(required)} arguments; a function of meta or of (meta, step) is needed"
        )
    return lambda meta, step: function(meta)


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
    if isinstance(value, Tensor | float | int):
        values = [value] * len(parameters)
    elif isinstance(value, list | tuple) and len(value) == len(parameters):
        values = list(value)
    else:
        try:
            found = _spread(value, presented(params))
        except LookupError:
            inside = presented(params)
            names = list(inside.named_tensors) if isinstance(inside, ModuleView) else trees.flatten(params)[1]
            raise ValueError(
                f"{name} gave {value!r} for {len(parameters)} parameters; it must give one value for all of them, a "
                f"list with one for each, or a tree that matches them: {names}"
            ) from None
        # A tensor in several places has the value of its first place.
        numbers = params.sources.numbers if type(params) is Shared else range(len(found))
        first = dict(reversed(list(zip(numbers, found, strict=True))))
        values = [first[number] for number in range(len(parameters))]
    for each, parameter in zip(values, parameters, strict=True):
        if isinstance(each, Tensor) and each.shape not in (torch.Size(), parameter.shape):
            raise ValueError(
                f"{name} gave a tensor of shape {tuple(each.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}; a scalar is needed, or the parameter's own shape; for one value per "
                "parameter write list(...) around a vector"
            )
    return values


def _spread(value: Any, node: Tree) -> list[Any]:
    """Return a value for each leaf of a tree; one value may stand for a whole branch.

    Raises:
        LookupError: the value does not match the tree.
    """
    if isinstance(value, Tensor | float | int):
        return [value] * len(trees.leaves(node))
    if isinstance(node, ModuleView):
        known = {name for name, _ in node.module.named_parameters(remove_duplicate=False)}
        if not (isinstance(value, Mapping) and node.named_tensors.keys() <= value.keys() <= known):
            raise LookupError
        return [value[name] for name in node.named_tensors]
    if trees.flatten(node)[1].is_leaf():
        raise LookupError
    children, _, entries, *_ = optree.tree_flatten_one_level(node, namespace=trees.NAMESPACE)
    if isinstance(node, Mapping):
        if not (isinstance(value, Mapping) and value.keys() == node.keys()):
            raise LookupError
        values = [value[entry] for entry in entries]
    elif isinstance(value, list | tuple) and len(value) == len(children):
        values = list(value)
    else:
        raise LookupError
    return [each for v, child in zip(values, children, strict=True) for each in _spread(v, child)]
