"""Bad input gives one clear error: what was passed, what is needed, what to write instead. Good input is not refused.

Most tests are rows of tables: what is wrong, how it is called, the exception's class, and fragments that its message
must contain. They are run over the estimators that are `small` in `estimator_table.py`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from estimator_table import ROWS
from torch import Tensor, nn

import bilevel
from bilevel import autodiff
from bilevel.directions import distributions
from bilevel.errors import NoDependenceError, NonFiniteError
from bilevel.estimators import implicit
from bilevel.problem import Descent
from bilevel.unrolling import unroll

NAN, INF = float("nan"), float("inf")
RATE = 0.1

ESTIMATORS = {name: estimator for row in ROWS.values() for name, estimator in row.small.items()}
EVERY = list(ESTIMATORS)
ROW_OF = {name: row for row in ROWS.values() for name in row.small}
ZEROTH_ORDER = [name for name in EVERY if not ESTIMATORS[name].needs_derivatives]
DERIVATIVES = [name for name in EVERY if name not in ZEROTH_ORDER]
FORWARD_MODE = [name for name in EVERY if ROW_OF[name].forward_mode]
IMPLICIT = [name for name in EVERY if ROW_OF[name].needs_inner_loss]
UNROLLED = [name for name in DERIVATIVES if name not in IMPLICIT]
"""Those that take any steps (`Problem`), and differentiate them."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def quadratic(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Pulls θ to φ."""
    return 0.5 * (theta - phi).square().sum()


def total(theta: Any, phi: Any, batch: Any) -> Tensor:
    """θ_1 + 2θ_2 + …, so that no direction of signs is at right angles to it."""
    return (theta * torch.arange(1.0, theta.numel() + 1).reshape(theta.shape)).sum()


def sgd(**settings: Any) -> Any:
    return bilevel.optimizer(torch.optim.SGD, **{"lr": RATE, **settings})


def descent(
    inner_loss: Any = quadratic, outer_loss: Any = total, params: Any = None, optimizer: Any = None
) -> bilevel.GradientDescent:
    params = torch.tensor([1.0, 2.0]) if params is None else params
    return bilevel.GradientDescent(inner_loss, outer_loss, params, sgd() if optimizer is None else optimizer)


def problem(init: Any = None, step: Any = None, outer_loss: Any = None) -> bilevel.Problem:
    """θ_0 = (1, 1), θ ← θ·φ, unless told otherwise."""
    return bilevel.Problem(
        (lambda phi: torch.ones(2)) if init is None else init,
        (lambda theta, phi, batch: theta * phi) if step is None else step,
        total if outer_loss is None else outer_loss,
    )


def call(name: str, problem: Any = None, meta: Any = None, inner_batches: Any = ..., **others: Any) -> bilevel.Estimate:
    """The estimator of that name on a good problem, but for what is given."""
    return ESTIMATORS[name](
        descent() if problem is None else problem,
        torch.tensor([0.5, -0.5]) if meta is None else meta,
        bilevel.no_batches(3) if inner_batches is ... else inner_batches,
        **others,
    )


def refused(exception: type[Exception], *fragments: str, by: Callable[[], Any]) -> Any:
    """The exception, which must be of exactly that class with all these fragments in its message, and no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # torch's own, on first use
        with pytest.raises(exception) as caught:
            by()
    assert type(caught.value) is exception
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"{missing} missing in: {caught.value}"
    return caught.value


class Row(NamedTuple):
    what: str
    call: Callable[..., Any]
    exception: type[Exception]
    fragments: list[str]
    names: list[str] = EVERY
    """The estimators it is run with."""


def table(rows: list[Row]) -> pytest.MarkDecorator:
    """A test for each row and each of its estimators."""
    cases = [pytest.param(row, name, id=f"{row.what}-{name}") for row in rows for name in row.names]
    return pytest.mark.parametrize(("row", "name"), cases)


def plain_table(rows: list[Row]) -> pytest.MarkDecorator:
    """A test for each row; no estimator is run."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in rows])


