"""The cost of one inner step, measured on the user's problem: without derivatives, in forward and in reverse mode.

Bytes are the peak of the bytes of live tensors (`live_memory`), above the bytes before the step. They are the same in
every measurement. Seconds are wall time, the shortest of three.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel import autodiff, trees
from bilevel.errors import MissingDerivativeError
from bilevel.models.module_view import modules_in
from bilevel.planning.live_memory import counting, quick_collections
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.step_products import push_step
from bilevel.unrolling.unroll import Unroll

_REPEATS = 3
_clock = time.perf_counter
"""The clock. `benchmarks/planner.py` replaces it by process time, which other work on the machine does not affect."""


@dataclass(frozen=True)
class Price:
    """Time and memory."""

    seconds: float
    bytes: float


@dataclass(frozen=True)
class PricePerDirection:
    """A price that grows with the number of directions that are carried at once."""

    shared: Price
    each: Price

    def __call__(self, count: int) -> Price:
        """Return the price for this number of directions."""
        return Price(self.shared.seconds + count * self.each.seconds, self.shared.bytes + count * self.each.bytes)


@dataclass(frozen=True)
class StepCosts:
    """The prices from which the price of every method is computed; `None` if the model lacks the derivative."""

    meta_size: int
    """N, the number of meta parameters."""
    meta_bytes: float
    """Bytes of φ."""
    state_bytes: float
    """Bytes of one inner state: parameters and the optimiser's memory."""
    plain: Price
    """The price of one step without derivatives; for a black box, of the whole solve."""
    outer: Price
    """The price of the outer loss."""
    outer_back: Price | None = None
    """The price of the outer loss and its derivatives."""
    back: Price | None = None
    """The price of one step that is computed again and differentiated in reverse mode."""
    graph: Price | None = None
    """The price of one more step in a stored graph, including its backward pass."""
    product: Price | None = None
    """The price of the graph of one inner gradient and of one product with its Jacobian. It is also `None` if that
    gradient does not depend on φ, in which case implicit methods miss the dependence on φ."""
    pushed: PricePerDirection | None = None
    """The price of one step with directions."""
    outer_pushed: PricePerDirection | None = None
    """The price of the outer loss with directions."""
    step_depends_on_meta: bool = True
    """Whether a step depends on φ. If only the initial state does, truncated methods miss the dependence."""


@quick_collections()
def measure(run: Unroll) -> StepCosts:
    """Measure the prices for this inner loop. The cost is that of about fifty inner steps, for any T."""
    state = run.start()
    meta_bytes, state_bytes = _size(run.meta), _size(state)
    argument_checks.one_outer_loss(
        run.outer_loss(state, run.meta).detach(),
        "plan and Auto choose a method for",
        ", or name the method: Reverse(), ForwardGradient and others take the vector as it is",
    )
    outer = _price(lambda: run.outer_loss(state, run.meta))
    if run.problem.is_black_box:
        return StepCosts(run.meta_size, meta_bytes, state_bytes, _price(run.start), outer)
    with autodiff.differentiable_kernels(modules_in([run.meta, state])):
        plain = _price(lambda: run.descend(state, 0, 1))
        backwards = _if_possible(lambda: _backwards(run, state)) or {}
        forwards = _if_possible(lambda: _forwards(run, state)) or {}
    return StepCosts(run.meta_size, meta_bytes, state_bytes, plain, outer, **backwards, **forwards)


def _backwards(run: Unroll, state: Tree) -> dict[str, Any]:
    d = [torch.ones_like(t) for t in trees.split(state).differentiable]

    def through_graph(steps: int) -> Price:
        def final(state: Tree, meta: Tree) -> Tree:
            for _ in range(steps):
                state = run.step(0, state, meta)
            return state

        return _price(lambda: autodiff.pull_back(final, [state, run.meta], d))

    two, four = through_graph(2), through_graph(4)
    across = run.pull_back_step(0, state, d).across
    prices = {
        "step_depends_on_meta": any(part is not None for part in across),
        "outer_back": _price(lambda: run.outer_cotangents(state)),
        "back": _price(lambda: run.pull_back_step(0, state, d)),
        "graph": Price((four.seconds - two.seconds) / 2, (four.bytes - two.bytes) / 2),
    }
    if (problem := run.problem.as_gradient_descent) is not None:
        count = len(trees.split(state.params).differentiable)

        def gradient(params: Tree, meta: Tree) -> list[torch.Tensor]:
            def filled(batch: Any) -> list[torch.Tensor]:
                return autodiff.fill_zeros(problem.gradient(params, meta, batch, state.buffers), params)

            return run.at_step(0, filled)

        def product() -> None:
            autodiff.Transpose(gradient, [state.params, run.meta])(d[:count])

        recording = autodiff.start_graph(run.meta)
        with torch.enable_grad():
            stationarity = run.at_step(0, lambda batch: problem.stationarity(state, recording, batch))
        if autodiff.has_graph(stationarity):
            prices["product"] = _price(product)
    return prices


def _forwards(run: Unroll, state: Tree) -> dict[str, Any]:
    def per_direction(pushed: Callable[[list[torch.Tensor], list[torch.Tensor]], Any]) -> PricePerDirection:
        few, more = (price(pushed, count) for count in (2, 6))
        each = Price((more.seconds - few.seconds) / 4, (more.bytes - few.bytes) / 4)
        return PricePerDirection(Price(max(0.0, few.seconds - 2 * each.seconds), few.bytes - 2 * each.bytes), each)

    def price(pushed: Callable[[list[torch.Tensor], list[torch.Tensor]], Any], count: int) -> Price:
        vectors = [t.new_ones(count, *t.shape) for t in trees.split(run.meta).differentiable]
        tangents = [t.new_zeros(count, *t.shape) for t in trees.split(state).differentiable]
        return _price(lambda: pushed(tangents, vectors))

    return {
        "pushed": per_direction(lambda y, v: push_step(run, 0, autodiff.Pushed(state, y), v)),
        "outer_pushed": per_direction(lambda y, v: run.push_outer(autodiff.Pushed(state, y), v)),
    }


def _if_possible(prices: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return prices()
    except MissingDerivativeError:
        return None


def _price(call: Callable[[], Any]) -> Price:
    call()  # the first call includes the cost of things that torch sets up only once
    with counting() as live:
        call()
    seconds = []
    for _ in range(_REPEATS):
        start = _clock()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(_clock() - start)
    return Price(min(seconds), live.peak)


def _size(tree: Tree) -> float:
    return sum(t.numel() * t.element_size() for t in trees.leaves(tree) if isinstance(t, torch.Tensor))
