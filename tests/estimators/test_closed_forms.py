"""Every estimator against hypergradients known in closed form.

An estimator joins by its row in `estimator_table.py`, where it says which properties it must have. Problems join in
`closed_forms.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from closed_forms import (
    BLACK_BOX,
    LEARNING_RATE,
    UNROLLED,
    WEAKEST,
    Array,
    ClosedForm,
    descent,
    product,
    tensor,
)
from estimator_table import ROWS, Converging, Formula, Own

import bilevel
from bilevel import HessianFree, Implicit, ZerothOrder
from bilevel.errors import NoDependenceError

ROUNDING = 1e-10
"""Relative; the problems are small and well conditioned, so float64 leaves some 1e-15."""

DESCENTS = [case for case in UNROLLED if case.stationarity]

every_problem = pytest.mark.parametrize("case", UNROLLED, ids=lambda case: case.name)
every_descent = pytest.mark.parametrize("case", DESCENTS, ids=lambda case: case.name)


# -- exact ---------------------------------------------------------------------------------------------------------

EXACT = {name: make for row in ROWS.values() for name, make in row.exact.items()}


@pytest.mark.sampled(every=4)
@every_problem
@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT.keys())
def test_exact_estimators_give_the_closed_form(
    estimator: Callable[[ClosedForm], bilevel.Estimator], case: ClosedForm
) -> None:
    estimate = case(estimator(case))
    assert case.error(estimate) < ROUNDING
    assert estimate.value.item() == pytest.approx(case.value, rel=ROUNDING)


# -- differences of h ----------------------------------------------------------------------------------------------


def rounding_of_differences(case: ClosedForm, step_size: float) -> float:
    """What float64 leaves of a difference quotient, relative to ‖∇h‖.

    Each h comes out of some 100 roundings, each of at most ε|h| at a point that is √N·μ away; two of them are divided
    by 2μ, and the N slopes times √N e_j over N again have norm max w.
    """
    reach = np.sqrt(case.N) * step_size
    curvature = np.linalg.norm(case.outer.second(case.Z()), 2)
    largest = abs(case.value) + reach * np.linalg.norm(case.gradient) + reach**2 / 2 * curvature
    return float(100 * np.finfo(float).eps * largest / step_size / np.linalg.norm(case.gradient))


QUADRATIC = [*(case for case in UNROLLED if case.h_is_quadratic), BLACK_BOX]


@pytest.mark.parametrize("step_size", [1e-3, 1.0])
@pytest.mark.parametrize("case", QUADRATIC, ids=lambda case: case.name)
def test_central_differences_of_a_quadratic_are_exact(case: ClosedForm, step_size: float) -> None:
    estimate = case(ZerothOrder(case.N, step_size, distribution="coordinate"))
    assert case.error(estimate) < rounding_of_differences(case, step_size)
    assert estimate.value.item() == pytest.approx(case.value, rel=ROUNDING)


@pytest.mark.parametrize("case", QUADRATIC, ids=lambda case: case.name)
def test_forward_differences_of_a_quadratic_are_off_by_its_curvature(case: ClosedForm) -> None:
    # (h(φ + μv) − h(φ))/μ = ∇h·v + μ/2 vᵀ∇²h v, and v = √N e_j: entry j of the estimate gains μ√N/2 ∂²h/∂φ_j².
    step_size = 0.1
    estimate = case(ZerothOrder(case.N, step_size, "forward", "coordinate"))
    curvature = np.diag(case.outer.second(case.Z()))
    truth = case.gradient + step_size * np.sqrt(case.N) / 2 * curvature
    assert case.error(estimate, truth) < ROUNDING


@pytest.mark.parametrize(("scheme", "order"), [("central", 2), ("forward", 1)])
def test_differences_of_other_functions_have_the_order_they_claim(scheme: str, order: int) -> None:
    case = next(case for case in UNROLLED if not case.h_is_quadratic)
    coarse, fine = (
        case.error(case(ZerothOrder(case.N, size, scheme, "coordinate")))  # pyright: ignore[reportArgumentType]
        for size in (2e-3, 1e-3)
    )
    # The next term of the expansion changes the ratio by O(μ) for forward, O(μ²) for central differences.
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.02)


# -- stochastic ----------------------------------------------------------------------------------------------------

STOCHASTIC = [sample for row in ROWS.values() for sample in row.stochastic]


class Sample(NamedTuple):
    """Many estimates of one gradient, under different seeds."""

    truth: Array
    grads: Array
    """`[calls, N]`"""
    standard_errors: Array
    """`[calls]`"""

    @property
    def squared_errors(self) -> Array:
        """Relative to ‖∇h‖²."""
        return np.square(self.grads - self.truth).sum(1) / np.square(self.truth).sum()

    @property
    def claimed_squared_errors(self) -> Array:
        """What `Estimate.standard_error` says about them."""
        return np.square(self.standard_errors) / np.square(self.truth).sum()


@functools.cache
def sample(row: int) -> Sample:
    """Estimates under the seeds 0, 1, 2, …, shared by the tests of a row."""
    estimator, _, case, calls, _ = STOCHASTIC[row]
    estimates = [case(estimator, seed) for seed in range(calls)]
    errors = [estimate.standard_error for estimate in estimates]
    grads = [case.flat(estimate.grad).numpy() for estimate in estimates]
    return Sample(case.gradient, np.stack(grads), np.array(errors, dtype=float))


def standard_error_of_mean(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


every_stochastic = pytest.mark.parametrize(
    "row", range(len(STOCHASTIC)), ids=[f"{row.estimator}, N={row.case.N}" for row in STOCHASTIC]
)


@pytest.mark.sampled(every=3)
@every_stochastic
def test_stochastic_estimators_are_unbiased(row: int) -> None:
    found = sample(row)
    along = found.grads @ found.truth / np.square(found.truth).sum()
    error = standard_error_of_mean(along)
    assert 6 * error < STOCHASTIC[row].smallest_bias, "the sample is too small to mean much"
    assert abs(along.mean() - 1) < 4 * error
    # In all directions together: E‖mean − ∇h‖² is the squared error of one call over the number of calls, as the
    # estimates themselves report it.
    miss = np.square(found.grads.mean(0) - found.truth).sum() / np.square(found.truth).sum()
    assert miss < 4**2 * found.claimed_squared_errors.mean() / len(found.grads)


@pytest.mark.sampled(every=3)
@every_stochastic
def test_stochastic_estimators_have_the_variance_of_theory(row: int) -> None:
    found, theory = sample(row).squared_errors, STOCHASTIC[row].relative_variance
    error = standard_error_of_mean(found)
    assert 4 * error < theory / 4, "the sample is too small to mean much"
    assert abs(found.mean() - theory) < 4 * error + ROUNDING


@every_stochastic
def test_standard_errors_are_right_on_average(row: int) -> None:
    found = sample(row)
    gap = found.claimed_squared_errors - found.squared_errors  # of the same call: much of the noise cancels
    assert abs(gap.mean()) < 4 * standard_error_of_mean(gap) + ROUNDING
    # And the average itself is that of theory, since E w² = ‖∇h‖².
    claimed = found.claimed_squared_errors
    assert abs(claimed.mean() - STOCHASTIC[row].relative_variance) < 4 * standard_error_of_mean(claimed) + ROUNDING


# -- implicit ------------------------------------------------------------------------------------------------------


FORMULAS = {name: formula for row in ROWS.values() for name, formula in row.formula.items()}
CONVERGING = {name: converging for row in ROWS.values() for name, converging in row.converging.items()}


@every_descent
@pytest.mark.parametrize("row", FORMULAS.values(), ids=FORMULAS.keys())
def test_implicit_estimators_give_their_formula_wherever_the_inner_loop_ends(row: Formula, case: ClosedForm) -> None:
    if row.batches > case.T:
        with pytest.raises(ValueError, match=f"batches={row.batches}.* with {case.T}"):
            case(row.estimator)
        return
    estimate = case(row.estimator)
    assert case.error(estimate, case.implicit(row.batches, functools.partial(row.matrix, case))) < ROUNDING
    assert estimate.value.item() == pytest.approx(case.value, rel=ROUNDING)
    if isinstance(row.estimator, Implicit):
        distance = np.linalg.norm(np.mean([s.value for s in case.stationarity[-row.batches :]], axis=0))
        assert estimate.diagnostics["gradient_norm"] == pytest.approx(distance, rel=ROUNDING)


@pytest.mark.parametrize("row", CONVERGING.values(), ids=CONVERGING.keys())
def test_implicit_estimators_converge_to_the_stationary_solution_as_fast_as_the_inner_loop(row: Converging) -> None:
    transition = product([A for A, _ in row.inner_loop(row.batches).jacobians], 10)
    rate = max(abs(np.linalg.eigvals(transition))) ** (1 / row.batches)
    whole = 2 * row.batches  # batches come round, and eigenvalues of both signs look alike
    steps = [whole * round(np.log(distance) / np.log(rate) / whole) for distance in (1e-2, 1e-4, 1e-6, 1e-10)]
    truth = gradient_at_rest(row.inner_loop(200), row.batches)
    cases = [row.inner_loop(T) for T in steps]
    errors = [case.error(case(row.estimator), truth) for case in cases]
    assert errors[-1] < 1e-8
    assert errors == sorted(errors, reverse=True)
    # error = ρᵀ (const + O((ρ₂/ρ)ᵀ)), ρ₂ the next eigenvalue
    observed = (errors[2] / errors[1]) ** (1 / (steps[2] - steps[1]))
    assert observed == pytest.approx(rate, rel=0.02)


def gradient_at_rest(case: ClosedForm, batches: int = 1) -> Array:
    """∇(f(θ*(φ), φ)) with θ* the minimiser of the mean inner loss, one Newton step from θ_T."""
    last = case.stationarity[-batches:]
    H, Y = np.mean([s.by_theta for s in last], axis=0), np.mean([s.by_phi for s in last], axis=0)
    theta = case.theta - np.linalg.solve(H, np.mean([s.value for s in last], axis=0))
    d, c = case.outer.by_theta(theta, case.phi), case.outer.by_phi(theta, case.phi)
    return c - d @ np.linalg.solve(H, Y)


@pytest.mark.parametrize("name", [name for name, row in CONVERGING.items() if row.batches == 1])
def test_the_stationary_closed_form_is_the_limit_of_the_unrolled_one(name: str) -> None:
    # Not a test of the library but of the table: two derivations of one number. (Minibatch descent stays at a solution
    # that the batches share, but how that moves with φ is not how the minimiser of the mean moves.)
    case = CONVERGING[name].inner_loop(200)
    assert np.linalg.norm(gradient_at_rest(case) - case.gradient) < ROUNDING * np.linalg.norm(case.gradient)


@pytest.mark.parametrize("algorithm", [torch.optim.Adam, torch.optim.AdamW])
def test_hessian_free_scales_with_adam(algorithm: type[torch.optim.Optimizer]) -> None:
    """P = ∂(lr m̂/(√v̂ + ε))/∂(gradient) for one more step, weight decay being part of Adam's gradient, not AdamW's."""
    steps, rate, decay, beta_1, beta_2, tiny = 6, 0.1, 0.5, 0.8, 0.9, 1e-3
    decays = decay if algorithm is torch.optim.Adam else 0.0
    case = descent("", T=2, periods=2, explicit=True, weight_decay=decays)  # two batches take turns
    assert isinstance(case.problem, bilevel.GradientDescent)
    outer_loss, batches = case.outer.as_torch(), bilevel.batches(lambda t: (case.inner_batches or [])[t % 2], steps)
    problem = bilevel.GradientDescent(
        inner_loss=case.problem.inner_loss,
        outer_loss=outer_loss,
        params=tensor(np.zeros(5)),
        optimizer=bilevel.optimizer(algorithm, lr=rate, weight_decay=decay, betas=(beta_1, beta_2), eps=tiny),
    )
    theta, m, v = np.zeros((3, 5))

    def gradient(t: int) -> Array:
        condition = case.stationarity[t % 2]
        return condition.value + condition.by_theta @ (theta - case.theta)

    for t in range(1, steps + 1):
        g = gradient(t - 1)
        m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
        shrink = 1 - rate * decay if algorithm is torch.optim.AdamW else 1.0
        theta = shrink * theta - rate * m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + tiny)
    late_1, late_2 = (1 - beta_1) / (1 - beta_1 ** (steps + 1)), (1 - beta_2) / (1 - beta_2 ** (steps + 1))
    last = gradient(steps - 1)
    m_hat = late_1 * (last + m * beta_1 / (1 - beta_1))
    root = np.sqrt(late_2 * (last**2 + v * beta_2 / (1 - beta_2)))
    P = rate * (late_1 / (root + tiny) - m_hat / (root + tiny) ** 2 * late_2 * last / root)
    d, c = case.outer.by_theta(theta, case.phi), case.outer.by_phi(theta, case.phi)
    estimate = HessianFree(0.7, "optimizer")(problem, case.meta, batches, tensor(case.outer.a))
    assert case.error(estimate, c - 0.7 * (P * d) @ case.stationarity[(steps - 1) % 2].by_phi) < ROUNDING


# -- from the initial state alone ----------------------------------------------------------------------------------

FROM_START = {name: estimator for row in ROWS.values() for name, estimator in row.from_start.items()}


@every_problem
@pytest.mark.parametrize("estimator", FROM_START.values(), ids=FROM_START.keys())
def test_estimators_from_the_start_take_the_steps_for_the_identity(
    estimator: bilevel.Estimator, case: ClosedForm
) -> None:
    if not case.Z_0.any():
        with pytest.raises(NoDependenceError, match="the initial state does not depend on the meta parameters"):
            case(estimator)
        return
    estimate = case(estimator)
    assert case.error(estimate, case.c + case.d @ case.Z_0[: len(case.theta)]) < ROUNDING
    assert estimate.value.item() == pytest.approx(case.value, rel=ROUNDING)


# -- methods with a truth of their own -----------------------------------------------------------------------------

OWN = {name: own for row in ROWS.values() for name, own in row.own.items()}


@pytest.mark.parametrize("row", OWN.values(), ids=OWN.keys())
def test_biased_estimators_give_what_they_define(row: Own) -> None:
    estimate = row.case(row.estimator)
    assert row.case.error(estimate, row.truth(row.case)) < row.tolerance
    assert estimate.value.item() == pytest.approx(row.case.value, rel=ROUNDING)


# -- truncated -----------------------------------------------------------------------------------------------------

TRUNCATED = {kind.__name__: row.last_steps for kind, row in ROWS.items() if row.last_steps is not None}

every_truncated = pytest.mark.parametrize("estimator", TRUNCATED.values(), ids=TRUNCATED.keys())


@every_problem
@every_truncated
def test_truncated_estimators_sum_over_the_last_steps(
    estimator: Callable[[int], bilevel.Estimator], case: ClosedForm
) -> None:
    for steps in range(1, case.T + 1):
        estimate = case(estimator(steps))
        assert case.error(estimate, case.truncated(steps)) < ROUNDING
        assert estimate.value.item() == pytest.approx(case.value, rel=ROUNDING)


@pytest.mark.parametrize("start_from_meta", [False, True])
@every_truncated
def test_truncated_estimators_obey_their_bias_bound(
    estimator: Callable[[int], bilevel.Estimator], start_from_meta: bool
) -> None:
    case = descent("", T=12, periods=12, start_from_meta=start_from_meta)
    slopes = [np.linalg.norm(B[: len(case.theta)], 2) for B in (case.Z_0, *(B for _, B in case.jacobians))]
    for steps in range(1, case.T):
        bias = np.linalg.norm(case.flat(case(estimator(steps)).grad).numpy() - case.gradient)
        assert bias <= bias_bound(steps, case) * max(slopes[: case.T - steps + 1])
    assert case.error(case(estimator(case.T))) < ROUNDING


@every_truncated
def test_the_bias_bound_is_attained(estimator: Callable[[int], bilevel.Estimator]) -> None:
    # One parameter of curvature α: the bias is the bound's geometric series up to T, (1 − ηα)^{T−s} short of its limit.
    case = descent("", T=12, M=1, N=1)
    (step,) = case.jacobians[0][1][:1].ravel()
    for steps in range(1, case.T):
        bias = np.linalg.norm(case.flat(case(estimator(steps)).grad).numpy() - case.gradient)
        missing = 1 - (1 - LEARNING_RATE * WEAKEST) ** (case.T - steps)
        assert bias == pytest.approx(bias_bound(steps, case) * abs(step) * missing, rel=ROUNDING)


def bias_bound(steps: int, case: ClosedForm) -> float:
    """(1 − ηα)^s/(ηα) · ‖d‖, to be multiplied by the largest ‖B_t‖ of the steps left out.

    Shaban et al., AISTATS 2019, Proposition 3.1.
    """
    contraction = LEARNING_RATE * WEAKEST
    return float((1 - contraction) ** steps / contraction * np.linalg.norm(case.d))


# -- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_every_estimator_has_a_truth_that_it_must_agree_with(kind: type[bilevel.Estimator]) -> None:
    row = ROWS[kind]
    assert row.exact or row.stochastic or row.formula or row.last_steps or row.from_start or row.own
    rows = (*row.stochastic, *row.formula.values(), *row.converging.values(), *row.own.values())
    found = [each.estimator for each in rows] + [make(UNROLLED[0]) for make in row.exact.values()]
    found += row.from_start.values()
    assert {type(estimator) for estimator in found} == {kind}
