"""Bad settings of estimators, and settings that do not fit the problem."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bad_input_cases import INF, KEEP, NAN, PHI, START, Row, descent, plain_table, refused, sgd

import bilevel

NOT_WHOLE = [0, -1, True, 1.5, "2", NAN]


NOT_POSITIVE = [0, 0.0, -1e-3, NAN, INF, True, "0.1", torch.tensor([1.0, 2.0])]


CG, NEUMANN, NYSTROM = bilevel.ConjugateGradient, bilevel.Neumann, bilevel.Nystrom


SETTINGS: list[tuple[Any, str, list[Any], list[str]]] = [
    (
        bilevel.Reverse,
        "checkpoints",
        [0, -1, True, 1.5, "all ", "half", None],
        ['"all", "sqrt", "log", "graph"', ">= 1"],
    ),
    (bilevel.Reverse, "offload", ["tape", 1], ["'cpu', 'disk'"]),
    (bilevel.Auto, "directions", NOT_WHOLE, ["a whole number of at least 1"]),
    (bilevel.TruncatedReverse, "steps", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.Forward, "chunk_size", NOT_WHOLE, ["a whole number of at least 1"]),
    (bilevel.ForwardGradient, "directions", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.ForwardGradient, "chunk_size", NOT_WHOLE, ["a whole number of at least 1"]),
    (
        bilevel.ForwardGradient,
        "distribution",
        ["normal", "Rademacher", None, ["gaussian"]],
        ["'rademacher', 'gaussian'"],
    ),
    (bilevel.ZerothOrder, "directions", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.ZerothOrder, "step_size", [*NOT_POSITIVE, None], ["a positive number"]),
    (bilevel.ZerothOrder, "scheme", ["backward", "Central", None, 2], ["'central', 'forward'"]),
    (bilevel.ZerothOrder, "distribution", ["uniform"], ["'coordinate'"]),
    (bilevel.Implicit, "batches", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.HessianFree, "scale", [*NOT_POSITIVE, None], ["a positive number"]),
    (bilevel.HessianFree, "preconditioner", ["adam", "optimiser", None], ["'identity', 'optimizer'"]),
    (CG, "iterations", NOT_WHOLE, ["a whole number of at least 1"]),
    (CG, "tolerance", [-1e-9, NAN, INF, "1e-6", True], ["a number of at least 0"]),
    (CG, "damping", [-1e-9, NAN, INF, None], ["a number of at least 0"]),
    (NEUMANN, "iterations", NOT_WHOLE, ["a whole number of at least 1"]),
    (NEUMANN, "step_size", NOT_POSITIVE, ["a positive number"]),
    (NYSTROM, "rank", NOT_WHOLE, ["a whole number of at least 1"]),
    (NYSTROM, "damping", [*NOT_POSITIVE, None], ["a positive number"]),
]


@pytest.mark.parametrize(
    ("made", "setting", "value", "fragments"),
    [
        pytest.param(made, setting, value, fragments, id=f"{made.__name__}-{setting}-{value!r}")
        for made, setting, values, fragments in SETTINGS
        for value in values
    ],
)
def test_settings(made: Any, setting: str, value: Any, fragments: list[str]) -> None:
    refused(ValueError, f"{setting}={value!r}", *fragments, by=lambda: made(**{setting: value}))


@pytest.mark.parametrize("solver", ["cg", CG, None, abs], ids=repr)
def test_a_solver_that_is_none(solver: Any) -> None:
    fragments = [f"solver is {solver!r}", "ConjugateGradient(iterations=20)", "Neumann(", "Nystrom("]
    refused(TypeError, *fragments, by=lambda: bilevel.Implicit(solver))


MEASURED = [
    Row(
        "more steps than there are",
        lambda: bilevel.TruncatedReverse(4)(descent(), PHI, bilevel.no_batches(3)),
        ValueError,
        ["TruncatedReverse(steps=4)", "3 steps", "steps <= 3", "Reverse()"],
    ),
    Row(
        "more directions than meta parameters",
        lambda: bilevel.ForwardGradient(3)(descent(), PHI, bilevel.no_batches(3)),
        ValueError,
        ["directions=3 for 2 meta parameters", "Forward() gives the exact gradient", "directions <= 2"],
    ),
    Row(
        "more directions than the one meta parameter",
        lambda: bilevel.ZerothOrder(2)(descent(), torch.tensor(1.0), bilevel.no_batches(3)),
        ValueError,
        ["directions=2 for 1 meta parameter:", "directions <= 1"],
    ),
    Row(
        "more batches for the loss than there are",
        lambda: bilevel.Implicit(batches=4)(descent(), PHI, bilevel.no_batches(3)),
        ValueError,
        ["Implicit(batches=4)", "3 batches", "batches <= 3"],
    ),
    Row(
        "learning rates for other parameters",
        lambda: bilevel.Reverse()(
            descent(
                lambda thetas, phi, batch: torch.stack(thetas).sum(),
                params=[START.clone() for _ in range(3)],
                optimizer=sgd(lr=list),
            ),
            PHI,
            bilevel.no_batches(3),
        ),
        ValueError,
        ["lr gave", "for 3 parameters"],
    ),
]


@plain_table(MEASURED)
def test_settings_that_do_not_fit_the_problem(row: Row) -> None:
    refused(row.exception, *row.fragments, by=row.call)


def test_settings_that_just_fit() -> None:
    assert math.isclose(bilevel.TruncatedReverse(3)(descent(), PHI, bilevel.no_batches(3)).grad[0], 1 - KEEP**3)
    started = descent(params=lambda phi: phi**2)
    reached = bilevel.TruncatedReverse(3)(started, PHI, bilevel.no_batches(3)).grad
    assert torch.equal(reached, bilevel.Reverse()(started, PHI, bilevel.no_batches(3)).grad)
    for estimator in (bilevel.ForwardGradient(2), bilevel.ZerothOrder(2), bilevel.Implicit(batches=3)):
        assert torch.isfinite(estimator(descent(), PHI, bilevel.no_batches(3)).grad).all()
