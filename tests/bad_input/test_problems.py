"""Bad parts of a problem, bad parameters and states, and losses that return something else than a number."""

from __future__ import annotations

from typing import Any

import torch
from bad_input_cases import UNROLLED, ZEROTH_ORDER, Row, call, descent, plain_table, problem, refused, sgd, table, total
from torch import nn

import bilevel

INT_TREE = {"steps": 3, "labels": torch.tensor([1, 2])}


def frozen() -> nn.Module:
    return nn.Linear(2, 1).requires_grad_(False)


def bound_sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=0.1)


CONSTRUCTORS = [
    Row("init no function", lambda: problem(init=torch.ones(2)), TypeError, ["init is tensor", "init(meta)"]),
    Row("step no function", lambda: problem(step=3), TypeError, ["step is 3 (int)", "step(state, meta, batch)"]),
    Row("outer loss no function", lambda: problem(outer_loss="mse"), TypeError, ["outer_loss is 'mse' (str)"]),
    Row("solve no function", lambda: bilevel.BlackBox(torch.ones(2), total), TypeError, ["solve is", "solve(meta)"]),  # type: ignore[arg-type]
    Row("black box without loss", lambda: bilevel.BlackBox(abs, None), TypeError, ["outer_loss is None"]),  # type: ignore[arg-type]
    Row(
        "inner loss a tensor",
        lambda: descent(torch.ones(())),
        TypeError,
        ["inner_loss is tensor", "(params, meta, batch)"],
    ),
    Row(
        "descent's outer loss",
        lambda: descent(outer_loss=0.5),
        TypeError,
        ["outer_loss is 0.5", "(params, meta, batch)"],
    ),
    Row(
        "optimizer a class",
        lambda: descent(optimizer=torch.optim.SGD),
        TypeError,
        ["optimizer is the class SGD", "bilevel.optimizer(torch.optim.SGD, lr=0.1)"],
    ),
    Row(
        "optimizer an instance",
        lambda: descent(optimizer=bound_sgd()),
        TypeError,
        ["optimizer is an instance of SGD", "bilevel.optimizer(torch.optim.SGD, lr=0.1)"],
    ),
    Row(
        "optimizer a word",
        lambda: descent(optimizer="sgd"),
        TypeError,
        ["optimizer is 'sgd' (str)", "bilevel.optimizer("],
    ),
    Row("optimizer of a word", lambda: bilevel.optimizer("SGD"), TypeError, ["'SGD' (str)", "torch.optim.SGD"]),  # type: ignore[arg-type]
    Row("optimizer of a module", lambda: bilevel.optimizer(nn.Linear), TypeError, ["the class Linear"]),  # type: ignore[arg-type]
    Row("optimizer of an instance", lambda: bilevel.optimizer(bound_sgd()), TypeError, ["an instance of SGD"]),  # type: ignore[arg-type]
    Row("optimizer's typo", lambda: sgd(momentom=0.9), ValueError, ["no setting 'momentom'", "momentum", "nesterov"]),
    Row("no steps", lambda: bilevel.no_batches(0), ValueError, ["steps=0", "at least 1"]),
    Row("half a step", lambda: bilevel.no_batches(1.5), ValueError, ["steps=1.5", "whole number"]),  # type: ignore[arg-type]
    Row("steps a bool", lambda: bilevel.batches(abs, True), ValueError, ["steps=True", "whole number"]),
    Row("batches of a list", lambda: bilevel.batches([1, 2], 2), TypeError, ["get is [1, 2] (list)", "get(t)"]),  # type: ignore[arg-type]
]


@plain_table(CONSTRUCTORS)
def test_what_a_problem_is_made_of(row: Row) -> None:
    refused(row.exception, *row.fragments, by=row.call)


PARAMS = [
    Row(
        what,
        lambda name, params=params: call(name, descent(params=params())),
        ValueError,
        ["params is", fragment, "requires_grad=True", ".float()"],
    )
    for what, params, fragment in [
        ("params whole numbers", lambda: torch.ones(2).long(), "tensor([1, 1])"),
        ("params without floats", lambda: INT_TREE, "'steps': 3"),
        ("params an empty list", list, "[]"),
        ("params all frozen", frozen, "ModuleView(Linear"),
        ("params made without floats", lambda: lambda phi: [3], "[3]"),
    ]
]


