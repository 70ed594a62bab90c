"""Checks of settings: each gives the value back, or an error with its name, what was passed and what is needed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any


def whole_number(value: Any, name: str, at_least: int = 1) -> int:
    """The value as an int, if it is a whole number of at least `at_least`.

    >>> whole_number(0, "directions")
    Traceback (most recent call last):
    ValueError: directions=0: a whole number of at least 1 is needed
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(f"{name}={value!r}: a whole number of at least {at_least} is needed")
    return int(value)


def positive(value: Any, name: str) -> float:
    """The value, if it is a positive and finite number."""
    if not (_is_finite_number(value) and value > 0):
        raise ValueError(f"{name}={value!r}: a positive number is needed")
    return value


def not_negative(value: Any, name: str) -> float:
    """The value, if it is a finite number of at least 0."""
    if not (_is_finite_number(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: a number of at least 0 is needed")
    return value


def one_of(value: Any, name: str, choices: Iterable[str]) -> str:
    """The value, if it is one of these words."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r}: there are {', '.join(map(repr, known))}")
    return value


def a_function(value: Any, name: str, signature: str) -> None:
    """Nothing, if the value can be called; the error shows the call that will be made."""
    if not callable(value):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); a function is needed, called as {signature}")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
