"""The short check: a few steps beside the plain loop, before the first estimate of a kind of problem.

The first, the last and one other step are taken one after the other, each with its own batch, noise and learning rate,
by the library and by a plain PyTorch loop (`PlainLoop`). At the step between, the derivative of the inner gradient by θ
and by φ, and that of the optimiser's update, are compared with central differences. In inner gradients this costs

    3 (plain steps) + 2 (steps) + 3 (a step with its transposed product) + 4 (differences) = 12,

and nothing where a problem of the same kind was checked before in this process: with the same code of the losses, the
same settings of the optimiser, and tensors of the same shapes and dtypes. A comparison that does not come out right is
made again with all that `bilevel.check` has for a step, so an error is only raised for what is wrong there as well.

The check consumes no random numbers. It depends on the problem and on the seed alone, so all workers find the same.
"""

from __future__ import annotations

import os
import threading
import time
import types
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import autodiff, randomness, trees
from bilevel.errors import CheckError
from bilevel.models.module_view import modules_in
from bilevel.problem import BilevelProblem, Descent, GradientDescent
from bilevel.report.findings import Finding, Verdict, as_text, with_verdict
from bilevel.unrolling.derivative_checks import directions_like, judged_product
from bilevel.unrolling.double_precision import as_double, lowest_dtype, problem_in_double
from bilevel.unrolling.loop_comparison import SideBySide
from bilevel.unrolling.plain_copies import NoPlainLoopError
from bilevel.unrolling.plain_loop import PlainLoop
from bilevel.unrolling.state_comparison import disagreement, parts_of, same_bits
from bilevel.unrolling.step_checks import (
    StepPoint,
    buffers_of,
    cached,
    compare_step,
    compare_update,
    evaluations_along,
    inner_product,
    weights_for,
    where_reached,
)
from bilevel.unrolling.stopped_gradients import Tape
from bilevel.unrolling.unroll import Unroll

_LARGEST, _LARGEST_IN_DOUBLE = 2**26, 2**22
"""The largest numbers of inner parameters for which there is a check at all, and one in float64, with derivatives. The
check holds three copies of the parameters."""
SWITCH = "BILEVEL_SHORT_CHECK"
"""The environment variable that decides where the check runs: "on", in every estimate, which is the default; "fit", in
`fit` alone; "off", nowhere."""

_CHECKED: dict[Hashable, str] = {}
"""What was verified, by kind of problem."""
_LOCK = threading.RLock()


class _State(threading.local):
    on: bool | None = None
    """`None` is the environment's choice."""
    in_fit: bool = False


_STATE = _State()


@contextmanager
def short_check(on: bool) -> Iterator[None]:
    """Context manager that switches the short check on or off, in this thread.

    Before the first estimate for each kind of problem, three inner steps are taken beside a plain PyTorch loop, and
    derivatives of one step are compared with differences. That costs at most 12 inner gradients. By default every
    estimator runs the check, once in a process for each kind of problem. The environment variable BILEVEL_SHORT_CHECK
    is "on", "fit" (before the first step of `fit` alone) or "off".

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta**2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> with bilevel.experimental.short_check(True):
    ...     estimate = bilevel.Reverse()(problem, torch.tensor(2.0), 4)
    >>> estimate.diagnostics["checked"].split(";")[0]
    'the loop: steps 0, 1, 3 and outer value'
    >>> with bilevel.experimental.short_check(False):
    ...     "checked" in bilevel.Reverse()(problem, torch.tensor(2.0), 4).diagnostics
    False
    """
    before = _STATE.on
    _STATE.on = on
    try:
        yield
    finally:
        _STATE.on = before


@contextmanager
def fitting() -> Iterator[None]:
    """Context of the outer loop of `fit`."""
    before = _STATE.in_fit
    _STATE.in_fit = True
    try:
        yield
    finally:
        _STATE.in_fit = before


def is_on() -> bool:
    """Return whether the short check runs here."""
    if _STATE.on is not None:
        return _STATE.on
    choice = os.environ.get(SWITCH, "on")
    if choice not in ("on", "fit", "off"):
        raise ValueError(f"the environment variable {SWITCH} is {choice!r}; set it to on, fit or off")
    return choice == "on" or (choice == "fit" and _STATE.in_fit)


