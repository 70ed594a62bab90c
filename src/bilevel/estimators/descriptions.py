"""Estimators, linear solvers and control variates as text: `forward-gradient(directions=32)`.

A name is the class name in kebab case. `bilevel.planning.names` reads such a text.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from bilevel.estimators.base import Estimator
from bilevel.estimators.control_variates import Variate
from bilevel.solvers import LinearSolver


def kebab(name: str) -> str:
    """Convert a class name: `ForwardGradient` becomes `forward-gradient`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def settings_of(kind: type[Any]) -> list[str]:
    """Return the names of the settings of a class."""
    return [field.name for field in dataclasses.fields(kind)]


def default_of(kind: type[Any], setting: str) -> Any:
    """Return the default of a setting, or `dataclasses.MISSING` if it has none."""
    (field,) = (field for field in dataclasses.fields(kind) if field.name == setting)
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def describe(estimator: Estimator | LinearSolver | Variate) -> str:
    """Return the text that names an estimator; settings at their defaults are left out.

    >>> from bilevel import ForwardGradient, Reverse
    >>> describe(ForwardGradient(directions=4)), describe(Reverse())
    ('forward-gradient(directions=4)', 'reverse')
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
