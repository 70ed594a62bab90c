"""The fourth part of a check: ∇h · v of estimators beside differences of whole solves, in float64.

The solves are those of the plain loop where there is one, with stopped gradients replayed along all of its steps. φ is
moved by a thousandth at random, off kinks such as that of a clamp at its bound.

An estimator that draws random directions is asked for the derivative of s ↦ h(φ + s v) at s = 0, a problem with one
meta parameter, in which one direction is all there is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.checking.subject import Subject, described
from bilevel.errors import BilevelError
from bilevel.estimators import Estimator
from bilevel.estimators.names import describe
from bilevel.models.sharing import presented
from bilevel.optim.update_rule import Optimizer
from bilevel.problem import BilevelProblem, Problem
from bilevel.report.findings import Finding, Verdict
from bilevel.trees import Tree
from bilevel.unrolling.derivative_checks import directions_like, judged, moved
from bilevel.unrolling.plain_copies import NoPlainLoopError
from bilevel.unrolling.plain_loop import PlainLoop
from bilevel.unrolling.step_checks import at_generic_point, taped
from bilevel.unrolling.stopped_gradients import Tape
from bilevel.unrolling.unroll import Unroll

PART = "the whole loop"
EPSILONS = (1e-4, 1e-5, 1e-6, 1e-7)
LOOSE = 1e-3
"""The relative error that is allowed to estimators that take differences themselves."""


def compare_estimators(
    subject: Subject, estimators: Sequence[Estimator], directions: int, own: Callable[[Any], Any] | None
) -> Iterator[Finding]:
    """Yield one row for each estimator, and one for a loop of the user's own."""
    run, where = subject.double, "in float64"
    if isinstance(run, str):
        where = f"in the user's dtype, for want of double precision ({run})"
        run = subject.run
    run = at_generic_point(run)
    precise = not isinstance(subject.double, str)
    values = [_values_along(subject, run, precise, number) for number in range(directions)]
    for estimator in estimators:
        yield _row(subject, run, estimator, values, where, precise)
    if own is not None:
        yield from _own(subject, own)


class _Along:
    """The outer value along one direction v, at φ + ε v."""

    def __init__(self, direction: list[Tensor], value: Callable[[float], Tensor]) -> None:
        self.direction = direction
        self._value = value
        self._known: dict[float, Tensor] = {}

    def __call__(self, epsilon: float) -> list[Tensor]:
        if epsilon not in self._known:
            self._known[epsilon] = self._value(epsilon)
        return [self._known[epsilon]]


def _values_along(subject: Subject, run: Unroll, precise: bool, number: int) -> _Along:
    parts = trees.split(run.meta)
    direction = directions_like(parts.differentiable, 50 + number)
    plain = subject.plain(in_double=precise) if run.problem.as_gradient_descent is not None else ""
    tape = Tape()
    subject.tapes.append(tape)
    black_box = run.problem.is_black_box
    own = run if black_box or isinstance(plain, PlainLoop) else replace(run, problem=taped(run.problem, tape))

    def solved(epsilon: float) -> Tensor:
        meta = moved(parts.differentiable, direction, epsilon)
        if isinstance(plain, PlainLoop):
            plain.tape = tape
            return plain.solve(meta)
        return own.at(parts.rebuild(meta)).value()[0]

    base = solved(0.0)

    def value(epsilon: float) -> Tensor:
        if epsilon == 0:
            return base
        tape.rewind()
        return solved(epsilon)

    return _Along(direction, value)


