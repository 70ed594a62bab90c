"""Optimisers that PyTorch did not write: their updates and derivatives are those of their own steps, or an error."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from plain_training import class_name, numerical_gradient, trained_tensors
from test_unreached_parameters import (
    ESTIMATORS,
    HEADS,
    META,
    PARAMETERS,
    TOLERANCE,
    head_loss,
    outer_loss,
    settings_as_meta,
    warmup,
)
from torch import Tensor

import bilevel
from bilevel.optim.differentiable_steps import DifferentiableStep

foreach: Any = torch

# -- classes as people write them --------------------------------------------------------------------------------------


class Decayed(torch.optim.SGD):
    """Weight decay after the step of the class it inherits from."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)


class Projected(torch.optim.Adam):
    """Projects onto a box through `.data`."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.data = p.data.clamp(-0.9, 0.9)


class Clipped(torch.optim.SGD):
    """Clips by PyTorch's function, in the step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.3)
        super().step(closure)


class ClippedByValue(torch.optim.SGD):
    """The same by value, and without the constructor's arguments by name."""

    def __init__(self, params: Any, bound: float = 0.05, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.bound = bound

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_value_(self.param_groups[0]["params"], self.bound)
        super().step(closure)


class OwnAdam(torch.optim.Optimizer):
    """Adam as in many tutorials: in place, `.data`, a counter that is an int, everything under `no_grad`."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.data, self.state[p]
                if len(state) == 0:
                    state["step"], state["m"], state["v"] = 0, torch.zeros_like(p.data), torch.zeros_like(p.data)
                state["step"] += 1
                state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
                state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = state["v"].sqrt().add_(group["eps"])
                size = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                p.data.addcdiv_(state["m"], denominator, value=-size)


class Lion(torch.optim.Optimizer):
    """Signs made soft, with a buffer that is a detached copy."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> Any:  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    buffer = state.get("buffer", None)
                    if buffer is None:
                        buffer = state["buffer"] = p.grad.clone().detach()
                    buffer.lerp_(p.grad.detach(), 1 - group["beta"])
                    with torch.no_grad():
                        p -= group["lr"] * (torch.tanh(3 * buffer) + group["weight_decay"] * p)


class ForeachMomentum(torch.optim.Optimizer):
    """Lists of tensors at once, with a buffer that the constructor makes."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for p in self.param_groups[0]["params"]:
            self.state[p]["buffer"] = torch.zeros_like(p)
            self.state[p]["anchor"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.grad is not None]
        grads, buffers = [p.grad for p in params], [self.state[p]["buffer"] for p in params]
        norms = foreach._foreach_norm(grads)
        foreach._foreach_div_(grads, foreach._foreach_add(norms, 1.0))
        foreach._foreach_mul_(buffers, group["momentum"])
        foreach._foreach_add_(buffers, grads)
        foreach._foreach_add_(params, buffers, alpha=-group["lr"])
        foreach._foreach_lerp_(params, [self.state[p]["anchor"] for p in params], 0.1)


class GlobalNorm(torch.optim.SGD):
    """Divides by a norm over all parameters, with views, an `out=` and an assignment to entries."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        total = torch.cat([p.grad.view(-1) for p in params]).norm()
        for p in params:
            torch.div(p.grad, total + 0.1, out=p.grad)
            p.grad.view(-1)[0] *= 0.5
            p.grad[..., -1] = p.grad[..., -1].sin()
            p.grad.abs_().add_(0.1).sqrt_().add_(0.2)
        super().step(closure)


OWN: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (Decayed, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (Decayed, {"lr": 0.1, "foreach": True}),
    (Projected, {"lr": 0.1, "amsgrad": True}),
    (Projected, {"lr": 0.1, "weight_decay": 0.1, "fused": True}),
    (Clipped, {"lr": 0.1}),
    (ClippedByValue, {"lr": 0.2, "bound": 0.1}),
    (OwnAdam, {"lr": 0.1}),
    (Lion, {"lr": 0.1, "weight_decay": 0.1}),
    (ForeachMomentum, {"lr": 0.1}),
    (GlobalNorm, {"lr": 0.05, "momentum": 0.5}),
    (torch.optim.Adafactor, {"lr": 0.1}),
]


@functools.cache
def truth(algorithm: type[torch.optim.Optimizer], settings: tuple[tuple[str, Any], ...]) -> tuple[list[Tensor], Tensor]:
    """The final parameters of the ordinary loop, and differences of its outer loss."""

    def trained(meta: Tensor) -> list[Tensor]:
        return trained_tensors(head_loss, PARAMETERS, meta, HEADS, lambda p: algorithm(p, **dict(settings)), warmup)

    return trained(META), numerical_gradient(lambda meta: float(outer_loss(trained(meta), meta, None)), META, 1e-4)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("algorithm", "settings"), OWN, ids=class_name)
