"""Vectors of outer losses: the numbers of separate estimates, for one inner loop."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from estimator_table import ROWS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bilevel
import bilevel.estimators
from bilevel import (
    Auto,
    CoarserProblem,
    ConjugateGradient,
    Forward,
    ForwardGradient,
    HessianFree,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    PersistentES,
    Reverse,
    SingleLoop,
    StreamingForwardGradient,
    TruncatedReverse,
    ZerothOrder,
)
from bilevel.errors import CheckError, NoDependenceError, NonFiniteError
from bilevel.experimental import short_check
from bilevel.unrolling.unroll import unroll

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import units  # pyright: ignore[reportMissingImports]

STEPS, ENTRIES = 4, 3
RNG = np.random.default_rng(0)
BATCHES = [torch.tensor(RNG.standard_normal((5, 3))) for _ in range(STEPS)]
TARGETS = torch.tensor(RNG.standard_normal((ENTRIES, 5, 3)))
START = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
with torch.no_grad():
    for number, parameter in enumerate(START.parameters()):
        parameter.copy_(torch.tensor(np.random.default_rng(number).standard_normal(parameter.shape)))


def make_meta() -> dict[str, Tensor]:
    return {
        "shift": torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64),
        "log_decay": torch.tensor([[-1.0], [-2.0]], dtype=torch.float64),
    }


def inner_loss(model: Any, meta: Any, x: Tensor) -> Tensor:
    penalty = sum(p.square().sum() for p in model.parameters()) * meta["log_decay"].exp().sum()
    return (model(x + meta["shift"]) - x.sum(1, keepdim=True)).square().mean() + penalty


def outer_losses(model: Any, meta: Any, targets: Tensor) -> Tensor:
    """`[m]`. The last one depends on φ explicitly as well."""
    losses = torch.stack([(model(x) - x[:, :1]).square().mean() for x in targets])
    return losses + torch.arange(len(losses)) * meta["shift"].square().sum()


def descent(outer_loss: Callable[..., Tensor]) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(inner_loss, outer_loss, START, bilevel.optimizer(torch.optim.Adam, lr=0.05))


def entry(number: int) -> Callable[..., Tensor]:
    return lambda model, meta, targets: outer_losses(model, meta, targets)[number]


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def rows(tree: Any) -> Tensor:
    """`[m, N]`."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tree.values()], 1)


ESTIMATORS = [
    Reverse(),
    Reverse(chunk_size=2),
    Reverse("sqrt"),
    Reverse("graph"),
    Reverse("graph", chunk_size=1),
    TruncatedReverse(2),
    TruncatedReverse(STEPS, chunk_size=2),
    Forward(),
    Forward(chunk_size=2),
    ForwardGradient(2),
    ForwardGradient(3, chunk_size=2, tangents="shared"),
    ForwardGradient(2, tangents="difference"),
    ForwardGradient(3, control_variate=TruncatedReverse(1)),
    ForwardGradient(3, control_variate=(CoarserProblem(2), HessianFree(0.1))),
    ForwardGradient(2, "coordinate", control_variate=TruncatedReverse(1)),
    ForwardGradient(2, "block", control_variate=TruncatedReverse(1)),
    ForwardGradient(3, support="reached"),
    StreamingForwardGradient(2),
    StreamingForwardGradient(2, carry="same"),
    ZerothOrder(2),
    ZerothOrder(3, scheme="forward", control_variate=TruncatedReverse(1)),
    Implicit(ConjugateGradient(3, damping=5.0)),
    Implicit(Neumann(3, 0.01), batches=2),
    Implicit(Nystrom(2, damping=2.0)),
    HessianFree(0.5),
    HessianFree(0.5, preconditioner="optimizer"),
    HessianFree(0.5, lookahead=True),
    HessianFree(0.5, mixed="difference"),
    HessianFree(0.5, preconditioner="optimizer", mixed="difference", step_size=0.01, lookahead=True),
]
SCALAR_ONLY = [
    Penalty(10.0),
    SingleLoop(0.1),
    SingleLoop(0.1, order="simultaneous"),
    PersistentES(2),
]


