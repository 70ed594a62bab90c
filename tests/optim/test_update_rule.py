"""Inner loops with `torch.optim`: the same trajectory as the ordinary loop, and its derivative."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plain_training import TEN_OPTIMIZERS, Schedule, class_name, default_dtype, numerical_gradient, trained_tensors
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

import bilevel

Algorithm = type[torch.optim.Optimizer]

SETTINGS: list[tuple[Algorithm, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (Adam, {}),
    (Adam, {"amsgrad": True, "maximize": True}),
    (Adam, {"weight_decay": 0.01, "betas": (0.8, 0.9)}),
    (Adam, {"weight_decay": 0.01, "decoupled_weight_decay": True, "eps": 1e-3}),
    (AdamW, {}),
    (AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    (RMSprop, {}),
    (RMSprop, {"centered": True}),
    (RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.01, "maximize": True}),
    (Adagrad, {}),
    (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.01, "maximize": True}),
    (NAdam, {}),
    (NAdam, {"momentum_decay": 0.1, "weight_decay": 0.01, "maximize": True}),
    (NAdam, {"weight_decay": 0.01, "decoupled_weight_decay": True}),
    (RAdam, {}),
    (RAdam, {"betas": (0.9, 0.95), "weight_decay": 0.01, "maximize": True}),
    (RAdam, {"betas": (0.9, 0.95), "weight_decay": 0.01, "decoupled_weight_decay": True}),
    (Adadelta, {}),
    (Adadelta, {"rho": 0.5, "weight_decay": 0.01, "maximize": True}),
    (Adamax, {}),
    (Adamax, {"weight_decay": 0.01, "maximize": True}),
    (ASGD, {}),
    (ASGD, {"lambd": 0.1, "alpha": 0.5, "t0": 2, "weight_decay": 0.01, "maximize": True}),
]
EVERY_SETTING = pytest.mark.parametrize(("algorithm", "settings"), SETTINGS, ids=class_name)
TEN = pytest.mark.parametrize("algorithm", TEN_OPTIMIZERS, ids=class_name)


# -- one inner problem for all: a ReLU network in which some coordinates never have a gradient ----------------------

STEPS = 8
DEAD_INPUT, DEAD_UNIT = 1, 2


def network_problem() -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], Tensor]:
    """Parameters, batches, and meta parameters (a weight for each example); in float64."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    parameters = [normal(3, 4), 0.1 * normal(4), normal(4)]
    parameters[1][DEAD_UNIT] = -100.0
    inputs = normal(STEPS, 5, 3)
    inputs[:, :, DEAD_INPUT] = 0.0
    return parameters, list(zip(inputs, normal(STEPS, 5), strict=True)), 1.0 + 0.1 * normal(5)