def test_hypergradient_is_that_of_the_plain_loop(
    algorithm: type[torch.optim.Optimizer], settings: dict[str, Any], name: str
) -> None:
    parameters, gradient = truth(algorithm, tuple(settings.items()))
    problem = bilevel.GradientDescent(
        head_loss, outer_loss, PARAMETERS, bilevel.optimizer(algorithm, schedule=warmup, **settings)
    )
    estimate = ESTIMATORS[name](problem, META, list(HEADS))
    for ours, theirs in zip(estimate.state.params, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (estimate.grad - gradient).norm() <= TOLERANCE.get(name, 1e-7) * gradient.norm()


# -- their settings as meta parameters ---------------------------------------------------------------------------------

OWN_META: list[tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, float]]] = [
    (Decayed, {"momentum": 0.9}, {"lr": 0.1, "weight_decay": 0.1}),
    (Decayed, {"dampening": 0.5}, {"momentum": 0.8}),
    (Projected, {}, {"lr": 0.1, "weight_decay": 0.1, "eps": 0.1}),
    (OwnAdam, {"lr": 0.1}, {"eps": 0.1}),
    (OwnAdam, {}, {"lr": 0.1}),
    (Lion, {}, {"lr": 0.1, "beta": 0.8, "weight_decay": 0.1}),
    (ForeachMomentum, {}, {"lr": 0.1, "momentum": 0.8}),
]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("schedule", [None, warmup])
@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("algorithm", "constants", "at"), OWN_META, ids=class_name)
def test_settings_as_meta_parameters(
    algorithm: type[torch.optim.Optimizer],
    constants: dict[str, Any],
    at: dict[str, float],
    estimator: bilevel.Estimator,
    schedule: Any,
) -> None:
    problem, h, point = settings_as_meta(algorithm, constants, at, schedule)
    gradient = numerical_gradient(h, point, offset=1e-5)
    assert (estimator(problem, point, list(HEADS)).grad - gradient).norm() <= 1e-7 * gradient.norm()


# -- refusals ----------------------------------------------------------------------------------------------------------


class Remembering(torch.optim.SGD):
    """Counts its steps in the optimiser, of which an inner loop makes a new one for every step."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        super().step(closure)


class ByFloat(torch.optim.SGD):
    """Scales the gradient by a number that was taken out of PyTorch."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.grad.mul_(1 / (1 + float(p.grad.detach().norm())))
        super().step(closure)


