"""Checks of settings return the value, or name it with what was passed and what is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from bilevel import checks


@pytest.mark.parametrize("value", [0, 0.0, 0.5, numpy.float64(0.99)])
def test_fractions(value: float) -> None:
    assert checks.fraction(value, "momentum") == value


@pytest.mark.parametrize("wrong", [1, 1.5, -0.1, float("nan"), float("inf"), "0.5", None, True])
def test_what_is_no_fraction_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"momentum=.*: a number in \[0, 1\) is needed"):
        checks.fraction(wrong, "momentum")


def test_each_field_is_checked_with_the_same_limits() -> None:
    settings = SimpleNamespace(width=3, steps=2, depth=1)
    checks.each_field(settings, checks.whole_number, "width", "steps", "depth")
    checks.each_field(settings, checks.whole_number, "width", "steps", at_least=2)
    with pytest.raises(ValueError, match="depth=1: a whole number of at least 2 is needed"):
        checks.each_field(settings, checks.whole_number, "width", "steps", "depth", at_least=2)