def checked_once(run: Unroll, meta: Any) -> str | None:
    """Check a problem, unless one of its kind was checked before; return what was verified.

    Args:
        run: the inner loop.
        meta: φ as the user passed it.

    Raises:
        CheckError: the library's loop is not the plain loop, or a derivative of a step is wrong.
    """
    outside = run.problem.is_black_box or run.carried is not None or not run.steps
    if outside or not is_on() or torch._C._are_functorch_transforms_active():
        return None
    try:
        kind = _kind_of(run)
        hash(kind)
    except TypeError:
        return None
    with _LOCK:
        if kind not in _CHECKED:
            with short_check(False), warnings.catch_warnings(), randomness.preserved():
                warnings.simplefilter("ignore")
                findings = _findings(run, meta)
            _CHECKED[kind] = _summary(findings)
            try:
                _report(findings)
            except CheckError:
                del _CHECKED[kind]
                raise
        return _CHECKED[kind]


def forget() -> None:
    """Forget which kinds of problems have been checked."""
    _CHECKED.clear()


def _summary(findings: list[Finding]) -> str:
    """What was verified, and when."""
    right = [f"{f.part}: {f.tested}" for f in with_verdict(findings, Verdict.RIGHT)]
    others = [f"{f.part}: {f.verdict.value} ({f.found})" for f in findings if f.verdict is not Verdict.RIGHT]
    return f"{'; '.join([*right, *others])}; at {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _report(findings: list[Finding]) -> None:
    if with_verdict(findings, Verdict.WRONG):
        table = as_text(findings)
        raise CheckError(
            "a short check of this problem found that something is wrong, so its hypergradient would be wrong too:\n"
            f"{table}\nbilevel.check(problem, meta, ...) says more. To go on without this check set {SWITCH}=off, or "
            "write with bilevel.experimental.short_check(False): ...",
            table,
        )
    doubtful = with_verdict(findings, Verdict.UNJUDGED)
    if doubtful:
        warnings.warn(
            "a short check could not judge this problem: "
            + "; ".join(f"{f.part}, {f.tested}: {f.found}" for f in doubtful)
            + ". bilevel.check(problem, meta, ...) says more",
            stacklevel=5,
        )


# -- the comparisons --------------------------------------------------------------------------------------------------


