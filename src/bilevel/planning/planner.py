"""Prediction of the memory and the time of each method, and the recommendation of a method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bilevel import checks
from bilevel.batches import Batches
from bilevel.distributed import communication
from bilevel.estimators.base import Estimator
from bilevel.estimators.forward import Forward
from bilevel.estimators.forward_gradient import ForwardGradient
from bilevel.estimators.hessian_free import HessianFree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.reverse import Reverse
from bilevel.estimators.truncated_reverse import TruncatedReverse
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.planning import step_costs
from bilevel.planning.step_costs import Price, PricePerDirection, StepCosts
from bilevel.problem import BilevelProblem, Unrollable
from bilevel.unrolling import checkpoint_schedules
from bilevel.unrolling.unroll import Unroll, unroll

_TRUNCATION = 10
_FEW = 16
_USABLE = 0.1
"""The signal-to-noise ratio above which a random estimate is preferred to a biased one. An outer optimiser with the
usual momentum of 0.9 averages about ten estimates. Ten estimates with this ratio have as much signal as noise."""
_BIASED = (TruncatedReverse, HessianFree, Implicit, Penalty)
"""Biased methods in the order of recommendation. Truncation needs neither convergence nor curvature, and its bias
decreases with its number of steps. `HessianFree` needs neither of them. `Implicit` is wrong unless the inner loop has
converged. `Penalty` also needs convergence, and has a further error of O(1/λ)."""
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class PlanRow:
    """A row of a `Plan`: one method, and its predicted error, memory and time."""

    estimator: Estimator
    relative_variance: float | None
    """E‖grad − ∇h‖²/‖∇h‖²: 0 for exact methods, `None` for biased methods, whose error is not known beforehand."""
    units: float
    """Cost in inner gradients, by the formulas in the docstrings of the estimators."""
    bytes: float
    """Bytes of the tensors alive at the peak, in addition to the model and the meta parameters."""
    seconds: float
    fits: bool
    exchange: str | None = None
    """The data that several workers send to each other, "slopes" or "gradient" (`bilevel.distributed.communication`);
    `None` if they do not share this method's work."""
    sent_bytes: float | None = None
    """Bytes that each worker sends for one estimate."""

    @property
    def biased(self) -> bool:
        """Whether an error, of unknown size, would remain with any number of random directions."""
        return self.relative_variance is None

    @property
    def signal_to_noise(self) -> float | None:
        """The ratio ‖∇h‖²/E‖grad − ∇h‖² of one estimate; infinite for exact methods, `None` for biased methods."""
        if self.relative_variance is None:
            return None
        return 1 / self.relative_variance if self.relative_variance else float("inf")

    @property
    def exact(self) -> bool:
        """Whether the method computes ∇h up to rounding. Differences of solves do not, as their error is O(step²)."""
        return self.relative_variance == 0 and not isinstance(self.estimator, ZerothOrder)


@dataclass(frozen=True)
class Plan:
    """The result of `plan`: a row for each method, and the recommended one."""

    rows: list[PlanRow]
    steps: int
    memory: float
    """Bytes that a worker may use, beyond the model and the data."""
    recommended: Estimator | None
    """The method to take; `None` if none fits into the memory."""
    reason: str
    costs: StepCosts
    workers: int = 1