def test_every_method_is_here() -> None:
    assert {type(e) for e in (*ESTIMATORS, *SCALAR_ONLY)} | {Auto, bilevel.FirstOrder} >= {
        cls for cls in ROWS if cls.__module__.startswith("bilevel.")
    }


@pytest.mark.parametrize("estimator", SCALAR_ONLY, ids=str)
def test_estimators_that_take_one_outer_loss_refuse_a_vector(estimator: bilevel.Estimator) -> None:
    name = type(estimator).__name__
    with pytest.raises(
        ValueError, match=rf"^{name} takes one outer loss, .* a vector of 3; write .mean\(\) .* Reverse"
    ):
        estimator(descent(outer_losses), make_meta(), BATCHES, TARGETS)


def test_check_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match=r"check compares one outer loss, .* a vector of 3; write .mean"):
        bilevel.check(descent(outer_losses), make_meta(), BATCHES, TARGETS, progress=False)
    box = bilevel.BlackBox(lambda meta: meta["shift"], lambda state, meta, batch: state)
    with pytest.raises(ValueError, match="check compares one outer loss"):
        bilevel.check(box, make_meta(), progress=False)


def test_the_short_check_compares_all_values_of_a_vector() -> None:
    with short_check(True):
        found = Reverse()(descent(outer_losses), make_meta(), BATCHES, TARGETS)
        assert "and outer value; one step: derivatives" in found.diagnostics["checked"]
        calls: list[int] = []

        def unsteady(model: Any, meta: Any, targets: Tensor) -> Tensor:
            calls.append(1)
            return outer_losses(model, meta, targets) + torch.tensor([0.0, 1.0, 0.0]) * len(calls)

        with pytest.raises(CheckError, match="outer value"):
            Reverse()(descent(unsteady), make_meta(), BATCHES, TARGETS)


def test_the_values_of_a_vector_can_be_weighted_in_a_loss() -> None:
    meta = {name: leaf.requires_grad_() for name, leaf in make_meta().items()}
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = Reverse()(descent(outer_losses), meta, BATCHES, TARGETS)
    (weights @ found.value).backward()
    for name, leaf in meta.items():
        torch.testing.assert_close(leaf.grad, torch.tensordot(weights, found.grad[name], 1))


@pytest.mark.filterwarnings("ignore:Implicit")  # solvers that stop early
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_vector_gives_the_numbers_of_separate_estimates(estimator: bilevel.Estimator) -> None:
    found = estimator(descent(outer_losses), make_meta(), BATCHES, TARGETS, seed=3)
    assert found.value.shape == (ENTRIES,)
    assert {name: tuple(leaf.shape) for name, leaf in found.grad.items()} == {
        "shift": (ENTRIES, 3),
        "log_decay": (ENTRIES, 2, 1),
    }
    for number in range(ENTRIES):
        alone = estimator(descent(entry(number)), make_meta(), BATCHES, TARGETS, seed=3)
        torch.testing.assert_close(found.value[number], alone.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(rows(found.grad)[number], flat(alone.grad), rtol=1e-7, atol=1e-10)
        if alone.standard_error is None:
            assert found.standard_error is None
        else:
            assert isinstance(found.standard_error, Tensor)
            assert found.standard_error.shape == (ENTRIES,)
            assert float(found.standard_error[number]) == pytest.approx(alone.standard_error, rel=1e-6)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse("graph"), Reverse("log", chunk_size=2), Forward()], ids=str)
