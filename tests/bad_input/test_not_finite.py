"""Numbers that are not finite are reported with the step at which they appear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from bad_input_cases import (
    DERIVATIVES,
    EVERY,
    IMPLICIT,
    INF,
    NAN,
    PHI,
    RATE,
    START,
    UNROLLED,
    call,
    descent,
    problem,
    quadratic,
    refused,
    sgd,
    weighted,
)
from torch import Tensor, nn

import bilevel
from bilevel.errors import NonFiniteError
from bilevel.problem import Descent


def plain_loop(loss: Callable[..., Tensor], theta: Tensor, phi: Tensor, batches: Any, **settings: Any) -> list[Tensor]:
    """θ_0 … θ_T by PyTorch's own optimiser, as any user would write it."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], **{"lr": RATE, **settings})
    states = [theta.detach().clone()]
    for batch in batches:
        optimizer.zero_grad()
        loss(theta, phi, batch).backward()
        optimizer.step()
        states.append(theta.detach().clone())
    return states


def first_not_finite(states: list[Tensor]) -> int:
    return next(t for t, state in enumerate(states) if not torch.isfinite(state).all())


def quartic(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    return 0.25 * (theta - phi).square().square().sum()


class Broken(NamedTuple):
    what: str
    loss: Callable[..., Tensor]
    start: Tensor
    batches: list[Any]
    fragments: list[str]
    settings: dict[str, Any] | None = None
    """Of SGD."""


BROKEN = [
    Broken(
        "a batch with NaN", weighted, START, [1.0, 1.0, NAN, 1.0], ["inner step 2 of 4", "inner_loss was nan", "batch"]
    ),
    Broken(
        "the first batch", weighted, START, [INF, 1.0], ["inner step 0 of 2", "inner_loss was inf", "check the batch"]
    ),
    Broken("the last batch", weighted, START, [1.0, -INF], ["inner step 1 of 2", "inner_loss was -inf"]),
    Broken("momentum", weighted, START, [1.0, NAN, 1.0], ["inner step 1 of 3"], {"momentum": 0.9}),
    Broken("an exploding loop", quartic, 30 * START, [None] * 30, ["of 30 (counted from 0)", "learning rate"]),
    Broken(
        "a learning rate far too large",
        weighted,
        START,
        [1.0] * 6,
        ["inner step 0 of 6", "inner_loss was 3.25 there", "a smaller inner learning rate is the usual cure"],
        {"lr": 1e308},
    ),
]


@pytest.mark.parametrize("name", DERIVATIVES)
def test_an_inner_loss_that_is_not_finite_though_its_gradient_is_zero(name: str) -> None:
    def loss(theta: Tensor, phi: Tensor, batch: Tensor) -> Tensor:
        return (theta - phi).square()[batch].mean()  # of nothing: NaN, with a gradient of zero

    batches = [torch.arange(0)] * 3
    fragments = ["inner_loss was nan at inner step 0 of 3", "is it empty?"]
    error = refused(NonFiniteError, *fragments, by=lambda: call(name, descent(loss, params=START), PHI, batches))
    assert error.inner_step == 0
    assert torch.equal(error.last_finite_state.params, START)


def test_a_parameter_that_is_not_finite_is_named() -> None:
    subject = bilevel.GradientDescent(
        lambda model, phi, batch: model(phi).square().sum() / 0,
        lambda model, phi, batch: model(phi).sum(),
        nn.Sequential(nn.Linear(2, 1).double()),
        sgd(),
    )
    fragments = ["made state.params['0.weight'] NaN or infinite", "inner step 0 of 2"]
    refused(NonFiniteError, *fragments, by=lambda: bilevel.Reverse()(subject, PHI, bilevel.no_batches(2)))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.what)
def test_an_inner_step_that_is_not_finite(case: Broken, name: str) -> None:
    settings = case.settings or {}
    states = plain_loop(case.loss, case.start, PHI, case.batches, **settings)
    bad = first_not_finite(states)
    subject = descent(case.loss, params=case.start, optimizer=sgd(**settings))
    error = refused(
        NonFiniteError,
        "the outer loss is not finite",
        "state.params",
        *case.fragments,
        by=lambda: call(name, subject, PHI, case.batches),
    )
    assert error.inner_step == bad - 1
    assert isinstance(error.last_finite_state, Descent)
    assert error.last_finite_state.steps == bad - 1
    torch.testing.assert_close(error.last_finite_state.params, states[bad - 1], rtol=1e-14, atol=0)
    assert torch.isfinite(error.last_finite_state.params).all()