def plan(
    problem: BilevelProblem | Unrollable,
    meta: Any,
    inner_batches: Batches | int | None = None,
    outer_batch: Any = None,
    seed: int = 0,
    *,
    memory: str | float,
    directions: int = 16,
    workers: int = 1,
) -> Plan:
    """Predict the memory and the time of every method for this problem, and recommend one.

    One inner step is measured three times: without derivatives, forwards with tangents, and backwards. The price of
    each method follows from these measurements, T and N. Transfers to the disk are assumed to take no extra time. The
    measurement costs about fifty inner steps. For a problem with `compile=True` the step is measured without compiled
    code.

    Args:
        problem: the bilevel problem.
        meta: φ, the meta parameters.
        inner_batches: T batches by random access, or the whole number T for a problem without data.
        outer_batch: passed to the outer loss.
        seed: the seed of the measured steps.
        memory: the memory that a worker may use, beyond the model and the data: `"8GB"`, `"512MiB"`, or a number of
            bytes.
        directions: b, the number of random directions, at most N.
        workers: the number of workers that share the directions; each carries ⌈b/workers⌉.

    Returns:
        A `Plan`. Of the methods that fit into the memory it recommends the first that exists in this list:

        1. the exact method with the fewest units (with states on disk only if no other fits);
        2. (FG)²U, or else differences of solves, if the signal-to-noise ratio ‖∇h‖²/E‖grad − ∇h‖² = b/(N − 1) of an
           estimate is at least 0.1, so that ten estimates together have as much signal as noise;
        3. a biased method: `TruncatedReverse`, `HessianFree`, `Implicit`, `Penalty`, as far as the problem depends on φ
           in a way that they see;
        4. (FG)²U or differences of solves, whatever their noise.

        `Plan.reason` contains the ratio, and the number of directions at which it would reach 1.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message says what to pass.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: (theta - phi).square().sum(),
    ...     outer_loss=lambda theta, phi, batch: theta.sum(),
    ...     params=torch.zeros(1000),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    ... )
    >>> bilevel.plan(problem, torch.zeros(1000), 400, memory="1MB").recommended.checkpoints
    'sqrt'
    """
    run = unroll(problem, meta, inner_batches, outer_batch, seed)
    return plan_of(run, memory, directions, workers)


def plan_of(run: Unroll, memory: str | float, directions: int, workers: int) -> Plan:
    """Return the plan for an inner loop whose arguments have been checked."""
    run = run.eager  # memory that compiled code allocates can't be counted
    return from_costs(step_costs.measure(run), len(run.inner_batches), memory, directions, workers)


def plan_from_sizes(
    params: float,
    meta_params: float,
    steps: int,
    *,
    memory: str | float,
    directions: int = 16,
    workers: int = 1,
    optimizer_memory: float = 2,
    bytes_per_number: float = 4,
    activation_bytes: float = 0,
    gradient_seconds: float = 1,
) -> Plan:
    """Predict memory and time of every method from sizes only, for a machine that is not available.

    A step that is computed again and differentiated counts as 3 units and three times the activations. A direction
    counts as 2 units and the activations once more.

    Args:
        params: M, the number of inner parameters.
        meta_params: N, the number of meta parameters.
        steps: T, the number of inner steps.
        memory: the memory that a worker may use, beyond the model and the data: `"80GB"`, or a number of bytes.
        directions: b, the number of random directions.
        workers: the number of workers that share the directions.
        optimizer_memory: the number of values that the inner optimiser keeps for each parameter: 0 for SGD, 1 with
            momentum, 2 for Adam.
        bytes_per_number: the number of bytes of a value, 4 for float32.
        activation_bytes: the number of bytes of the activations of one inner forward pass.
        gradient_seconds: the number of seconds of one inner gradient. With 1, all times are in units of one inner
            gradient.

    Returns:
        A `Plan`, as from `plan`.

    Raises:
        ValueError: a number is too small. The message names it.

    >>> plan_from_sizes(1.5e9, 1e5, 100, memory="90GB", optimizer_memory=0).recommended.checkpoints
    'log'
    """
    size = params * bytes_per_number
    state, gradient = size * (1 + optimizer_memory), gradient_seconds
    half = Price(gradient / 2, activation_bytes)
    step = Price(gradient, state + size + activation_bytes)
    paper = StepCosts(
        meta_size=int(meta_params),
        meta_bytes=meta_params * bytes_per_number,
        state_bytes=state,
        plain=step,
        outer=half,
        outer_back=Price(gradient, size + activation_bytes),
        back=Price(3 * gradient, 2 * state + 2 * size + 3 * activation_bytes),
        graph=Price(3 * gradient, state + size + 3 * activation_bytes),
        product=Price(2 * gradient, 2 * size + 3 * activation_bytes),
        pushed=PricePerDirection(step, Price(2 * gradient, state + size + activation_bytes)),
        outer_pushed=PricePerDirection(half, half),
    )
    return from_costs(paper, steps, memory, directions, workers)


