"""Methods side by side: each one's hypergradient at the same point, against the exact one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bilevel import trees
from bilevel.batches import Batches
from bilevel.estimators import Estimate, Estimator, Reverse
from bilevel.estimators.names import describe
from bilevel.problem import BlackBox, Unrollable
from bilevel.progress import bar
from bilevel.unroll import unroll


@dataclass(frozen=True)
class Compared:
    """How one method did."""

    estimator: str
    relative_error: float
    """‖grad − exact‖ / ‖exact‖."""
    cosine: float
    """Of the angle between grad and exact."""
    standard_error: float | None
    """As the estimator itself reports it, relative to ‖exact‖."""
    units: float
    """Process time over that of the inner loop alone, run plainly. Times are the best of up to three."""
    seconds: float


def compare(
    problem: Unrollable | BlackBox,
    meta: Any,
    inner_batches: Batches | None = None,
    outer_batch: Any = None,
    seed: int = 0,
    *,
    estimators: Sequence[Estimator],
    exact: Estimator | None = None,
    progress: bool = False,
) -> list[Compared]:
    """Estimate one hypergradient by several methods and compare each with the exact one.

    Args:
        problem: as in the call of an estimator, and so are `meta`, the batches and `seed`.
        meta: φ, the point at which to compare.
        inner_batches: T batches by random access.
        outer_batch: passed to the outer loss.
        seed: the same for all methods.
        estimators: what to compare.
        exact: what to compare with; `Reverse("sqrt")` by default.
        progress: show a progress bar.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> (row,) = bilevel.compare(
    ...     problem, torch.tensor(1.0), bilevel.no_batches(2), estimators=[bilevel.TruncatedReverse(1)]
    ... )
    >>> row.estimator, round(row.relative_error, 3)  # 0.5 instead of 0.75
    ('truncated-reverse', 0.333)
    """
    run = unroll(problem, meta, inner_batches, outer_batch, seed)
    rows: list[Compared] = []
    with bar("comparing", len(estimators) + 1, show=progress) as shown:
        truth = (exact or Reverse("sqrt"))(problem, meta, inner_batches, outer_batch, seed)
        length = float(trees.squared_norm(trees.leaves(truth.grad)).sqrt())
        if length == 0:
            raise ValueError(
                "the exact hypergradient is zero here: relative errors have no meaning; take another point"
            )
        _, plain, _ = _timed(lambda: run.descend(run.start()))
        shown.advance("exact")
        for estimator in estimators:
            found, process, wall = _timed(lambda e=estimator: e(problem, meta, inner_batches, outer_batch, seed))
            rows.append(_compared(describe(estimator), found, truth, length, process / plain, wall))
            shown.advance(rows[-1].estimator)
    return rows


def as_dicts(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """The rows as dicts, for JSON."""
    return [asdict(row) for row in rows]


def _compared(name: str, found: Estimate, truth: Estimate, length: float, units: float, seconds: float) -> Compared:
    grad, exact = trees.leaves(found.grad), trees.leaves(truth.grad)
    difference = [a - b for a, b in zip(grad, exact, strict=True)]
    own_length = float(trees.squared_norm(grad).sqrt())
    return Compared(
        estimator=name,
        relative_error=float(trees.squared_norm(difference).sqrt()) / length,
        cosine=float(trees.dot(grad, exact)) / (length * own_length) if own_length > 0 else 0.0,
        standard_error=None if found.standard_error is None else found.standard_error / length,
        units=units,
        seconds=seconds,
    )


def _timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, and the least process time and wall time of up to three calls.

    A first call may pay for what torch sets up only once, so short ones are repeated.
    """
    process_times: list[float] = []
    wall_times: list[float] = []
    result = None
    while len(wall_times) < 3 and sum(wall_times) < 2:
        wall, process = time.perf_counter(), time.process_time()
        result = function()
        process_times.append(time.process_time() - process)
        wall_times.append(time.perf_counter() - wall)
    least = max(min(process_times), time.get_clock_info("process_time").resolution)
    return result, least, min(wall_times)