@pytest.mark.parametrize("name", EVERY)
def test_initial_parameters_that_are_not_finite(name: str) -> None:
    subject = descent(
        lambda theta, phi, batch: quadratic(theta["a"], phi, batch) + theta["b"].square().sum(),
        lambda theta, phi, batch: theta["a"].sum() + theta["b"].sum(),
        {"a": torch.ones(2), "b": torch.tensor([1.0, INF])},
    )
    fragments = ["state.params['b'] holds NaN or infinity before the first inner step", "initial parameters"]
    error = refused(NonFiniteError, *fragments, by=lambda: call(name, subject))
    assert error.inner_step is None
    assert error.last_finite_state is None


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_outer_loss_that_is_not_finite(name: str, bad: float) -> None:
    subject = descent(outer_loss=lambda theta, phi, batch: theta.sum() + batch)
    fragments = [f"the outer loss is not finite: outer_loss is {bad}", "all 3 inner states are finite", "outer_batch"]
    error = refused(NonFiniteError, *fragments, by=lambda: call(name, subject, PHI, outer_batch=bad))
    assert error.inner_step is None
    expected = plain_loop(quadratic, START, PHI, range(3))[-1]
    torch.testing.assert_close(error.last_finite_state.params, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in IMPLICIT])
def test_an_infinite_state_that_the_outer_loss_hides(name: str) -> None:
    subject = problem(outer_loss=lambda state, phi, batch: torch.sigmoid(state).sum())
    fragments = ["the final inner state is not finite", "inner step 1 of 3 (counted from 0) made state NaN or infinite"]
    error = refused(NonFiniteError, *fragments, by=lambda: call(name, subject, torch.full((2,), 1e200)))
    assert error.inner_step == 1
    assert torch.equal(error.last_finite_state, torch.full((2,), 1e200))


DERIVATIVE_FAULTS: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("of the outer loss", lambda: descent(outer_loss=lambda theta, phi, batch: (0 * theta).sum().sqrt()), DERIVATIVES),
    (
        "of the outer loss's explicit part",
        lambda: descent(outer_loss=lambda theta, phi, batch: theta.sum() + (0 * phi).sum().sqrt()),
        DERIVATIVES,
    ),
    (
        "of the inner loss with respect to meta",
        lambda: descent(lambda theta, phi, batch: (theta * (1 + (0 * phi).sqrt())).square().sum()),
        DERIVATIVES,
    ),
    (  # |θ|^1.5 rests at 0, where its second derivative is infinite
        "of the inner loss's gradient",
        lambda: descent(
            lambda theta, phi, batch: (theta.abs() ** 1.5 + 0 * phi * theta).sum(),
            lambda theta, phi, batch: theta.sum(),
            torch.zeros(2),
        ),
        [
            name
            for name in DERIVATIVES
            if name not in ("truncated-reverse", "hessian-free", "hessian-free-optimizer", "penalty")
        ],
    ),
    (
        "of the initial state",
        lambda: descent(params=lambda phi: 1 + (0 * phi).sqrt()),
        [name for name in UNROLLED if name != "truncated-reverse"],
    ),
    (
        "through a loop that multiplies it by 1e200 a step",
        lambda: problem(lambda phi: phi - phi.detach(), lambda state, phi, batch: torch.tanh(1e200 * state)),
        [name for name in UNROLLED if name != "truncated-reverse"],
    ),
]


@pytest.mark.parametrize(
    ("made", "name"),
    [pytest.param(made, name, id=f"{what}-{name}") for what, made, names in DERIVATIVE_FAULTS for name in names],
)
def test_a_derivative_that_is_not_finite_where_the_values_are(made: Callable[[], Any], name: str) -> None:
    error = refused(NonFiniteError, "not finite", "overflows", "undefined", by=lambda: call(name, made()))
    assert error.inner_step is None
    assert error.last_finite_state is not None


def test_a_solver_that_diverges_past_all_numbers_says_so() -> None:
    implicit = bilevel.Implicit(bilevel.Neumann(iterations=400, step_size=1e3))
    fragments = ["Implicit", "not finite", "the series diverges", "lower step_size"]
    refused(NonFiniteError, *fragments, by=lambda: implicit(descent(), PHI, bilevel.no_batches(3)))


def test_a_solver_that_fails_warns_at_the_line_that_called() -> None:
    implicit = bilevel.Implicit(bilevel.Neumann(iterations=4, step_size=3.0))
    with pytest.warns(UserWarning, match="the series diverges") as caught:
        implicit(descent(), PHI, bilevel.no_batches(3))
    assert [warning.filename for warning in caught] == [__file__]