def from_costs(prices: StepCosts, steps: int, memory: str | float, directions: int, workers: int) -> Plan:
    """Return the plan that follows from the prices of one step."""
    checks.whole_number(steps, "steps")
    checks.whole_number(directions, "directions")
    checks.whole_number(workers, "workers")
    available = parse_bytes(memory)
    rows = [
        _with_exchange(
            PlanRow(estimator, variance, units, price.bytes, price.seconds, price.bytes <= available), prices, workers
        )
        for estimator, variance, units, price in _predictions(prices, steps, min(directions, prices.meta_size), workers)
    ]
    recommended, reason = _recommendation(rows, prices, available)
    return Plan(rows, steps, available, recommended, reason, prices, workers)


def _with_exchange(row: PlanRow, prices: StepCosts, workers: int) -> PlanRow:
    """Return the row with the data that several workers send each other."""
    if workers == 1 or not isinstance(row.estimator, ForwardGradient | ZerothOrder):
        return row
    size, directions = prices.meta_size, row.estimator.directions
    bytes_per_number = round(prices.meta_bytes / size)
    how = communication.chosen("auto", directions, size, workers, bytes_per_number)
    sent = communication.sent_bytes(how, directions, size, workers, bytes_per_number)
    return replace(row, exchange=how, sent_bytes=sent)


