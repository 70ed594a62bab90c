"""A dependence that is there is not refused, however faint it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from bad_input_cases import (
    BLACK_BOX,
    BY_DEFINITION,
    DERIVATIVES,
    ESTIMATORS,
    EVERY,
    IMPLICIT,
    KEEP,
    RATE,
    ZEROTH_ORDER,
    alone,
    call,
    descent,
    explicit,
    frozen_pull,
    quadratic,
    sgd,
    total,
)
from torch import Tensor

from bilevel import autodiff
from bilevel.estimators import implicit, penalty
from bilevel.unrolling import unroll


class Legitimate(NamedTuple):
    """A problem with one meta parameter and one inner parameter, whose hypergradient is known."""

    what: str
    problem: Callable[[], Any]
    phi: float
    batches: Any
    exact: float
    others: dict[str, float]
    """Where a method is biased by definition: what it must give. An absent name means `exact`."""
    names: list[str] = EVERY


def all_implicit(value: float) -> dict[str, float]:
    return dict.fromkeys(IMPLICIT, value)


def pulled(where: Callable[[Any], bool], size: Callable[[Tensor], Tensor] = lambda phi: phi) -> Callable[..., Tensor]:
    """Inner loss θ²/2, with a term φθ on some batches alone."""

    def loss(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        return 0.5 * theta**2 + (size(phi) * theta if where(batch) else 0.0)

    return loss


def scalar_descent(inner_loss: Any = alone, outer_loss: Any = total, **settings: Any) -> Callable[[], Any]:
    return lambda: descent(inner_loss, outer_loss, **{"params": torch.tensor(1.0), **settings})


NOT_IMPLICIT = [name for name in EVERY if name not in IMPLICIT]


LEGITIMATE = [
    Legitimate(
        "in the initial parameters alone",
        scalar_descent(params=lambda phi: phi**2),
        3.0,
        range(3),
        6 * KEEP**3,
        {},
        [name for name in NOT_IMPLICIT if name != "truncated-reverse"],
    ),
    Legitimate(
        "in the learning rate alone",
        scalar_descent(optimizer=sgd(lr=lambda phi: phi)),
        RATE,
        range(3),
        -3 * KEEP**2,
        {"truncated-reverse": -(KEEP**2)},
        NOT_IMPLICIT,
    ),
    Legitimate(  # θ' = θ − η(1 + φ)θ; the solution is 0 whatever φ, and θ_T is not there yet: λY = θ_T/(1 + φ)
        "in the weight decay alone",
        scalar_descent(optimizer=sgd(weight_decay=lambda phi: phi)),
        1.0,
        range(3),
        -3 * RATE * (1 - 2 * RATE) ** 2,
        {
            "truncated-reverse": -RATE * (1 - 2 * RATE) ** 2,
            **dict.fromkeys(IMPLICIT[:2], -((1 - 2 * RATE) ** 3) / 2),
            "hessian-free": -((1 - 2 * RATE) ** 3),
            "hessian-free-optimizer": -RATE * (1 - 2 * RATE) ** 3,
        },
    ),
    Legitimate(
        "on the last batch alone",
        scalar_descent(pulled(lambda batch: batch > 0)),
        2.0,
        [0, 0, 1],
        -RATE,
        {**all_implicit(-1.0), "hessian-free-optimizer": -RATE},
    ),
    Legitimate(
        "on the first batch alone",
        scalar_descent(pulled(lambda batch: batch > 0)),
        2.0,
        [1, 0, 0],
        -RATE * KEEP**2,
        {"truncated-reverse": 0.0, **all_implicit(0.0)},
    ),
    Legitimate(
        "on the first batch alone, beside an explicit part",
        scalar_descent(pulled(lambda batch: batch > 0), explicit),
        2.0,
        [1, 0, 0],
        4.0 - RATE * KEEP**2,
        {"truncated-reverse": 4.0, **all_implicit(4.0)},
    ),
    Legitimate(  # differences of losses can't see what was meant to be constant
        "beside a part that is under no_grad",
        scalar_descent(lambda theta, phi, batch: 0.5 * (frozen_pull(theta, phi, batch) + quadratic(theta, phi, batch))),
        2.0,
        range(3),
        0.5 * (1 - KEEP**3),
        {"truncated-reverse": 0.5 * RATE, **all_implicit(0.5), "hessian-free-optimizer": 0.5 * RATE},
        DERIVATIVES,
    ),
    Legitimate(
        "with a derivative of zero", scalar_descent(pulled(lambda _: True, torch.relu)), -1.0, range(3), 0.0, {}
    ),
    Legitimate(
        "with a derivative of zero, on a batch in the middle",
        scalar_descent(pulled(lambda batch: batch == 1, torch.relu)),
        -1.0,
        range(3),
        0.0,
        {},
    ),
    Legitimate(
        "with a derivative of zero, beside an explicit part",
        scalar_descent(pulled(lambda _: True, torch.relu), explicit),
        -1.0,
        range(3),
        -2.0,
        {},
    ),
    Legitimate(
        "where the outer loss has a derivative of zero",
        scalar_descent(pulled(lambda _: True), lambda theta, phi, batch: torch.relu(theta - 9.0)),
        1.0,
        range(3),
        0.0,
        {},
    ),
    Legitimate(
        "in the initial parameters, where the derivative is zero",
        scalar_descent(params=lambda phi: torch.relu(phi) + 1.0),
        -1.0,
        range(3),
        0.0,
        {},
        [name for name in NOT_IMPLICIT if name != "truncated-reverse"],
    ),
]


@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(case, name, id=f"{case.what}-{name}") for case in LEGITIMATE for name in case.names]
)
def test_faint_dependence_is_not_refused(case: Legitimate, name: str) -> None:
    expected = case.others.get(name, case.exact)
    silent = name in ZEROTH_ORDER and expected == 0
    with pytest.warns(UserWarning, match="to the last bit") if silent else contextlib.nullcontext():
        estimate = call(name, case.problem(), torch.tensor(case.phi), case.batches)
    # Differences: central ones are off by O(μ²), one-sided ones by O(μ); the Neumann series stops at its 20th term.
    tolerances = {
        "zeroth-order": 1e-6,
        "persistent-es": 1e-6,
        "zeroth-order-forward": 1e-3,
        "implicit-neumann": 2 * 0.5**20,
    }
    tolerance = tolerances.get(name, 1e-10)
    if name in BLACK_BOX and name not in ZEROTH_ORDER:  # random: what matters here is that there is an estimate
        assert bool(torch.isfinite(estimate.grad).all())
        return
    if name in BY_DEFINITION:
        assert bool(estimate.grad.any()) == (expected != 0)
        return
    torch.testing.assert_close(estimate.grad, torch.tensor(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_nobody_looks_for_missing_dependence_where_something_arrives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*arguments: Any) -> None:
        raise AssertionError("an inner loop was run again for nothing")

    monkeypatch.setattr(unroll, "require_dependence", unexpected)
    for module in (implicit, penalty):
        monkeypatch.setattr(module, "require_dependence_of_loss", unexpected)
    call(name)
    call(name, descent(outer_loss=explicit))


@pytest.mark.parametrize("name", EVERY)
def test_a_meta_parameter_without_effect_gets_zero_beside_one_with(name: str) -> None:
    def loss(theta: Any, phi: Any, batch: Any) -> Tensor:
        return quadratic(theta, phi["used"], batch)

    meta = {"used": torch.ones(2), "unused": torch.ones(3)}
    grad = call(name, descent(loss), meta).grad
    assert grad["used"].abs().sum() > 0
    if not ESTIMATORS[name].is_random:  # they spread noise over all of φ
        assert torch.equal(grad["unused"], torch.zeros(3))


def test_constants_that_record_leave_no_graph_behind_in_forward_mode() -> None:
    teacher = torch.tensor(2.0, requires_grad=True)
    for count in (1, 3):
        pushed = autodiff.push_forward(lambda x: (teacher * x, x > 0), [torch.tensor(3.0)], [[torch.ones(count)]])
        assert not any(t.requires_grad for t in [*pushed.value, *pushed.tangents])
        torch.testing.assert_close(pushed.tangents, [torch.full((count,), 2.0)])
