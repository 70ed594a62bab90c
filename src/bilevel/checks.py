"""Checks of settings. Each returns the value, or raises an error that says what was passed and what is needed."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any


def whole_number(value: Any, name: str, at_least: int = 1) -> int:
    """Return the value as an int, if it is a whole number of at least `at_least`.

    >>> whole_number(0, "directions")
    Traceback (most recent call last):
    ValueError: directions=0: a whole number of at least 1 is needed
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(f"{name}={value!r}: a whole number of at least {at_least} is needed")
    return int(value)


def positive(value: Any, name: str) -> float:
    """Return the value, if it is a positive and finite number."""
    if not (_is_finite_number(value) and value > 0):
        raise ValueError(f"{name}={value!r}: a positive number is needed")
    return value


def not_negative(value: Any, name: str) -> float:
    """Return the value, if it is a finite number of at least 0."""
    if not (_is_finite_number(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: a number of at least 0 is needed")
    return value


def fraction(value: Any, name: str) -> float:
    """Return the value, if it is a number of at least 0 and less than 1."""
    if not (_is_finite_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}={value!r}: a number in [0, 1) is needed")
    return value


def each_field(settings: Any, check: Callable[..., Any], *names: str, **limits: Any) -> None:
    """Apply one check to several fields of an object with settings.

    >>> from types import SimpleNamespace
    >>> each_field(SimpleNamespace(width=32, steps=0), whole_number, "width", "steps", at_least=1)
    Traceback (most recent call last):
    ValueError: steps=0: a whole number of at least 1 is needed
    """
    for name in names:
        check(getattr(settings, name), name, **limits)


def one_of(value: Any, name: str, choices: Iterable[str]) -> str:
    """Return the value, if it is one of the choices."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r}: there are {', '.join(map(repr, known))}")
    return value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like this one, as an addition to an error; nothing if none is like it.

    >>> did_you_mean("revers", ["reverse", "forward"])
    " (did you mean 'reverse'?)"
    >>> did_you_mean("x", ["reverse", "forward"])
    ''
    """
    likely = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {likely[0]!r}?)" if likely else ""


def a_function(value: Any, name: str, signature: str) -> None:
    """Raise a TypeError unless the value can be called. The message shows how it would be called."""
    if not callable(value):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); a function is needed, called as {signature}")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