def _row(
    subject: Subject, run: Unroll, estimator: Estimator, values: Sequence[_Along], where: str, precise: bool
) -> Finding:
    name, biased = describe(estimator), estimator.is_biased
    judgements = []
    try:
        resolved = estimator.resolved(run)
        for along in values:
            slope = _slope(run, resolved, along.direction)
            epsilons = EPSILONS if precise else (1e-2, 1e-3)
            judgements.append((slope, judged([slope], along, epsilons=epsilons)))
    except (BilevelError, TypeError, ValueError, NoPlainLoopError) as error:
        return Finding(PART, name, Verdict.UNJUDGED, f"refused or failed: {described(error)}", "take another estimator")
    except Exception as error:
        found = f"the plain loop or the estimate raised {described(error)}"
        return Finding(PART, name, Verdict.UNJUDGED, found)
    errors = [j.error for _, j in judgements]
    numbers = {"relative": max(errors)}
    worst = max((j for _, j in judgements), key=lambda j: _ORDER.index(j.verdict))
    if biased:
        found = f"biased on purpose: off by {max(errors):.2g} along {len(values)} directions"
        return Finding(PART, name, Verdict.NOT_CHECKED, found, numbers=numbers)
    if worst.verdict is Verdict.WRONG and not estimator.needs_derivatives and max(errors) < LOOSE:
        worst = judgements[0][1]
        return Finding(PART, name, Verdict.RIGHT, f"{where}: off by {max(errors):.1g}", numbers=numbers)
    if worst.verdict is Verdict.RIGHT:
        return Finding(PART, name, Verdict.RIGHT, f"{where}: off by at most {max(errors):.1g}", numbers=numbers)
    found = f"{where}: {worst.why or f'off by {max(errors):.2g} of its size'}"
    if worst.verdict is Verdict.WRONG and not precise:
        return Finding(PART, name, Verdict.UNJUDGED, found, "", numbers)
    if worst.verdict is Verdict.WRONG and any(tape.not_replayed for tape in subject.tapes):
        found += "; numbers without a derivative are used, see stopped gradients"
        return Finding(PART, name, Verdict.UNJUDGED, found, "", numbers)
    takes_differences = estimator.first_order or not estimator.needs_derivatives
    if worst.verdict is Verdict.WRONG and takes_differences and any(tape.replayed for tape in subject.tapes):
        found += "; it takes differences, which move the stopped gradients, too"
        advice = "take Reverse() or ForwardGradient() if the stopped gradients are meant"
        return Finding(PART, name, Verdict.UNJUDGED, found, advice, numbers)
    advice = "do not use this estimator here; report this with Report.save" if worst.verdict is Verdict.WRONG else ""
    return Finding(PART, name, worst.verdict, found, advice, numbers)


_ORDER = (Verdict.RIGHT, Verdict.NOT_CHECKED, Verdict.UNJUDGED, Verdict.WRONG)


def _slope(run: Unroll, estimator: Estimator, direction: list[Tensor]) -> Tensor:
    """∇h · v as an estimator gives it."""
    if not estimator.is_random:
        found = estimator(run.problem, run.meta, run.inner_batches, run.outer_batch, run.seed)
        return trees.dot(trees.leaves(found.grad), direction)
    scalar = torch.zeros(1, dtype=direction[0].dtype, device=direction[0].device)
    along = problem_along(run.problem, run.meta, direction)
    return estimator(along, scalar, run.inner_batches, run.outer_batch, run.seed).grad[0]


def problem_along(problem: BilevelProblem, meta: Tree, direction: Sequence[Tensor]) -> BilevelProblem:
    """Return the same problem with one meta parameter s `[1]`, which stands for φ + s v."""
    parts = trees.split(meta)

    def there(s: Tensor) -> Tree:
        return parts.rebuild([p + s[0] * v for p, v in zip(parts.differentiable, direction, strict=True)])

    descent = problem.as_gradient_descent
    if descent is None:
        return Problem(
            lambda s: problem.init(presented(there(s))),
            lambda state, s, batch: problem.step(state, presented(there(s)), batch),
            lambda state, s, batch: problem.outer_loss(state, presented(there(s)), batch),
        )
    twin: Any = copy.copy(descent)
    own, inner, outer, optimizer = type(descent)._initial, twin.inner_loss, twin._outer_loss, descent.optimizer
    initial = descent.__dict__.get("_initial", lambda meta, memory: own(descent, meta, memory))
    twin._eager = twin
    twin.inner_loss = lambda params, s, batch: inner(params, presented(there(s)), batch)
    twin._outer_loss = lambda params, s, batch: outer(params, presented(there(s)), batch)
    twin._initial = lambda s, memory: initial(there(s), memory)
    if functions := {name: value for name, value in optimizer.settings.items() if callable(value)}:
        settings = {name: _after(there, function) for name, function in functions.items()}
        twin.optimizer = Optimizer(
            optimizer.algorithm, {**optimizer.settings, **settings}, optimizer.schedule, optimizer.clipping
        )
    return twin


