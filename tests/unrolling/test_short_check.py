"""The short check before the first estimate of a kind of problem: what it finds, costs, and leaves alone."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel.autodiff import custom_functions
from bilevel.experimental import short_check as switched
from bilevel.optim import clipping
from bilevel.problem import GradientDescent
from bilevel.unrolling import short_check

DOUBLE = torch.float64
X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
Y = torch.tensor([0.3, -0.7, 0.1, 0.9])
META = torch.linspace(0.5, 1.5, 4)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """No kind of problem has been checked before a test."""
    short_check.forget()
    yield
    short_check.forget()


def inner(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (meta * (model(X).squeeze(1) - Y).square()).mean()


def outer(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (model(-X).squeeze(1) - Y).square().mean()


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))


def problem(loss: Any = inner, model: Any = None, **settings: Any) -> GradientDescent:
    chosen: dict[str, Any] = {"lr": 0.01} | settings
    optimizer = bilevel.optimizer(torch.optim.Adam, **chosen)
    return GradientDescent(loss, outer, net() if model is None else model, optimizer)


def estimated(described: Any, steps: Any = 6, meta: Any = META, seed: int = 0) -> bilevel.Estimate:
    with switched(True):
        return bilevel.Reverse()(described, meta, steps, seed=seed)


def test_what_was_verified_is_in_the_diagnostics() -> None:
    checked = estimated(problem()).diagnostics["checked"]
    assert "the loop: steps 0" in checked
    assert "outer value" in checked
    assert "derivatives of step" in checked
    assert "not checked" not in checked


def test_estimates_are_the_same_with_and_without() -> None:
    described = problem(model=net(0.3))
    with_check = estimated(described)
    with switched(False):
        without = bilevel.Reverse()(described, META, 6)
    assert torch.equal(with_check.grad, without.grad)
    assert "checked" not in without.diagnostics


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_it_costs_at_most_twelve_units(steps: int) -> None:
    """Ten losses with their gradients, and one gradient's transposed product, which is two more."""
    calls = []

    def counted(model: Any, meta: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        return inner(model, meta, batch)

    described = problem(counted)
    with switched(False):
        bilevel.Reverse()(described, META, steps)
    alone = len(calls)
    calls.clear()
    estimated(described, steps)
    assert 0 < len(calls) - alone <= 10
    calls.clear()
    estimated(described, steps)
    assert len(calls) == alone, "a kind of problem is checked once"


def test_problems_of_one_kind_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    own = short_check._findings
    monkeypatch.setattr(short_check, "_findings", lambda run, meta: checks.append(1) or own(run, meta))
    for _ in range(3):  # as code for MAML does, which builds a problem for each task
        estimated(problem())
    assert len(checks) == 1
    estimated(problem(lr=0.02))
    assert len(checks) == 2, "other settings of the optimiser"
    estimated(problem(), meta=META.double())
    assert len(checks) == 3, "another dtype"
    estimated(problem(lambda model, meta, batch: 2 * inner(model, meta, batch)))
    assert len(checks) == 4, "another loss"
    estimated(problem(model=nn.Sequential(nn.Linear(3, 1))))
    assert len(checks) == 5, "another module"


def test_no_random_numbers_are_consumed_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.3), nn.Linear(2, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # type: ignore[index]
    assert "derivatives" in estimated(problem(model=model)).diagnostics["checked"]
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[arg-type, index]
    assert states[2] == random.getstate()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping.Clipping, "__call__", lambda self, gradients, meta, step: list(gradients))


