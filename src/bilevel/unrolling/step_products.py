"""One inner step with derivatives: tangents pushed forward, cotangents pulled back by either of two products."""

from __future__ import annotations

import time
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import MissingDerivativeError
from bilevel.problem import Descent, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.inner_loop import InnerLoop

Product: TypeAlias = Literal["reverse", "mixed"]
_REPEATS = 3
_FASTER: WeakKeyDictionary[GradientDescent, Product] = WeakKeyDictionary()
"""What was found for a problem, so that it is measured once, and every later hypergradient of it is computed alike."""


def push_step(run: InnerLoop, t: int, pushed: autodiff.Pushed, directions: list[Tensor]) -> autodiff.Pushed:
    """θ_{t+1} and A_t y + B_t v for k tangents y of θ_t and directions v.

    Forward mode goes through the whole step; where the gradient is compiled, with its tangents, through the update.
    """
    problem, state = run.problem, pushed.value
    if not isinstance(problem, GradientDescent) or problem.backend is None:
        return autodiff.push_forward(
            lambda state, meta: run.step(t, state, meta), [state, run.meta], [pushed.tangents, directions]
        )
    run.require_one_device(t, state, run.meta)
    along = pushed.tangents[: len(trees.split(state.params).differentiable)]
    with run.seeded_step(t):
        gradient = problem.push_gradient(state.params, run.meta, run.inner_batches[t], along, directions)
    return autodiff.push_forward(
        problem.apply, [state, gradient.value, run.meta], [pushed.tangents, gradient.tangents, directions]
    )


def pull_back_step(
    run: InnerLoop, t: int, state: Tree, d: list[Tensor], product: Product
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """d A_t and d B_t for the step from θ_t.

    `"reverse"`: one backward pass through the step, which contains a backward pass of its own (reverse over reverse).

    `"mixed"` (forward over reverse; for `GradientDescent`): a step is an update u(θ, g, φ) of the gradient
    g = ∇_θ loss(θ, φ). Backwards through u alone come a cotangent w of g, and the parts that do not pass through g.
    Since second derivatives are symmetric, w ∂g/∂(θ, φ) is the derivative of ∇_{θ,φ} loss in the direction w in θ: one
    product in forward mode, without a graph. Exact for every update. Reference: Kemaev et al., ICML 2025 (MixFlow-MG).
    """
    if product == "mixed" and isinstance(run.problem, GradientDescent):
        return _mixed(run, run.problem, t, state, d)
    _, (down, across) = autodiff.pull_back(lambda state, meta: run.step(t, state, meta), [state, run.meta], d)
    return down, across


def faster_product(run: InnerLoop, d: list[Tensor]) -> Product:
    """The product that takes less time on the first inner step, or the only one that this model's operations allow."""
    if not isinstance(run.problem, GradientDescent):
        return "reverse"
    if run.problem not in _FASTER:
        _FASTER[run.problem] = _measured(run, d)
    return _FASTER[run.problem]


def _measured(run: InnerLoop, d: list[Tensor]) -> Product:
    seconds: dict[Product, float] = {}
    state = run.start()
    for product in ("reverse", "mixed"):
        try:
            seconds[product] = min(_seconds(run, state, d, product) for _ in range(_REPEATS))
        except MissingDerivativeError:
            if product == "mixed" and not seconds:
                raise
    return min(seconds, key=lambda product: seconds[product])


def _seconds(run: InnerLoop, state: Tree, d: list[Tensor], product: Product) -> float:
    _synchronise(d)
    start = time.perf_counter()
    pull_back_step(run, 0, state, list(d), product)
    _synchronise(d)
    return time.perf_counter() - start


def _synchronise(tensors: list[Tensor]) -> None:
    if any(t.is_cuda for t in tensors):
        torch.cuda.synchronize()


def _mixed(
    run: InnerLoop, problem: GradientDescent, t: int, state: Descent, d: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    batch = run.inner_batches[t]
    with torch.enable_grad(), run.seeded_step(t):
        gradient = problem.gradient(state.params, run.meta, batch)
    _, (down, weights, across) = autodiff.pull_back(problem.apply, [state, gradient, run.meta], d)
    with run.seeded_step(t):
        through = problem.joint_product(state.params, run.meta, batch, autodiff.fill_zeros(weights, gradient))
    count = len(gradient)
    down = [*_sums(down[:count], through[:count]), *down[count:]]
    return down, _sums(across, through[count:])


def _sums(left: list[Tensor | None], right: list[Tensor]) -> list[Tensor | None]:
    return [b if a is None else a + b for a, b in zip(left, right, strict=True)]
