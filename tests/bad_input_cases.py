"""Good problems and calls of every estimator, to be spoiled by one bad input at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from estimator_table import ROWS
from torch import Tensor

import bilevel

NAN, INF = float("nan"), float("inf")
RATE = 0.1

ESTIMATORS = {name: estimator for row in ROWS.values() for name, estimator in row.small.items()}
EVERY = list(ESTIMATORS)
ROW_OF = {name: row for row in ROWS.values() for name in row.small}
DERIVATIVES = [name for name in EVERY if ESTIMATORS[name].needs_derivatives]
BLACK_BOX = [name for name in EVERY if name not in DERIVATIVES]
ZEROTH_ORDER = [name for name in EVERY if ROW_OF[name].differences]
FORWARD_MODE = [name for name in EVERY if ROW_OF[name].forward_mode]
IMPLICIT = [name for name in EVERY if ROW_OF[name].needs_inner_loss]
BY_DEFINITION = [name for name in EVERY if ROW_OF[name].own]
"""Those whose value is one of their own; tests/estimators compares it."""
UNROLLED = [name for name in DERIVATIVES if name not in IMPLICIT]
"""Those that take any steps (`Problem`), and differentiate them."""


def quadratic(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Pulls θ to φ."""
    return 0.5 * (theta - phi).square().sum()


def total(theta: Any, phi: Any, batch: Any) -> Tensor:
    """θ_1 + 2θ_2 + …, so that no direction of signs is at right angles to it."""
    return (theta * torch.arange(1.0, theta.numel() + 1).reshape(theta.shape)).sum()


def sgd(**settings: Any) -> Any:
    return bilevel.optimizer(torch.optim.SGD, **{"lr": RATE, **settings})


def descent(
    inner_loss: Any = quadratic, outer_loss: Any = total, params: Any = None, optimizer: Any = None
) -> bilevel.GradientDescent:
    params = torch.tensor([1.0, 2.0]) if params is None else params
    return bilevel.GradientDescent(inner_loss, outer_loss, params, sgd() if optimizer is None else optimizer)


def problem(init: Any = None, step: Any = None, outer_loss: Any = None) -> bilevel.Problem:
    """θ_0 = (1, 1), θ ← θ·φ, unless told otherwise."""
    return bilevel.Problem(
        (lambda phi: torch.ones(2)) if init is None else init,
        (lambda theta, phi, batch: theta * phi) if step is None else step,
        total if outer_loss is None else outer_loss,
    )


def call(name: str, problem: Any = None, meta: Any = None, inner_batches: Any = ..., **others: Any) -> bilevel.Estimate:
    """The estimator of that name on a good problem, but for what is given."""
    return ESTIMATORS[name](
        descent() if problem is None else problem,
        torch.tensor([0.5, -0.5]) if meta is None else meta,
        bilevel.no_batches(3) if inner_batches is ... else inner_batches,
        **others,
    )


def refused(exception: type[Exception], *fragments: str, by: Callable[[], Any]) -> Any:
    """The exception, which must be of exactly that class with all these fragments in its message, and no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # torch's own, on first use
        with pytest.raises(exception) as caught:
            by()
    assert type(caught.value) is exception
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"{missing} missing in: {caught.value}"
    return caught.value


class Row(NamedTuple):
    what: str
    call: Callable[..., Any]
    exception: type[Exception]
    fragments: list[str]
    names: list[str] = EVERY
    """The estimators it is run with."""


def table(rows: list[Row]) -> pytest.MarkDecorator:
    """A test for each row and each of its estimators."""
    cases = [pytest.param(row, name, id=f"{row.what}-{name}") for row in rows for name in row.names]
    return pytest.mark.parametrize(("row", "name"), cases)


def plain_table(rows: list[Row]) -> pytest.MarkDecorator:
    """A test for each row; no estimator is run."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in rows])


def alone(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Without φ."""
    return 0.5 * theta.square().sum()


def frozen_pull(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Pulls θ to φ as it is now."""
    with torch.no_grad():
        target = 1.0 * phi
    return quadratic(theta, target, batch)


def explicit(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Outer loss with φ in it."""
    return theta.sum() + phi.square().sum()


KEEP = 1 - RATE  # what a step leaves of θ under the loss θ²/2


def weighted(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    return batch * quadratic(theta, phi, batch)


PHI = torch.tensor([0.5, -0.5], dtype=torch.float64)


START = torch.tensor([1.0, 2.0], dtype=torch.float64)
