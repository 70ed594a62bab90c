"""Parameters that the loss of a step does not reach: left alone, as `torch.optim` does where `grad` is `None`.

The truth is the ordinary loop with `zero_grad()`, for values, and its finite differences for hypergradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_training import TEN_OPTIMIZERS, class_name, default_dtype, numerical_gradient, trained_tensors
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import bilevel

SETTINGS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (Adam, {"lr": 0.1, "weight_decay": 0.1}),
    (Adam, {"lr": 0.1, "amsgrad": True}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    (Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    (NAdam, {"lr": 0.1}),
    (RAdam, {"lr": 0.1, "betas": (0.9, 0.95)}),  # adapts from the sixth update of a parameter on
    (Adadelta, {"lr": 1.0}),
    (Adamax, {"lr": 0.1}),
    (ASGD, {"lr": 0.1, "lambd": 0.1, "t0": 1}),
]
EVERY_SETTING = pytest.mark.parametrize(("algorithm", "settings"), SETTINGS, ids=class_name)
HEADS = "bbabcaabb"
"""The head of each step: `a` comes first at the third step, `c` comes once."""
PLACES = {"a": 0, "b": 1, "c": 2}


def heads_problem() -> tuple[list[Tensor], Tensor, Tensor]:
    """Parameters (three heads on a trunk that is in every loss), inputs and targets; in float64."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return [normal(2), normal(2), normal(2), normal(3, 2)], normal(5, 3), normal(5)


PARAMETERS, INPUTS, TARGETS = heads_problem()
META = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)


def head_loss(parameters: Sequence[Tensor], meta: Tensor, head: str) -> Tensor:
    """Weighted squares of one head's errors."""
    return (meta[:5] * ((INPUTS @ parameters[3]).tanh() @ parameters[PLACES[head]] - TARGETS).square()).mean()


def outer_loss(parameters: Sequence[Tensor], meta: Tensor, batch: Any) -> Tensor:
    hidden = (INPUTS @ parameters[3]).tanh()
    return torch.stack([(hidden @ parameters[i] + TARGETS).square().mean() for i in PLACES.values()]).sum()


def signed(settings: dict[str, Any]) -> Callable[..., Tensor]:
    """The inner loss, turned over for an optimiser that maximises."""
    return (lambda *arguments: -head_loss(*arguments)) if settings.get("maximize") else head_loss


