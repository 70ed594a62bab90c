"""Estimators, linear solvers and control variates as text: `forward-gradient(directions=32)`.

A name is the class name in kebab case. Settings are those of the constructor, with Python literals or names as values.
The class name itself can be used as well: `ForwardGradient(directions=32)`. Which estimators there are is not decided
here: `read` and `parse` are given the list (`bilevel.planning.registry` holds the list of all).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from bilevel import checks
from bilevel.estimators.base import Estimator
from bilevel.estimators.variates import CoarserProblem, RunningMean, Variate
from bilevel.solvers import ConjugateGradient, EmpiricalFisher, LinearSolver, Neumann, Nystrom

SOLVERS: tuple[type[LinearSolver], ...] = (ConjugateGradient, Neumann, Nystrom, EmpiricalFisher)
"""The solvers that a text may name."""
VARIATES: tuple[type[Variate], ...] = (CoarserProblem, RunningMean)
"""The control variates, besides estimators, that a text may name."""
Kind = TypeVar("Kind")


def kebab(name: str) -> str:
    """Return a class name in kebab case.

    >>> kebab("ForwardGradient"), kebab("PersistentES")
    ('forward-gradient', 'persistent-es')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def by_name(kinds: Sequence[type[Kind]]) -> dict[str, type[Kind]]:
    """Return classes by their names in kebab case."""
    return {kebab(kind.__name__): kind for kind in kinds}


def settings_of(kind: type[Any]) -> list[str]:
    """Return the names of a class's settings."""
    return [field.name for field in dataclasses.fields(kind)]


def default_of(kind: type[Any], setting: str) -> Any:
    """Return the default of a setting, or `dataclasses.MISSING` if it has none."""
    (field,) = (field for field in dataclasses.fields(kind) if field.name == setting)
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def read(text: str, estimators: Sequence[type[Estimator]]) -> tuple[type[Estimator], dict[str, Any]]:
    """Return the estimator among these that a text names, and the settings in the text, which are not checked yet."""
    name, settings = _name_and_settings(text)
    known = by_name(estimators)
    if name not in known:
        raise ValueError(
            f"there is no estimator {name!r}{checks.did_you_mean(name, known)}; there are {', '.join(known)}"
        )
    return known[name], settings


def parse(text: str, estimators: Sequence[type[Estimator]], **defaults: Any) -> Estimator:
    """Return the estimator among these that a text describes; `defaults` are settings that the text may override."""
    kind, settings = read(text, estimators)
    return _build(kind, {**defaults, **settings}, estimators)


def describe(estimator: Estimator | LinearSolver | Variate) -> str:
    """Return the text that `parse` turns into this object. Settings at their defaults are left out.

    >>> describe(Neumann(iterations=4)), describe(Neumann())
    ('neumann(iterations=4)', 'neumann')
    """
    changed = []
    for name in settings_of(type(estimator)):
        value = getattr(estimator, name)
        if value != default_of(type(estimator), name):
            changed.append(f"{name}={_described(value)}")
    return kebab(type(estimator).__name__) + (f"({', '.join(changed)})" if changed else "")


def _described(value: Any) -> str:
    if isinstance(value, Estimator | LinearSolver | Variate):
        return describe(value)
    if isinstance(value, tuple):
        return f"({', '.join(_described(each) for each in value)}{',' * (len(value) == 1)})"
    return repr(value)


def _build(kind: type[Any], settings: dict[str, Any], estimators: Sequence[type[Estimator]]) -> Any:
    name, known = kebab(kind.__name__), settings_of(kind)
    for setting in settings:
        if setting not in known:
            has = ", ".join(known) if known else "none"
            meant = checks.did_you_mean(setting, known)
            raise ValueError(f"{name} has no setting {setting!r}{meant}; its settings: {has}")
    solver = settings.get("solver")
    if "solver" in settings and not isinstance(solver, LinearSolver):
        settings = {**settings, "solver": _solver(str(solver))}
    if "control_variate" in settings:
        settings = {**settings, "control_variate": _variate(settings["control_variate"], estimators)}
    if isinstance(settings.get("estimator"), str):
        settings = {**settings, "estimator": parse(settings["estimator"], estimators)}
    try:
        return kind(**settings)
    except TypeError as error:  # a word where a number is needed
        given = ", ".join(f"{setting}={value!r}" for setting, value in settings.items())
        raise ValueError(f"{name}({given}): {error}") from error


def _solver(text: str) -> LinearSolver:
    name, settings = _name_and_settings(text)
    known = by_name(SOLVERS)
    if name not in known:
        raise ValueError(f"there is no solver {name!r}; there are {', '.join(known)}")
    return _build(known[name], settings, ())


def _variate(given: Any, estimators: Sequence[type[Estimator]]) -> Any:
    if isinstance(given, tuple | list):
        return tuple(_variate(each, estimators) for each in given)
    if not isinstance(given, str):
        return given
    name, settings = _name_and_settings(given)
    known = by_name(VARIATES)
    if name in known:
        return _build(known[name], settings, estimators)
    if name not in by_name(estimators):
        raise ValueError(f"there is no control variate {name!r}; there are {', '.join([*known, *by_name(estimators)])}")
    return parse(given, estimators)


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
