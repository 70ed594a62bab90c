"""The derivatives of one inner step beside differences: of the inner gradient, of the update, and of the whole step.

The Jacobian of the inner gradient and that of the update are compared apart from each other, because one can hide the
other. At Adam's first step B = ∂θ'/∂φ is about 1e-11, whatever the loss depends on; and with gradient descent
A = I − ηH shows little of H, so what is compared is (A − I) u.

The point is moved by a thousandth at random, so that it does not lie on the edge of a clamp or of a ReLU. Differences
of the gradient are those of the plain loop (`PlainLoop.gradient`), with stopped gradients replayed. Derivatives are
taken in forward mode and in reverse mode, the latter as a product Jᵀ w with a random w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import MissingDerivativeError
from bilevel.models.module_view import modules_in
from bilevel.problem import BilevelProblem, Descent, Evaluated, GradientDescent, Problem
from bilevel.report.findings import Verdict
from bilevel.trees import Tree
from bilevel.unrolling.derivative_checks import Judgement, directions_like, judged, judged_product, moved
from bilevel.unrolling.plain_loop import PlainLoop
from bilevel.unrolling.step_products import push_step
from bilevel.unrolling.stopped_gradients import Tape
from bilevel.unrolling.unroll import Unroll

GRADIENT = "inner gradient"
"""The name of a part."""
OFF = 1e-3
"""How far points are moved, relative to their size."""


def at_generic_point(run: Unroll) -> Unroll:
    """Return the inner loop at a φ that is moved at random, off kinks such as those of a clamp at its bound."""
    parts = trees.split(run.meta)
    return replace(run, meta=parts.rebuild(moved(parts.differentiable, directions_like(parts.differentiable, 12), OFF)))


class Compared(NamedTuple):
    """One derivative of one part of a step."""

    part: str
    """The function that was differentiated."""
    by: str
    """The argument by which it was differentiated."""
    mode: str
    """The mode of differentiation: forward or reverse."""
    judgement: Judgement
    tape: Tape | None = None


@dataclass(frozen=True)
class StepPoint:
    """A step, and the point at which its derivatives are taken."""

    run: Unroll
    """In float64, at the moved φ."""
    t: int
    state: Tree
    """The moved state before the step."""

    @classmethod
    def near(cls, run: Unroll, t: int, state: Tree) -> StepPoint:
        """Return the point near a state, moved at random by a thousandth."""
        state_parts = trees.split(state)
        count = len(trees.split(state.params).differentiable) if isinstance(state, Descent) else None
        tensors = state_parts.differentiable
        some = tensors[:count]
        off = moved(some, directions_like(some, 11), OFF)
        return cls(at_generic_point(run), t, state_parts.rebuild([*off, *tensors[len(off) :]]))

    @property
    def problem(self) -> GradientDescent:
        """The problem with an inner loss."""
        problem = self.run.problem.as_gradient_descent
        assert problem is not None
        return problem


def compare_step(
    point: StepPoint, plain: PlainLoop | None, modes: Sequence[str] = ("forward", "reverse")
) -> Iterator[Compared]:
    """Yield one comparison after the other.

    Args:
        point: the step.
        plain: the plain loop in float64, without hooks; `None` for a problem that is given by its steps.
        modes: in which modes derivatives are taken.
    """
    with autodiff.differentiable_kernels(modules_in([point.run.meta, point.state])):
        if plain is None:
            yield from _of_own_step(point, modes)
        else:
            yield from _of_descent(point, plain, modes)


def _of_descent(point: StepPoint, plain: PlainLoop, modes: Sequence[str]) -> Iterator[Compared]:
    run, t, problem, state = point.run, point.t, point.problem, point.state
    params, buffers = trees.split(state.params), trees.split(state.buffers)
    meta = trees.split(run.meta)
    names = [name for name, _ in trees.named_leaves(state.params, "params")]
    names = [
        name for name, leaf in zip(names, trees.leaves(state.params), strict=True) if trees.is_differentiable(leaf)
    ]
    buffer_names = [n for n, leaf in buffers_of(state).items() if trees.is_differentiable(leaf)]
    tape = Tape()

    def outputs(theta: Sequence[Tensor], b: Sequence[Tensor], phi: Sequence[Tensor]) -> list[Tensor]:
        """The gradient and the buffers after the loss, in the plain loop."""
        there = {**buffers_of(state), **dict(zip(buffer_names, b, strict=True))}
        plain.tape = tape
        try:
            gradient, after = plain.gradient(t, theta, there, phi)
        finally:
            plain.tape = None
        return [*autodiff.fill_zeros(gradient, state.params), *(after[name] for name in buffer_names)]

    base = outputs(params.differentiable, buffers.differentiable, meta.differentiable)

    def evaluated(theta: Tree, b: Tree, phi: Tree) -> Tree:
        found: Evaluated = run.at_step(t, lambda batch: problem.evaluate(theta, phi, batch, b))
        return autodiff.fill_zeros(found.gradient, theta), found.buffers

    arguments = [state.params, state.buffers, run.meta]
    parts = [params, buffers, meta]
    whole = [*params.differentiable, *buffers.differentiable]
    for number, by in enumerate(("parameters", "buffers", "meta parameters")):
        if not parts[number].differentiable:
            continue
        along = [[torch.zeros_like(leaf) for leaf in part.differentiable] for part in parts]
        along[number] = directions_like(parts[number].differentiable, 20 + number, entrywise=by == "buffers")
        at = cached(evaluations_along(outputs, [p.differentiable for p in parts], along, tape))
        everything = [*names, *buffer_names]
        for compared in _both(evaluated, arguments, along, at, everything, run, GRADIENT, by, modes):
            yield compared._replace(tape=tape)
        if by == "buffers":
            continue

        reached = _reached(plain, point, whole)

        def stepped(epsilon: float, at: Any = at, along: Any = along, reached: Any = reached) -> list[Tensor]:
            """The step, with the plain loop's gradient."""
            found = at(epsilon)
            theta = params.rebuild(moved(params.differentiable, along[0], epsilon))
            phi = meta.rebuild(moved(meta.differentiable, along[2], epsilon))
            gradient = where_reached(found[: len(names)], reached)
            after = problem.apply(state._replace(params=theta), gradient, phi, buffers.rebuild(found[len(names) :]))
            return _changes(after, theta)

        if "forward" in modes:
            yield Compared("whole step", by, "forward", _stepped_forward(point, along, stepped), tape)
        if "reverse" in modes:
            yield Compared("whole step", by, "reverse", _stepped_reverse(point, along, stepped), tape)
    yield from compare_update(point, base[: len(names)], _reached(plain, point, whole), modes)


