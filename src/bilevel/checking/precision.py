"""The seventh part of a check: how many digits of the hypergradient survive in the user's dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from bilevel import trees
from bilevel.checking.subject import Subject, described
from bilevel.estimators import Reverse
from bilevel.report.findings import Finding, Verdict

PART = "precision"
_ENOUGH, _HALF = 0.1, 0.5
"""The relative errors up to which a hypergradient counts as right, and from which it counts as wrong."""


def compare_precision(subject: Subject) -> Iterator[Finding]:
    """Yield a row on the hypergradient in the user's dtype beside the one in float64, at the same random numbers."""
    tested = f"hypergradient in {str(subject.dtype).removeprefix('torch.')}"
    double = subject.double
    if subject.dtype == torch.float64:
        yield Finding(PART, tested, Verdict.RIGHT, "this is double precision")
        return
    if isinstance(double, str):
        yield Finding(PART, tested, Verdict.NOT_CHECKED, f"no double precision to compare with: {double}")
        return
    try:
        estimator = Reverse("sqrt")
        rough = estimator(subject.problem, subject.meta, subject.inner_batches, subject.outer_batch, subject.seed)
        fine = estimator(double.problem, double.meta, double.inner_batches, double.outer_batch, double.seed)
    except Exception as error:
        yield Finding(PART, tested, Verdict.UNJUDGED, described(error))
        return
    gap = [a.double() - b for a, b in zip(trees.leaves(rough.grad), trees.leaves(fine.grad), strict=True)]
    size = float(trees.squared_norm(trees.leaves(fine.grad)).sqrt())
    error = float(trees.squared_norm(gap).sqrt()) / size if size else math.inf
    digits = max(-math.log10(error), 0.0) if error > 0 else 16.0
    found = f"{digits:.1f} digits survive: {100 * error:.2g} % of the hypergradient is rounding"
    numbers = {"relative": error, "digits": digits}
    if error <= _ENOUGH:
        yield Finding(PART, tested, Verdict.RIGHT, found, "", numbers)
        return
    advice = "keep the parameters of the inner loop in float32 (autocast inside the loss), or take fewer steps"
    yield Finding(PART, tested, Verdict.WRONG if error > _HALF else Verdict.UNJUDGED, found, advice, numbers)
