"""Optimisers that PyTorch did not write: their updates and derivatives are those of their own steps, or an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import class_name, numerical_gradient, trained_tensors
from test_unreached_parameters import ESTIMATORS, HEADS, META, PARAMETERS, TOLERANCE, head_loss, outer_loss, warmup
from torch import Tensor

import bilevel
from bilevel.optim.differentiable_steps import DifferentiableStep

# -- classes as people write them --------------------------------------------------------------------------------------


class Decayed(torch.optim.SGD):
    """Weight decay after the step of the class it inherits from."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)


class Projected(torch.optim.Adam):
    """Projects onto a box through `.data`."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.data = p.data.clamp(-0.9, 0.9)


class Clipped(torch.optim.SGD):
    """Clips by PyTorch's function, in the step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.3)
        super().step(closure)


class ClippedByValue(torch.optim.SGD):
    """The same by value, and without the constructor's arguments by name."""

    def __init__(self, params: Any, bound: float = 0.05, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.bound = bound

    def step(self, closure: Any = None) -> None:
        torch.nn.utils.clip_grad_value_(self.param_groups[0]["params"], self.bound)
        super().step(closure)


class OwnAdam(torch.optim.Optimizer):
    """Adam as in many tutorials: in place, `.data`, a counter that is an int, everything under `no_grad`."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
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

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
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
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.grad is not None]
        grads, buffers = [p.grad for p in params], [self.state[p]["buffer"] for p in params]
        norms = torch._foreach_norm(grads)
        torch._foreach_div_(grads, torch._foreach_add(norms, 1.0))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])
        torch._foreach_lerp_(params, [self.state[p]["anchor"] for p in params], 0.1)


class GlobalNorm(torch.optim.SGD):
    """Divides by a norm over all parameters, with views, an `out=` and an assignment to entries."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
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
    names = list(at)
    point = torch.tensor(list(at.values()), dtype=torch.float64)
    weights = torch.ones(5, dtype=torch.float64)

    def h(values: Tensor) -> float:
        settings = {**constants, **dict(zip(names, values.tolist(), strict=True))}
        trained = trained_tensors(head_loss, PARAMETERS, weights, HEADS, lambda p: algorithm(p, **settings), schedule)
        return float(outer_loss(trained, weights, None))

    functions = {key: (lambda meta, i=i: meta[i]) for i, key in enumerate(names)}
    problem = bilevel.GradientDescent(
        lambda parameters, meta, head: head_loss(parameters, weights, head),
        outer_loss,
        PARAMETERS,
        bilevel.optimizer(algorithm, schedule=schedule, **constants, **functions),
    )
    gradient = numerical_gradient(h, point, offset=1e-5)
    assert (estimator(problem, point, list(HEADS)).grad - gradient).norm() <= 1e-7 * gradient.norm()
