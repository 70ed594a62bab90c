"""Custom autograd functions are right where their derivatives serve hypergradients, and refused by name elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.autodiff import custom_functions

DOUBLE = torch.float64
THETA, PHI = torch.tensor([1.0, -0.5], dtype=DOUBLE), torch.tensor([0.7, 0.4], dtype=DOUBLE)
ESTIMATORS = [
    bilevel.Reverse(),
    bilevel.Reverse("graph"),
    bilevel.Forward(),
    bilevel.Forward(chunk_size=1),
    bilevel.ForwardGradient(2, "coordinate", tangents="shared"),
]


class Cubed(torch.autograd.Function):
    """x³; the classes below change one of its parts."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class CubedInTheOldWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class CubedWithForwardMode(Cubed):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class KeepsAnIntermediateResult(torch.autograd.Function):
    """Its backward reads 3x² as a constant: right once, wrong twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.slope * grad


class ComputesInNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = ctx.saved_tensors[0].detach().numpy()
        return torch.from_numpy(3 * x**2 * grad.detach().numpy())


class WrongForwardMode(Cubed):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -3 * ctx.saved_tensors[0] ** 2 * tangent


class Once(CubedInTheOldWay):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class RoundedStraightThrough(torch.autograd.Function):
    """Rounds; its derivative is meant to be that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


class ClippedStraightThrough(torch.autograd.Function):
    """The sign; its derivative is meant to be that of a clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * (ctx.saved_tensors[0].abs() < 0.6)


def losses(operation: Callable[[Any], Any], first: int = 0) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """An inner loss that calls the operation from step `first` on, and an outer loss."""

    def inner(theta: Tensor, phi: Tensor, batch: int) -> Tensor:
        x = theta * phi
        return ((operation(x) if batch >= first else x) - phi).square().sum() + 0.1 * x.square().sum()

    return inner, lambda theta, phi, batch: theta.square().sum() + theta.prod()


def problem(operation: Callable[[Any], Any], first: int = 0) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(*losses(operation, first), THETA, bilevel.optimizer(torch.optim.SGD, lr=0.1))


def by_autograd(operation: Callable[[Any], Any], steps: int = 3) -> Tensor:
    """The hypergradient by PyTorch's own backward pass through a plain loop."""
    inner, outer = losses(operation)
    phi, theta = PHI.clone().requires_grad_(), THETA.clone().requires_grad_() * 1
    for t in range(steps):
        (gradient,) = torch.autograd.grad(inner(theta, phi, t), theta, create_graph=True)
        theta = theta - 0.1 * gradient
    return torch.autograd.grad(outer(theta, phi, None), phi)[0]


@pytest.fixture(autouse=True)
def nothing_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_functions, "_VERIFIED", set())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("function", [Cubed, CubedInTheOldWay, CubedWithForwardMode])
def test_a_function_with_right_derivatives_is_right(estimator: bilevel.Estimator, function: Any) -> None:
    found = estimator(problem(function.apply), PHI, range(3)).grad
    expected = by_autograd(lambda x: x**3)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert "forward" in vars(Cubed), "the class is as it was"


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("function", [RoundedStraightThrough, ClippedStraightThrough])
def test_a_straight_through_estimator_means_what_it_means_in_a_plain_loop(
    estimator: bilevel.Estimator, function: Any
) -> None:
    found = estimator(problem(function.apply), PHI, range(3)).grad
    torch.testing.assert_close(found, by_autograd(function.apply), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (KeepsAnIntermediateResult, r"'KeepsAnIntermediateResult' do not agree: .*the derivative of its backward is"),
        (ComputesInNumPy, r"'ComputesInNumPy' do not agree: its backward is linear"),
        (Once, "'Once' is marked @once_differentiable"),
    ],
)
def test_a_function_whose_backward_has_no_right_derivative_is_refused(
    estimator: bilevel.Estimator, function: Any, message: str
) -> None:
    for first in (0, 2):
        with pytest.raises(bilevel.errors.MissingDerivativeError, match=message):
            estimator(problem(function.apply, first), PHI, range(3))
    differences = bilevel.ForwardGradient(2, "coordinate", tangents="difference")
    found = differences(problem(function.apply), PHI, range(3)).grad
    torch.testing.assert_close(found, by_autograd(lambda x: x**3), rtol=1e-6, atol=1e-9)


def test_a_forward_mode_that_contradicts_the_backward_pass_is_refused() -> None:
    for estimator in ESTIMATORS:
        with pytest.raises(
            bilevel.errors.MissingDerivativeError, match=r"'WrongForwardMode' do not agree: .* its jvp gives"
        ):
            estimator(problem(WrongForwardMode.apply), PHI, range(3))


def test_a_function_inside_the_step_of_a_general_problem_is_refused() -> None:
    def step(theta: Tensor, phi: Tensor, batch: int) -> Tensor:
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        inner, _ = losses(KeepsAnIntermediateResult.apply)
        return theta - 0.1 * torch.autograd.grad(inner(theta, phi, batch), theta, create_graph=True)[0]

    general = bilevel.Problem(lambda phi: THETA, step, losses(torch.sin)[1])
    for estimator in (bilevel.Reverse(), bilevel.Reverse("graph"), bilevel.Forward()):
        with pytest.raises(bilevel.errors.MissingDerivativeError, match="'KeepsAnIntermediateResult' do not agree"):
            estimator(general, PHI, range(3))


def test_a_class_is_verified_once_and_draws_no_random_numbers() -> None:
    calls: list[int] = []

    class Counted(CubedInTheOldWay):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            calls.append(1)
            return CubedInTheOldWay.forward(ctx, x)

    def noisy(x: Tensor) -> Tensor:
        return Counted.apply(x + 0.1 * torch.randn_like(x))  # type: ignore[return-value]

    first = bilevel.Reverse()(problem(noisy), PHI, range(3)).grad
    once = len(calls)
    second = bilevel.Reverse()(problem(noisy), PHI, range(3)).grad
    assert len(calls) - once < once
    torch.testing.assert_close(first, second, rtol=0, atol=0)