def parse_bytes(text: str | float) -> float:
    """Return a size in bytes from a text such as `"8GB"` or `"512MiB"`, or from a number.

    Raises:
        ValueError: the text is not a size.

    >>> parse_bytes("8GB"), parse_bytes("1.5 KiB"), parse_bytes(100)
    (8000000000.0, 1536.0, 100.0)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?B)?\s*", str(text).upper().replace("E", "e"))
    try:
        size = float(found[1]) * _UNITS[found[2] or "B"] if found else 0.0
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(f"memory={text!r}: write a size such as 8GB or 512MiB, or a number of bytes")
    return size


def _predictions(p: StepCosts, T: int, b: int, workers: int) -> Iterator[tuple[Estimator, float | None, float, Price]]:
    """Yield the estimator, the relative variance, the units and the price of each method."""
    yield from _backward_methods(p, T)
    share = -(-b // workers)
    if p.pushed is not None and p.outer_pushed is not None:
        if p.meta_size <= max(b, _FEW):
            yield _priced(p, Forward(), 0.0, T, _pushed(p, T, p.meta_size))
        units = ForwardGradient(share).units(T, p.meta_size)
        yield ForwardGradient(b), (p.meta_size - 1) / b, units, _pushed(p, T, share)
    solve = T * p.plain.seconds + p.outer.seconds
    price = Price((1 + 2 * share) * solve, 2 * p.state_bytes + 2 * p.meta_bytes + max(p.plain.bytes, p.outer.bytes))
    yield ZerothOrder(b), (p.meta_size - 1) / b, ZerothOrder(share).units(T, p.meta_size), price


def _backward_methods(p: StepCosts, T: int) -> Iterator[tuple[Estimator, float | None, float, Price]]:
    if p.back is None or p.graph is None or p.outer_back is None:
        return
    S, meta = p.state_bytes, 2 * p.meta_bytes
    outer = p.outer_back.seconds
    graph = Price(T * p.graph.seconds + outer, T * p.graph.bytes + S + p.outer_back.bytes)
    yield _priced(p, Reverse("graph"), 0.0, T, graph)
    one_back = max(p.back.bytes, p.outer_back.bytes) + S + meta  # with the cotangent of the state
    for name in ("all", "sqrt", "log"):
        kept = checkpoint_schedules.slots(name, T)
        made = checkpoint_schedules.steps_computed(T, kept)
        # With fewer, the last state but one is not among the kept states, nor the one that a step is compared with.
        held = kept if kept == T else kept + 2
        price = Price(made * p.plain.seconds + T * p.back.seconds + outer, held * S + one_back)
        yield _priced(p, Reverse(name), 0.0, T, price)
    price = Price(T * (p.plain.seconds + p.back.seconds) + outer, 3 * S + one_back)
    yield _priced(p, Reverse("all", offload="disk"), 0.0, T, price)
    there = T * p.plain.seconds + outer
    few = min(_TRUNCATION, T)
    if p.step_depends_on_meta or few == T:
        variance = 0.0 if few == T else None  # the method is exact through all steps
        yield _priced(p, TruncatedReverse(few), variance, T, Price(there + few * p.back.seconds, few * S + one_back))
    if p.product is not None:
        implicit = Implicit()
        products = 2 + implicit.solver.products
        held = 2 * S + meta + max(p.product.bytes, p.outer_back.bytes)
        yield _priced(p, implicit, None, T, Price(there + products * p.product.seconds, held))
        yield _priced(p, HessianFree(), None, T, Price(there + p.product.seconds, held))
        seconds = T * (2 * p.plain.seconds + outer) + p.outer.seconds + outer + 2 * p.plain.seconds
        held = 3 * S + meta + max(p.plain.bytes, p.outer_back.bytes)  # both copies, and the gradient of f
        yield _priced(p, Penalty(), None, T, Price(seconds, held))


def _priced(
    p: StepCosts, estimator: Estimator, variance: float | None, T: int, price: Price
) -> tuple[Estimator, float | None, float, Price]:
    return estimator, variance, estimator.units(T, p.meta_size), price


def _pushed(p: StepCosts, T: int, count: int) -> Price:
    assert p.pushed is not None
    assert p.outer_pushed is not None
    step, outer = p.pushed(count), p.outer_pushed(count)
    held = (1 + count) * (p.state_bytes + p.meta_bytes)
    return Price(T * step.seconds + outer.seconds, held + max(step.bytes, outer.bytes))


def _recommendation(rows: list[PlanRow], prices: StepCosts, memory: float) -> tuple[Estimator | None, str]:
    fitting = [row for row in rows if row.fits]
    exact = [row for row in fitting if row.exact]
    exact.sort(key=lambda row: (getattr(row.estimator, "offload", None) is not None, row.units, row.bytes))
    if exact:
        return exact[0].estimator, (
            f"it is exact, and of the exact methods that fit into {size_text(memory)} the one with the fewest units"
        )
    noisy = [row for row in fitting if not row.biased]
    usable = [row for row in noisy if (row.signal_to_noise or 0) >= _USABLE]
    if usable:
        return usable[0].estimator, f"{_without_exact(memory, prices)}; {_worth(usable[0], prices)}"
    biased = sorted((row for row in fitting if row.biased), key=lambda row: _BIASED.index(type(row.estimator)))
    if biased:
        noise = f"; {_worth(noisy[0], prices)}, so it is mostly noise" if noisy else ""
        bias = "the recommended method is biased, by an amount that is not known beforehand"
        others = any(isinstance(row.estimator, Implicit) for row in biased[1:])
        hint = "; Implicit, which fits too, is better where the inner loop converges" if others else ""
        return biased[0].estimator, f"{_without_exact(memory, prices)}{noise}; {bias}{hint}"
    if noisy:
        return noisy[0].estimator, (
            f"{_without_exact(memory, prices)}, and no biased one; {_worth(noisy[0], prices)}, so it is mostly noise"
        )
    least = min(rows, key=lambda row: row.bytes)
    return None, f"nothing fits into {size_text(memory)}; the least is {size_text(least.bytes)}"


def _without_exact(memory: float, prices: StepCosts) -> str:
    """Return the reason why no exact method is recommended."""
    if prices.back is None and prices.pushed is None:
        return "the inner loop has no derivatives here"
    return f"no exact method fits into {size_text(memory)}"


def _worth(row: PlanRow, prices: StepCosts) -> str:
    """Return a sentence on the signal-to-noise ratio of an estimate along random directions."""
    assert isinstance(row.estimator, ForwardGradient | ZerothOrder)
    directions, size = row.estimator.directions, prices.meta_size
    return (
        f"an estimate by {type(row.estimator).__name__} along {directions:,} of {size:,} dimensions has a "
        f"signal-to-noise ratio of {row.signal_to_noise:.2g}, and {max(1, size - 1):,} directions would give 1"
    )


def size_text(size: float) -> str:
    """Return a number of bytes as text with a unit.

    >>> size_text(8e9), size_text(250_000), size_text(12)
    ('8 GB', '250 kB', '12 B')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