def compare_update(
    point: StepPoint, gradient: Sequence[Tensor], reached: Sequence[bool], modes: Sequence[str]
) -> Iterator[Compared]:
    """Yield comparisons of the derivatives of the optimiser's update, of which only the gradient is given."""
    problem, state, run = point.problem, point.state, point.run
    given = where_reached(gradient, reached)

    def update(params: Tree, memory: Tree, gradient: Tree, phi: Tree) -> list[Tensor]:
        after = problem.apply(state._replace(params=params, optimizer=memory), gradient, phi, state.buffers)
        return _changes(after, params)

    arguments = [state.params, state.optimizer, given, run.meta]
    parts = [trees.split(argument) for argument in arguments]
    for number, by in enumerate(("parameters", "optimiser's memory", "gradient", "meta parameters")):
        if not parts[number].differentiable:
            continue
        along = [[torch.zeros_like(leaf) for leaf in part.differentiable] for part in parts]
        if by == "meta parameters" and not _depends_on_meta(problem):
            continue
        along[number] = directions_like(parts[number].differentiable, 30 + number, entrywise=number in (1, 2))
        if not any(bool(v.any()) for v in along[number]):
            continue

        def outputs(*groups: Sequence[Tensor]) -> list[Tensor]:
            return update(*(part.rebuild(group) for part, group in zip(parts, groups, strict=True)))

        at = cached(evaluations_along(outputs, [part.differentiable for part in parts], along, None))
        yield from _both(update, arguments, along, at, [], run, "update", by, modes, _magnitudes(point))


def _depends_on_meta(problem: GradientDescent) -> bool:
    clipping = problem.optimizer.clipping
    return bool(problem.optimizer.meta_settings) or callable(clipping.norm) or callable(clipping.value)