UNROLLED_AND_ZEROTH = [*UNROLLED, *ZEROTH_ORDER]


def step_row(what: str, init: Any, step: Any, *fragments: str) -> Row:
    def run(name: str) -> Any:
        return call(name, problem(init, step, lambda state, phi, batch: torch.ones(())))

    return Row(what, run, ValueError, [*fragments], UNROLLED_AND_ZEROTH)


STATES = [
    Row(
        f"init returns {what}",
        lambda name, value=value: call(name, problem(init=lambda phi: value)),
        TypeError,
        [f"init returned {value!r}", "floating-point tensor", "torch.tensor(0.0)"],
        UNROLLED_AND_ZEROTH,
    )
    for what, value in [("None", None), ("a number", 1.0), ("whole numbers", torch.tensor([1])), ("nothing", {})]
] + [
    step_row(
        "step changes the shape",
        lambda phi: phi[:1],
        lambda state, phi, batch: state + phi,
        "step turned state from a tensor of shape (1,) and torch.float64 into a tensor of shape (2,)",
        ".reshape",
    ),
    step_row(
        "step changes the dtype",
        lambda phi: {"x": phi.float()},
        lambda state, phi, batch: {"x": state["x"] + phi},
        "step turned state['x'] from",
        "torch.float32 into",
        ".to(state.dtype)",
    ),
    step_row(
        "step drops a leaf",
        lambda phi: {"x": phi, "count": 0},
        lambda state, phi, batch: {"x": state["x"] + phi},
        "another structure",
        "with state['x'] instead of state['count'], state['x']",
    ),
    step_row("step returns nothing", lambda phi: phi, lambda state, phi, batch: None, "no leaves instead of state"),
    step_row(
        "step makes a tensor of a number",
        lambda phi: (phi, 0.0),
        lambda state, phi, batch: (state[0] + phi, state[0].sum()),
        "step turned state[1] from a number into a tensor of shape ()",
        "let init return what step returns",
    ),
]


@table(PARAMS + STATES)
def test_params_and_states(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))


LOSS_VALUES = [
    ("a number", lambda theta: 0.25, TypeError, ["returned 0.25 (float)", "as a tensor", ".item()"]),
    ("the item", lambda theta: float(theta.sum().detach()), TypeError, ["(float)", "as a tensor", ".item()"]),
    ("nothing", lambda theta: None, TypeError, ["returned None (NoneType)", "return the loss as a tensor"]),
    ("a matrix", lambda theta: theta.square().reshape(1, 2), ValueError, ["shape (1, 2)", ".mean() or .sum()"]),
    ("a whole number", lambda theta: theta.sum().long(), ValueError, ["torch.int64 scalar", "floating-point"]),
    ("a complex number", lambda theta: theta.sum() * 1j, ValueError, ["torch.complex128 scalar", "real"]),
]
INNER_VALUES = [
    *LOSS_VALUES,
    ("a vector", lambda theta: theta.square(), ValueError, ["shape (2,)", ".mean() or .sum()"]),
    ("one number in a vector", lambda theta: theta.sum().reshape(1), ValueError, ["shape (1,)", ".mean() or .sum()"]),
]
OUTER_VALUES = [
    *LOSS_VALUES,
    (
        "an empty vector",
        lambda theta: theta[:0].square(),
        ValueError,
        ["a vector without entries", "one entry for each"],
    ),
    ("whole numbers in a vector", lambda theta: theta.long(), ValueError, ["torch.int64 vector", "floating-point"]),
    ("a complex vector", lambda theta: theta * 1j, ValueError, ["torch.complex128 vector", "real"]),
]


LOSSES = [
    Row(
        f"{which} returns {what}",
        lambda name, which=which, value=value: call(name, descent(**{which: lambda theta, phi, batch: value(theta)})),
        exception,
        [f"{which} returned", *fragments],
    )
    for which, values in (("inner_loss", INNER_VALUES), ("outer_loss", OUTER_VALUES))
    for what, value, exception, fragments in values
] + [
    Row(
        f"outer_loss of a Problem returns {what}",
        lambda name, value=value: call(name, problem(outer_loss=lambda state, phi, batch: value(state))),
        exception,
        ["outer_loss returned", *fragments],
        UNROLLED_AND_ZEROTH,
    )
    for what, value, exception, fragments in OUTER_VALUES
]


@table(LOSSES)
def test_what_losses_return(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))
