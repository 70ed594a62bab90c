"""Comparison of the hypergradients of several methods with the exact hypergradient, at the same point."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bilevel import checks, trees
from bilevel.batches import Batches
from bilevel.estimators import Estimate, Estimator, Reverse
from bilevel.estimators.names import describe
from bilevel.problem import BilevelProblem, Unrollable, as_problem
from bilevel.report.peak_memory import PeakMemory
from bilevel.report.progress import bar
from bilevel.unrolling import argument_checks
from bilevel.unrolling.short_check import short_check
from bilevel.unrolling.unroll import unroll


@dataclass(frozen=True)
class ComparisonRow:
    """A row of the result of `compare`, for one method.

    Errors are relative to ‖exact‖, and squared errors are relative to ‖exact‖².
    """

    estimator: str
    repeats: int
    """The number of estimates, each with other random directions; 1 for a deterministic method."""
    relative_error: float
    """The square root of the mean of ‖grad − exact‖²/‖exact‖² over the draws."""
    squared_bias: float | None
    """An unbiased estimate of ‖E grad − exact‖², which can be slightly negative; `None` for one random draw."""
    variance: float | None
    """An estimate of E‖grad − E grad‖²; `None` for one random draw."""
    cosine: float
    """The cosine of the angle between grad and exact, averaged over the draws."""
    standard_error: float | None
    """The error that the estimator itself reports, as the root mean square over the draws."""
    half_widths: dict[str, float]
    """Half the widths of the 95 % confidence intervals (jackknife over the draws) of `relative_error`,
    `squared_error`, its square, `squared_bias`, `variance` and `cosine`; empty for fewer than three draws."""
    units: float
    """Process time divided by that of the inner loop without derivatives. Times are the best of up to three."""
    seconds: float
    """Wall time of one estimate."""
    peak_memory_bytes: int | None
    """The peak memory of a call in bytes, above the memory before it. On a GPU it is torch's memory, on a CPU the
    resident memory of the process, which is sampled; `None` if the system does not report it."""
    compile_seconds: float | None = None
    """Seconds that this method took to compile, before it was timed; `None` if the problem is not compiled."""


def compare(
    problem: BilevelProblem | Unrollable,
    meta: Any,
    inner_batches: Batches | int | None = None,
    outer_batch: Any = None,
    seed: int = 0,
    *,
    estimators: Sequence[Estimator],
    exact: Estimator | None = None,
    repeats: int = 1,
    progress: bool = False,
) -> list[ComparisonRow]:
    """Estimate one hypergradient by several methods and compare each with the exact one.

    A problem with `compile=True` is compiled again for each method, before the method is timed. The exact hypergradient
    and the inner loop that defines the unit are computed without compiling.

    Args:
        problem: the bilevel problem.
        meta: φ, the point at which to compare.
        inner_batches: T batches by random access, or the whole number T for a problem without data.
        outer_batch: passed to the outer loss.
        seed: the seed, which is the same for all methods.
        estimators: the methods to compare.
        exact: the method whose result counts as exact; `Reverse("sqrt")` by default.
        repeats: the number of draws of random directions for each random method, at the same initialisation and
            dropout. With two or more, bias and variance are reported separately.
        progress: whether to show a progress bar.

    Returns:
        A row for each method, in the order of `estimators`.

    Raises:
        TypeError, ValueError: an argument cannot be used, or the exact hypergradient is zero.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> (row,) = bilevel.compare(
    ...     problem, torch.tensor(1.0), 2, estimators=[bilevel.TruncatedReverse(1)]
    ... )
    >>> row.estimator, round(row.relative_error, 3)  # 0.5 instead of 0.75
    ('truncated-reverse', 0.333)
    """
    checks.whole_number(repeats, "repeats")
    problem = as_problem(problem)
    run = unroll(problem, meta, inner_batches, outer_batch, seed).eager
    rows: list[ComparisonRow] = []
    with bar("comparing", len(estimators) + 1, show=progress) as shown:
        truth = (exact or Reverse("sqrt"))(run.problem, meta, inner_batches, outer_batch, seed)
        argument_checks.one_outer_loss(
            truth.value,
            "compare measures errors of the gradient of",
            ", or compare the estimates themselves, which take the vector",
        )
        length = float(trees.squared_norm(trees.leaves(truth.grad)).sqrt())
        if length == 0:
            raise ValueError(
                "the exact hypergradient is zero here: relative errors have no meaning; take another point"
            )
        _, plain, _ = _timed(lambda: run.descend(run.start()))
        shown.advance("exact")
        for estimator in estimators:
            call = partial(_call, problem.not_yet_compiled(), meta, inner_batches, outer_batch, seed)
            compiling = call(estimator).compile_seconds if run.problem is not problem else None
            with PeakMemory() as memory:
                first, process, wall = _timed(partial(call, estimator))
            resolved = estimator.resolved(run)
            draws = repeats if resolved.is_random else 1
            found = [first, *(call(resolved.redrawn(number)) for number in range(1, draws))]
            row = _compared(describe(estimator), resolved, found, truth, length, process / plain, wall, memory.peak)
            rows.append(replace(row, compile_seconds=compiling))
            shown.advance(rows[-1].estimator)
    return rows


def as_dicts(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """Return the rows as dicts, for JSON."""
    return [asdict(row) for row in rows]


def _call(problem: Any, meta: Any, inner_batches: Any, outer_batch: Any, seed: int, estimator: Estimator) -> Estimate:
    with short_check(False):  # the exact estimate was checked, and clocks and memory are those of the method alone
        return estimator(problem, meta, inner_batches, outer_batch, seed)


def _compared(
    name: str,
    estimator: Estimator,
    found: Sequence[Estimate],
    truth: Estimate,
    length: float,
    units: float,
    seconds: float,
    peak_memory_bytes: int | None,
) -> ComparisonRow:
    exact = _flat(truth.grad)
    grads = np.stack([_flat(estimate.grad) for estimate in found])
    errors = (grads - exact) / length
    products, own = errors @ errors.T, np.linalg.norm(grads, axis=1)
    cosines = np.where(own > 0, grads @ exact / (length * np.where(own > 0, own, 1)), 0.0)
    values = _statistics(products, cosines)
    claimed = [None if e.standard_error is None else (float(e.standard_error) / length) ** 2 for e in found]
    known = [c for c in claimed if c is not None]
    if not estimator.is_random:  # the whole error is bias
        values["squared_bias"], values["variance"] = values["squared_error"], 0.0
    return ComparisonRow(
        estimator=name,
        repeats=len(found),
        relative_error=values["relative_error"],
        squared_bias=values.get("squared_bias"),
        variance=values.get("variance"),
        cosine=values["cosine"],
        standard_error=float(np.mean(known)) ** 0.5 if known else None,
        half_widths=_half_widths(products, cosines),
        units=units,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes,
    )


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([leaf.detach().double().cpu().reshape(-1).numpy() for leaf in trees.leaves(tree)])


def _statistics(products: np.ndarray, cosines: np.ndarray) -> dict[str, float]:
    """Compute the statistics from the inner products e_r · e_s `[R, R]` of the errors.

    The products of different draws have the mean ‖bias‖².
    """
    count, own = len(products), float(np.trace(products)) / len(products)
    found = {"squared_error": own, "relative_error": max(own, 0.0) ** 0.5, "cosine": float(cosines.mean())}
    if count > 1:
        bias = float(products.sum() - np.trace(products)) / (count * (count - 1))
        found |= {"squared_bias": bias, "variance": own - bias}
    return found


def _half_widths(products: np.ndarray, cosines: np.ndarray) -> dict[str, float]:
    """Compute 1.96 jackknife standard errors of each statistic that is still defined with one draw left out."""
    count = len(products)
    if count < 3:
        return {}
    without = [_statistics(np.delete(np.delete(products, r, 0), r, 1), np.delete(cosines, r)) for r in range(count)]
    table = {name: np.array([each[name] for each in without]) for name in without[0]}
    return {name: float(1.96 * np.sqrt((count - 1) * np.var(values))) for name, values in table.items()}


def _timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result, and the shortest process time and wall time of up to three calls.

    The first call may include the cost of things that torch sets up only once, so short calls are repeated.
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