@pytest.mark.parametrize("name", EVERY)
def test_the_call_that_the_tables_spoil_is_good(name: str) -> None:
    estimate = call(name)
    # θ_T = φ + (1 − η)³ (θ_0 − φ). H = I, so implicit methods give 1, and so does HessianFree(scale=1).
    exact = 1 - (1 - RATE) ** 3
    factor = {"truncated-reverse": RATE, "hessian-free-optimizer": RATE, **dict.fromkeys(IMPLICIT[:3], 1.0)}.get(
        name, exact
    )
    if not ESTIMATORS[name].is_random:  # those see one direction of the two
        torch.testing.assert_close(estimate.grad, factor * torch.tensor([1.0, 2.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(estimate.value, torch.tensor((1 - exact) * 5.0 + exact * -0.5))


# -- arguments of the call ---------------------------------------------------------------------------------------------


class EmptyModule(nn.Module):
    """Without parameters."""


class Loader:
    """A length, and nothing but iteration."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Streamed(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def meta_row(what: str, meta: Any, exception: type[Exception], *fragments: str) -> Row:
    return Row(what, lambda name: ESTIMATORS[name](descent(), meta(), bilevel.no_batches(3)), exception, [*fragments])


def batches_row(what: str, batches: Any, exception: type[Exception], *fragments: str) -> Row:
    return Row(what, lambda name: call(name, inner_batches=batches()), exception, [*fragments])


def seed_row(seed: Any) -> Row:
    fragments = [f"seed={seed!r}", "a whole number of at least 0"]
    return Row(f"seed {seed!r}", lambda name: call(name, seed=seed), ValueError, fragments)


ARGUMENTS = [
    meta_row("meta None", lambda: None, ValueError, "meta is None", "a floating-point tensor"),
    meta_row("meta an empty dict", dict, ValueError, "meta is {}", "nn.Module"),
    meta_row("meta an empty tensor", lambda: torch.zeros(0, 3), ValueError, "size=(0, 3)", "without a single number"),
    meta_row("meta a module without parameters", EmptyModule, ValueError, "EmptyModule", "requires_grad=True"),
    meta_row("meta a number", lambda: 5, TypeError, "meta is 5 (int)", "write 1.0 instead of 1"),
    meta_row("meta an array", lambda: np.ones(2, int), TypeError, "meta is array([1, 1]) (ndarray)", ".astype(float)"),
    meta_row(
        "meta with a number", lambda: {"w": torch.ones(2), "lr": 1}, TypeError, "meta['lr'] is 1 (int)", "write 1.0"
    ),
    meta_row("meta with a word", lambda: [torch.ones(2), "lr"], TypeError, "meta[1] is 'lr' (str)", "leave everything"),
    meta_row("meta whole numbers", lambda: torch.ones(2).long(), TypeError, "meta has dtype torch.int64", ".float()"),
    meta_row("meta booleans", lambda: {"m": torch.ones(2).bool()}, TypeError, "meta['m'] has dtype torch.bool"),
    meta_row("meta complex", lambda: torch.ones(2) * 1j, TypeError, "torch.complex128", "torch.view_as_real"),
    meta_row("meta without values", lambda: torch.ones(2, device="meta"), ValueError, "on the meta device", "cpu"),
    meta_row("meta a generator", lambda: nn.Linear(2, 2).parameters(), TypeError, "(generator)", "tensors"),
    meta_row(
        "meta with NaN",
        lambda: {"a": torch.ones(2), "b": torch.tensor([1.0, NAN])},
        NonFiniteError,
        "meta['b'] holds NaN",
        "before the first inner step",
        "outer learning rate",
    ),
    meta_row("meta infinite", lambda: torch.tensor(INF), NonFiniteError, "meta holds NaN or infinity"),
    batches_row("batches a generator", lambda: (b for b in range(3)), TypeError, "(generator)", "list(...)"),
    batches_row("batches a function", lambda: lambda t: t, TypeError, "is a function", "bilevel.batches(function"),
    batches_row("batches empty", list, ValueError, "is empty", "the whole number T"),
    batches_row("batches None", lambda: None, TypeError, "inner_batches is None", "the whole number T"),
    batches_row("batches a fraction", lambda: 3.0, TypeError, "inner_batches is 3.0 (float)", "the whole number T"),
    batches_row("batches too few", lambda: 0, ValueError, "inner_batches=0: a whole number of at least 1"),
    batches_row("batches one batch", lambda: {"x": torch.ones(3)}, TypeError, "is a dict", "one batch", "[batch] * T"),
    batches_row("batches a tensor of no dimension", lambda: torch.tensor(1.0), TypeError, "(Tensor)", "a list"),
    batches_row("batches a loader", Loader, TypeError, "(Loader)", "list(...)"),
    batches_row("batches a stream", Streamed, TypeError, "(Streamed)", "list(...)"),
    batches_row("batches a DataLoader", lambda: torch.utils.data.DataLoader([1, 2, 3]), TypeError, "(DataLoader)"),  # type: ignore[arg-type]
    batches_row("batches a set", lambda: {1, 2}, TypeError, "(set)", "random access"),
    *[seed_row(seed) for seed in (-1, 1.5, True, "0", None)],
    Row("problem None", lambda name: ESTIMATORS[name](None, torch.ones(2)), TypeError, ["NoneType", "bilevel.Problem"]),  # type: ignore[arg-type]
    Row("problem a class", lambda name: call(name, bilevel.GradientDescent), TypeError, ["the class GradientDescent"]),
    Row("problem a module", lambda name: call(name, nn.Linear(2, 2)), TypeError, ["a Linear", "an instance of"]),
    Row(
        "arguments swapped",
        lambda name: ESTIMATORS[name](torch.ones(2), descent(), bilevel.no_batches(3)),  # type: ignore[arg-type]
        TypeError,
        ["problem is a Tensor", "estimator(problem, meta, inner_batches, outer_batch)"],
    ),
]


@table(ARGUMENTS)
def test_arguments_of_the_call(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode_is_refused_and_no_grad_is_not(name: str) -> None:
    with torch.inference_mode():
        refused(RuntimeError, "torch.inference_mode()", "outside of it", by=lambda: call(name))
    with torch.no_grad():
        silent = call(name)
    assert torch.equal(silent.grad, call(name).grad)


class Numbers(torch.utils.data.Dataset[float]):
    """A map-style dataset."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> float:
        return [1.0, 2.0, 3.0][index]


@pytest.mark.parametrize("name", EVERY)
def test_batches_of_every_good_kind(name: str) -> None:
    def weighted(theta: Any, phi: Any, batch: Any) -> Tensor:
        return batch * quadratic(theta, phi, batch)

    def grad(batches: Any, seed: Any = 0) -> Tensor:
        return call(name, descent(weighted), inner_batches=batches, seed=seed).grad

    expected = grad([1.0, 2.0, 3.0])
    good = [
        (1.0, 2.0, 3.0),
        range(1, 4),
        np.array([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0]),
        Numbers(),
        bilevel.batches(lambda t: t + 1.0, steps=3),
        bilevel.batches(lambda t: t + 1.0, steps=np.int64(3)),  # type: ignore[arg-type]
    ]
    for batches in good:
        torch.testing.assert_close(grad(batches), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad([1.0, 2.0, 3.0], seed=np.int64(0)), expected, rtol=1e-12, atol=0)


# -- devices: torch.device("meta") stands in for a GPU -----------------------------------------------------------------


def elsewhere(*shape: int) -> Tensor:
    return torch.ones(*shape, device="meta")


def uses_batch(theta: Any, phi: Any, batch: Any) -> Tensor:
    return (quadratic(theta, phi, batch) * batch["x"]).sum()


DEVICES = [
    Row(
        "params elsewhere",
        lambda name: call(name, descent(params=elsewhere(2))),
        ValueError,
        ["params is on the meta device", "make it on cpu or a GPU"],
    ),
    Row(
        "a module elsewhere",
        lambda name: call(
            name, descent(lambda net, phi, batch: (net(phi) - phi).sum(), params=nn.Linear(2, 2).to("meta"))
        ),
        ValueError,
        ["parameter 'weight' of params is on the meta device", "to_empty(device='cpu')"],
    ),
    Row(
        "an inner batch elsewhere",
        lambda name: call(name, descent(uses_batch), inner_batches=[{"x": elsewhere(2)}] * 3),
        ValueError,
        ["meta is on cpu", "inner_batch['x'] is on meta", ".to("],
    ),
    Row(
        "the outer batch elsewhere",
        lambda name: call(name, outer_batch=(torch.ones(2), elsewhere(2))),
        ValueError,
        ["meta is on cpu", "outer_batch[1] is on meta", ".to("],
    ),
    Row(
        "meta on two devices",
        lambda name: call(name, meta={"a": torch.ones(2), "b": elsewhere(2)}),
        ValueError,
        ["2 devices", "meta['a'] is on cpu", "meta['b'] is on meta"],
    ),
]


@table(DEVICES)
def test_two_devices(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))


def test_two_devices_of_a_black_box() -> None:
    box = bilevel.BlackBox(lambda phi: phi, total)
    fragments = ["meta is on cpu", "outer_batch is on meta"]
    refused(ValueError, *fragments, by=lambda: call("zeroth-order", box, inner_batches=None, outer_batch=elsewhere(2)))


# -- what a problem is made of -----------------------------------------------------------------------------------------

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


# -- losses ------------------------------------------------------------------------------------------------------------

LOSS_VALUES = [
    ("a number", lambda theta: 0.25, TypeError, ["returned 0.25 (float)", "as a tensor", ".item()"]),
    ("the item", lambda theta: float(theta.sum().detach()), TypeError, ["(float)", "as a tensor", ".item()"]),
    ("nothing", lambda theta: None, TypeError, ["returned None (NoneType)", "return the loss as a tensor"]),
    ("a vector", lambda theta: theta.square(), ValueError, ["shape (2,)", ".mean() or .sum()"]),
    ("one number in a vector", lambda theta: theta.sum().reshape(1), ValueError, ["shape (1,)", ".mean() or .sum()"]),
    ("a whole number", lambda theta: theta.sum().long(), ValueError, ["torch.int64 scalar", "floating-point"]),
    ("a complex number", lambda theta: theta.sum() * 1j, ValueError, ["torch.complex128 scalar", "real"]),
]
LOSSES = [
    Row(
        f"{which} returns {what}",
        lambda name, which=which, value=value: call(name, descent(**{which: lambda theta, phi, batch: value(theta)})),
        exception,
        [f"{which} returned", *fragments],
    )
    for which in ("inner_loss", "outer_loss")
    for what, value, exception, fragments in LOSS_VALUES
] + [
    Row(
        f"outer_loss of a Problem returns {what}",
        lambda name, value=value: call(name, problem(outer_loss=lambda state, phi, batch: value(state))),
        exception,
        ["outer_loss returned", *fragments],
        UNROLLED_AND_ZEROTH,
    )
    for what, value, exception, fragments in LOSS_VALUES
]


@table(LOSSES)
def test_what_losses_return(row: Row, name: str) -> None:
    refused(row.exception, *row.fragments, by=lambda: row.call(name))


# -- dependence that is missing ----------------------------------------------------------------------------------------


def alone(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Without φ."""
    return 0.5 * theta.square().sum()


def frozen_pull(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Pulls θ to φ as it is now."""
    with torch.no_grad():
        target = 1.0 * phi
    return quadratic(theta, target, batch)


def explicit(theta: Any, phi: Any, batch: Any) -> Tensor:
    """Outer loss with φ in it."""
    return theta.sum() + phi.square().sum()


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
        refused(NoDependenceError, NO_STATE, by=lambda name=name: call(name, descent(inside, outside, net)))


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_zeroth_order_warns_where_nothing_changes(name: str) -> None:
    for outer_loss, meta in [
        (lambda theta, phi, batch: OUTSIDE.sum(), torch.ones(2)),
        (total, torch.full((2,), 1e20)),  # where a step of 1e-4 is rounded away
    ]:
        with pytest.warns(UserWarning, match=r"ZerothOrder: .* to the last bit .* step_size=0.0001") as caught:
            estimate = call(name, descent(outer_loss=outer_loss), meta)
        assert [warning.filename for warning in caught] == [__file__]
        assert torch.equal(estimate.grad.abs(), torch.zeros(2))


# -- dependence that is there, however faint ---------------------------------------------------------------------------


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


KEEP = 1 - RATE  # what a step leaves of θ under the loss θ²/2
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
    tolerance = {"zeroth-order": 1e-6, "zeroth-order-forward": 1e-3, "implicit-neumann": 2 * 0.5**20}.get(name, 1e-10)
    torch.testing.assert_close(estimate.grad, torch.tensor(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_nobody_looks_for_missing_dependence_where_something_arrives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*arguments: Any) -> None:
        raise AssertionError("an inner loop was run again for nothing")

    monkeypatch.setattr(unroll, "require_dependence", unexpected)
    monkeypatch.setattr(implicit, "_require_dependence_of_loss", unexpected)
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


# -- numbers that are not finite ---------------------------------------------------------------------------------------


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


def weighted(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    return batch * quadratic(theta, phi, batch)


def quartic(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    return 0.25 * (theta - phi).square().square().sum()


PHI = torch.tensor([0.5, -0.5], dtype=torch.float64)
START = torch.tensor([1.0, 2.0], dtype=torch.float64)


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
        [name for name in DERIVATIVES if name not in ("truncated-reverse", "hessian-free", "hessian-free-optimizer")],
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


# -- black boxes and zeroth order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("batches", [None, [1, 2]])
def test_a_black_box_is_refused_by_name(name: str, batches: Any) -> None:
    box = bilevel.BlackBox(lambda phi: phi, total)
    fragments = [type(ESTIMATORS[name]).__name__, "a BlackBox has no derivatives", "ZerothOrder(", "bilevel.Problem"]
    refused(TypeError, *fragments, by=lambda: call(name, box, inner_batches=batches))


@pytest.mark.parametrize("name", IMPLICIT)
def test_steps_without_a_loss_are_refused_by_name(name: str) -> None:
    fragments = [type(ESTIMATORS[name]).__name__, "needs the inner loss", "a Problem has only steps", "GradientDescent"]
    refused(TypeError, *fragments, by=lambda: call(name, problem()))


@pytest.mark.parametrize("name", ZEROTH_ORDER)
class TestZerothOrder:
    def test_inner_batches_of_a_black_box(self, name: str) -> None:
        box = bilevel.BlackBox(lambda phi: phi, total)
        fragments = ["a BlackBox takes no inner_batches", "pass None"]
        refused(ValueError, *fragments, by=lambda: call(name, box, inner_batches=[1, 2]))

    def test_an_exception_of_the_solver_arrives_unchanged(self, name: str) -> None:
        class SolverCrashedError(Exception):
            pass

        crash = SolverCrashedError("mesh 17 is inverted")

        def solve(phi: Any) -> Any:
            raise crash

        error = refused(SolverCrashedError, by=lambda: call(name, bilevel.BlackBox(solve, total), inner_batches=None))
        assert error is crash
        assert error.__cause__ is None

    def test_a_number_for_a_loss(self, name: str) -> None:
        number: Any = lambda state, phi, batch: 0.5  # noqa: E731
        box = bilevel.BlackBox(lambda phi: phi, number)
        refused(TypeError, "outer_loss returned 0.5 (float)", by=lambda: call(name, box, inner_batches=None))

    def test_a_black_box_that_is_not_finite(self, name: str) -> None:
        solves = []

        def solve(phi: Tensor) -> dict[str, Tensor]:
            solves.append(phi)
            return {"u": phi / 0}

        box = bilevel.BlackBox(solve, lambda state, phi, batch: state["u"].sum())
        fragments = ["outer_loss is nan for the state that solve returned", "state['u'] holds NaN"]
        refused(NonFiniteError, *fragments, by=lambda: call(name, box, inner_batches=None))
        assert len(solves) == 1  # one may take an hour

    def test_a_black_box_may_keep_what_it_likes_in_its_state(self, name: str) -> None:
        box = bilevel.BlackBox(lambda phi: {"u": phi, "mask": NAN * phi}, lambda state, phi, batch: state["u"].sum())
        assert call(name, box, torch.tensor(2.0), None).grad.item() == pytest.approx(1.0, abs=1e-9)

    def test_a_shifted_point_that_is_not_finite(self, name: str) -> None:
        # √0 is fine, and so is one of the two points beside it. Forward differences go to +v alone, so v must be −1.
        seed = next(s for s in range(64) if direction_of(s) < 0)
        box = bilevel.BlackBox(torch.sqrt, lambda state, phi, batch: state)
        fragments = ["0.0001·direction", "finite at meta itself", "smaller step_size", "outer_loss is nan"]
        refused(NonFiniteError, *fragments, by=lambda: call(name, box, torch.tensor(0.0), None, seed=seed))

    def test_a_shifted_point_whose_inner_step_is_not_finite(self, name: str) -> None:
        seed = next(s for s in range(64) if direction_of(s) < 0)
        subject = problem(
            lambda phi: torch.ones(()), lambda state, phi, batch: state + phi.sqrt() if batch else 2 * state
        )
        fragments = ["0.0001·direction", "finite at meta itself", "inner step 1 of 3 (counted from 0) made state NaN"]
        error = refused(
            NonFiniteError,
            *fragments,
            by=lambda: call(name, subject, torch.tensor(0.0), [0, 1, 0], seed=seed),
        )
        assert error.inner_step == 1
        assert error.last_finite_state.item() == 2.0


def direction_of(seed: int) -> float:
    """The first direction of a seed, for one meta parameter."""
    return distributions.Directions("rademacher", seed, 1, [torch.zeros(())]).draw([0])[0].item()


@pytest.mark.parametrize("name", EVERY)
def test_an_exception_of_the_users_own_arrives_unchanged_and_leaves_nothing_behind(name: str) -> None:
    mine = NotImplementedError("forward this to me")

    def loss(theta: Any, phi: Any, batch: Any) -> Tensor:
        if batch == 1:
            raise mine
        return quadratic(theta, phi, batch) + torch.rand(())

    torch.manual_seed(3)
    before = torch.get_rng_state()
    error = refused(NotImplementedError, by=lambda: call(name, descent(loss), inner_batches=[0, 1, 2]))
    assert error is mine
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


# -- settings ----------------------------------------------------------------------------------------------------------

NOT_WHOLE = [0, -1, True, 1.5, "2", NAN]
NOT_POSITIVE = [0, 0.0, -1e-3, NAN, INF, True, "0.1", torch.tensor([1.0, 2.0])]
CG, NEUMANN, NYSTROM = bilevel.ConjugateGradient, bilevel.Neumann, bilevel.Nystrom

SETTINGS: list[tuple[Any, str, list[Any], list[str]]] = [
    (
        bilevel.Reverse,
        "checkpoints",
        [0, -1, True, 1.5, "all ", "half", None],
        ['"all", "sqrt", "log", "graph"', ">= 1"],
    ),
    (bilevel.Reverse, "offload", ["tape", 1], ["'cpu', 'disk'"]),
    (bilevel.Auto, "directions", NOT_WHOLE, ["a whole number of at least 1"]),
    (bilevel.TruncatedReverse, "steps", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.Forward, "chunk_size", NOT_WHOLE, ["a whole number of at least 1"]),
    (bilevel.ForwardGradient, "directions", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.ForwardGradient, "chunk_size", NOT_WHOLE, ["a whole number of at least 1"]),
    (
        bilevel.ForwardGradient,
        "distribution",
        ["normal", "Rademacher", None, ["gaussian"]],
        ["'rademacher', 'gaussian'"],
    ),
    (bilevel.ZerothOrder, "directions", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.ZerothOrder, "step_size", [*NOT_POSITIVE, None], ["a positive number"]),
    (bilevel.ZerothOrder, "scheme", ["backward", "Central", None, 2], ["'central', 'forward'"]),
    (bilevel.ZerothOrder, "distribution", ["uniform"], ["'coordinate'"]),
    (bilevel.Implicit, "batches", [*NOT_WHOLE, None], ["a whole number of at least 1"]),
    (bilevel.HessianFree, "scale", [*NOT_POSITIVE, None], ["a positive number"]),
    (bilevel.HessianFree, "preconditioner", ["adam", "optimiser", None], ["'identity', 'optimizer'"]),
    (CG, "iterations", NOT_WHOLE, ["a whole number of at least 1"]),
    (CG, "tolerance", [-1e-9, NAN, INF, "1e-6", True], ["a number of at least 0"]),
    (CG, "damping", [-1e-9, NAN, INF, None], ["a number of at least 0"]),
    (NEUMANN, "iterations", NOT_WHOLE, ["a whole number of at least 1"]),
    (NEUMANN, "step_size", NOT_POSITIVE, ["a positive number"]),
    (NYSTROM, "rank", NOT_WHOLE, ["a whole number of at least 1"]),
    (NYSTROM, "damping", [*NOT_POSITIVE, None], ["a positive number"]),
]


@pytest.mark.parametrize(
    ("made", "setting", "value", "fragments"),
    [
        pytest.param(made, setting, value, fragments, id=f"{made.__name__}-{setting}-{value!r}")
        for made, setting, values, fragments in SETTINGS
        for value in values
    ],
)
def test_settings(made: Any, setting: str, value: Any, fragments: list[str]) -> None:
    refused(ValueError, f"{setting}={value!r}", *fragments, by=lambda: made(**{setting: value}))


@pytest.mark.parametrize("solver", ["cg", CG, None, abs], ids=repr)
def test_a_solver_that_is_none(solver: Any) -> None:
    fragments = [f"solver is {solver!r}", "ConjugateGradient(iterations=20)", "Neumann(", "Nystrom("]
    refused(TypeError, *fragments, by=lambda: bilevel.Implicit(solver))


MEASURED = [
    Row(
        "more steps than there are",
        lambda: bilevel.TruncatedReverse(4)(descent(), PHI, bilevel.no_batches(3)),
        ValueError,
        ["TruncatedReverse(steps=4)", "3 steps", "steps <= 3", "Reverse()"],
    ),
    Row(
        "more directions than meta parameters",
        lambda: bilevel.ForwardGradient(3)(descent(), PHI, bilevel.no_batches(3)),
        ValueError,
        ["directions=3 for 2 meta parameters", "Forward() gives the exact gradient", "directions <= 2"],
    ),
    Row(
        "more directions than the one meta parameter",
        lambda: bilevel.ZerothOrder(2)(descent(), torch.tensor(1.0), bilevel.no_batches(3)),
        ValueError,
        ["directions=2 for 1 meta parameter:", "directions <= 1"],
    ),
    Row(
        "more batches for the loss than there are",
        lambda: bilevel.Implicit(batches=4)(descent(), PHI, bilevel.no_batches(3)),
        ValueError,
        ["Implicit(batches=4)", "3 batches", "batches <= 3"],
    ),
    Row(
        "learning rates for other parameters",
        lambda: bilevel.Reverse()(
            descent(
                lambda thetas, phi, batch: torch.stack(thetas).sum(),
                params=[START.clone() for _ in range(3)],
                optimizer=sgd(lr=list),
            ),
            PHI,
            bilevel.no_batches(3),
        ),
        ValueError,
        ["lr gave", "for 3 parameters"],
    ),
]


@plain_table(MEASURED)
def test_settings_that_do_not_fit_the_problem(row: Row) -> None:
    refused(row.exception, *row.fragments, by=row.call)


def test_settings_that_just_fit() -> None:
    assert math.isclose(bilevel.TruncatedReverse(3)(descent(), PHI, bilevel.no_batches(3)).grad[0], 1 - KEEP**3)
    started = descent(params=lambda phi: phi**2)
    reached = bilevel.TruncatedReverse(3)(started, PHI, bilevel.no_batches(3)).grad
    assert torch.equal(reached, bilevel.Reverse()(started, PHI, bilevel.no_batches(3)).grad)
    for estimator in (bilevel.ForwardGradient(2), bilevel.ZerothOrder(2), bilevel.Implicit(batches=3)):
        assert torch.isfinite(estimator(descent(), PHI, bilevel.no_batches(3)).grad).all()