def _of_own_step(point: StepPoint, modes: Sequence[str]) -> Iterator[Compared]:
    t = point.t
    tape = Tape()
    run = replace(point.run, problem=taped(point.run.problem, tape))
    parts = [trees.split(point.state), trees.split(run.meta)]

    def outputs(state: Sequence[Tensor], phi: Sequence[Tensor]) -> list[Tensor]:
        # Tensors that require gradients, since a step may do something else with others.
        moved_to = zip(parts, (state, phi), strict=True)
        there, meta = (part.rebuild([x.detach().requires_grad_() for x in xs]) for part, xs in moved_to)
        with torch.enable_grad():
            after = run.step(t, there, meta)
        return [a.detach() - b for a, b in zip(trees.split(after).differentiable, state, strict=True)]

    outputs(parts[0].differentiable, parts[1].differentiable)
    for number, by in enumerate(("state", "meta parameters")):
        along = [[torch.zeros_like(leaf) for leaf in part.differentiable] for part in parts]
        along[number] = directions_like(parts[number].differentiable, 20 + number)
        at = cached(evaluations_along(outputs, [p.differentiable for p in parts], along, tape))

        if "forward" in modes:
            yield Compared("whole step", by, "forward", _stepped_forward(point, along, at), tape)
        if "reverse" in modes:
            yield Compared("whole step", by, "reverse", _stepped_reverse(point, along, at), tape)


def taped(problem: BilevelProblem, tape: Tape) -> Problem:
    """Return a problem that is given by its steps, with its three functions recorded or replayed by a tape."""

    def running(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with tape.running():
                return function(*arguments)

        return call

    return Problem(running(problem.init), running(problem.step), running(problem.outer_loss))


# -- the library's own products of whole steps ------------------------------------------------------------------------


def _stepped_forward(
    point: StepPoint, along: Sequence[Sequence[Tensor]], at: Callable[[float], list[Tensor]]
) -> Judgement:
    y, v = _tangents(point.state, along), [t.unsqueeze(0) for t in along[-1]]
    try:
        pushed = push_step(point.run, point.t, autodiff.Pushed(point.state, y), v)
    except MissingDerivativeError as error:
        return _refused(error)
    claimed = [t[0] for t in pushed.tangents]
    for i, moved_by in enumerate(along[0]):
        claimed[i] = claimed[i] - moved_by
    return judged(claimed, at, magnitudes=_magnitudes(point))


def _stepped_reverse(
    point: StepPoint, along: Sequence[Sequence[Tensor]], at: Callable[[float], list[Tensor]]
) -> Judgement:
    weights = weights_for(at)
    try:
        pulled = point.run.pull_back_step(point.t, point.state, list(weights))
    except MissingDerivativeError as error:
        return _refused(error)
    y = _tangents(point.state, along)
    down = autodiff.fill_zeros(pulled.down, point.state)
    changes = [d - weights[i] if i < len(along[0]) else d for i, d in enumerate(down)]
    product = inner_product(changes, [t[0] for t in y]) + inner_product(pulled.across, along[-1])
    return judged_product(product, weights, at, magnitudes=_magnitudes(point))


def _magnitudes(point: StepPoint) -> list[float]:
    """The sizes of the state's leaves, whose rounding is in the change that a step makes to them."""
    return [float(torch.linalg.vector_norm(leaf)) for leaf in trees.split(point.state).differentiable]


def _tangents(state: Tree, along: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Tangents of all leaves of a state, of which those of the parameters (or of the state) are given."""
    leaves = trees.split(state).differentiable
    given = list(along[0])
    return [(given[i] if i < len(given) else torch.zeros_like(t)).unsqueeze(0) for i, t in enumerate(leaves)]


# -- parts ------------------------------------------------------------------------------------------------------------


def _both(
    function: Callable[..., Tree],
    arguments: Sequence[Tree],
    along: Sequence[Sequence[Tensor]],
    at: Callable[[float], list[Tensor]],
    names: Sequence[str],
    run: Unroll,
    part: str,
    by: str,
    modes: Sequence[str],
    magnitudes: Sequence[float] = (),
) -> Iterator[Compared]:
    """Compare the derivative of a function in both modes."""
    if "forward" in modes:
        tangents = [[v.unsqueeze(0) for v in group] for group in along]
        try:
            if part == GRADIENT:
                pushed = autodiff.push_forward_or_refuse(function, arguments, tangents, run.memory)
            else:
                pushed = autodiff.push(function, arguments, tangents, run.memory, f"{part}, checked")
        except MissingDerivativeError as error:
            # The library then takes the tangents of a gradient by another route, which only whole steps have.
            if part != GRADIENT:
                yield Compared(part, by, "forward", _refused(error))
        else:
            found = judged([t[0] for t in pushed.tangents], at, names, magnitudes=magnitudes)
            yield Compared(part, by, "forward", found)
    if "reverse" in modes:
        weights = weights_for(at)
        try:
            transpose = autodiff.Transpose(function, arguments, run.memory)
            pulled = transpose(weights, keep=False)
            product = sum(inner_product(down, group) for down, group in zip(pulled, along, strict=True))
            found = judged_product(product, weights, at, magnitudes=magnitudes)
        except MissingDerivativeError as error:
            found = _refused(error)
        yield Compared(part, by, "reverse", found)


def evaluations_along(
    outputs: Callable[..., list[Tensor]],
    points: Sequence[Sequence[Tensor]],
    along: Sequence[Sequence[Tensor]],
    tape: Tape | None,
) -> Callable[[float], list[Tensor]]:
    """Return the outputs at x + ε v as a function of ε, with stopped gradients replayed."""

    def at(epsilon: float) -> list[Tensor]:
        if tape is not None:
            tape.rewind()
        return outputs(*(moved(p, v, epsilon) for p, v in zip(points, along, strict=True)))

    return at


def cached(at: Callable[[float], list[Tensor]]) -> Callable[[float], list[Tensor]]:
    """Return the same function with a memory."""
    known: dict[float, list[Tensor]] = {}

    def evaluated(epsilon: float) -> list[Tensor]:
        if epsilon not in known:
            known[epsilon] = at(epsilon)
        return known[epsilon]

    return evaluated


def weights_for(at: Callable[[float], Sequence[Tensor]]) -> list[Tensor]:
    """Return random cotangents, scaled so that each output's difference counts alike."""
    generator = torch.Generator().manual_seed(40)
    first = 1e-4
    ahead, behind = at(first), at(-first)
    sizes = [float(torch.linalg.vector_norm(a - b)) / (2 * first) for a, b in zip(ahead, behind, strict=True)]
    largest = max(sizes, default=0.0) or 1.0
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) / max(size, 1e-3 * largest)
        for t, size in zip(ahead, sizes, strict=True)
    ]