def _findings(run: Unroll, meta: Any) -> list[Finding]:
    try:
        state = run.start()
        count = trees.size(state.params if isinstance(state, Descent) else state)
        if count > _LARGEST:
            return [_not_checked(f"{count} parameters are too many for a check on the side")]
        if any(leaf.is_complex() for leaf in trees.split(state).differentiable):
            return [_not_checked("parameters are complex")]
        dtype = lowest_dtype(run.meta, state)
        precise = count <= _LARGEST_IN_DOUBLE
        there = _in_double(run, dtype) if precise else run.eager
        if there.problem.as_gradient_descent is None:
            return _of_own_steps(there) if precise else [_not_checked("a large problem given by its steps")]
        return _of_descent(there, meta, dtype if precise else None)
    except NoPlainLoopError as error:
        return [_not_checked(str(error))]
    except Exception as error:  # the user's code, in a loop or a dtype that it was not written for
        return [_not_checked(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")]


def _not_checked(why: str) -> Finding:
    return Finding("short check", "the loop and its derivatives", Verdict.NOT_CHECKED, why)


def _in_double(run: Unroll, dtype: torch.dtype) -> Unroll:
    return replace(run, problem=problem_in_double(run.problem, dtype), meta=as_double(run.meta))


@dataclass
class _Middle:
    """The step at which derivatives are compared."""

    t: int
    before: Descent
    transpose: autodiff.Transpose
    reached: list[bool]
    tape: Tape


def _of_descent(run: Unroll, meta: Any, draws: torch.dtype | None) -> list[Finding]:
    problem = run.problem.as_gradient_descent
    assert problem is not None
    last = run.steps - 1
    between = 1 + randomness.derive(run.seed, run.steps) % max(run.steps - 2, 1)
    chosen = sorted({0, min(between, last), last})
    middle, found = chosen[len(chosen) // 2], list[_Middle]()
    plain, tape = PlainLoop(run, meta, draws), Tape()
    both = SideBySide(run, plain)
    if both.trains_others:
        return [Finding("the loop", "trained tensors", Verdict.WRONG, both.trains_others)]
    tested = f"steps {', '.join(map(str, chosen))}"
    for t in chosen:
        both.skip_to(t)
        before = both.state
        with_derivatives = t == middle and draws is not None
        if with_derivatives:
            plain.tape = tape

        def ours(state: Descent, t: int = t) -> Descent:
            step = _with_transpose(run, problem, t, state, tape)
            found.append(step[0])
            return step[1]

        apart = both.advance(t, ours if with_derivatives else None)
        plain.tape = None
        if apart is not None:
            what = f"{apart.what}, {apart.distance:.2g} apart"
            return [_apart(run, t, before, both.state, what, apart.distance, draws)]
    mine, theirs = run.outer_loss(both.state, run.meta).detach(), plain.outer_value()
    size = max(float(value.abs().max()) for value in (mine, theirs))
    apart_by = (mine - theirs).abs()
    if names := both.unfollowed():
        found_buffers = f"the plain loop changes {', '.join(names[:3])}, which is no part of the inner state"
        return [Finding("the loop", "buffers", Verdict.WRONG, found_buffers)]
    if not float(apart_by.max()) <= torch.finfo(theirs.dtype).eps ** 0.5 * size and not torch.equal(mine, theirs):
        finite = all(bool(torch.isfinite(value).all()) for value in (mine, theirs))
        worst = int(apart_by.argmax())
        a, b = (float(value.flatten()[worst]) for value in (mine, theirs))
        text = f"outer value {a:.9g}, and {b:.9g} in the plain loop"
        doubt = Verdict.WRONG if finite and draws is not None else Verdict.NOT_CHECKED
        return [Finding("the loop", "outer value", doubt, text)]
    rows = [Finding("the loop", f"{tested} and outer value", Verdict.RIGHT, "equal within rounding")]
    if found:
        rows.append(_of_derivatives(run, meta, draws, found[0]))
    else:
        rows.append(Finding("one step", "derivatives", Verdict.NOT_CHECKED, "too many parameters for float64"))
    return rows


def _apart(
    run: Unroll, t: int, before: Descent, after: Descent, what: str, distance: float, draws: torch.dtype | None
) -> Finding:
    """The row for two loops that differ: unless the user's code has a memory, so that no step is the same twice."""
    with autodiff.differentiable_kernels(modules_in([run.meta, before])):
        again = [run.descend(before, t, t + 1)]
        run.descend(run.start(), 0, 1)  # a queue then holds something else
        again.append(run.descend(before, t, t + 1))
    if any(_differ(before, after, each) for each in again):
        found = f"step {t} gives another state each time, because something that it uses changes from call to call"
        return Finding("a step twice", f"step {t}", Verdict.NOT_CHECKED, found)
    tested, advice = f"step {t}", "the hypergradient would be that of another loop than yours"
    sure = draws is not None and distance == distance and distance < float("inf")
    return Finding("the loop", tested, Verdict.WRONG if sure else Verdict.UNJUDGED, what, advice)


def _differ(before: Any, first: Any, again: Any) -> bool:
    return not same_bits(first, again) and bool(disagreement(parts_of(first), before, first, again)[0])


def _with_transpose(
    run: Unroll, problem: GradientDescent, t: int, state: Descent, tape: Tape
) -> tuple[_Middle, Descent]:
    """Step t with the graph of its gradient: its transposed product costs no further gradient."""
    reached: list[bool] = []

    def evaluated(theta: Any, b: Any, phi: Any) -> Any:
        found = run.at_step(t, lambda batch: problem.evaluate(theta, phi, batch, b))
        reached[:] = [g is not None for g in found.gradient]
        return autodiff.fill_zeros(found.gradient, theta), found.buffers

    transpose = autodiff.Transpose(evaluated, [state.params, state.buffers, run.meta], run.memory)
    gradient, buffers = transpose.value
    after = problem.apply(state, where_reached(gradient, reached), run.meta, buffers)
    return _Middle(t, state, transpose, list(reached), tape), trees.detach(after)


def _of_derivatives(run: Unroll, meta: Any, draws: torch.dtype | None, middle: _Middle) -> Finding:
    state, tested = middle.before, f"derivatives of step {middle.t}"
    plain = PlainLoop(run, meta, draws, hooks=False)
    parts = [trees.split(tree) for tree in (state.params, state.buffers, run.meta)]
    points = [part.differentiable for part in parts]
    names = [name for name, leaf in buffers_of(state).items() if trees.is_differentiable(leaf)]

    def outputs(theta: Any, b: Any, phi: Any) -> list[Tensor]:
        plain.tape = middle.tape
        there = {**buffers_of(state), **dict(zip(names, b, strict=True))}
        gradient, after = plain.gradient(middle.t, theta, there, phi)
        return [*autodiff.fill_zeros(gradient, state.params), *(after[name] for name in names)]

    gradient, buffers = middle.transpose.value
    base = [*gradient, *trees.split(buffers).differentiable]
    weights: list[Tensor] = []
    right = True
    pulled: list[Any] = []
    for number in (0, 2):
        along = [[torch.zeros_like(leaf) for leaf in group] for group in points]
        along[number] = directions_like(points[number], 20 + number)
        at = cached(evaluations_along(outputs, points, along, middle.tape))
        if not weights:
            weights = weights_for(at)
            pulled = middle.transpose(weights, keep=False)
        product = sum(inner_product(down, group) for down, group in zip(pulled, along, strict=True))
        right = right and judged_product(product, weights, at, epsilons=(1e-4,)).verdict is Verdict.RIGHT
    point = StepPoint(run, middle.t, state)
    updates = compare_update(point, base[: len(gradient)], middle.reached, ("reverse",))
    right = right and all(compared.judgement.verdict is Verdict.RIGHT for compared in updates)
    if right:
        return Finding("one step", tested, Verdict.RIGHT, "equal to differences")
    # Not sure: everything that there is for a step, at a point off kinks.
    everything = list(compare_step(StepPoint.near(run, middle.t, state), plain, ("reverse",)))
    return _judged(everything, tested)


def _judged(everything: list[Any], tested: str) -> Finding:
    wrong = [c for c in everything if c.judgement.verdict is Verdict.WRONG]
    if wrong and not any(c.tape is not None and c.tape.not_replayed for c in everything):
        off = [c.judgement.why or f"off by {c.judgement.error:.2g} of its size" for c in wrong]
        found = "; ".join(f"{c.part} by {c.by}: {how}" for c, how in zip(wrong, off, strict=True))
        return Finding("one step", tested, Verdict.WRONG, found)
    if all(c.judgement.verdict is Verdict.RIGHT for c in everything):
        return Finding("one step", tested, Verdict.RIGHT, "equal to differences")
    why = next((c.judgement.why for c in everything if c.judgement.verdict is not Verdict.RIGHT), "")
    return Finding("one step", tested, Verdict.NOT_CHECKED, why or "numbers without a derivative are used")


def _of_own_steps(run: Unroll) -> list[Finding]:
    """A problem that is given by its steps: step 0 twice, and its derivatives."""
    state = run.start()
    first, second = (run.descend(state, 0, 1) for _ in range(2))
    if _differ(state, first, second):
        return [Finding("a step twice", "step 0", Verdict.NOT_CHECKED, "another state each time")]
    rows = [Finding("a step twice", "step 0", Verdict.RIGHT, "the same state")]
    everything = list(compare_step(StepPoint.near(run, 0, state), None, ("reverse",)))
    return [*rows, _judged(everything, "derivatives of step 0")]


# -- kinds of problems ------------------------------------------------------------------------------------------------


def _kind_of(run: Unroll) -> Hashable:
    """What two problems must share for one check to be enough."""
    problem: BilevelProblem = run.problem
    if problem.of_one is not problem:
        return type(problem), _kind_of(replace(run, problem=problem.of_one))
    descent = problem.as_gradient_descent
    metas = _shapes(run.meta)
    if descent is None:
        return type(problem), _code(problem.init), _code(problem.step), _code(problem.outer_loss), metas
    params = None if descent._builds_params else _shapes(descent._make_params(None))
    return (
        *(_code(f) for f in (descent.inner_loss, descent._outer_loss, descent._make_params)),
        params,
        metas,
        _settings(descent),
    )


def _settings(descent: GradientDescent) -> Hashable:
    ours = descent.optimizer
    settings = tuple((name, _setting(value)) for name, value in sorted(ours.settings.items()))
    clipping = tuple(map(_setting, (ours.clipping.norm, ours.clipping.value, ours.clipping.norm_type)))
    return ours.algorithm, settings, clipping, _setting(ours.schedule)


def _setting(value: Any) -> Hashable:
    return _code(value) if callable(value) else repr(value)


def _code(function: Callable[..., Any]) -> Hashable:
    """The code of a function, whatever it is bound to."""
    while isinstance(function, types.MethodType) or hasattr(function, "func"):
        function = function.__func__ if isinstance(function, types.MethodType) else function.func  # type: ignore[attr-defined]
    own = getattr(function, "__code__", None)
    return own if own is not None else (type(function), getattr(type(function).__call__, "__code__", None))


def _shapes(tree: Any) -> Hashable:
    found: list[Hashable] = []
    for leaf in trees.leaves(tree):
        if isinstance(leaf, nn.Module):
            found += [(type(layer).__qualname__, layer.training) for layer in leaf.modules()]
            tensors: Mapping[str, Tensor] = dict(leaf.named_parameters())
            found += [(n, t.shape, t.dtype, t.requires_grad, len(t._backward_hooks or ())) for n, t in tensors.items()]
        elif isinstance(leaf, Tensor):
            found.append((leaf.shape, leaf.dtype, len(leaf._backward_hooks or ()) if leaf.requires_grad else 0))
        else:
            found.append(type(leaf))
    return tuple(found)
