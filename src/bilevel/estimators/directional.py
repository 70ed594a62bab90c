"""What estimators with random directions have in common: their settings, and the gradient made from slopes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bilevel import checks, distributed, trees
from bilevel.directions import control_variates, distributions
from bilevel.directions.distributions import Directions
from bilevel.distributed.communication import EXCHANGES, Exchange
from bilevel.estimators import variates
from bilevel.estimators.base import Estimate, like_meta
from bilevel.estimators.variates import ControlVariate
from bilevel.trees import Tree
from bilevel.unrolling.unroll import Unroll


class Settings(Protocol):
    """The settings that these estimators share."""

    @property
    def directions(self) -> int: ...

    @property
    def distribution(self) -> str: ...

    @property
    def control_variate(self) -> ControlVariate | None: ...

    @property
    def draw(self) -> int: ...

    @property
    def exchange(self) -> Exchange: ...


def check_settings(settings: Settings) -> None:
    """Raise for a setting that is not what it should be."""
    checks.whole_number(settings.directions, "directions")
    distributions.distribution(settings.distribution)
    checks.whole_number(settings.draw, "draw", at_least=0)
    checks.one_of(settings.exchange, "exchange", EXCHANGES)
    if variates.as_tuple(settings.control_variate) and settings.directions == 1:
        raise ValueError("control_variate with directions=1: its scale is fitted to the other directions; take two")


def directions_of(
    settings: Settings,
    run: Unroll,
    exact_instead: str,
    seed: int | None = None,
    support: Sequence[Tensor] | None = None,
) -> Directions:
    """Return the directions of an estimate, or raise if there are more of them than meta parameters.

    Args:
        settings: of the estimator.
        run: the inner loop.
        exact_instead: what an error says about the exact gradient.
        seed: `None` for the seed of the estimate.
        support: for each leaf of φ a mask of the entries in which directions may differ from 0.
    """
    seed = distributions.seed_of_draw(run.seed if seed is None else seed, settings.draw)
    directions = Directions(settings.distribution, seed, settings.directions, trees.leaves(run.meta), support)
    directions.require_count(exact_instead)
    return directions


def estimate_from_slopes(
    settings: Settings,
    run: Unroll,
    directions: Directions,
    value: Tensor,
    state: Tree,
    slopes: Tensor,
    gradients: Sequence[Sequence[Tensor]],
    at_once: int = control_variates.DRAWN_AT_ONCE,
) -> Estimate:
    """Return the estimate from the slopes of all directions and the gradients of all control variates.

    Args:
        settings: of the estimator.
        run: the inner loop.
        directions: v_1 … v_b.
        value: the outer loss.
        state: θ_T.
        slopes: ∇h · v_i `[b]`, all of them on every worker; for a vector of m outer losses `[b, m]`.
        gradients: for each control variate its gradient, one tensor for each leaf of φ; for a vector of outer losses
            `[m, *leaf.shape]`, or `[*leaf.shape]` for a variate that is the same for all of them.
        at_once: how many directions may be in memory together.
    """
    leaves, count = trees.leaves(run.meta), len(value) if value.ndim else 1
    variates_of_each = [
        control_variates.scaled(
            [[_of_entry(part, leaf, j, count, value) for part, leaf in zip(g, leaves, strict=True)] for g in gradients],
            leaves,
            directions.support,
        )
        for j in range(count)
    ]
    scaled = variates_of_each[0]
    if value.ndim:
        scaled = [torch.stack(each) for each in zip(*variates_of_each, strict=True)]
    workers = distributed.current()
    found = control_variates.combine(directions, slopes, scaled, at_once, workers, settings.exchange)
    left = {} if found.variance_left is None else {"variance_left": found.variance_left}
    return Estimate(value, like_meta(run, found.grad), state, found.standard_error, left)


def _of_entry(part: Tensor, leaf: Tensor, number: int, count: int, value: Tensor) -> Tensor:
    """Return the control variate of one entry of the outer loss, for one leaf of φ."""
    if part.shape == leaf.shape:
        return part
    if not value.ndim or part.shape != (count, *leaf.shape):
        entries = f" or {(count, *leaf.shape)}, one for each of {count} outer losses," if value.ndim else ""
        raise ValueError(
            f"a control variate has a gradient of shape {tuple(part.shape)} for a meta parameter of shape "
            f"{tuple(leaf.shape)}; the same shape{entries} is needed"
        )
    return part[number]