def _changes(after: Descent, params: Tree) -> list[Tensor]:
    """The leaves of a state after a step, of parameters the change.

    An average of the parameters that ASGD keeps, and on which no step depends, has no derivative, and counts as zero.
    """
    named = [(name, leaf) for name, leaf in trees.named_leaves(after, "") if trees.is_differentiable(leaf)]
    start = trees.split(params).differentiable
    leaves = [leaf - start[i] if i < len(start) else leaf for i, (_, leaf) in enumerate(named)]
    return [leaf * 0 if name.endswith(_AVERAGE) else leaf for leaf, (name, _) in zip(leaves, named, strict=True)]


_AVERAGE = "memory['ax']"


def _reached(plain: PlainLoop, point: StepPoint, whole: Sequence[Tensor]) -> list[bool]:
    """Which parameters have a gradient at this step, in the plain loop."""
    count = len(trees.split(point.state.params).differentiable)
    gradient, _ = plain.gradient(
        point.t, whole[:count], buffers_of(point.state), trees.split(point.run.meta).differentiable
    )
    return [g is not None for g in gradient]


def where_reached(gradient: Sequence[Tensor], reached: Sequence[bool]) -> list[Tensor | None]:
    """Return a gradient with `None` where the loss does not reach a parameter."""
    return [g if there else None for g, there in zip(gradient, reached, strict=True)]


def buffers_of(state: Descent) -> Mapping[str, Tensor]:
    """The buffers by name, in the order of the tree's leaves."""
    if not isinstance(state.buffers, Mapping):
        return {}
    buffers: Any = state.buffers
    return {str(path[0]): buffers[path[0]] for path in optree.tree_paths(buffers, namespace=trees.NAMESPACE)}


def inner_product(left: Sequence[Tensor | None], right: Sequence[Tensor]) -> float:
    """Return the inner product, in which `None` is zero."""
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True) if a is not None)


def _refused(error: Exception) -> Judgement:
    return Judgement(Verdict.UNJUDGED, float("nan"), 0.0, why=f"refused: {error}")
