"""One row for each estimator, over which the tests that estimators share are run.

A new estimator joins with a row in `ROWS`. What each field asks for:

- `estimates` (tests/estimators/test_estimates.py): settings for a problem with N = 5 and T = 4, whose results must be
  of the right form, repeatable and independent of global state.
- `exact`, `stochastic`, `formula`, `last_steps`, `from_start`, `own` (tests/estimators/test_closed_forms.py): the truth
  that the estimates must agree with. At least one of them is needed.
- `unbiased` (tests/estimators/test_unbiasedness.py): for random estimators, from a distribution and a control variate
  to the estimator whose expectation is computed over all values of its directions.
- `small` (tests/test_bad_input.py): settings for a problem with N = 2 and T = 3, with which bad input is tried.
- `named` (tests/estimators/test_names.py): further settings that must read back from their text.
- `flags` (tests/cli/test_command.py): what is typed, and the estimator that comes of it.
- `workers`, `streams` (tests/distributed): settings with which several workers must get the numbers of one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from closed_forms import LEARNING_RATE, Array, ClosedForm, affine, descent

import bilevel
from bilevel import (
    Auto,
    CoarserProblem,
    ConjugateGradient,
    EmpiricalFisher,
    FirstOrder,
    Forward,
    ForwardGradient,
    HessianFree,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    PersistentES,
    Reverse,
    RunningMean,
    SingleLoop,
    StreamingForwardGradient,
    TruncatedReverse,
    ZerothOrder,
)

SMALL = affine("few parameters", T=1, N=4, column_scale=0.4)
LOPSIDED = affine("many parameters, one of which matters most", T=1, N=64, column_scale=0.01)


class Stochastic(NamedTuple):
    """An unbiased estimator, and the relative variance that theory gives it."""

    estimator: bilevel.Estimator
    relative_variance: float
    case: ClosedForm = SMALL
    calls: int = 300
    smallest_bias: float = 0.4
    """The relative bias along ∇h that this sample finds, with probability 97 %: six of its standard errors at most."""


@dataclass(frozen=True)
class Formula:
    """An estimator of the form c − d X Y, and the matrix X that it has instead of H⁻¹."""

    estimator: bilevel.Estimator
    matrix: Callable[[ClosedForm, Array], Array]
    """(problem, H) ↦ X."""
    batches: int = 1


class Own(NamedTuple):
    """An estimator, a problem, and the biased gradient that the method computes there by its own definition."""

    estimator: bilevel.Estimator
    case: ClosedForm
    truth: Callable[[ClosedForm], Array]
    tolerance: float
    """The largest error relative to ‖truth‖."""


class Converging(NamedTuple):
    """An estimator that is exact at a stationary point, and inner loops that come to rest as T grows."""

    estimator: bilevel.Estimator
    inner_loop: Callable[[int], ClosedForm]
    """T ↦ problem."""
    batches: int = 1
    """After so many steps the batches start over."""


class Unbiased(NamedTuple):
    """A random estimator with two directions, whose expectation is computed exactly."""

    make: Callable[[str, Any], bilevel.Estimator]
    """(distribution, control variate) ↦ estimator."""
    distributions: tuple[str, ...]
    rounding: float = 1e-9
    with_variates: bool = True


@dataclass(frozen=True)
class Row:
    """What is known about one estimator; the fields are explained at the top of this file."""

    estimates: Sequence[bilevel.Estimator]
    small: Mapping[str, bilevel.Estimator]
    flags: Sequence[tuple[list[str], str]]
    exact_estimates: Sequence[bilevel.Estimator] = ()
    """Settings that give the exact gradient of the problem of `estimates`."""
    exact: Mapping[str, Callable[[ClosedForm], bilevel.Estimator]] = field(default_factory=dict)
    stochastic: Sequence[Stochastic] = ()
    formula: Mapping[str, Formula] = field(default_factory=dict)
    own: Mapping[str, Own] = field(default_factory=dict)
    converging: Mapping[str, Converging] = field(default_factory=dict)
    last_steps: Callable[[int], bilevel.Estimator] | None = None
    """The number s of last steps ↦ an estimator that goes back through them alone."""
    from_start: Mapping[str, bilevel.Estimator] = field(default_factory=dict)
    """Estimators that see the dependence of the initial state alone: c + d Z_0."""
    unbiased: Unbiased | None = None
    named: Sequence[bilevel.Estimator] = ()
    workers: Mapping[str, bilevel.Estimator] = field(default_factory=dict)
    streams: Mapping[str, bilevel.Estimator] = field(default_factory=dict)
    forward_mode: bool = False
    """Whether the inner loop is differentiated in forward mode (with the settings of `small`)."""
    differences: bool = False
    """Whether those of `small` take differences along one random direction of signs, of length 1e-4: for one meta
    parameter, or along a line, they are then right without an average, and they warn where no difference is seen."""
    needs_inner_loss: bool = False
    """Whether it takes a `GradientDescent` only."""


def neumann_series(H: Array, iterations: int, step_size: float) -> Array:
    """α Σ_{k=0..K} (I − αH)^k."""
    powers = [np.linalg.matrix_power(np.eye(len(H)) - step_size * H, k) for k in range(iterations + 1)]
    return step_size * np.sum(powers, axis=0)


def penalty_at_rest(penalty: float, case: ClosedForm) -> Array:
    """∇L_λ = c(y) + λ Yᵀ(y − z) at the minimisers y of g + f/λ and z of g, for a quadratic g and f."""
    g, outer = case.stationarity[-1], case.outer
    z = case.theta - np.linalg.solve(g.by_theta, g.value)
    curvature = g.by_theta + outer.D.T @ outer.D / penalty
    y = z - np.linalg.solve(curvature, outer.by_theta(z, case.phi) / penalty)
    return outer.by_phi(y, case.phi) + penalty * (y - z) @ g.by_phi


PRECISE = ConjugateGradient(iterations=20, tolerance=1e-13)
LONG_NEUMANN = Neumann(iterations=100, step_size=LEARNING_RATE)  # 0.6¹⁰¹ = 4e-23

# What the samples of `stochastic` can tell, which the tests check as well. With N = 4 the theories differ by a third:
# (N − 1)/b for Rademacher, (N + 1)/b for Gaussian, (N − b)/b for coordinates; a sample places the variance to within a
# quarter. Along ∇h the estimate is mean(w²)/‖∇h‖², w = ∇h·v. For Rademacher directions its variance is
# 2(1 − Σ g_i⁴/‖g‖⁴)/b, tiny where one entry of the gradient dominates: that is how the rows with N = 64 see a bias
# below a percent in a hundred calls. Their variance is tight as well, the squared error being a sum of 64 nearly
# independent terms.
ROWS: dict[type[bilevel.Estimator], Row] = {
    Reverse: Row(
        estimates=[Reverse("all"), Reverse("sqrt"), Reverse("graph"), Reverse(2), Reverse("log", offload="disk")],
        exact_estimates=[
            Reverse("all"),
            Reverse("sqrt"),
            Reverse("graph"),
            Reverse(2),
            Reverse("log", offload="disk"),
        ],
        small={"reverse": Reverse(), "reverse-sqrt": Reverse("sqrt"), "reverse-graph": Reverse("graph")},
        exact={
            "Reverse, all": lambda case: Reverse("all"),
            "Reverse, sqrt": lambda case: Reverse("sqrt"),
            "Reverse, log, disk": lambda case: Reverse("log", offload="disk"),
            "Reverse, graph": lambda case: Reverse("graph"),
            "Reverse, 3": lambda case: Reverse(3),
            "Reverse, more than T": lambda case: Reverse(case.T + 1),
        },
        flags=[
            (["--estimator", "reverse"], "reverse"),
            ([], "reverse"),
            (["--checkpoints", "sqrt"], "reverse(checkpoints='sqrt')"),
            (["--checkpoints", "3"], "reverse(checkpoints=3)"),
            (["--estimator", "reverse", "--offload", "disk"], "reverse(offload='disk')"),
        ],
        workers={"exact": Reverse()},
    ),
    TruncatedReverse: Row(
        estimates=[TruncatedReverse(2)],
        exact_estimates=[TruncatedReverse(4)],
        small={"truncated-reverse": TruncatedReverse(1)},
        exact={"TruncatedReverse, T": lambda case: TruncatedReverse(case.T)},
        last_steps=TruncatedReverse,
        flags=[
            (["--estimator", "truncated-reverse"], "truncated-reverse"),
            (["--estimator", "truncated-reverse", "--steps=2"], "truncated-reverse(steps=2)"),
        ],
        named=[TruncatedReverse(7)],
    ),
    Forward: Row(
        estimates=[Forward(), Forward(chunk_size=3)],
        exact_estimates=[Forward(), Forward(chunk_size=3)],
        small={"forward": Forward(), "forward-chunked": Forward(chunk_size=1)},
        exact={"Forward": lambda case: Forward(), "Forward, chunks": lambda case: Forward(chunk_size=2)},
        flags=[(["--estimator", "forward", "--chunk-size", "320"], "forward(chunk_size=320)")],
        forward_mode=True,
    ),
    ForwardGradient: Row(
        estimates=[
            ForwardGradient(3),
            ForwardGradient(3, "gaussian", chunk_size=2),
            ForwardGradient(2, "coordinate", chunk_size=1),
        ],
        exact_estimates=[ForwardGradient(5, "coordinate")],
        small={"forward-gradient": ForwardGradient(1)},
        exact={
            "ForwardGradient, N coordinates": lambda case: ForwardGradient(case.N, "coordinate"),
            "ForwardGradient, N coordinates, shared steps": lambda case: ForwardGradient(
                case.N, "coordinate", chunk_size=2, tangents="shared" if case.stationarity else "exact"
            ),
            "ForwardGradient, N coordinates, chunks": lambda case: ForwardGradient(case.N, "coordinate", chunk_size=3),
        },
        stochastic=[
            Stochastic(ForwardGradient(64), 63 / 64, LOPSIDED, calls=100, smallest_bias=0.0075),
            Stochastic(ForwardGradient(1), 3),
            Stochastic(ForwardGradient(3), 1),
            Stochastic(ForwardGradient(4, "gaussian"), 5 / 4, calls=600),
            Stochastic(ForwardGradient(1, "coordinate"), 3),
            Stochastic(ForwardGradient(3, "coordinate"), 1 / 3),
        ],
        unbiased=Unbiased(
            lambda name, variate: ForwardGradient(2, name, control_variate=variate),
            ("rademacher", "coordinate", "orthogonal"),
        ),
        flags=[
            (["--estimator", "forward-gradient"], "forward-gradient"),
            (["--estimator", "forward-gradient", "--directions", "4"], "forward-gradient(directions=4)"),
            (["--estimator", "forward_gradient", "--directions", "4"], "forward-gradient(directions=4)"),
            (
                ["--estimator", "forward-gradient(directions=4)", "--chunk-size", "2", "--distribution", "gaussian"],
                "forward-gradient(directions=4, distribution='gaussian', chunk_size=2)",
            ),
        ],
        named=[
            ForwardGradient(32, "gaussian", chunk_size=8),
            ForwardGradient(distribution="coordinate"),
            ForwardGradient(4, control_variate=TruncatedReverse(5), tangents="difference", support="reached"),
            ForwardGradient(4, "block", control_variate=(RunningMean(0.5), HessianFree(scale=2.0))),
            ForwardGradient(4, control_variate=(CoarserProblem(steps=3, estimator=Reverse("sqrt")),)),
        ],
        workers={
            "slopes": ForwardGradient(7, exchange="slopes"),
            "gradient": ForwardGradient(7, exchange="gradient"),
            "one at a time": ForwardGradient(7, chunk_size=1, exchange="slopes"),
            "chunks": ForwardGradient(7, chunk_size=2, exchange="slopes"),
            "chunks, gradient": ForwardGradient(7, chunk_size=2, exchange="gradient"),
            "fewer than workers": ForwardGradient(1),
            "basis": ForwardGradient(5, "orthogonal", exchange="gradient", control_variate=TruncatedReverse(2)),
            "variates": ForwardGradient(
                6, control_variate=(TruncatedReverse(1), HessianFree()), exchange="slopes", chunk_size=2
            ),
            "variates, gradient": ForwardGradient(
                6, control_variate=(TruncatedReverse(1), HessianFree()), exchange="gradient", chunk_size=2
            ),
            "an expensive variate": ForwardGradient(
                7, control_variate=CoarserProblem(steps=3, estimator=Reverse("log")), exchange="slopes"
            ),
            "an expensive variate, chunks": ForwardGradient(
                7, control_variate=CoarserProblem(steps=3), exchange="slopes", chunk_size=1
            ),
            "blocks": ForwardGradient(6, "block", exchange="gradient", control_variate=TruncatedReverse(2)),
            "differences": ForwardGradient(5, tangents="difference", exchange="slopes"),
        },
        forward_mode=True,
    ),
    StreamingForwardGradient: Row(
        estimates=[StreamingForwardGradient(3), StreamingForwardGradient(3, "same", chunk_size=2)],
        exact_estimates=[StreamingForwardGradient(5, "same", "coordinate")],
        small={"streaming-forward-gradient": StreamingForwardGradient(1)},
        exact={
            "StreamingForwardGradient, N coordinates": lambda case: StreamingForwardGradient(
                case.N, "same", "coordinate"
            ),
        },
        stochastic=[
            Stochastic(StreamingForwardGradient(3), 1),
            Stochastic(StreamingForwardGradient(3, "same", "coordinate"), 1 / 3),
        ],
        unbiased=Unbiased(
            lambda name, variate: StreamingForwardGradient(2, "fresh" if variate is None else "same", name),
            ("rademacher",),
            with_variates=False,
        ),
        flags=[
            (["--estimator", "streaming-forward-gradient"], "streaming-forward-gradient"),
            (
                ["--estimator", "streaming-forward-gradient", "--carry", "same", "--directions", "4"],
                "streaming-forward-gradient(directions=4, carry='same')",
            ),
        ],
        named=[StreamingForwardGradient(4, "same", "gaussian", 2, TruncatedReverse(5), "difference")],
        streams={
            "same directions": StreamingForwardGradient(5, "same", exchange="gradient"),
            "same directions, chunks": StreamingForwardGradient(7, "same", exchange="slopes", chunk_size=2),
            "same directions, variate": StreamingForwardGradient(
                4, "same", control_variate=TruncatedReverse(2), exchange="gradient"
            ),
            "same directions, differences": StreamingForwardGradient(3, "same", tangents="difference", chunk_size=1),
            "fresh directions": StreamingForwardGradient(5),
            "fresh directions, chunks": StreamingForwardGradient(7, chunk_size=2),
            "fresh directions, fewer than workers": StreamingForwardGradient(2, chunk_size=1),
        },
        forward_mode=True,
    ),
    ZerothOrder: Row(
        differences=True,
        estimates=[ZerothOrder(2), ZerothOrder(2, scheme="forward", distribution="gaussian")],
        small={
            "zeroth-order": ZerothOrder(1, step_size=1e-4),
            "zeroth-order-forward": ZerothOrder(1, step_size=1e-4, scheme="forward"),
        },
        stochastic=[
            Stochastic(ZerothOrder(64, 0.5), 63 / 64, LOPSIDED, calls=60, smallest_bias=0.0075),
            Stochastic(ZerothOrder(1, 0.5), 3),
            Stochastic(ZerothOrder(3, 0.5), 1),
            Stochastic(ZerothOrder(2, 0.5, distribution="coordinate"), 1),
        ],
        # h is quadratic there, so central differences have no bias of their own.
        unbiased=Unbiased(
            lambda name, variate: ZerothOrder(2, 1e-2, distribution=name, control_variate=variate),
            ("rademacher", "coordinate"),
            rounding=1e-8,
        ),
        flags=[
            (["--estimator", "zeroth-order"], "zeroth-order"),
            (["--estimator", "zeroth-order", "--step-size", "1e-2"], "zeroth-order(step_size=0.01)"),
        ],
        named=[
            ZerothOrder(4, control_variate=Implicit(Neumann(iterations=3))),
            ZerothOrder(4, step_size=1 / 3, scheme="forward"),
            ZerothOrder(step_size=1e-300),
            ZerothOrder(step_size=1e22, distribution="gaussian"),
        ],
        workers={
            "solves and variates": ZerothOrder(
                5, step_size=1e-4, exchange="slopes", control_variate=(Implicit(), HessianFree())
            ),
            "solves": ZerothOrder(5, step_size=1e-4, exchange="slopes"),
            "solves, gradient": ZerothOrder(5, step_size=1e-4, exchange="gradient"),
            "forward solves": ZerothOrder(4, step_size=1e-6, scheme="forward", exchange="slopes"),
            "black box": ZerothOrder(5, step_size=1e-4, exchange="slopes"),
        },
    ),
    PersistentES: Row(
        differences=True,
        estimates=[PersistentES(4), PersistentES(2, carry="same", distribution="gaussian")],
        small={"persistent-es": PersistentES(1, step_size=1e-4)},
        stochastic=[
            Stochastic(PersistentES(3, 0.5), 1),
            Stochastic(PersistentES(4, 0.5, "same", "gaussian"), 5 / 4, calls=600),
        ],
        # h is quadratic there, so central differences have no bias of their own.
        unbiased=Unbiased(
            lambda name, variate: PersistentES(2, 1e-2, distribution=name), ("rademacher",), 1e-8, with_variates=False
        ),
        flags=[
            (["--estimator", "persistent-es"], "persistent-es"),
            (
                ["--estimator", "persistent-es", "--carry", "same", "--step-size", "1e-2"],
                "persistent-es(step_size=0.01, carry='same')",
            ),
        ],
        named=[PersistentES(4, 0.5, "same", "gaussian")],
    ),
    Implicit: Row(
        estimates=[
            Implicit(ConjugateGradient(iterations=30)),
            Implicit(Neumann(5, step_size=0.1), batches=2),
            Implicit(Nystrom(rank=10, damping=1.0)),
            Implicit(EmpiricalFisher(rank=3, damping=4.0)),
        ],
        small={"implicit": Implicit(), "implicit-neumann": Implicit(Neumann(20, step_size=0.5))},
        formula={
            "conjugate gradients": Formula(Implicit(PRECISE), lambda case, H: np.linalg.inv(H)),
            "conjugate gradients, 3 batches": Formula(
                Implicit(PRECISE, batches=3), lambda case, H: np.linalg.inv(H), batches=3
            ),
            "conjugate gradients, damped": Formula(
                Implicit(ConjugateGradient(20, 1e-13, damping=0.5)),
                lambda case, H: np.linalg.inv(H + 0.5 * np.eye(len(H))),
            ),
            "Neumann, 1": Formula(Implicit(Neumann(1, 0.2)), lambda case, H: neumann_series(H, 1, 0.2)),
            "Neumann, 5, 2 batches": Formula(
                Implicit(Neumann(5, 0.3), batches=2), lambda case, H: neumann_series(H, 5, 0.3), batches=2
            ),
            "Neumann, 100": Formula(Implicit(Neumann(100, LEARNING_RATE)), lambda case, H: np.linalg.inv(H)),
            "Nyström, whole": Formula(
                Implicit(Nystrom(rank=100, damping=0.5)), lambda case, H: np.linalg.inv(H + 0.5 * np.eye(len(H)))
            ),
        },
        converging={
            "conjugate gradients": Converging(Implicit(PRECISE), lambda T: descent("", T=T, explicit=True)),
            "Neumann": Converging(Implicit(LONG_NEUMANN), lambda T: descent("", T=T, explicit=True)),
            "weight decay": Converging(Implicit(PRECISE), lambda T: descent("", T=T, weight_decay=0.5)),
            "weight decay, Neumann": Converging(Implicit(LONG_NEUMANN), lambda T: descent("", T=T, weight_decay=0.5)),
            "learned weight decay": Converging(
                Implicit(PRECISE), lambda T: descent("", T=T, weight_decay=0.5, learned_decay=True)
            ),
            # In these two the slowest mode does not oscillate (small momentum; this seed), so its rate can be read off.
            "momentum": Converging(Implicit(PRECISE), lambda T: descent("", T=T, momentum=0.1, start_from_meta=True)),
            "3 batches": Converging(
                Implicit(PRECISE, batches=3),
                lambda T: descent("", T=T, periods=3, shared_solution=True, seed=4),
                batches=3,
            ),
        },
        flags=[
            (["--estimator", "implicit"], "implicit"),
            (["--estimator", "implicit", "--solver", "neumann"], "implicit(solver=neumann)"),
            (
                ["--estimator", "implicit", "--solver", "Neumann(iterations=3)"],
                "implicit(solver=neumann(iterations=3))",
            ),
        ],
        named=[
            Implicit(batches=5),
            Implicit(ConjugateGradient(iterations=7, tolerance=1e-12, damping=0.5)),
            Implicit(Neumann(), batches=2),
            Implicit(Nystrom(rank=3, damping=0.5)),
            Implicit(EmpiricalFisher(rank=3, damping=0.5, scale=32.0)),
            Implicit(Neumann(iterations=3, step_size=math.pi)),
        ],
        needs_inner_loss=True,
    ),
    HessianFree: Row(
        estimates=[
            HessianFree(),
            HessianFree(preconditioner="optimizer"),
            HessianFree(preconditioner="optimizer", mixed="difference"),
            HessianFree(lookahead=True),
        ],
        small={"hessian-free": HessianFree(), "hessian-free-optimizer": HessianFree(preconditioner="optimizer")},
        formula={
            "Hessian-free": Formula(HessianFree(0.7), lambda case, H: 0.7 * np.eye(len(H))),
            "Hessian-free, optimizer": Formula(
                HessianFree(0.7, "optimizer"), lambda case, H: 0.7 * case.last_rate * np.eye(len(H))
            ),
        },
        flags=[
            (["--estimator", "hessian-free"], "hessian-free"),
            (["--estimator", "hessian-free", "--scale", "0.5"], "hessian-free(scale=0.5)"),
        ],
        named=[
            HessianFree(scale=1e-7, preconditioner="optimizer"),
            HessianFree(mixed="difference", step_size=0.01, lookahead=True),
        ],
        needs_inner_loss=True,
    ),
    Penalty: Row(
        estimates=[Penalty(), Penalty(10.0, steps=2, batches=2)],
        small={"penalty": Penalty(1e3)},
        # Rounding is magnified by λ, so 1e-16 becomes 1e-12 at λ = 1e3, times the condition of the problem.
        own={
            f"penalty {penalty:g}, {what}": Own(
                Penalty(penalty), case, functools.partial(penalty_at_rest, penalty), 1e-13 * max(penalty, 100.0)
            )
            for penalty in (50.0, 1e3)
            for what, case in {
                "plain": descent("", T=300),
                "explicit": descent("", T=300, explicit=True),
                "momentum": descent("", T=300, momentum=0.5, explicit=True),
                "weight decay": descent("", T=300, weight_decay=0.5),
                "ascent": descent("", T=300, weight_decay=0.5, maximize=True, explicit=True),
                "trees": descent("", T=300, as_trees=True),
            }.items()
        },
        flags=[
            (["--estimator", "penalty"], "penalty"),
            (["--estimator", "penalty", "--penalty", "10", "--growth", "0.5"], "penalty(penalty=10.0, growth=0.5)"),
        ],
        named=[Penalty(10.0, growth=0.25), Penalty(steps=3, batches=2)],
        needs_inner_loss=True,
    ),
    SingleLoop: Row(
        estimates=[
            SingleLoop(0.1),
            SingleLoop(0.1, solver_steps=6),
            SingleLoop(0.1, order="simultaneous", average=0.5),
        ],
        small={"single-loop": SingleLoop(1.0)},
        formula={"single loop": Formula(SingleLoop(0.3), lambda case, H: 0.3 * np.eye(len(H)))},
        own={
            f"single loop, {steps} steps": Own(
                SingleLoop(0.3, solver_steps=steps),
                descent("", T=3, explicit=True),
                lambda case, steps=steps: case.implicit(inverse=lambda H: neumann_series(H, steps - 1, 0.3)),
                1e-10,
            )
            for steps in (1, 2, 7)
        },
        flags=[
            (["--estimator", "single-loop"], "single-loop"),
            (["--estimator", "single-loop", "--solver-steps", "3"], "single-loop(solver_steps=3)"),
        ],
        named=[SingleLoop(0.5, order="simultaneous", average=0.1)],
        needs_inner_loss=True,
    ),
    FirstOrder: Row(
        estimates=[],  # it refuses a problem whose initial state does not depend on φ: see test_first_order.py
        small={},
        from_start={"first order": FirstOrder()},
        flags=[],  # the initial parameters of the tasks do not depend on φ either
        named=[FirstOrder()],
    ),
    Auto: Row(
        estimates=[Auto("1GB")],
        exact_estimates=[Auto("1GB")],
        small={},  # it hands its arguments to one of the others
        exact={
            "Auto": lambda case: Auto("1GB"),
            "Auto, little memory": lambda case: Auto("20kB", directions=case.N),
        },
        flags=[(["--estimator", "auto", "--memory", "1GB"], "auto(memory='1GB')")],
        named=[Auto(), Auto(memory="512MiB", directions=4)],
        workers={"auto": Auto()},
    ),
}

RANDOM = {estimator for row in ROWS.values() for estimator in row.estimates if estimator.is_random} - {Auto("1GB")}
"""The estimators among all `estimates` that draw directions; `Auto("1GB")` takes an exact method."""
