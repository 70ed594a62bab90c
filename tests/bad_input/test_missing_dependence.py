"""A loss or a state that does not depend on what it must depend on is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import bad_input_cases
import pytest
import torch
from bad_input_cases import (
    DERIVATIVES,
    EVERY,
    FORWARD_MODE,
    IMPLICIT,
    RATE,
    UNROLLED,
    ZEROTH_ORDER,
    Row,
    alone,
    call,
    descent,
    explicit,
    frozen_pull,
    problem,
    quadratic,
    refused,
    sgd,
    table,
    total,
)
from torch import Tensor, nn

from bilevel.errors import NoDependenceError

NO_META = "does not depend on the meta parameters"


NO_PARAMS = "inner_loss does not depend on the parameters"


NO_STATE = "outer_loss does not depend on the inner state"


OUTSIDE = torch.tensor([3.0, 4.0])


def unconnected(what: str, made: Callable[[], Any], *fragments: str, names: list[str]) -> Row:
    return Row(what, lambda name: call(name, made()), NoDependenceError, [*fragments], names)


MISSING = [
    unconnected(f"meta {what}", lambda loss=loss: descent(loss), *fragments, names=names)
    for what, loss in [
        ("nowhere", alone),
        ("added only", lambda theta, phi, batch: alone(theta, phi, batch) + phi.sum()),
        ("under no_grad", frozen_pull),
        ("detached", lambda theta, phi, batch: quadratic(theta, phi.detach(), batch)),
        (
            "taken out as numbers",
            lambda theta, phi, batch: quadratic(theta, torch.tensor([p.item() for p in phi]), batch),
        ),
    ]
    for fragments, names in [
        (
            ["the inner loop " + NO_META, "any of its 3 steps", "in inner_loss", ".detach()"],
            [*UNROLLED[:3], *FORWARD_MODE],
        ),
        (["none of the 3 inner steps uses the meta parameters", "in inner_loss", "Reverse()"], ["truncated-reverse"]),
        (["inner_loss " + NO_META, "Reverse, Forward or ForwardGradient", "else use meta in inner_loss"], IMPLICIT),
    ]
] + [
    unconnected(
        "meta in the outer loss alone",
        lambda: descent(alone, explicit),
        "meta parameters",
        "in inner_loss",
        names=DERIVATIVES,
    ),
    unconnected(
        "meta in the initial parameters alone",
        lambda: descent(alone, params=lambda phi: phi),
        "inner_loss " + NO_META,
        "take Reverse",
        names=IMPLICIT,
    ),
    unconnected(
        "meta in the initial parameters alone, out of reach",
        lambda: descent(alone, explicit, params=lambda phi: phi),
        "none of the 3 inner steps uses the meta parameters",
        "take Reverse()",
        names=["truncated-reverse"],
    ),
    unconnected(
        "meta in the learning rate alone",
        lambda: descent(alone, optimizer=sgd(lr=lambda phi: phi.sum() + RATE)),
        "inner_loss " + NO_META,
        "optimiser's settings",
        "take Reverse",
        names=IMPLICIT,
    ),
    unconnected(
        "a state cut off by a step",
        lambda: problem(lambda phi: phi, lambda state, phi, batch: 2 * state.detach()),
        "the final inner state " + NO_META,
        "the initial one does, and a later step cuts it off",
        ".detach()",
        names=[name for name in UNROLLED if name != "truncated-reverse"],
    ),
    unconnected(
        "an inner loss without params",
        lambda: descent(lambda theta, phi, batch: phi.square().sum()),
        NO_PARAMS,
        "nothing to descend on",
        "the params it is given",
        names=EVERY,
    ),
    unconnected(
        "a constant inner loss, meta in the initial parameters",
        lambda: descent(lambda theta, phi, batch: torch.ones(()), params=lambda phi: phi),
        NO_PARAMS,
        "call the model passed to inner_loss",
        names=EVERY,
    ),
    unconnected(
        "an inner loss of detached params, meta in the initial parameters",
        lambda: descent(lambda theta, phi, batch: quadratic(theta.detach(), phi, batch), params=lambda phi: phi),
        NO_PARAMS,
        ".detach()",
        names=EVERY,
    ),
    unconnected(
        "a constant outer loss",
        lambda: descent(outer_loss=lambda theta, phi, batch: torch.ones(())),
        NO_STATE,
        "no inner step has an effect",
        "it is given",
        names=DERIVATIVES,
    ),
    unconnected(
        "an outer loss of a tensor from outside",
        lambda: descent(outer_loss=lambda theta, phi, batch: OUTSIDE.sum()),
        NO_STATE,
        "call the model passed to outer_loss",
        names=DERIVATIVES,
    ),
    unconnected(
        "a detached outer loss",
        lambda: descent(outer_loss=lambda theta, phi, batch: theta.sum().detach()),
        NO_STATE,
        ".detach()",
        names=DERIVATIVES,
    ),
    unconnected(
        "an outer loss under no_grad",
        lambda: descent(outer_loss=torch.no_grad()(total)),
        NO_STATE,
        "torch.no_grad()",
        names=DERIVATIVES,
    ),
    # Forward mode gives the (right) explicit part here: only zeros make it look for the reason.
    unconnected(
        "an outer loss of meta alone",
        lambda: descent(outer_loss=lambda theta, phi, batch: phi.square().sum()),
        NO_STATE,
        names=[name for name in DERIVATIVES if name not in FORWARD_MODE],
    ),
]


@table(MISSING)
def test_missing_dependence(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))


def test_a_model_from_outside_is_missed_in_both_losses() -> None:
    net = nn.Linear(2, 1)

    def inside(model: Any, phi: Any, batch: Any) -> Tensor:
        return (model(phi) - 1).square().sum()

    def outside(model: Any, phi: Any, batch: Any) -> Tensor:
        return (net(phi) - 1).square().sum()

    for name in EVERY:
        refused(NoDependenceError, NO_PARAMS, by=lambda name=name: call(name, descent(outside, inside, net)))
    for name in UNROLLED[:3]:
        with (
            pytest.warns(UserWarning, match="requires gradients .* from outside of its arguments"),
            pytest.raises(NoDependenceError, match=re.escape(NO_STATE)),
        ):
            call(name, descent(inside, outside, net))


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_zeroth_order_warns_where_nothing_changes(name: str) -> None:
    for outer_loss, meta in [
        (lambda theta, phi, batch: OUTSIDE.sum(), torch.ones(2)),
        (total, torch.full((2,), 1e20)),  # where a step of 1e-4 is rounded away
    ]:
        with pytest.warns(
            UserWarning, match=r"(ZerothOrder|PersistentES): .* to the last bit .* step_size=0.0001"
        ) as caught:
            estimate = call(name, descent(outer_loss=outer_loss), meta)
        assert [warning.filename for warning in caught] == [bad_input_cases.__file__]
        assert torch.equal(estimate.grad.abs(), torch.zeros(2))