class ByNumPy(torch.optim.SGD):
    """The same through an array."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.grad.mul_(1 / (1 + float(abs(p.grad.detach().numpy()).max())))
        super().step(closure)


class Closure(torch.optim.SGD):
    """Evaluates the loss again."""

    def step(self, closure: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        closure()
        super().step()


def problem_with(optimizer: Any) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(head_loss, outer_loss, PARAMETERS, optimizer)


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward(), bilevel.ZerothOrder()])
def test_memory_outside_of_the_state_is_refused(estimator: bilevel.Estimator) -> None:
    with pytest.raises(ValueError, match=r"Remembering computes other updates .* Keep what it remembers in self.state"):
        estimator(problem_with(bilevel.optimizer(Remembering, lr=0.1)), META, list(HEADS))


@pytest.mark.parametrize("name", ["Reverse", "Reverse(graph)", "Forward", "exact", "shared", "difference"])
@pytest.mark.parametrize("algorithm", [ByFloat, ByNumPy], ids=class_name)
def test_numbers_taken_out_of_pytorch_are_refused(algorithm: type[torch.optim.Optimizer], name: str) -> None:
    message = rf"the step of {algorithm.__name__} (has another derivative than|cannot be differentiated).*NumPy"
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name](problem_with(bilevel.optimizer(algorithm, lr=0.1)), META, list(HEADS))


def test_differences_of_whole_solves_need_no_derivative_of_the_step() -> None:
    def trained(meta: Tensor) -> list[Tensor]:
        return trained_tensors(head_loss, PARAMETERS, meta, HEADS, lambda p: ByFloat(p, lr=0.1))

    expected = numerical_gradient(lambda meta: float(outer_loss(trained(meta), meta, None)), META, 1e-4)
    found = ESTIMATORS["ZerothOrder"](problem_with(bilevel.optimizer(ByFloat, lr=0.1)), META, list(HEADS)).grad
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_step_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Closure.step needs a closure"):
        problem_with(bilevel.optimizer(Closure, lr=0.1))


def test_rates_of_single_parameters_are_refused() -> None:
    rates = [torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.1), torch.tensor(0.1)]
    with pytest.raises(ValueError, match=r"lr differs between parameters, and the step of Decayed is run for all"):
        bilevel.ZerothOrder()(problem_with(bilevel.optimizer(Decayed, lr=lambda meta: rates)), META, list(HEADS))


def test_unknown_settings_of_a_class_with_keyword_arguments() -> None:
    with pytest.raises(ValueError, match=r"ClippedByValue has no setting 'bond'; it has: .*momentum.*bound"):
        bilevel.optimizer(ClippedByValue, lr=0.1, bond=0.1)


# -- ways of naming an optimiser --------------------------------------------------------------------------------------


def test_partial_classes_are_classes_with_settings() -> None:
    made = bilevel.optimizer(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5), momentum=0.9)
    assert made == bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(TypeError, match="positional arguments"):
        bilevel.optimizer(functools.partial(torch.optim.SGD, [torch.zeros(1)]))


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"fused": True}, {"differentiable": False}, {"differentiable": True}]
)
@pytest.mark.parametrize("algorithm", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad], ids=class_name)
def test_settings_of_speed_change_nothing(algorithm: type[torch.optim.Optimizer], flags: dict[str, Any]) -> None:
    plain, flagged = (
        bilevel.Reverse()(problem_with(bilevel.optimizer(algorithm, lr=0.1, **more)), META, list(HEADS)).grad
        for more in ({}, flags)
    )
    assert torch.equal(plain, flagged)


def test_rates_for_single_parameters_without_a_function() -> None:
    by_list, by_function = (
        bilevel.Reverse()(problem_with(bilevel.optimizer(torch.optim.SGD, lr=lr)), META, list(HEADS)).grad
        for lr in ([0.1, 0.2, 0.3, 0.0], lambda meta: [0.1, 0.2, 0.3, 0.0])
    )
    assert torch.equal(by_list, by_function)


@pytest.mark.parametrize("operation", ["sqrt_", "exp_", "tanh_", "sigmoid_", "abs_", "reciprocal_"])
def test_operations_in_place_have_derivatives_though_the_result_is_written_over(operation: str) -> None:
    point = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        y = x.clone()
        with DifferentiableStep(), torch.no_grad():
            getattr(y, operation)().add_(1.0).mul_(y).add_(x.data * y.detach())
        return y

    assert torch.autograd.gradcheck(function, point, check_forward_ad=True)
