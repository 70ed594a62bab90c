"""Estimators (and linear solvers) by name: `forward-gradient(directions=32)`.

A name is the class name in kebab case; settings are the constructor's, with Python's literals or names as values. The
class name itself will do as well: `ForwardGradient(directions=32)`.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from bilevel.estimators.base import Estimator
from bilevel.estimators.control_variates import CoarserProblem, RunningMean, Variate
from bilevel.estimators.descriptions import default_of, describe, kebab, settings_of
from bilevel.estimators.forward import Forward
from bilevel.estimators.forward_gradient import ForwardGradient
from bilevel.estimators.hessian_free import HessianFree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.reverse import Reverse
from bilevel.estimators.truncated_reverse import TruncatedReverse
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.planning.auto import Auto
from bilevel.solvers import ConjugateGradient, LinearSolver, Neumann, Nystrom

__all__ = ["ESTIMATORS", "SOLVERS", "VARIATES", "default_of", "describe", "kebab", "parse", "read", "settings_of"]

ESTIMATORS: dict[str, type[Estimator]] = {
    kebab(c.__name__): c
    for c in (Reverse, TruncatedReverse, Forward, ForwardGradient, ZerothOrder, Implicit, HessianFree, Auto)
}
SOLVERS: dict[str, type[LinearSolver]] = {kebab(c.__name__): c for c in (ConjugateGradient, Neumann, Nystrom)}
VARIATES: dict[str, type[Variate]] = {kebab(c.__name__): c for c in (CoarserProblem, RunningMean)}


def read(text: str) -> tuple[type[Estimator], dict[str, Any]]:
    """The estimator that a text names, and the settings that it gives, not yet checked.

    >>> read("forward-gradient(directions=32)")
    (<class 'bilevel.estimators.forward_gradient.ForwardGradient'>, {'directions': 32})
    """
    name, settings = _name_and_settings(text)
    if name not in ESTIMATORS:
        raise ValueError(f"there is no estimator {name!r}; there are {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name], settings


def parse(text: str, **defaults: Any) -> Estimator:
    """The estimator that a text describes; `defaults` are settings that the text may override.

    >>> parse("forward-gradient(directions=32)", chunk_size=8).chunk_size
    8
    >>> parse("forward-gradient(control_variate=truncated-reverse(steps=5), directions=32)").control_variate
    TruncatedReverse(steps=5)
    >>> parse("implicit(solver=neumann(iterations=5))").solver
    Neumann(iterations=5, step_size=0.01)
    """
    kind, settings = read(text)
    return _build(kind, {**defaults, **settings})


def _build(kind: type[Any], settings: dict[str, Any]) -> Any:
    name, known = kebab(kind.__name__), settings_of(kind)
    for setting in settings:
        if setting not in known:
            has = ", ".join(known) if known else "none"
            raise ValueError(f"{name} has no setting {setting!r}; its settings: {has}")
    solver = settings.get("solver")
    if "solver" in settings and not isinstance(solver, LinearSolver):
        settings = {**settings, "solver": _solver(str(solver))}
    if "control_variate" in settings:
        settings = {**settings, "control_variate": _variate(settings["control_variate"])}
    if isinstance(settings.get("estimator"), str):
        settings = {**settings, "estimator": parse(settings["estimator"])}
    try:
        return kind(**settings)
    except TypeError as error:  # a word where a number is needed
        given = ", ".join(f"{setting}={value!r}" for setting, value in settings.items())
        raise ValueError(f"{name}({given}): {error}") from error


def _solver(text: str) -> LinearSolver:
    name, settings = _name_and_settings(text)
    if name not in SOLVERS:
        raise ValueError(f"there is no solver {name!r}; there are {', '.join(SOLVERS)}")
    return _build(SOLVERS[name], settings)


def _variate(given: Any) -> Any:
    if isinstance(given, tuple | list):
        return tuple(_variate(each) for each in given)
    if not isinstance(given, str):
        return given
    name, settings = _name_and_settings(given)
    if name in VARIATES:
        return _build(VARIATES[name], settings)
    if name not in ESTIMATORS:
        raise ValueError(f"there is no control variate {name!r}; there are {', '.join([*VARIATES, *ESTIMATORS])}")
    return parse(given)


def _name_and_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Read `name` or `name(setting=value, …)` without evaluating anything."""
    python = re.sub(r"(?<=[a-z])-(?=[a-z])", "_", text.strip())
    try:
        node = ast.parse(python, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if call.args or not isinstance(call.func, ast.Name) or any(k.arg is None for k in call.keywords):
            raise ValueError
        settings = {str(k.arg): _value(k.value) for k in call.keywords}
        if len(settings) < len(call.keywords):
            raise ValueError
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {text!r}; write a name or name(setting=value, ...)") from error
    return kebab(call.func.id.replace("_", "-")), settings


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # a bare word is a string: checkpoints=sqrt
        return node.id.replace("_", "-")
    if isinstance(node, ast.Call):
        return ast.unparse(node)
    if isinstance(node, ast.Tuple | ast.List) and any(isinstance(each, ast.Call | ast.Name) for each in node.elts):
        return tuple(_value(each) for each in node.elts)
    return ast.literal_eval(node)
