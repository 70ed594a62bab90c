"""What one inner step costs, run plainly, forwards with tangents and backwards: measured on the user's own problem.

Bytes are those of live tensors (`live_bytes`) above what lay there before, at the peak; so they are the same at every
measurement. Seconds are wall time, the least of three.
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
from bilevel.planning.live_memory import counting
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.step_products import push_step
from bilevel.unrolling.unroll import Unroll

_REPEATS = 3
_clock = time.perf_counter
"""`benchmarks/planner.py` takes process time, which other work on the machine does not stretch."""


@dataclass(frozen=True)
class Price:
    """Time and memory."""

    seconds: float
    bytes: float


@dataclass(frozen=True)
class PricePerDirection:
    """A price that grows with the number of directions that are pushed at once."""

    shared: Price
    each: Price

    def __call__(self, count: int) -> Price:
        """The price with that many directions."""
        return Price(self.shared.seconds + count * self.each.seconds, self.shared.bytes + count * self.each.bytes)


@dataclass(frozen=True)
class StepCosts:
    """The prices of which every method's is made up; `None` where the model lacks the derivative."""

    meta_size: int
    """N."""
    meta_bytes: float
    """φ."""
    state_bytes: float
    """One inner state: parameters and the optimiser's memory."""
    plain: Price
    """One step; of a black box, the whole solve."""
    outer: Price
    """The outer loss."""
    outer_back: Price | None = None
    """The outer loss and its derivatives."""
    back: Price | None = None
    """One step redone and differentiated backwards."""
    graph: Price | None = None
    """One more step in a stored graph, the way back included."""
    product: Price | None = None
    """The graph of one inner gradient, and one product with its Jacobian; `None` also where that gradient does not
    depend on φ, so that implicit methods see nothing of φ."""
    pushed: PricePerDirection | None = None
    """One step with directions."""
    outer_pushed: PricePerDirection | None = None
    """The outer loss with directions."""
    step_depends_on_meta: bool = True
    """Whether a step depends on φ, and not the initial state alone, of which truncation sees nothing."""


def measure(run: Unroll) -> StepCosts:
    """The prices for this inner loop: some fifty steps' work, whatever T."""
    state = run.start()
    meta_bytes, state_bytes = _size(run.meta), _size(state)
    argument_checks.one_outer_loss(
        run.outer_loss(state, run.meta).detach(),
        "plan and Auto choose a method for",
        ", or name the method: Reverse() and all others take the vector as it is",
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
    call()  # the first one pays for what torch sets up once
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
