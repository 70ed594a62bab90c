"""One inner step with derivatives: tangents pushed forward, cotangents pulled back by either of two products."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import MissingDerivativeError
from bilevel.problem import Descent, Evaluated, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.inner_loop import InnerLoop

Product: TypeAlias = Literal["reverse", "mixed"]
_REPEATS = 3
_FASTER: WeakKeyDictionary[GradientDescent, Product] = WeakKeyDictionary()
"""What was found for a problem, so that it is measured once, and every later hypergradient of it is computed alike."""


class Pulled(NamedTuple):
    """A cotangent d pulled back through one step."""

    after: Tree
    """θ_{t+1}, computed again."""
    down: list[Tensor | None]
    """d A_t."""
    across: list[Tensor | None]
    """d B_t."""


def push_step(run: InnerLoop, t: int, pushed: autodiff.Pushed, directions: list[Tensor]) -> autodiff.Pushed:
    """Return θ_{t+1} and A_t y + B_t v for k tangents y of θ_t and directions v.

    Forward mode goes through the whole step, or through the update where the gradient is compiled with its tangents.
    Where the inner loss has an operation without a forward-mode derivative, the tangents of its gradient are
    Hessian-vector products (`push_step_by_hessian_products`), and those of a `Problem`'s step come from two backward
    passes (`autodiff.push_by_double_reverse`).
    """
    problem, state = run.problem.as_gradient_descent, pushed.value

    def step(state: Tree, meta: Tree) -> Tree:
        return run.step(t, state, meta)

    arguments, tangents = [state, run.meta], [pushed.tangents, directions]
    if problem is None:
        return autodiff.push(step, arguments, tangents, run.memory, "step")

    def by_hessian_products() -> autodiff.Pushed:
        moved = [pushed.tangents]
        after = push_step_by_hessian_products(run, problem.eager, t, state, moved, [directions])
        autodiff.note_route("hessian_product_steps", 1.0 + 2.0 * len(directions[0]))
        return autodiff.Pushed(after, moved[0])

    if problem.backend is None:
        return autodiff.push(step, arguments, tangents, run.memory, "step", by_hessian_products)
    if "step" in run.memory.without_forward_mode:
        return by_hessian_products()
    along = pushed.tangents[: len(trees.split(state.params).differentiable)]

    def push_gradient(batch: Any) -> autodiff.Pushed:
        run.require_one_device(t, state, run.meta, batch)
        return problem.push_gradient(state.params, run.meta, batch, along, directions)

    try:
        gradient = run.at_step(t, push_gradient)
    except MissingDerivativeError as error:
        found = by_hessian_products()
        run.memory.without_forward_mode["step"] = str(error)
        return found
    tangents = [pushed.tangents, gradient.tangents, directions, []]
    return _push_update(run, problem, state, gradient.value, (), tangents)


def push_step_by_hessian_products(
    run: InnerLoop,
    problem: GradientDescent,
    t: int,
    state: Descent,
    tangents: list[list[Tensor]],
    chunks: Sequence[list[Tensor]],
) -> Descent:
    """Return θ_{t+1}, and replace each chunk of tangents y of θ_t by A_t y + B_t v, without forward mode.

    With g = ∇_θ loss, the tangent of g along (y, v) is ∂g/∂θ y + ∂g/∂φ v, which is the θ part of the Hessian of the
    loss in (θ, φ) times (y, v). A Hessian is symmetric, so the product is one backward pass through the graph of
    ∇_{θ,φ} loss. The graph is made once for all chunks.

    Buffers b that modules update to b' (running statistics) are followed by the same product. With weights w for b',
    the loss becomes L = loss + w · b'. The w part of the Hessian of L at w = 0, times (y, v), is the tangent of b'.

    Cost: 1 + 2k units for k directions in all. Memory: the graph of one gradient.
    """

    def joint(params: Tree, buffers: Tree, weights: list[Tensor], meta: Tree) -> Tree:
        def evaluated(batch: Any) -> Evaluated:
            run.require_one_device(t, state, run.meta, batch)
            return problem.evaluate_jointly(params, meta, batch, buffers, weights)

        with run.watched_step(t, params, meta):
            found = run.at_step(t, evaluated)
        return found.gradient, trees.detach(found.buffers)

    followed = trees.split(state.buffers).differentiable
    weights = [torch.zeros_like(b) for b in followed]
    arguments = [state.params, state.buffers, weights, run.meta]
    shared = autodiff.Transpose(joint, arguments, autodiff.memory_of(problem))
    size, rest = len(trees.split(state.params).differentiable), len(followed)
    (joint_gradient, buffers), after = shared.value, state
    gradient, reached = joint_gradient[:size], [g is not None for g in joint_gradient]
    if not any(g is not None and bool(g.any()) for g in gradient):
        # Raises if the loss does not depend on the parameters.
        run.at_step(t, lambda batch: problem.gradient(state.params, run.meta, batch, state.buffers))
    for number, (y, vectors) in enumerate(zip(tangents, chunks, strict=True)):
        of_buffers = y[len(y) - rest :]
        # A leaf that the loss does not reach has neither a row nor a column in the Hessian. The last cotangents stand
        # for the outputs `buffers`, which have no graph.
        cotangents = [*itertools.compress([*y[:size], *vectors, *of_buffers], reached), *of_buffers]
        bend, moved = shared.many(cotangents, of=[0, 2])
        bend = list(itertools.compress(bend, reached))
        pushed = _push_update(run, problem, state, gradient, buffers, [y, bend, vectors, moved])
        after, tangents[number] = pushed.value, pushed.tangents
    return after


def _push_update(
    run: InnerLoop,
    problem: GradientDescent,
    state: Descent,
    gradient: Sequence[Tensor | None],
    buffers: Tree,
    tangents: Sequence[Sequence[Tensor]],
) -> autodiff.Pushed:
    """Return the optimiser's update with a given gradient, and its tangents.

    `tangents` are those of the state, of the entries of the gradient that are not `None`, of φ and of the buffers.
    """
    return autodiff.push(problem.apply, [state, gradient, run.meta, buffers], tangents, run.memory, "update")


def pull_back_step(run: InnerLoop, t: int, state: Tree, d: list[Tensor], product: Product) -> Pulled:
    """θ_{t+1}, d A_t and d B_t for the step from θ_t.

    `"reverse"`: one backward pass through the step, which contains a backward pass of its own (reverse over reverse).

    `"mixed"` (forward over reverse; for `GradientDescent`): a step is an update u(θ, g, φ) of the gradient
    g = ∇_θ loss(θ, φ). Backwards through u alone come a cotangent w of g, and the parts that do not pass through g.
    Since second derivatives are symmetric, w ∂g/∂(θ, φ) is the derivative of ∇_{θ,φ} loss in the direction w in θ: one
    product in forward mode, without a graph. Exact for every update. Reference: Kemaev et al., ICML 2025 (MixFlow-MG).
    """
    if product == "mixed" and (problem := run.problem.as_gradient_descent) is not None:
        return _mixed(run, problem, t, state, d)
    after, (down, across) = autodiff.pull_back(lambda state, meta: run.step(t, state, meta), [state, run.meta], d)
    return Pulled(after, down, across)


def faster_product(run: InnerLoop, d: list[Tensor]) -> Product:
    """The product that takes less time on the first inner step, or the only one that this model's operations allow."""
    if (problem := run.problem.as_gradient_descent) is None:
        return "reverse"
    if problem not in _FASTER:
        _FASTER[problem] = _measured(run, d)
    return _FASTER[problem]


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


def _mixed(run: InnerLoop, problem: GradientDescent, t: int, state: Descent, d: list[Tensor]) -> Pulled:
    with torch.enable_grad():
        gradient, buffers = run.at_step(t, lambda batch: problem.evaluate(state.params, run.meta, batch, state.buffers))
    arguments = [state, gradient, run.meta, buffers]
    after, (down, weights, across, to_buffers) = autodiff.pull_back(problem.apply, arguments, d)
    along = autodiff.placed_where_reached(weights, gradient, trees.split(state.params).differentiable)
    along_buffers = autodiff.fill_zeros(to_buffers, buffers)
    through = run.at_step(
        t,
        lambda batch: problem.joint_product(state.params, run.meta, batch, along, state.buffers, along_buffers),
    )
    first, last = len(gradient), len(d) - len(along_buffers)
    size = first + len(across)
    down = [*_sums(down[:first], through[:first]), *down[first:last], *_sums(down[last:], through[size:])]
    return Pulled(after, down, _sums(across, through[first:size]))


def _sums(left: list[Tensor | None], right: list[Tensor]) -> list[Tensor | None]:
    return [b if a is None else a + b for a, b in zip(left, right, strict=True)]
