"""Plans: predicted bytes against counted ones, what is recommended, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.cli import plan_command
from bilevel.planning import planner
from bilevel.planning.live_memory import counting

T = 30


def problem(optimizer: Any = None, width: int = 40) -> tuple[bilevel.GradientDescent, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(20, 12), torch.randint(3, (20,))
    network = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return bilevel.GradientDescent(
        lambda model, meta, batch: (meta.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean(),
        lambda model, meta, batch: cross_entropy(model(x), y),
        network,
        optimizer or bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    ), torch.zeros(20)


@pytest.mark.parametrize("algorithm", [torch.optim.SGD, pytest.param(torch.optim.Adam, marks=pytest.mark.slow)])
def test_predicted_bytes_are_those_counted(algorithm: Any) -> None:
    found, meta = problem(bilevel.optimizer(algorithm, lr=0.01))
    plan = bilevel.plan(found, meta, bilevel.no_batches(T), memory="1GB", directions=4)
    kinds = {type(row.estimator) for row in plan.rows}
    assert kinds == {
        bilevel.Reverse,
        bilevel.TruncatedReverse,
        bilevel.ForwardGradient,
        bilevel.ZerothOrder,
        bilevel.Implicit,
        bilevel.HessianFree,
        bilevel.Penalty,
    }
    for row in plan.rows:
        if isinstance(row.estimator, bilevel.Implicit):
            continue  # the same as HessianFree's and a few vectors; it would have to converge
        with counting() as live:
            row.estimator(found, meta, bilevel.no_batches(T))
        assert row.bytes == pytest.approx(live.peak, rel=0.2), row.estimator


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize(
    ("memory", "recommended"),
    [
        ("1GB", bilevel.Reverse("graph")),
        ("800kB", bilevel.Reverse("all")),
        ("290kB", bilevel.Reverse("sqrt")),
        ("250kB", bilevel.Reverse("log")),
        ("180kB", bilevel.Reverse("all", offload="disk")),
        ("1kB", None),
    ],
)
def test_the_exact_method_of_the_fewest_units_that_fits(memory: str, recommended: Any) -> None:
    found, meta = problem()
    plan = bilevel.plan(found, meta, bilevel.no_batches(T), memory=memory, directions=16)
    assert plan.recommended == recommended, [(row.estimator, row.bytes) for row in plan.rows]
    auto = bilevel.Auto(memory)
    if recommended is None:
        assert "nothing fits into 1 kB; the least is" in plan.reason
        with pytest.raises(bilevel.errors.MemoryBudgetError, match="nothing fits into 1 kB"):
            auto(found, meta, bilevel.no_batches(T))
    else:
        expected = recommended(found, meta, bilevel.no_batches(T)).grad
        assert torch.equal(auto(found, meta, bilevel.no_batches(T)).grad, expected)


def test_auto_measures_a_problem_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, meta = problem()
    auto = bilevel.Auto("1GB")
    auto(found, meta, bilevel.no_batches(3))
    monkeypatch.setattr(planner, "plan_of", None)
    auto(found, meta, bilevel.no_batches(3))


def test_a_black_box_is_differenced() -> None:
    box = bilevel.BlackBox(solve=lambda phi: phi.sin(), outer_loss=lambda state, phi, batch: state.square().sum())
    plan = bilevel.plan(box, torch.ones(5, dtype=torch.float64), memory="1MB", directions=16)
    assert plan.recommended == bilevel.ZerothOrder(5)
    estimate = bilevel.Auto("1MB")(box, torch.ones(5, dtype=torch.float64))
    assert estimate.standard_error is not None


def test_a_model_without_forward_mode_has_forward_methods_by_hessian_products() -> None:
    def inner(theta: Tensor, phi: Tensor, batch: None) -> Tensor:
        image = (theta * phi).reshape(1, 1, 1, 3)
        sampled = nn.functional.grid_sample(image, 0.1 * torch.ones(1, 1, 1, 2), align_corners=False)
        return sampled.sum() + (theta * phi).square().sum()

    descent = bilevel.GradientDescent(
        inner, lambda theta, phi, batch: theta.sum(), torch.ones(3), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    plan = bilevel.plan(descent, torch.ones(3), bilevel.no_batches(4), memory="1MB")
    assert {type(row.estimator) for row in plan.rows} >= {bilevel.Forward, bilevel.ForwardGradient}


def test_workers_share_the_directions() -> None:
    found, meta = problem()
    alone, together = (
        next(row for row in plan.rows if isinstance(row.estimator, bilevel.ForwardGradient))
        for plan in (
            bilevel.plan(found, meta, bilevel.no_batches(T), memory="1GB", directions=16, workers=w) for w in (1, 8)
        )
    )
    assert (alone.units, together.units) == ((1 + 2 * 16) * T, (1 + 2 * 2) * T)
    assert together.bytes < alone.bytes / 4
    assert together.relative_variance == alone.relative_variance == 19 / 16


def test_on_paper() -> None:
    """GPT-2 XL, 48 steps of SGD, a weight model of 80 million parameters, 64 workers: states of 6 GB."""
    plan = bilevel.plan_from_sizes(
        1.5e9, 8e7, 48, memory="80GB", directions=64, workers=64, optimizer_memory=0, activation_bytes=4e9
    )
    rows = {repr(row.estimator): row for row in plan.rows}
    everything = rows[repr(bilevel.Reverse("all"))]
    assert everything.bytes > 48 * 6e9
    assert not everything.fits
    assert plan.recommended == bilevel.Reverse("all", offload="disk")
    roomier = bilevel.plan_from_sizes(1.5e9, 8e7, 48, memory="100GB", optimizer_memory=0, activation_bytes=4e9)
    assert roomier.recommended == bilevel.Reverse("log")  # 6 states
    assert rows[repr(bilevel.ForwardGradient(64))].units == 3 * 48
    assert bilevel.plan_from_sizes(1.5e9, 8e7, 48, memory="1GB").recommended is None


@pytest.mark.parametrize("memory", ["", "much", "8XB", "-1GB", "0", float("nan"), -3, "1e999GB"])
def test_memory_that_is_no_size(memory: Any) -> None:
    with pytest.raises(ValueError, match="write a size such as 8GB"):
        planner.parse_bytes(memory)
    with pytest.raises(ValueError, match="write a size such as 8GB"):
        bilevel.Auto(memory)


def test_differences_are_never_called_exact() -> None:
    """With one meta parameter they have no variance, and are cheap, but leave O(step²)."""
    found, _ = problem()
    one = bilevel.GradientDescent(
        lambda model, meta, batch: meta.exp() * found.inner_loss(model, torch.zeros(20), batch),
        lambda model, meta, batch: found.inner_loss(model, torch.zeros(20), batch),
        nn.Linear(12, 3),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    plan = bilevel.plan(one, torch.tensor(0.0), bilevel.no_batches(T), memory="1GB")
    differences = next(row for row in plan.rows if isinstance(row.estimator, bilevel.ZerothOrder))
    assert differences.relative_variance == 0
    assert not differences.exact
    assert "O(step²)" in plan_command.error_text(differences)
    assert not isinstance(plan.recommended, bilevel.ZerothOrder)


# -- what an estimate is worth -----------------------------------------------------------------------------------------

STEPS = 48


def on_paper(meta_params: float, memory: str) -> planner.Plan:
    """A large model on 64 workers, for which 100 GB hold an exact method, and no less does."""
    return bilevel.plan_from_sizes(
        1.5e9, meta_params, STEPS, memory=memory, directions=64, workers=64, activation_bytes=1e8
    )


def test_an_estimate_that_is_noise_is_not_recommended_where_a_biased_method_fits() -> None:
    plan = on_paper(8e7, "90GB")
    fitting = [type(row.estimator) for row in plan.rows if row.fits]
    biased = [bilevel.Implicit, bilevel.HessianFree, bilevel.Penalty]
    assert fitting == [*biased, bilevel.ForwardGradient, bilevel.ZerothOrder]
    assert plan.recommended == bilevel.HessianFree()
    for part in (
        "no exact method fits into 90 GB",
        "ForwardGradient along 64 of 80,000,000 dimensions has a signal-to-noise ratio of 8e-07",
        "79,999,999 directions would give 1",
        "biased",
        "Implicit, which fits too, is better where the inner loop converges",
    ):
        assert part in plan.reason


@pytest.mark.parametrize(
    ("meta_params", "memory", "recommended"),
    [
        (641, "90GB", bilevel.ForwardGradient(64)),  # 64/640 = 0.1
        (642, "90GB", bilevel.HessianFree()),
        (641, "61GB", bilevel.ZerothOrder(64)),
        (642, "61GB", bilevel.HessianFree()),
        (8e7, "300GB", bilevel.Reverse("sqrt")),  # where an exact one fits, nothing else counts
    ],
)
def test_ten_usable_estimates_have_as_much_signal_as_noise(meta_params: float, memory: str, recommended: Any) -> None:
    plan = on_paper(meta_params, memory)
    assert plan.recommended == recommended
    (row,) = (row for row in plan.rows if row.estimator == recommended)
    if not row.exact and not row.biased:
        assert row.signal_to_noise == 0.1
        assert "a signal-to-noise ratio of 0.1, and 640 directions would give 1" in plan.reason


def low_memory(found: bilevel.GradientDescent, meta: Any, directions: int = 1) -> planner.Plan:
    """The plan for memory in which no exact method fits, and as much of the rest as possible."""
    everything = bilevel.plan(found, meta, bilevel.no_batches(T), memory="1GB", directions=directions)
    least = min(row.bytes for row in everything.rows if row.exact)
    return bilevel.plan(found, meta, bilevel.no_batches(T), memory=least - 1, directions=directions)


def test_auto_says_when_its_choice_is_biased() -> None:
    found, meta = problem()
    plan = low_memory(found, meta)
    assert plan.recommended == bilevel.HessianFree()
    auto = bilevel.Auto(plan.memory, directions=1)
    with pytest.warns(UserWarning, match=r"takes HessianFree.*a signal-to-noise ratio of 0.053.*biased"):
        estimate = auto(found, meta, bilevel.no_batches(T))
    assert torch.equal(estimate.grad, bilevel.HessianFree()(found, meta, bilevel.no_batches(T)).grad)
    auto(found, meta, bilevel.no_batches(T))  # once is enough


OUTER = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
DEPENDENCES: dict[str, tuple[Any, Any, Any, set[Any]]] = {
    "inner loss": (
        lambda theta, phi, batch: (theta - phi).square().sum(),
        torch.ones(2, 2),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
        {bilevel.TruncatedReverse, bilevel.Implicit, bilevel.HessianFree, bilevel.Penalty},
    ),
    "weight decay": (
        lambda theta, phi, batch: theta.square().sum(),
        torch.ones(2, 2),
        bilevel.optimizer(torch.optim.SGD, lr=0.1, weight_decay=lambda phi: phi[0, 0].exp()),
        {bilevel.TruncatedReverse, bilevel.Implicit, bilevel.HessianFree, bilevel.Penalty},
    ),
    "learning rate": (
        lambda theta, phi, batch: theta.square().sum(),
        torch.ones(2, 2),
        bilevel.optimizer(torch.optim.SGD, lr=lambda phi: phi[0, 0].exp()),
        {bilevel.TruncatedReverse},
    ),
    "initial parameters": (
        lambda theta, phi, batch: theta.square().sum(),
        lambda phi: 2 * phi,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
        set(),
    ),
}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("dependence", DEPENDENCES)
def test_biased_methods_are_offered_where_they_see_the_meta_parameters(dependence: str) -> None:
    """Implicit methods see them in the inner loss and the weight decay, truncation in every step."""
    inner, params, optimizer, kinds = DEPENDENCES[dependence]
    found = bilevel.GradientDescent(inner, lambda theta, phi, batch: (theta * OUTER).sum(), params, optimizer)
    meta = torch.full((2, 2), -3.0)
    plan = low_memory(found, meta)
    assert {type(row.estimator) for row in plan.rows if row.biased} == kinds
    for row in plan.rows:
        row.estimator(found, meta, bilevel.no_batches(T))  # without NoDependenceError


def test_noise_is_recommended_last_and_called_noise() -> None:
    """No biased method sees the parameters that the inner loop starts from."""
    meta = torch.ones(300)
    found = bilevel.GradientDescent(
        lambda theta, phi, batch: theta.square().sum(),
        lambda theta, phi, batch: theta.square().sum(),
        lambda phi: 2 * phi,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    plan = low_memory(found, meta)
    assert isinstance(plan.recommended, bilevel.ForwardGradient | bilevel.ZerothOrder)
    assert "no biased one" in plan.reason
    assert "a signal-to-noise ratio of 0.0033, and 299 directions would give 1, so it is mostly noise" in plan.reason


def test_truncation_after_all_steps_is_exact() -> None:
    found, meta = problem()
    plan = bilevel.plan(found, meta, bilevel.no_batches(4), memory="1GB")
    (row,) = (row for row in plan.rows if isinstance(row.estimator, bilevel.TruncatedReverse))
    assert (row.estimator, row.exact) == (bilevel.TruncatedReverse(4), True)
    assert plan.recommended == bilevel.Reverse("graph")