def predictions(parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
    into, bias, out = parameters
    return (inputs @ into + bias).relu() @ out


def weighted_loss(parameters: Sequence[Tensor], meta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return (meta * (predictions(parameters, inputs) - targets).square()).mean()


def outer_loss(parameters: Sequence[Tensor], meta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return (predictions(parameters, inputs) - targets).square().mean()


def descending(settings: dict[str, Any]) -> Callable[..., Tensor]:
    """The inner loss, turned over for an optimiser that maximises."""
    if settings.get("maximize"):
        return lambda parameters, meta, batch: -weighted_loss(parameters, meta, batch)
    return weighted_loss


def complete(algorithm: Algorithm, settings: dict[str, Any]) -> dict[str, Any]:
    return {"lr": TEN_OPTIMIZERS[algorithm]["lr"], **settings}


def inner_trajectory(
    optimizer: Any, loss: Callable[..., Tensor], parameters: list[Tensor], meta: Tensor, batches: Sequence[Any]
) -> list[list[Tensor]]:
    """The parameters after every step of our inner loop."""
    problem = bilevel.GradientDescent(loss, outer_loss, parameters, optimizer)
    state, trajectory = problem.init(meta), []
    for batch in batches:
        state = problem.step(state, meta, batch)
        trajectory.append(state.params)
    return trajectory


def plain_trajectory(
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    loss: Callable[..., Tensor],
    parameters: list[Tensor],
    meta: Tensor,
    batches: Sequence[Any],
    schedule: Schedule | None = None,
) -> list[list[Tensor]]:
    """The same by the ordinary loop."""
    return [
        trained_tensors(loss, parameters, meta, batches[:steps], optimizer, schedule)
        for steps in range(1, len(batches) + 1)
    ]


# -- the trajectory is that of the plain optimiser -------------------------------------------------------------------


@EVERY_SETTING
def test_trajectory_is_the_plain_one_in_double_precision(algorithm: Algorithm, settings: dict[str, Any]) -> None:
    parameters, batches, meta = network_problem()
    settings = complete(algorithm, settings)
    loss = descending(settings)
    # The plain NAdam keeps a product of momenta in the default dtype, we in float64. ASGD rounds its rate to it.
    with default_dtype(torch.float32 if algorithm is ASGD else torch.float64):
        plain = plain_trajectory(lambda p: algorithm(p, **settings), loss, parameters, meta, batches)
    ours = inner_trajectory(bilevel.optimizer(algorithm, **settings), loss, parameters, meta, batches)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@EVERY_SETTING
def test_trajectory_is_the_plain_one_in_single_precision(algorithm: Algorithm, settings: dict[str, Any]) -> None:
    parameters, batches, meta = network_problem()
    parameters, meta = [p.float() for p in parameters], meta.float()
    batches = [(x.float(), y.float()) for x, y in batches]
    settings = complete(algorithm, settings)
    loss = descending(settings)
    plain = plain_trajectory(lambda p: algorithm(p, **settings), loss, parameters, meta, batches)
    ours = inner_trajectory(bilevel.optimizer(algorithm, **settings), loss, parameters, meta, batches)
    # The differentiable update orders its products otherwise. That is a few roundings, of the parameter or of the
    # step, in each step.
    for steps, (found, expected) in enumerate(zip(ours, plain, strict=True), start=1):
        torch.testing.assert_close(found, expected, rtol=4e-7 * steps, atol=4e-7 * steps)


SCHEDULES: dict[str, Schedule] = {
    "cosine": functools.partial(CosineAnnealingLR, T_max=STEPS, eta_min=1e-4),
    "step": functools.partial(StepLR, step_size=3, gamma=0.5),
    "warm-up": functools.partial(LinearLR, start_factor=0.2, total_iters=4),
    "one-cycle": functools.partial(OneCycleLR, max_lr=0.1, total_steps=STEPS, cycle_momentum=False),
}
ONE_CYCLE_OF_MOMENTUM = functools.partial(OneCycleLR, max_lr=0.1, total_steps=STEPS)  # both of lr and of momentum


def scheduled_rows() -> list[Any]:
    rows = [
        pytest.param(algorithm, {}, schedule, id=f"{class_name(algorithm)}-{name}")
        for algorithm in TEN_OPTIMIZERS
        for name, schedule in SCHEDULES.items()
    ]
    moving_momentum: list[tuple[Algorithm, dict[str, Any]]] = [
        (SGD, {}),  # the schedule gives it momentum
        (SGD, {"momentum": 0.9, "nesterov": True}),
        (SGD, {"momentum": 0.9, "dampening": 0.5}),
        (RMSprop, {}),
        (RMSprop, {"momentum": 0.9, "centered": True}),
        (Adam, {}),
        (AdamW, {}),
        (NAdam, {}),
        (RAdam, {}),
        (Adamax, {}),
    ]
    rows += [
        pytest.param(algorithm, settings, ONE_CYCLE_OF_MOMENTUM, id=f"{class_name(algorithm)}-momentum{i}")
        for i, (algorithm, settings) in enumerate(moving_momentum)
    ]
    return rows


@pytest.mark.parametrize(("algorithm", "settings", "schedule"), scheduled_rows())
def test_scheduled_trajectory_and_derivative_are_the_plain_ones(
    algorithm: Algorithm, settings: dict[str, Any], schedule: Schedule
) -> None:
    parameters, batches, meta = network_problem()
    settings = complete(algorithm, settings)
    optimizer = bilevel.optimizer(algorithm, schedule=schedule, **settings)

    def plain_optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return algorithm(tensors, **settings)

    with default_dtype(torch.float64):
        ours = inner_trajectory(optimizer, weighted_loss, parameters, meta, batches)
        plain = plain_trajectory(plain_optimizer, weighted_loss, parameters, meta, batches, schedule)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)

        problem = bilevel.GradientDescent(weighted_loss, outer_loss, parameters, optimizer)
        expected = numerical_gradient(
            lambda meta: outer_loss(
                trained_tensors(weighted_loss, parameters, meta, batches, plain_optimizer, schedule), meta, batches[0]
            ).item(),
            meta,
        )
        reverse = bilevel.Reverse()(problem, meta, batches, batches[0]).grad
    torch.testing.assert_close(reverse, expected, rtol=1e-6, atol=1e-8)


# -- the derivative is that of the plain optimiser, dead coordinates and all -----------------------------------------


def test_problem_has_dead_coordinates() -> None:
    parameters, batches, meta = network_problem()
    tracked = [p.requires_grad_() for p in parameters]
    into, bias, out = torch.autograd.grad(weighted_loss(tracked, meta, batches[0]), tracked)
    assert not into[DEAD_INPUT].any()
    assert not into[:, DEAD_UNIT].any()
    assert bias[DEAD_UNIT] == 0
    assert out[DEAD_UNIT] == 0


@EVERY_SETTING
def test_hypergradient_agrees_with_differences_of_the_plain_loop(
    algorithm: Algorithm, settings: dict[str, Any]
) -> None:
    parameters, batches, meta = network_problem()
    settings = complete(algorithm, settings)
    loss = descending(settings)

    def h(meta: Tensor) -> float:
        trained = trained_tensors(loss, parameters, meta, batches, lambda p: algorithm(p, **settings))
        return outer_loss(trained, meta, batches[0]).item()

    with default_dtype(torch.float64):
        expected = numerical_gradient(h, meta)
        problem = bilevel.GradientDescent(loss, outer_loss, parameters, bilevel.optimizer(algorithm, **settings))
        reverse = bilevel.Reverse()(problem, meta, batches, batches[0])
        forward = bilevel.Forward()(problem, meta, batches, batches[0])
        torch.testing.assert_close(reverse.value.item(), h(meta), rtol=1e-12, atol=0)
    torch.testing.assert_close(reverse.grad, forward.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(reverse.grad, expected, rtol=1e-6, atol=1e-8)
    assert expected.abs().max() > 1e-4, "too flat to tell anything"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adam_on_digits_with_black_pixels(dtype: torch.dtype) -> None:
    images, labels = (torch.tensor(array[:40]) for array in load_digits(return_X_y=True))
    images = images.to(dtype) / 16
    assert (images == 0).all(0).sum() >= 3, "pixels that are always black"
    draw = torch.Generator().manual_seed(0)
    parameters = [0.1 * torch.randn(shape, generator=draw, dtype=dtype) for shape in ((64, 16), (16, 10))]

    def logits(parameters: Sequence[Tensor], images: Tensor) -> Tensor:
        return (images @ parameters[0]).relu() @ parameters[1]

    def inner(parameters: Sequence[Tensor], meta: Tensor, batch: None) -> Tensor:
        losses = torch.nn.functional.cross_entropy(logits(parameters, images[:30]), labels[:30], reduction="none")
        return (meta[labels[:30]] * losses).mean()  # a weight for each class

    def outer(parameters: Sequence[Tensor], meta: Tensor, batch: None) -> Tensor:
        return torch.nn.functional.cross_entropy(logits(parameters, images[30:]), labels[30:])

    problem = bilevel.GradientDescent(inner, outer, parameters, bilevel.optimizer(Adam, lr=0.01))
    meta = torch.ones(10, dtype=dtype)
    reverse = bilevel.Reverse()(problem, meta, bilevel.no_batches(20)).grad
    forward = bilevel.Forward()(problem, meta, bilevel.no_batches(20)).grad
    assert torch.isfinite(reverse).all()
    assert reverse.norm() > 0
    # In float32 each of the 20 steps adds a rounding, which the loop amplifies; a wrong rule would be off by more.
    torch.testing.assert_close(reverse, forward, rtol=1e-10 if dtype == torch.float64 else 1e-3, atol=1e-9)


# -- why the rules are needed ----------------------------------------------------------------------------------------


def naive_hypergradient_of_one_step(algorithm: Algorithm, settings: dict[str, Any]) -> Tensor:
    """As PyTorch's `differentiable=True` does it without our rules."""
    parameters, batches, meta = network_problem()
    meta.requires_grad_()
    for parameter in parameters:
        parameter.requires_grad_()
    gradients = torch.autograd.grad(weighted_loss(parameters, meta, batches[0]), parameters, create_graph=True)
    moved = [p.clone() for p in parameters]
    optimizer = algorithm(moved, differentiable=True, **settings)  # pyright: ignore[reportCallIssue]
    for p, gradient in zip(moved, gradients, strict=True):
        p.grad = gradient
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about reading .grad of tensors that are no leaves
        optimizer.step()
    outer = outer_loss(moved, meta, batches[1])
    return torch.autograd.grad(outer, meta, allow_unused=True, materialize_grads=True)[0]


def test_without_the_floor_adam_gives_nan_and_with_it_the_derivative() -> None:
    parameters, batches, meta = network_problem()
    settings = TEN_OPTIMIZERS[Adam]
    assert naive_hypergradient_of_one_step(Adam, settings).isnan().all()
    problem = bilevel.GradientDescent(weighted_loss, outer_loss, parameters, bilevel.optimizer(Adam, **settings))
    ours = bilevel.Reverse()(problem, meta, batches[:1], batches[1]).grad
    assert torch.isfinite(ours).all()


def test_without_its_buffer_of_zeros_sgd_momentum_loses_the_derivative() -> None:
    parameters, batches, meta = network_problem()
    settings = TEN_OPTIMIZERS[SGD]
    problem = bilevel.GradientDescent(weighted_loss, outer_loss, parameters, bilevel.optimizer(SGD, **settings))
    ours = bilevel.Reverse()(problem, meta, batches[:1], batches[1]).grad
    assert naive_hypergradient_of_one_step(SGD, settings).norm() < 1e-12
    assert ours.norm() > 1e-3


MU = [0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2)]  # NAdam's momenta in its first step
DERIVATIVE_OF_FIRST_STEP_AT_ZERO_GRADIENT: list[tuple[Algorithm, dict[str, Any], float]] = [
    # −∂θ_1/∂g at g = 0 and lr = 1, from each class's formula with its eps
    (SGD, {}, 1.0),
    (SGD, {"momentum": 0.9}, 1.0),
    (SGD, {"momentum": 0.9, "dampening": 0.5}, 1.0),
    (SGD, {"momentum": 0.9, "nesterov": True}, 1.9),
    (Adam, {}, 1e8),  # g / (|g| + eps)
    (Adam, {"amsgrad": True}, 1e8),
    (AdamW, {}, 1e8),
    (RMSprop, {}, 1e8),  # g / (√(0.01 g²) + eps)
    (RMSprop, {"centered": True}, 1e8),
    (RMSprop, {"momentum": 0.9}, 1e8),
    (Adagrad, {}, 1e10),  # g / (|g| + eps)
    (NAdam, {}, (1 + MU[1] * 0.1 / (1 - MU[0] * MU[1])) * 1e8),
    (RAdam, {}, 1.0),  # not adaptive yet
    (Adadelta, {}, 1.0),  # √(0 + eps) / √(0 + eps) · g
    (Adamax, {}, 1e8),  # g / (|g| + eps)
    (ASGD, {}, 1.0),
]


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("algorithm", "settings", "factor"), DERIVATIVE_OF_FIRST_STEP_AT_ZERO_GRADIENT, ids=class_name)
def test_derivative_at_a_gradient_of_zero(
    algorithm: Algorithm, settings: dict[str, Any], factor: float, estimator: bilevel.Estimator
) -> None:
    gradient_and_slope = torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([1.0, -3.0], dtype=torch.float64)
    problem = bilevel.GradientDescent(
        # g = meta · slope is zero, ∂g/∂meta = slope is not
        lambda theta, meta, batch: (theta * meta * gradient_and_slope[1]).sum(),
        lambda theta, meta, batch: theta.sum(),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        bilevel.optimizer(algorithm, **{"lr": 0.1, "weight_decay": 0.0, **settings}),
    )
    grad = estimator(problem, gradient_and_slope[0], bilevel.no_batches(1)).grad
    with default_dtype(torch.float64):  # ASGD's rate
        torch.testing.assert_close(grad, -0.1 * factor * gradient_and_slope[1], rtol=1e-7, atol=0)


def test_floor_outlives_a_long_dead_run() -> None:
    optimizer = bilevel.optimizer(Adam, lr=0.1, betas=(0.9, 0.9))
    theta, zero = torch.tensor([1.0]), torch.tensor([0.0])
    state = optimizer.init([theta])
    for step in range(20_000):  # 0.9^1000 is below the smallest number of float32
        (theta,), state = optimizer.update([theta], [zero], state, step)
    assert theta == 1.0

    def next_theta(gradient: Tensor) -> Tensor:
        return optimizer.update([theta], [gradient], state, 20_000)[0][0]

    # (1 − beta1) g / (√((1 − beta2) g²) + eps), the bias corrections being 1 by now
    expected = torch.tensor([-0.1 * 0.1 / 1e-8])
    forward = torch.func.jvp(next_theta, (zero,), (torch.ones(1),))[1]
    reverse = torch.func.grad(lambda g: next_theta(g).sum())(zero)
    torch.testing.assert_close(forward, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(reverse, expected, rtol=1e-6, atol=0)


# -- settings as meta parameters -------------------------------------------------------------------------------------


COSINE = functools.partial(CosineAnnealingLR, T_max=STEPS)
STEPWISE = functools.partial(StepLR, step_size=3, gamma=0.5)
ALL_BUT_ASGD = [a for a in TEN_OPTIMIZERS if a is not ASGD]
"""ASGD takes its rate as a plain number."""

SETTINGS_AS_META: list[tuple[Algorithm, dict[str, Any], dict[str, float], Schedule | None]] = [
    # class, constant settings, settings that are meta parameters and where, schedule
    *((a, {"weight_decay": 0.01}, {"lr": TEN_OPTIMIZERS[a]["lr"]}, None) for a in ALL_BUT_ASGD),
    *((a, {}, {"weight_decay": 0.1}, None) for a in TEN_OPTIMIZERS),
    (SGD, {"momentum": 0.9, "nesterov": True}, {"lr": 0.1, "weight_decay": 0.1}, COSINE),
    (SGD, {"momentum": 0.9, "maximize": True}, {"lr": 0.1, "weight_decay": 0.1}, STEPWISE),
    (SGD, {"dampening": 0.5}, {"momentum": 0.8}, None),
    (SGD, {"weight_decay": 0.01}, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}, COSINE),
    (SGD, {"momentum": 0.8}, {"dampening": 0.3}, None),
    (SGD, {"nesterov": True}, {"momentum": 0.8, "lr": 0.1}, STEPWISE),
    (RMSprop, {}, {"alpha": 0.8}, None),
    (Adadelta, {}, {"rho": 0.8}, None),
    (Adagrad, {}, {"lr_decay": 0.3}, None),
    (Adam, {}, {"eps": 0.1}, None),
    (Adam, {"decoupled_weight_decay": True}, {"lr": 0.01, "eps": 0.1, "weight_decay": 0.1}, STEPWISE),
    (AdamW, {"amsgrad": True}, {"eps": 0.1}, None),
    (AdamW, {}, {"lr": 0.01, "weight_decay": 0.1}, None),
    (AdamW, {"maximize": True}, {"weight_decay": 0.1}, COSINE),
    (RMSprop, {"centered": True}, {"momentum": 0.8, "eps": 0.1}, None),
    (RMSprop, {"momentum": 0.9}, {"lr": 0.01, "weight_decay": 0.1}, COSINE),
    (Adagrad, {"lr_decay": 0.1}, {"lr": 0.05, "eps": 0.1}, STEPWISE),
    (NAdam, {"decoupled_weight_decay": True}, {"lr": 0.01, "weight_decay": 0.1}, COSINE),
    (NAdam, {}, {"eps": 0.1}, None),
    (RAdam, {"decoupled_weight_decay": True}, {"lr": 0.01, "weight_decay": 0.1}, COSINE),
    (RAdam, {"betas": (0.9, 0.95)}, {"eps": 0.1}, None),
    (Adadelta, {}, {"lr": 1.0, "eps": 1e-3}, None),
    (Adamax, {}, {"lr": 0.01, "eps": 0.1}, None),
]


def settings_as_meta_rows() -> list[Any]:
    """Each row with one value for all parameters, and with one for each where a setting can have that."""
    rows = []
    for i, (algorithm, settings, at, schedule) in enumerate(SETTINGS_AS_META):
        for several in dict.fromkeys([(), tuple(name for name in at if name in ("lr", "weight_decay"))]):
            name = f"{class_name(algorithm)}{i}-{'+'.join(at)}{'-each' if several else ''}"
            rows.append(pytest.param(algorithm, settings, at, schedule, several, id=name))
    return rows


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("algorithm", "settings", "at", "schedule", "several"), settings_as_meta_rows())
def test_settings_as_meta_parameters(
    algorithm: Algorithm,
    settings: dict[str, Any],
    at: dict[str, float],
    schedule: Schedule | None,
    several: tuple[str, ...],
) -> None:
    parameters, batches, weights = network_problem()
    loss = descending(settings)
    # φ: one number for each setting, or three for those that differ between the three parameters
    start = {name: torch.tensor([0.7, 1.0, 1.2][: 3 if name in several else 1]) * value for name, value in at.items()}
    sizes = [len(values) for values in start.values()]
    meta = torch.cat(list(start.values())).double()

    def inner(parameters: Sequence[Tensor], meta: Tensor, batch: Any) -> Tensor:
        return loss(parameters, weights, batch)

    def value_of(name: str, meta: Tensor) -> Any:
        values = dict(zip(start, meta.split(sizes), strict=True))[name]
        return list(values) if name in several else values[0]

    functions = {name: functools.partial(value_of, name) for name in start}
    optimizer = bilevel.optimizer(algorithm, schedule=schedule, **{**settings, **functions})
    problem = bilevel.GradientDescent(inner, outer_loss, parameters, optimizer)

    def h(meta: Tensor) -> float:
        def plain_optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
            groups = []
            for i, tensor in enumerate(tensors):
                values = {name: value_of(name, meta) for name in start}
                numbers = {k: (v[i] if isinstance(v, list) else v).item() for k, v in values.items()}
                groups.append({"params": [tensor], **settings, **numbers})
            return algorithm(groups)  # pyright: ignore[reportCallIssue]

        trained = trained_tensors(inner, parameters, meta, batches, plain_optimizer, schedule)
        return outer_loss(trained, meta, batches[0]).item()

    with default_dtype(torch.float64):
        reverse = bilevel.Reverse()(problem, meta, batches, batches[0])
        forward = bilevel.Forward()(problem, meta, batches, batches[0])
        torch.testing.assert_close(reverse.value.item(), h(meta), rtol=1e-12, atol=0)
        torch.testing.assert_close(reverse.grad, forward.grad, rtol=1e-10, atol=1e-13)
        # the settings are of different sizes, so the steps of the differences are relative
        expected = numerical_gradient(lambda relative: h(meta * relative), torch.ones_like(meta)) / meta
    torch.testing.assert_close(reverse.grad, expected, rtol=1e-5, atol=1e-7)
    assert reverse.grad.abs().max() > 1e-5, "too flat to tell anything"


