"""Verdicts on claimed derivatives: right, wrong, and what cannot be judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel.report.findings import Verdict
from bilevel.unrolling.derivative_checks import directions_like, judged, judged_product
from bilevel.unrolling.stopped_gradients import AnotherPathError


def outputs(*functions: Callable[[float], float]) -> Callable[[float], list[Tensor]]:
    return lambda e: [torch.tensor([f(e)], dtype=torch.float64) for f in functions]


def claimed(*slopes: float) -> list[Tensor]:
    return [torch.tensor([slope], dtype=torch.float64) for slope in slopes]


CASES = {
    "right": (claimed(3.0), outputs(lambda e: (1 + e) ** 3), Verdict.RIGHT),
    "strongly curved": (claimed(1e4), outputs(lambda e: (1 + 1e4 * e) ** 3 / 3), Verdict.RIGHT),
    "wrong by a factor": (claimed(3.1), outputs(lambda e: (1 + e) ** 3), Verdict.WRONG),
    "wrong sign": (claimed(-3.0), outputs(lambda e: (1 + e) ** 3), Verdict.WRONG),
    "lost": (claimed(0.0), outputs(lambda e: (1 + e) ** 3), Verdict.WRONG),
    "not a number": (claimed(float("nan")), outputs(lambda e: (1 + e) ** 3), Verdict.WRONG),
    "zero": (claimed(0.0), outputs(lambda e: 1.0), Verdict.RIGHT),
    "a small leaf is lost": (claimed(3.0, 0.0), outputs(lambda e: (1 + e) ** 3, lambda e: 1e-4 * e), Verdict.WRONG),
    "a small leaf is right": (claimed(3.0, 1e-4), outputs(lambda e: (1 + e) ** 3, lambda e: 1e-4 * e), Verdict.RIGHT),
    "a kink at the point": (claimed(1.0), outputs(lambda e: max(e, 0.0)), Verdict.UNJUDGED),
    "a kink nearby": (claimed(1.0), outputs(lambda e: e + max(e - 3e-5, 0.0)), Verdict.RIGHT),
    "a jump": (claimed(1.0), outputs(lambda e: e + (e > 0)), Verdict.UNJUDGED),
    "rounding": (claimed(0.0), outputs(lambda e: 1.0 + 1e-15 * ((1e9 * e) % 7)), Verdict.RIGHT),
    "not finite ahead": (claimed(1.0), outputs(lambda e: float("inf") if e > 0 else e), Verdict.UNJUDGED),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str) -> None:
    slopes, at, verdict = CASES[name]
    assert judged(slopes, at).verdict is verdict


@pytest.mark.parametrize(("slope", "verdict"), [(3.0, Verdict.RIGHT), (2.0, Verdict.WRONG), (0.0, Verdict.WRONG)])
def test_verdicts_on_products(slope: float, verdict: Verdict) -> None:
    weights = claimed(2.0, -1.0)
    at = outputs(lambda e: (1 + e) ** 3, lambda e: e)
    assert judged_product(2 * slope - 1, weights, at).verdict is verdict


def test_the_worst_leaf_is_named() -> None:
    found = judged(claimed(3.0, 7.0), outputs(lambda e: (1 + e) ** 3, lambda e: e), ["a", "b"])
    assert (found.verdict, found.worst) == (Verdict.WRONG, "b")


def test_another_path_cannot_be_judged() -> None:
    def at(epsilon: float) -> list[Tensor]:
        raise AnotherPathError

    assert judged(claimed(1.0), at).verdict is Verdict.UNJUDGED


def test_directions_have_the_size_of_each_tensor_and_are_reproducible() -> None:
    tensors = [1e3 * torch.ones(50), torch.zeros(50), torch.tensor([0.0, 2.0])]
    first, second = directions_like(tensors, 3), directions_like(tensors, 3)
    assert all(map(torch.equal, first, second))
    assert 500 < first[0].norm() / 50**0.5 < 2000
    assert first[1].any(), "zeros are moved too"
    entrywise = directions_like(tensors, 3, entrywise=True)
    assert not entrywise[1].any()
    assert entrywise[2][0] == 0