def _after(there: Callable[[Tensor], Tree], function: Callable[[Tree], Any]) -> Callable[[Tensor], Any]:
    return lambda s: function(there(s))


def _own(subject: Subject, own: Callable[[Any], Any]) -> Iterator[Finding]:
    """Differences of the user's own loop, as far as its precision allows."""
    from bilevel.checking.loop import own_value
    from bilevel.estimators import Reverse

    tested = "differences of your own loop"
    if not isinstance(subject.meta, Tensor):
        yield Finding(PART, tested, Verdict.NOT_CHECKED, "meta is not a single tensor, so it cannot be moved for you")
        return
    meta = subject.meta.detach()
    (direction,) = directions_like([meta], 50)

    def at(epsilon: float) -> list[Tensor]:
        there = Subject(subject.problem, meta + epsilon * direction, None, None, subject.seed)
        return [torch.tensor(own_value(there, own), dtype=meta.dtype)]

    try:
        slope = _slope(subject.run, Reverse("sqrt"), [direction])
        found = judged(
            [slope.to(meta.dtype)], at, epsilons=EPSILONS[:3] if meta.dtype == torch.float64 else (1e-2, 1e-3)
        )
    except Exception as error:
        yield Finding(PART, tested, Verdict.UNJUDGED, described(error))
        return
    doubtful = meta.dtype != torch.float64 or any(tape.replayed or tape.not_replayed for tape in subject.tapes)
    verdict = Verdict.UNJUDGED if found.verdict is Verdict.WRONG and doubtful else found.verdict
    text = f"off by {found.error:.1g}" if verdict is Verdict.RIGHT else found.why or f"off by {found.error:.2g}"
    advice = "the problem, or its outer loss, differs from your loop" if verdict is Verdict.WRONG else ""
    if verdict is not found.verdict and meta.dtype == torch.float64:
        text += "; the differences of your loop move the stopped gradients, too"
        verdict = Verdict.NOT_CHECKED
    yield Finding(PART, tested, verdict, text, advice, {"relative": found.error})


def stopped_gradients(subject: Subject) -> Iterator[Finding]:
    """Yield rows on the stopped gradients that the parts above have met."""
    part = "stopped gradients"
    replayed = list(dict.fromkeys(place for tape in subject.tapes for place in tape.replayed))
    taken_out = list(dict.fromkeys(place for tape in subject.tapes for place in tape.not_replayed))
    if any(tape.is_full for tape in subject.tapes):
        yield Finding(part, "memory", Verdict.UNJUDGED, "more than 1 GiB would have to be kept to replay them")
    if taken_out:
        advice = "these are constants for every derivative; keep numbers as tensors, or write create_graph=True"
        yield Finding(part, "numbers taken out of PyTorch", Verdict.UNJUDGED, _places(taken_out), advice)
    if replayed:
        advice = "constants for every derivative; remove .detach() or torch.no_grad() there if this is not meant"
        yield Finding(part, "detach, .data and no_grad", Verdict.RIGHT, f"replayed: {_places(replayed)}", advice)
    elif not taken_out and subject.tapes:
        yield Finding(part, "detach, .data and no_grad", Verdict.RIGHT, "none that moves")


def _places(places: Sequence[str]) -> str:
    more = f" and {len(places) - 4} more" if len(places) > 4 else ""
    return ", ".join(places[:4]) + more
