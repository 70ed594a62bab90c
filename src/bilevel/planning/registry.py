"""The list of all estimators. The command line's names and settings follow from it.

A new estimator joins with one entry in `ESTIMATORS`; `docs/new_estimator.md` describes the steps.
"""

from __future__ import annotations

from typing import Any

from bilevel.estimators import names
from bilevel.estimators.base import Estimator
from bilevel.estimators.first_order import FirstOrder
from bilevel.estimators.forward import Forward
from bilevel.estimators.forward_gradient import ForwardGradient
from bilevel.estimators.hessian_free import HessianFree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.persistent_es import PersistentES
from bilevel.estimators.reverse import Reverse
from bilevel.estimators.single_loop import SingleLoop
from bilevel.estimators.streaming_forward_gradient import StreamingForwardGradient
from bilevel.estimators.truncated_reverse import TruncatedReverse
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.planning.auto import Auto

ESTIMATORS: tuple[type[Estimator], ...] = (
    Reverse,
    TruncatedReverse,
    Forward,
    ForwardGradient,
    StreamingForwardGradient,
    ZerothOrder,
    PersistentES,
    Implicit,
    HessianFree,
    Penalty,
    SingleLoop,
    FirstOrder,
    Auto,
)
"""All estimators, in the order in which they are listed."""


def by_name() -> dict[str, type[Estimator]]:
    """Return all estimators by their names on the command line, such as `forward-gradient`."""
    return names.by_name(ESTIMATORS)


def read(text: str) -> tuple[type[Estimator], dict[str, Any]]:
    """Return the estimator that a text names and the settings in it, which are not checked yet.

    >>> read("forward-gradient(directions=32)")
    (<class 'bilevel.estimators.forward_gradient.ForwardGradient'>, {'directions': 32})
    """
    return names.read(text, ESTIMATORS)


def parse(text: str, **defaults: Any) -> Estimator:
    """Return the estimator that a text describes.

    Args:
        text: the name of an estimator, with settings in parentheses.
        defaults: settings that the text may override.

    >>> parse("forward-gradient(directions=32)", chunk_size=8).chunk_size
    8
    >>> parse("forward-gradient(control_variate=truncated-reverse(steps=5), directions=32)").control_variate
    TruncatedReverse(steps=5, chunk_size=None)
    >>> parse("implicit(solver=neumann(iterations=5))").solver
    Neumann(iterations=5, step_size=0.01)
    """
    return names.parse(text, ESTIMATORS, **defaults)