def test_exact_methods_are_the_jacobian_of_a_plain_loop(estimator: bilevel.Estimator) -> None:
    def trained(meta: dict[str, Tensor]) -> Tensor:
        model = copy.deepcopy(START)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for x in BATCHES:
            optimizer.zero_grad()
            inner_loss(model, meta, x).backward()
            optimizer.step()
        with torch.no_grad():
            return outer_losses(model, meta, TARGETS)

    meta = make_meta()
    found = rows(estimator(descent(outer_losses), meta, BATCHES, TARGETS).grad)
    step, columns = 1e-5, []
    for leaf in meta.values():
        for place in leaf.reshape(-1):
            before = place.clone()
            ahead = trained(_set(meta, place, before + step))
            behind = trained(_set(meta, place, before - step))
            _set(meta, place, before)
            columns.append((ahead - behind) / (2 * step))
    torch.testing.assert_close(found, torch.stack(columns, 1), rtol=1e-6, atol=1e-8)


def _set(meta: dict[str, Tensor], place: Tensor, value: Tensor) -> dict[str, Tensor]:
    place.copy_(value)
    return meta


@pytest.mark.parametrize(
    "estimator", [Reverse(), Reverse(chunk_size=1), Reverse("sqrt"), TruncatedReverse(2), Implicit(Neumann(2))], ids=str
)
def test_the_inner_loop_is_run_once_for_all_entries(estimator: bilevel.Estimator) -> None:
    calls: list[int] = []

    def counted(model: Any, meta: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return inner_loss(model, meta, x)

    made = []
    for outer in (entry(0), outer_losses):
        problem = bilevel.GradientDescent(counted, outer, START, bilevel.optimizer(torch.optim.SGD, lr=0.05))
        estimator(problem, make_meta(), BATCHES, TARGETS)
        calls.clear()  # checks that are made once for a problem
        estimator(problem, make_meta(), BATCHES, TARGETS)
        made.append(len(calls))
    assert made[0] == made[1]


@pytest.mark.filterwarnings("ignore:Implicit")
@pytest.mark.parametrize(
    "estimator",
    [
        Reverse(),
        Reverse(chunk_size=2),
        Reverse("graph"),
        TruncatedReverse(4),
        Forward(),
        ForwardGradient(4),
        ZerothOrder(2),
        Implicit(ConjugateGradient(iterations=3, tolerance=0.0, damping=10.0)),
        HessianFree(),
        HessianFree(preconditioner="optimizer"),
    ],
    ids=str,
)
def test_operations_are_those_of_the_formula(estimator: bilevel.Estimator) -> None:
    """As in `test_units.py`: never more, and little less, for each entry what may be less for one."""
    T, m = 8, 5
    base, meta = units.problem(width=8, depth=6, examples=32)

    def outer(model: Any, meta: Tensor, batch: None) -> Tensor:
        return torch.stack([p.square().sum() for p in model.parameters()][:m])

    network = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())][:-1])
    problem = bilevel.GradientDescent(base.inner_loss, outer, network, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    estimator(problem, meta, T)  # checks that are made once for a problem

    def counted(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    run = unroll(problem, meta, T, None, 0)
    unit = counted(lambda: run.descend(run.start())) / T
    found, formula = counted(lambda: estimator(problem, meta, T)) / unit, estimator.units(T, 8, m)
    assert formula * 17 / 18 - 1.5 * m < found < 1.001 * formula


class Square(torch.autograd.Function):
    """A function whose backward pass leaves PyTorch, so that `torch.vmap` does not take it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * cotangent.detach().numpy())


@pytest.mark.parametrize("estimator", [Reverse(), Reverse("graph"), Reverse("graph", chunk_size=2)], ids=str)
@pytest.mark.parametrize("place", ["step", "outer_loss"])
def test_operations_without_batching_rule_are_pulled_back_one_by_one(estimator: bilevel.Estimator, place: str) -> None:
    def problem(square: Callable[[Tensor], Tensor]) -> bilevel.Problem:
        in_step = square if place == "step" else torch.square
        in_outer = square if place == "outer_loss" else torch.square
        return bilevel.Problem(
            init=lambda meta: torch.ones(3, dtype=torch.float64),
            step=lambda state, meta, batch: state - 0.1 * in_step(state) * meta,
            outer_loss=lambda state, meta, batch: in_outer(state),
        )

    meta = torch.tensor([0.3, 0.2, -0.1], dtype=torch.float64)
    found, expected = (estimator(problem(square), meta, 3).grad for square in (lambda x: Square.apply(x), torch.square))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert torch.count_nonzero(found) == 3  # entries of the state do not mix


def test_first_order_takes_vectors() -> None:
    def problem(outer_loss: Callable[..., Tensor]) -> bilevel.GradientDescent:
        return bilevel.GradientDescent(
            lambda theta, meta, x: (x @ theta - 1).square().mean(),
            outer_loss,
            lambda meta: meta.sin(),
            bilevel.optimizer(torch.optim.Adam, lr=0.05),
        )

    def losses(theta: Tensor, meta: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([(x @ theta).square().mean() for x in targets]) + meta[0]

    meta = torch.tensor([0.3, 0.2, -0.1], dtype=torch.float64)
    found = bilevel.FirstOrder()(problem(losses), meta, BATCHES, TARGETS)
    for j in range(ENTRIES):
        alone = bilevel.FirstOrder()(problem(lambda *a, j=j: losses(*a)[j]), meta, BATCHES, TARGETS)
        torch.testing.assert_close(found.grad[j], alone.grad, rtol=1e-12, atol=1e-15)


def test_a_black_box_takes_vectors() -> None:
    box = bilevel.BlackBox(torch.sin, lambda state, meta, batch: state.square())
    meta = torch.tensor([0.5, 0.7], dtype=torch.float64)
    found = ZerothOrder(2, 1e-5, distribution="coordinate")(box, meta)
    torch.testing.assert_close(found.grad, torch.diag(torch.sin(2 * meta)), rtol=1e-8, atol=1e-9)


def test_one_entry_is_a_vector_too() -> None:
    one = Reverse()(descent(lambda *a: outer_losses(*a)[1:2]), make_meta(), BATCHES, TARGETS)
    alone = Reverse()(descent(entry(1)), make_meta(), BATCHES, TARGETS)
    assert one.value.shape == (1,)
    torch.testing.assert_close(rows(one.grad)[0], flat(alone.grad), rtol=1e-12, atol=0)


def test_a_module_as_meta_gets_a_row_for_each_entry() -> None:
    scale = nn.Linear(3, 1).double()
    problem = bilevel.GradientDescent(
        lambda theta, meta, x: (meta(x).squeeze(1) * (x @ theta - 1).square()).mean(),
        lambda theta, meta, targets: torch.stack([(x @ theta).square().mean() for x in targets]),
        torch.ones(3, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    found, other = (e(problem, scale, BATCHES, TARGETS).grad for e in (Reverse(), Forward()))
    assert {name: tuple(g.shape) for name, g in found.items()} == {"weight": (ENTRIES, 1, 3), "bias": (ENTRIES, 1)}
    torch.testing.assert_close(dict(found), dict(other), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_error_of_each_entry_is_what_its_estimates_show() -> None:
    """Over many draws, the mean squared error of each entry is the mean of its squared standard error."""
    problem, meta = descent(outer_losses), make_meta()
    truth = rows(Reverse()(problem, meta, BATCHES, TARGETS).grad)
    estimator = ForwardGradient(3, control_variate=TruncatedReverse(1))
    found = [estimator.redrawn(n)(problem, meta, BATCHES, TARGETS) for n in range(150)]
    errors = torch.stack([(rows(e.grad) - truth).square().sum(1) for e in found])
    claimed = torch.stack([torch.as_tensor(e.standard_error).square() for e in found])
    spread = (errors - claimed).std(0) / math.sqrt(len(found))
    assert bool(((errors - claimed).mean(0).abs() < 4 * spread).all())


def test_a_constant_may_be_one_gradient_or_one_for_each_entry() -> None:
    problem, meta = descent(outer_losses), make_meta()
    exact = Reverse()(problem, meta, BATCHES, TARGETS).grad
    with_exact = ForwardGradient(3, control_variate=bilevel.Constant(exact))(problem, meta, BATCHES, TARGETS)
    plain = ForwardGradient(3)(problem, meta, BATCHES, TARGETS)
    assert bool((torch.as_tensor(with_exact.standard_error) < torch.as_tensor(plain.standard_error)).all())
    one = bilevel.Constant({name: leaf[0] for name, leaf in exact.items()})
    shared = ForwardGradient(3, control_variate=one)(problem, meta, BATCHES, TARGETS)
    torch.testing.assert_close(shared.grad["shift"][0], with_exact.grad["shift"][0])
    wrong = bilevel.Constant({name: leaf[:2] for name, leaf in exact.items()})
    with pytest.raises(ValueError, match="one for each of 3 outer losses"):
        ForwardGradient(3, control_variate=wrong)(problem, meta, BATCHES, TARGETS)


# -- what takes a single outer loss ---------------------------------------------------------------------------------


def test_fit_compare_plan_and_auto_take_one_outer_loss() -> None:
    problem, meta = descent(outer_losses), make_meta()
    words = r"one outer loss, and outer_loss returned a vector of 3; write \.mean\(\) or \.sum\(\)"
    with pytest.raises(ValueError, match=f"fit descends on {words}"):
        bilevel.fit(problem, meta, BATCHES, TARGETS, estimator=Reverse(), steps=1, progress=False)
    with pytest.raises(ValueError, match=words):
        bilevel.compare(problem, meta, BATCHES, TARGETS, estimators=[Reverse()])
    with pytest.raises(ValueError, match=f"plan and Auto choose a method for {words}"):
        bilevel.plan(problem, meta, BATCHES, TARGETS, memory="1GB")
    with pytest.raises(ValueError, match=words):
        Auto()(problem, meta, BATCHES, TARGETS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda losses: losses[:0], "vector without entries"),
        (lambda losses: losses.reshape(1, -1), r"shape \(1, 3\)"),
        (lambda losses: (losses > 0).long(), "int64 vector"),
    ],
)
@pytest.mark.parametrize("estimator", [Reverse(), ForwardGradient(2), ZerothOrder(2)], ids=str)
def test_what_is_no_vector_of_losses_is_refused(estimator: Any, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimator(descent(lambda *a: change(outer_losses(*a))), make_meta(), BATCHES, TARGETS)


@pytest.mark.parametrize("estimator", [Reverse(), ForwardGradient(2), ZerothOrder(2)], ids=str)
def test_an_entry_that_is_not_finite_is_named(estimator: Any) -> None:
    broken = torch.tensor([1.0, math.nan, 1.0])
    with pytest.raises(NonFiniteError, match=r"nan \(entry 1 of 3\)"):
        estimator(descent(lambda *a: outer_losses(*a) * broken), make_meta(), BATCHES, TARGETS)


def test_a_vector_that_does_not_depend_on_the_state_is_refused() -> None:
    with pytest.raises(NoDependenceError, match="outer_loss does not depend on the inner state"):
        Reverse()(descent(lambda model, meta, targets: meta["shift"].square()), make_meta(), BATCHES, TARGETS)


def test_an_estimator_that_was_not_written_for_vectors_is_named() -> None:
    class OfSums(bilevel.estimators.Estimator):
        is_random = False

        def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
            return float(steps)

        def _estimate(self, run: Any) -> Any:
            value, state = run.value()
            return bilevel.estimators.Estimate(value, run.meta, state)

    with pytest.raises(ValueError, match="a vector of 3 outer losses"):
        OfSums()(descent(outer_losses), make_meta(), BATCHES, TARGETS)


def test_a_chunk_size_is_a_whole_number() -> None:
    for method in (lambda: Reverse(chunk_size=0), lambda: TruncatedReverse(1, chunk_size=-1)):
        with pytest.raises(ValueError, match="chunk_size"):
            method()