def clip_without_derivative(patch: pytest.MonkeyPatch) -> None:
    def call(self: Any, gradients: Any, meta: Any, step: int) -> Any:
        found = [g for g in gradients if g is not None]
        total = torch.stack([g.detach().square().sum() for g in found]).sum().sqrt()
        factor = (self.norm / (total + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * factor for g in gradients]

    patch.setattr(clipping.Clipping, "__call__", call)


def half_the_gradient(patch: pytest.MonkeyPatch) -> None:
    """The derivative of the inner gradient by the meta parameters is lost for half of the gradient."""
    own = GradientDescent.evaluate

    def evaluate(self: Any, params: Any, meta: Any, *rest: Any) -> Any:
        found = own(self, params, meta, *rest)
        gradient = [None if g is None else 0.5 * g + 0.5 * g.detach() for g in found.gradient]
        return found._replace(gradient=gradient)

    patch.setattr(GradientDescent, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("switch", "words"),
    [(no_clipping, "the loop"), (clip_without_derivative, "update by gradient"), (half_the_gradient, "inner gradient")],
)
def test_what_is_wrong_raises_with_the_table(
    switch: Callable[[pytest.MonkeyPatch], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch(monkeypatch)
    described = problem(clip_norm=0.01)
    for _ in range(2):  # and again: a failed check is not remembered as made
        with pytest.raises(bilevel.errors.CheckError, match="BILEVEL_SHORT_CHECK=off") as caught:
            estimated(described)
        assert words in caught.value.table
    with switched(False):
        bilevel.Reverse()(described, META, 6)


def test_a_wrong_step_of_a_problem_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.slope = 3 * x.detach() ** 2
            return x**3

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * ctx.slope

    monkeypatch.setattr(custom_functions, "is_verified", lambda function: True)

    def step(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        there = theta if theta.requires_grad else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((Saves.apply(there) * meta).sum(), there, create_graph=True)  # type: ignore[operator]
        return theta - 0.1 * gradient

    described = bilevel.Problem(lambda meta: torch.ones(4), step, lambda theta, meta, batch: theta.square().sum())
    with pytest.raises(bilevel.errors.CheckError, match="whole step by state"):
        estimated(described)


def test_losses_with_a_memory_are_left_to_the_estimators() -> None:
    kept: list[Tensor] = []

    def remembers(model: Any, meta: Tensor, batch: Any) -> Tensor:
        kept.append(model(X).detach())
        return inner(model, meta, batch) + 0.3 * (model(X) * torch.stack(kept[-3:]).mean(0)).mean()

    with switched(True):
        once = bilevel.Reverse("graph")(problem(remembers), META, 4)
        assert len(kept) == 4, "each step is computed once"
        assert "checked" not in once.diagnostics
        with pytest.raises(bilevel.errors.ReplayError):
            bilevel.Reverse()(problem(remembers), META, 4)


def test_by_default_every_estimate_runs_it_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    own = short_check._findings
    monkeypatch.setattr(short_check, "_findings", lambda run, meta: checks.append(1) or own(run, meta))
    monkeypatch.delenv(short_check.SWITCH, raising=False)
    described = problem()
    for _ in range(2):
        assert "checked" in bilevel.Reverse()(described, META, 3).diagnostics
        assert len(checks) == 1
    monkeypatch.setenv(short_check.SWITCH, "fit")
    short_check.forget()
    assert "checked" not in bilevel.Reverse()(described, META, 3).diagnostics
    bilevel.fit(described, META, 3, estimator=bilevel.Reverse(), steps=3, progress=False)
    assert len(checks) == 2
    monkeypatch.setenv(short_check.SWITCH, "off")
    short_check.forget()
    bilevel.fit(described, META, 3, estimator=bilevel.Reverse(), steps=1, progress=False)
    assert "checked" not in bilevel.Reverse()(described, META, 3).diagnostics
    assert len(checks) == 2


def test_a_misspelt_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(short_check.SWITCH, "of")
    with pytest.raises(ValueError, match=r"BILEVEL_SHORT_CHECK is 'of'; set it to"):
        bilevel.Reverse()(problem(), META, 3)


def test_fit_raises_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    no_clipping(monkeypatch)
    monkeypatch.delenv(short_check.SWITCH, raising=False)
    seen: list[Any] = []
    with pytest.raises(bilevel.errors.CheckError):
        bilevel.fit(
            problem(clip_norm=0.01),
            META,
            3,
            estimator=bilevel.Reverse(),
            steps=2,
            progress=False,
            callbacks=[seen.append],
        )
    assert not seen


def test_a_large_model_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_check, "_LARGEST", 10)
    assert "too many" in estimated(problem()).diagnostics["checked"]
    short_check.forget()
    monkeypatch.setattr(short_check, "_LARGEST", 2**20)
    monkeypatch.setattr(short_check, "_LARGEST_IN_DOUBLE", 10)
    assert "the loop: steps 0" in estimated(problem()).diagnostics["checked"]


@pytest.mark.parametrize(
    "estimator",
    [bilevel.ForwardGradient(2), bilevel.ZerothOrder(2, 1e-3), bilevel.TruncatedReverse(2), bilevel.Forward()],
    ids=lambda e: type(e).__name__,
)
def test_every_estimator_checks(estimator: bilevel.Estimator) -> None:
    with switched(True), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "derivatives" in estimator(problem(model=net(0.2)), META, 4).diagnostics["checked"]


@pytest.mark.parametrize("algorithm", [torch.optim.SGD, torch.optim.ASGD, torch.optim.RAdam, torch.optim.NAdam])
def test_optimizers(algorithm: type[torch.optim.Optimizer]) -> None:
    described = GradientDescent(inner, outer, net(), bilevel.optimizer(algorithm, lr=0.01))
    assert "derivatives" in estimated(described).diagnostics["checked"]