def test_rate_of_each_element() -> None:
    theta, target = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([3.0, 5.0], dtype=torch.float64)
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: 0.5 * (theta - target).square().sum(),
        lambda theta, meta, batch: theta.sum(),
        theta,
        bilevel.optimizer(SGD, lr=lambda meta: meta),
    )
    rates = torch.tensor([0.1, 0.4], dtype=torch.float64)
    grad = bilevel.Reverse()(problem, rates, bilevel.no_batches(2)).grad
    # θ_2 = target + (1 − η)² (θ_0 − target)
    torch.testing.assert_close(grad, -2 * (1 - rates) * (theta - target), rtol=1e-12, atol=0)


REFUSED: list[tuple[Algorithm, dict[str, Any], str]] = [
    (NAdam, {}, "betas"),
    (NAdam, {}, "momentum_decay"),
    (ASGD, {}, "lr"),
    (ASGD, {}, "alpha"),
]


def as_meta(name: str) -> dict[str, Any]:
    """A setting that is φ itself."""
    return {name: lambda meta: meta}


def bound_to_a_problem(optimizer: Any) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        lambda theta, meta, batch: theta.sum(), lambda theta, meta, batch: theta.sum(), torch.ones(2), optimizer
    )


@pytest.mark.parametrize(("algorithm", "settings", "name"), REFUSED, ids=class_name)
def test_settings_whose_derivative_pytorch_drops_are_refused(
    algorithm: Algorithm, settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b|learning rate as a plain number") as caught:
        bound_to_a_problem(bilevel.optimizer(algorithm, **{**settings, name: lambda meta: meta}))
    assert f"torch.optim.{algorithm.__name__}" in str(caught.value)
    assert "lr and weight_decay can" in str(caught.value) or "no step uses it" in str(caught.value) or name == "lr"


@pytest.mark.parametrize(
    ("algorithm", "name"), [(SGD, "dampening"), (Adagrad, "initial_accumulator_value"), (ASGD, "t0")], ids=class_name
)
def test_settings_without_effect_are_refused(algorithm: Algorithm, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of .* no step uses it"):
        bound_to_a_problem(bilevel.optimizer(algorithm, **as_meta(name)))


@TEN
def test_every_setting_is_differentiable_or_refused_by_name(algorithm: Algorithm) -> None:
    """Those in neither table above are switches."""
    tested = {name for a, _, at, _ in SETTINGS_AS_META if a is algorithm for name in at}
    tested |= (
        {"lambd"} if algorithm is ASGD else {"betas"} if algorithm is not NAdam else set()
    )  # test_settings_of_meta_and_step.py
    refused = {name for a, _, name in REFUSED if a is algorithm}
    without_effect = {"initial_accumulator_value", "t0"}
    for name in set(inspect.signature(algorithm).parameters) - {"params"} - tested - refused - without_effect:
        with pytest.raises(ValueError, match=f"{name} of torch.optim.{algorithm.__name__} is a switch"):
            bound_to_a_problem(bilevel.optimizer(algorithm, **as_meta(name)))


@pytest.mark.parametrize("settings", [{}, {"maximize": True}], ids=["minimising", "maximising"])
@pytest.mark.parametrize("decay", [0.1, lambda meta: meta[1]], ids=["constant", "meta"])
def test_stationarity_vanishes_where_the_loop_comes_to_rest(settings: dict[str, Any], decay: Any) -> None:
    sign = -1 if settings else 1
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: sign * 0.5 * (theta - meta[0]).square().sum(),
        lambda theta, meta, batch: theta.sum(),
        torch.zeros(2, dtype=torch.float64),
        bilevel.optimizer(SGD, lr=0.5, weight_decay=decay, **settings),
    )
    meta = torch.tensor([3.0, 0.1], dtype=torch.float64)
    state = bilevel.Reverse()(problem, meta, bilevel.no_batches(100)).state  # the error halves at every step
    torch.testing.assert_close(state.params, meta[0].expand(2) / 1.1, rtol=1e-12, atol=0)
    torch.testing.assert_close(problem.stationarity(state, meta, None)[0], torch.zeros_like(state.params))


# -- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_setting_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"torch.optim.SGD has no setting 'mommentum'; it has: lr, momentum, damp"):
        bilevel.optimizer(SGD, mommentum=0.9)


@pytest.mark.parametrize("thing", [torch.nn.Linear, "Adam", SGD([torch.zeros(1)])], ids=["module", "name", "instance"])
def test_something_else_than_an_optimizer_class(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"the class itself and its settings are needed: bilevel.optimizer\(torch"):
        bilevel.optimizer(thing)


def test_optimizer_that_was_not_named_with_ours() -> None:
    with pytest.raises(TypeError, match=r"name the class and its settings: optimizer=bilevel.optimizer\(torch"):
        bound_to_a_problem(SGD)


@pytest.mark.parametrize("algorithm", [torch.optim.LBFGS, torch.optim.SparseAdam], ids=class_name)
def test_optimizers_without_a_derivative(algorithm: Algorithm) -> None:
    with pytest.raises(
        ValueError, match=f"torch.optim.{algorithm.__name__} has no differentiable=True.*take SGD, Adam"
    ):
        bound_to_a_problem(bilevel.optimizer(algorithm))


def test_rprop_moves_by_signs_alone() -> None:
    with pytest.raises(ValueError, match=r"torch.optim.Rprop moves by the signs.*its derivative is zero"):
        bound_to_a_problem(bilevel.optimizer(torch.optim.Rprop))


def test_squares_of_gradients_in_half_precision() -> None:
    with pytest.raises(ValueError, match=r"torch.optim.Adam keeps squares of gradients, which float16 rounds to zero"):
        bilevel.optimizer(Adam).init([torch.ones(2, dtype=torch.float16)])


def test_schedule_that_goes_by_the_loss() -> None:
    with pytest.raises(TypeError, match=r"ReduceLROnPlateau goes by the loss.*CosineAnnealingLR"):
        bilevel.optimizer(SGD, lr=0.1, schedule=ReduceLROnPlateau)


def test_schedule_that_makes_no_scheduler() -> None:
    with pytest.raises(TypeError, match=r"made 0.1; a function from an optimiser to a scheduler"):
        bilevel.optimizer(SGD, lr=0.1, schedule=lambda optimizer: 0.1)  # type: ignore[arg-type, return-value]


def test_schedule_that_turns_momentum_on_later_where_pytorch_has_no_buffer_for_it() -> None:
    class LateMomentum(StepLR):
        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            self.optimizer.param_groups[0]["momentum"] = 0.9 if self.last_epoch >= 2 else 0.0

    problem = bound_to_a_problem(bilevel.optimizer(RMSprop, lr=0.1, schedule=lambda o: LateMomentum(o, step_size=9)))
    with pytest.raises(ValueError, match=r"turns momentum on at step 2 \(to 0.9\)"):
        bilevel.ZerothOrder()(problem, torch.ones(1), bilevel.no_batches(4))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_wrong_number_of_values_for_a_setting(name: str) -> None:
    values: dict[str, Any] = {name: lambda meta: [meta[0], meta[1]]}
    problem = bound_to_a_problem(bilevel.optimizer(SGD, **values))
    with pytest.raises(ValueError, match=rf"{name} gave \[.*\] for 1 parameters"):
        bilevel.Reverse()(problem, torch.ones(2), bilevel.no_batches(1))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_vector_of_values_for_a_setting(name: str) -> None:
    problem = bound_to_a_problem(bilevel.optimizer(SGD, **as_meta(name)))
    with pytest.raises(ValueError, match=rf"{name} gave a tensor of shape \(3,\) for a parameter of shape \(2,\)"):
        bilevel.Reverse()(problem, torch.ones(3), bilevel.no_batches(1))


def test_rates_by_name_go_to_the_parameters_of_those_names() -> None:
    """A dict is matched by name: sorted by key, as trees are, its values would go to other parameters."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2).double()  # its parameters are weight, bias; sorted: bias, weight
    inputs = torch.randn(4, 3, dtype=torch.float64)
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: model(inputs).square().mean(),
        lambda model, meta, batch: model(inputs).sum(),
        module,
        bilevel.optimizer(SGD, lr=lambda meta: meta),
    )
    rates = {"weight": torch.tensor(0.0, dtype=torch.float64), "bias": torch.tensor(0.1, dtype=torch.float64)}
    moved = bilevel.Reverse()(problem, rates, bilevel.no_batches(1)).state.params.named_tensors
    assert torch.equal(moved["weight"], module.weight)
    assert not torch.equal(moved["bias"], module.bias)


def test_rates_that_match_no_parameters() -> None:
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: theta["a"] ** 2 + theta["b"] ** 2,
        lambda theta, meta, batch: theta["a"],
        {"a": torch.tensor(1.0), "b": torch.tensor(1.0)},
        bilevel.optimizer(SGD, lr=lambda meta: meta),
    )
    with pytest.raises(ValueError, match="a tree that matches them"):
        bilevel.Reverse()(problem, {"a": torch.tensor(0.1), "c": torch.tensor(0.1)}, bilevel.no_batches(1))
