"""Comparison of directional derivatives in bf16 and in float32, along the same directions."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import bilevel
from bilevel import trees
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.problem import problem
from bilevel.tasks.task import Setup

_DIRECTIONS, _STEPS, TOLERANCE = 4, 3, 0.05


def difference(config: OnlineLM, model: Any, setup: Setup, seed: int) -> float:
    """Compute ‖w₁₆ − w₃₂‖/‖w₃₂‖ of the slopes w along four directions, over the first three documents."""
    inner = setup.inner_batches_of(0)
    few = [inner[t] for t in range(min(_STEPS, len(inner)))]
    estimator = bilevel.ForwardGradient(_DIRECTIONS, chunk_size=1)
    found = []
    for precision in ("float32", "bfloat16"):
        there = problem(dataclasses.replace(config, precision=precision), model)
        estimate = estimator(there, setup.meta, few, setup.outer_batch_of(0), seed)
        found.append(trees.leaves(estimate.grad))
    error = [a - b for a, b in zip(*found, strict=True)]
    return float((trees.squared_norm(error) / trees.squared_norm(found[0])).sqrt())


def warn_if_off(config: OnlineLM, model: Any, setup: Setup, seed: int) -> float | None:
    """Compare bf16 with float32, if bf16 is used. Warn if the relative difference is more than five percent."""
    if config.precision == "float32":
        return None
    error = difference(config, model, setup, seed)
    if not error <= TOLERANCE:
        warnings.warn(
            f"directional derivatives in bfloat16 are {error:.1%} off those in float32, more than {TOLERANCE:.0%}: the "
            "hypergradient has an error of this size with every estimator; take precision=float32",
            stacklevel=2,
        )
    return error