def warmup(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The first learning rate is 0."""
    return LambdaLR(optimizer, lambda step: min(1.0, step / 4))


ESTIMATORS: dict[str, bilevel.Estimator] = {
    "Reverse": bilevel.Reverse(),
    "Reverse(sqrt, disk)": bilevel.Reverse("sqrt", offload="disk"),
    "Reverse(graph)": bilevel.Reverse("graph"),
    "TruncatedReverse": bilevel.TruncatedReverse(len(HEADS)),
    "Forward": bilevel.Forward(),
    "Forward(chunk 1)": bilevel.Forward(chunk_size=1),
    "exact": bilevel.ForwardGradient(5, "coordinate"),
    "shared": bilevel.ForwardGradient(5, "coordinate", tangents="shared", chunk_size=3),
    "difference": bilevel.ForwardGradient(5, "coordinate", tangents="difference"),
    "ZerothOrder": bilevel.ZerothOrder(5, 1e-5, distribution="coordinate"),
}
TOLERANCE = {"difference": 1e-5, "ZerothOrder": 1e-4}
"""Relative; 1e-7 for exact methods, where five-point differences of step 1e-5 are the less accurate ones."""
DTYPE_OF_COUNTERS = {ASGD: torch.float32, NAdam: torch.float64}
"""The plain NAdam keeps a product of momenta in the default dtype, this library in float64. ASGD rounds its rate."""


@EVERY_SETTING
@pytest.mark.parametrize("schedule", [None, functools.partial(CosineAnnealingLR, T_max=len(HEADS)), warmup])
def test_values_are_those_of_the_plain_loop(
    algorithm: type[torch.optim.Optimizer], settings: dict[str, Any], schedule: Any
) -> None:
    problem = bilevel.GradientDescent(
        signed(settings), outer_loss, PARAMETERS, bilevel.optimizer(algorithm, schedule=schedule, **settings)
    )
    state = problem.init(META)
    with default_dtype(DTYPE_OF_COUNTERS.get(algorithm, torch.float32)):
        for steps, head in enumerate(HEADS, 1):
            state = problem.step(state, META, head)
            plain = trained_tensors(
                signed(settings), PARAMETERS, META, HEADS[:steps], lambda p: algorithm(p, **settings), schedule
            )
            for ours, theirs in zip(state.params, plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", ESTIMATORS)
@EVERY_SETTING
def test_hypergradient_is_that_of_the_plain_loop(
    algorithm: type[torch.optim.Optimizer], settings: dict[str, Any], name: str
) -> None:
    truth = differences_of_plain_loop(algorithm, tuple(settings.items()))
    problem = bilevel.GradientDescent(
        signed(settings), outer_loss, PARAMETERS, bilevel.optimizer(algorithm, schedule=warmup, **settings)
    )
    found = ESTIMATORS[name](problem, META, list(HEADS)).grad
    assert (found - truth).norm() <= TOLERANCE.get(name, 1e-7) * truth.norm()


@functools.cache
def differences_of_plain_loop(algorithm: type[torch.optim.Optimizer], settings: tuple[tuple[str, Any], ...]) -> Tensor:
    """The hypergradient of the ordinary loop, under the warmup."""
    loss, known = signed(dict(settings)), dict(settings)

    def h(meta: Tensor) -> float:
        trained = trained_tensors(loss, PARAMETERS, meta, HEADS, lambda p: algorithm(p, **known), warmup)
        return float(outer_loss(trained, meta, None))

    with default_dtype(DTYPE_OF_COUNTERS.get(algorithm, torch.float32)):
        return numerical_gradient(h, META, offset=1e-4)


# -- settings as meta parameters ---------------------------------------------------------------------------------------

META_SETTINGS: list[tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, float]]] = [
    (SGD, {"dampening": 0.5}, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8}),
    (SGD, {"momentum": 0.9, "nesterov": True}, {"lr": 0.1}),
    (Adam, {}, {"lr": 0.1, "weight_decay": 0.1}),
    (Adam, {"lr": 0.1}, {"eps": 0.1}),
    (AdamW, {}, {"lr": 0.1, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.1}, {"weight_decay": 0.1}),
    (RMSprop, {"momentum": 0.9}, {"lr": 0.01, "weight_decay": 0.1}),
    (Adagrad, {}, {"lr": 0.1, "eps": 0.1}),
    (NAdam, {"decoupled_weight_decay": True}, {"lr": 0.1, "weight_decay": 0.1}),
    (RAdam, {"betas": (0.9, 0.95)}, {"lr": 0.1, "weight_decay": 0.1}),
    (Adadelta, {}, {"lr": 1.0, "weight_decay": 0.1}),
    (Adamax, {}, {"lr": 0.1, "weight_decay": 0.1}),
    (ASGD, {"lr": 0.1, "lambd": 0.1}, {"weight_decay": 0.1}),
]


def settings_as_meta(
    algorithm: type[torch.optim.Optimizer], constants: dict[str, Any], at: dict[str, float], schedule: Any
) -> tuple[bilevel.GradientDescent, Callable[[Tensor], float], Tensor]:
    """A problem whose meta parameters are settings of the optimiser, its outer loss by plain training, and a point."""
    names = list(at)
    point = torch.tensor(list(at.values()), dtype=torch.float64)
    weights = torch.ones(5, dtype=torch.float64)

    def h(values: Tensor) -> float:
        settings = {**constants, **dict(zip(names, values.tolist(), strict=True))}
        trained = trained_tensors(head_loss, PARAMETERS, weights, HEADS, lambda p: algorithm(p, **settings), schedule)
        return float(outer_loss(trained, weights, None))

    functions: dict[str, Any] = {key: (lambda meta, i=i: meta[i]) for i, key in enumerate(names)}
    problem = bilevel.GradientDescent(
        lambda parameters, meta, head: head_loss(parameters, weights, head),
        outer_loss,
        PARAMETERS,
        bilevel.optimizer(algorithm, schedule=schedule, **constants, **functions),
    )
    return problem, h, point


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("schedule", [None, warmup])
@pytest.mark.parametrize("name", ["Reverse", "exact", "difference"])
@pytest.mark.parametrize(("algorithm", "constants", "at"), META_SETTINGS, ids=class_name)
def test_settings_as_meta_parameters(
    algorithm: type[torch.optim.Optimizer], constants: dict[str, Any], at: dict[str, float], name: str, schedule: Any
) -> None:
    problem, h, point = settings_as_meta(algorithm, constants, at, schedule)
    estimators = {
        "Reverse": bilevel.Reverse(),
        "exact": bilevel.Forward(),
        "difference": bilevel.ForwardGradient(len(at), "coordinate", tangents="difference"),
    }
    with default_dtype(DTYPE_OF_COUNTERS.get(algorithm, torch.float32)):
        truth = numerical_gradient(h, point, offset=1e-5)
    found = estimators[name](problem, point, list(HEADS)).grad
    assert (found - truth).norm() <= (1e-5 if name == "difference" else 1e-7) * truth.norm()


def test_rates_of_single_parameters_move_only_parameters_that_are_reached() -> None:
    """With SGD, a head that is used once has the derivative −(its gradient) · (outer gradient) with respect to its
    rate.
    """
    problem = bilevel.GradientDescent(
        lambda parameters, meta, head: head_loss(parameters, torch.ones(5, dtype=torch.float64), head),
        lambda parameters, meta, batch: parameters[2].sum(),
        PARAMETERS,
        bilevel.optimizer(SGD, lr=lambda meta: list(meta)),
    )
    rates = torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64)
    leaf = PARAMETERS[2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        head_loss([*PARAMETERS[:2], leaf, PARAMETERS[3]], torch.ones(5, dtype=torch.float64), "c"), leaf
    )
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        grad = estimator(problem, rates, list("abca")).grad
        assert grad[:2].tolist() == [0.0, 0.0]
        torch.testing.assert_close(grad[2], -gradient.sum())


def test_dampening_of_a_momentum_that_a_schedule_turns_on_later() -> None:
    """The first buffer is the gradient of the step at which momentum begins."""

    class LateMomentum(LambdaLR):
        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            self.optimizer.param_groups[0]["momentum"] = 0.9 if self.last_epoch >= 3 else 0.0

    def schedule(optimizer: torch.optim.Optimizer) -> LateMomentum:
        return LateMomentum(optimizer, lambda step: 1.0)

    def plain(meta: Tensor) -> list[Tensor]:
        return trained_tensors(head_loss, PARAMETERS, meta, HEADS, lambda p: SGD(p, lr=0.1, dampening=0.5), schedule)

    optimizer = bilevel.optimizer(SGD, lr=0.1, dampening=0.5, schedule=schedule)
    problem = bilevel.GradientDescent(head_loss, outer_loss, PARAMETERS, optimizer)
    truth = numerical_gradient(lambda meta: float(outer_loss(plain(meta), meta, None)), META, offset=1e-4)
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        estimate = estimator(problem, META, list(HEADS))
        for ours, theirs in zip(estimate.state.params, plain(META), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert (estimate.grad - truth).norm() <= 1e-7 * truth.norm()


# -- what counts as reached --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward(), ESTIMATORS["shared"]])
def test_a_derivative_of_zero_is_a_gradient(estimator: bilevel.Estimator) -> None:
    """Weight decay moves a parameter that the loss reaches with a derivative of zero, and not one that it does not."""

    def inner_loss(parameters: Sequence[Tensor], meta: Tensor, batch: Any) -> Tensor:
        dead = torch.relu(parameters[0] - 100.0).sum()
        return dead + parameters[1].detach().sum() + (meta[:3] * parameters[2].square()).sum() + meta.square().sum()

    parameters = [torch.ones(3, dtype=torch.float64) for _ in range(3)]
    problem = bilevel.GradientDescent(
        inner_loss, lambda p, meta, batch: p[2].sum(), parameters, bilevel.optimizer(SGD, lr=0.1, weight_decay=0.5)
    )
    state = estimator(problem, META, bilevel.no_batches(1)).state
    assert state.params[0].tolist() == [0.95] * 3
    assert state.params[1].tolist() == [1.0] * 3


def test_a_loss_that_reaches_meta_alone_is_an_error() -> None:
    problem = bilevel.GradientDescent(
        lambda p, meta, batch: meta.sum(), lambda p, meta, batch: p.sum(), torch.ones(2), bilevel.optimizer(SGD, lr=0.1)
    )
    for estimator in (bilevel.Reverse(), bilevel.Forward(), bilevel.ZerothOrder()):
        with pytest.raises(bilevel.errors.NoDependenceError, match="inner_loss does not depend on the parameters"):
            estimator(problem, torch.ones(2), bilevel.no_batches(2))


@pytest.mark.sampled(every=4)
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", TEN_OPTIMIZERS, ids=class_name)
def test_compiled_gradients_leave_them_alone_as_well(algorithm: type[torch.optim.Optimizer]) -> None:
    settings = TEN_OPTIMIZERS[algorithm]
    eager = bilevel.GradientDescent(head_loss, outer_loss, PARAMETERS, bilevel.optimizer(algorithm, **settings))
    compiled = eager.compiled("aot_eager")
    estimators = (bilevel.Reverse(), bilevel.Forward(), bilevel.Reverse("graph"))
    for estimator in estimators if algorithm is SGD else estimators[:1]:
        expected, found = (estimator(problem, META, list("abba")) for problem in (eager, compiled))
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.state.params, expected.state.params, rtol=1e-12, atol=1e-12)


def test_a_compiled_loss_that_comes_to_reach_other_parameters_is_an_error() -> None:
    flag = ["a"]
    problem = bilevel.GradientDescent(
        lambda parameters, meta, batch: head_loss(parameters, 0 * meta, flag[0]) + parameters[3].sum(),
        outer_loss,
        PARAMETERS,
        bilevel.optimizer(SGD, lr=0.1),
        compile="aot_eager",
    )
    problem.step(problem.init(META), META, None)
    flag[0] = "b"
    problem.check_compiled_again()
    with pytest.raises(
        bilevel.errors.CompileError, match="reaches 2 of the 4 parameters, and inner_loss now reaches 2 others"
    ):
        problem.step(problem.init(META), META, None)


# -- implicit methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 2])
def test_implicit_gradient_leaves_out_what_the_last_batches_do_not_reach(batches: int) -> None:
    """Of two quadratics (θ_i − φ_i)²/2 + decay, dθ_i/dφ_i = 1/(1 + decay) for those that the last batches reach."""
    problem = bilevel.GradientDescent(
        lambda p, meta, i: 0.5 * (p[i] - meta[i]).square().sum(),
        lambda p, meta, batch: p[0].sum() + p[1].sum(),
        [torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)],
        bilevel.optimizer(SGD, lr=0.5, weight_decay=0.25),
    )
    meta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for solver in (bilevel.ConjugateGradient(), bilevel.Neumann(iterations=200, step_size=0.5)):
        grad = bilevel.Implicit(solver, batches=batches)(problem, meta, [0, 1] * 30).grad
        expected = [0.8 if batches == 2 else 0.0, 0.8]
        torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64))
    preconditioned = bilevel.HessianFree(preconditioner="optimizer")(problem, meta, [0, 1] * 30).grad
    torch.testing.assert_close(preconditioned, torch.tensor([0.0, 0.5], dtype=torch.float64))


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.StreamingForwardGradient(2, "same")])
def test_a_stream_is_resumed_with_the_counts_of_every_head(estimator: bilevel.Estimator, tmp_path: Path) -> None:
    """The layout of Adam's memory differs from that before the first step, and is in the checkpoint."""

    def fit(**settings: Any) -> Tensor:
        problem = bilevel.GradientDescent(head_loss, outer_loss, PARAMETERS, bilevel.optimizer(Adam, lr=0.1))
        phases = [bilevel.Phase(estimator, steps=4)]
        settings = {"phases": phases, "stream": True, "progress": False, **settings}
        return bilevel.fit(problem, META.clone(), list("abb"), **settings).meta

    class StopError(Exception):
        pass

    def stop(row: Any) -> None:
        if row.number == 2:
            raise StopError

    straight = fit()
    with pytest.raises(StopError):
        fit(out=bilevel.RunFolder(tmp_path, checkpoint_every=1), callbacks=[stop])
    assert torch.equal(fit(out=bilevel.RunFolder(tmp_path, resume=True)), straight)
