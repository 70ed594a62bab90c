"""Tangents are those of the plain PyTorch loop by every route, and constants are the same in every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from bilevel import autodiff

DOUBLE = torch.float64
WEIGHT_NORM: Any = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
THETA = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
PHI = torch.tensor([0.7, 1.2, 0.9], dtype=DOUBLE)
RATE, STEPS = 0.1, 3
ESTIMATORS: dict[str, bilevel.Estimator] = {
    "reverse": bilevel.Reverse(),
    "graph": bilevel.Reverse("graph"),
    "forward": bilevel.Forward(),
    "one by one": bilevel.Forward(chunk_size=1),
    "shared": bilevel.ForwardGradient(3, "coordinate", tangents="shared"),
}
Loss = Callable[[Any, Any, Any], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


INPUTS = normal(4, 3)


def outer(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    return theta.square().sum() + theta.prod()


def by_autograd(inner: Loss) -> Tensor:
    """PyTorch's backward pass through a plain loop, in which a stop-gradient is a constant."""
    phi, theta = PHI.clone().requires_grad_(), THETA.clone().requires_grad_() * 1
    for _ in range(STEPS):
        theta = theta - RATE * torch.autograd.grad(inner(theta, phi, None), theta, create_graph=True)[0]
    return torch.autograd.grad(outer(theta, phi, None), phi)[0]


def by_differences(inner: Loss) -> Tensor:
    """Five-point differences of a plain loop."""

    def h(phi: Tensor) -> float:
        theta = THETA.clone().requires_grad_()
        for _ in range(STEPS):
            (gradient,) = torch.autograd.grad(inner(theta, phi, None), theta)
            theta = (theta - RATE * gradient).detach().requires_grad_()
        return outer(theta, phi, None).item()

    step, grad = 1e-3, torch.zeros_like(PHI)
    for i, e in enumerate(torch.eye(len(PHI), dtype=DOUBLE)):
        near, far = (h(PHI + m * step * e) - h(PHI - m * step * e) for m in (1, 2))
        grad[i] = (8 * near - far) / (12 * step)
    return grad


def problem(inner: Loss) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(inner, outer, THETA, bilevel.optimizer(torch.optim.SGD, lr=RATE))


def general_problem(inner: Loss) -> bilevel.Problem:
    """The same with a step that the user wrote."""

    def step(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        return theta - RATE * torch.autograd.grad(inner(theta, phi, batch), theta, create_graph=True)[0]

    return bilevel.Problem(lambda phi: THETA, step, outer)


def assert_all_agree(inner: Loss, expected: Tensor, tolerance: float) -> None:
    assert expected.norm() > 1e-3
    batches = bilevel.no_batches(STEPS)
    for name, estimator in ESTIMATORS.items():
        found = estimator(problem(inner), PHI, batches).grad
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        found = estimator(general_problem(inner), PHI, batches).grad
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- constants ---------------------------------------------------------------------------------------------------------


def under_no_grad(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    with torch.no_grad():
        target = theta * phi
    return (2 * theta * phi - target).square().sum()


@torch.no_grad()
def target_of(theta: Tensor, phi: Tensor) -> Tensor:
    return theta * phi


def switched_off(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    with torch.set_grad_enabled(False):
        target = theta * phi
    return (2 * theta * phi - target).square().sum()


def in_inference_mode(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    with torch.inference_mode():
        target = theta * phi
    return (2 * theta * phi - target).square().sum()


CONSTANTS: dict[str, Loss] = {
    "detach": lambda t, w, b: (t * w - t.detach()).square().sum(),
    "data": lambda t, w, b: (t * w - t.data).square().sum(),
    "detach_": lambda t, w, b: (t * w - (1 * t).detach_()).square().sum(),
    "no_grad": under_no_grad,
    "no_grad as a decorator": lambda t, w, b: (2 * t * w - target_of(t, w)).square().sum(),
    "set_grad_enabled": switched_off,
    "inference_mode": in_inference_mode,
    "item": lambda t, w, b: (2 * t * w - (t * w).sum().item()).square().sum(),
    "tolist": lambda t, w, b: (2 * t * w - torch.tensor((t * w).tolist(), dtype=DOUBLE)).square().sum(),
    "numpy": lambda t, w, b: (2 * t * w - torch.from_numpy((t * w).detach().numpy())).square().sum(),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
def test_a_stop_gradient_is_a_constant_to_every_method(name: str) -> None:
    assert_all_agree(CONSTANTS[name], by_autograd(CONSTANTS[name]), 1e-12)


def test_a_tensor_of_inference_mode_that_is_multiplied_is_refused() -> None:
    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        with torch.inference_mode():
            scale = theta * phi
        return (scale * theta * phi).sum()

    for estimator in ESTIMATORS.values():
        with pytest.raises(bilevel.errors.MissingDerivativeError, match=r"torch.inference_mode.*write torch.no_grad"):
            estimator(problem(inner), PHI, bilevel.no_batches(STEPS))


# -- gradients inside of a loss ----------------------------------------------------------------------------------------


def penalty(layer: Callable[[Tensor], Tensor]) -> Loss:
    """A loss with the gradient of a small network by its inputs in it."""

    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        x = INPUTS.clone().requires_grad_()
        u = layer(torch.tanh(x * theta * phi)).tanh() @ torch.arange(1.0, 4.0, dtype=DOUBLE)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return 0.1 * slope.square().sum() + 0.1 * u.sum()

    return inner


def by_its_parameters(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    (slope,) = torch.autograd.grad((theta.tanh() * phi).sum(), theta, create_graph=True)
    return (slope.square() * phi).sum() + (theta - phi).square().sum()


def through_functorch(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    slope = torch.func.grad(lambda theta: (theta.tanh() * phi).sum())(theta)
    return (slope.square() * phi).sum() + (theta - phi).square().sum()


def jacobian(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
    found: Any = torch.autograd.functional.jacobian(lambda theta: theta.tanh() * phi, theta, create_graph=True)
    return found.square().sum() + (theta - phi).square().sum()


GRADIENTS: dict[str, Loss] = {
    "by inputs": penalty(lambda h: h),
    "by parameters": by_its_parameters,
    "torch.func.grad": through_functorch,
    "torch.autograd.functional.jacobian": jacobian,
    "layer norm": penalty(lambda h: functional.layer_norm(h, (3,))),
    "LayerNorm": penalty(nn.LayerNorm(3, dtype=DOUBLE).requires_grad_(False)),
    "group norm": penalty(lambda h: functional.group_norm(h.T[None], 1)[0].T),
    "instance norm": penalty(lambda h: functional.instance_norm(h.T[None])[0].T),
    "batch norm": penalty(lambda h: functional.batch_norm(h, None, None, training=True)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_inside_of_a_loss(name: str) -> None:
    assert_all_agree(GRADIENTS[name], by_differences(GRADIENTS[name]), 1e-8)


def test_a_gradient_without_a_graph_is_a_constant() -> None:
    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        (slope,) = torch.autograd.grad((theta.tanh() * phi).sum(), theta, retain_graph=True)
        return (slope * theta * phi).sum() + (theta - phi).square().sum()

    assert_all_agree(inner, by_autograd(inner), 1e-12)


def test_a_gradient_by_an_input_of_every_step_is_refused_in_one_graph_of_all_steps() -> None:
    x = INPUTS.clone().requires_grad_()

    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        u = torch.tanh(x * theta) * phi
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope.square().mean() + u.sum()

    expected = by_differences(inner)
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        found = estimator(problem(inner), PHI, bilevel.no_batches(STEPS)).grad
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(bilevel.errors.MissingDerivativeError, match=r"take Reverse\(\)"):
        bilevel.Reverse("graph")(problem(inner), PHI, bilevel.no_batches(STEPS))


# -- operations that forward mode has not, or has wrong ----------------------------------------------------------------

PLACES = torch.tensor([0, 0, 1])
MATRIX = torch.tril(normal(3, 3)) + 3 * torch.eye(3, dtype=DOUBLE)


def sampled(x: Tensor) -> Tensor:
    image = torch.arange(9, dtype=DOUBLE).reshape(1, 1, 3, 3)
    return functional.grid_sample(image, 0.1 * x[:2].reshape(1, 1, 1, 2), align_corners=False).sum()


def old_solve(t: Tensor, w: Tensor, _: Any) -> Tensor:
    return torch.triangular_solve((t * w)[:, None], MATRIX + 0.1 * torch.diag(t * w), upper=False)[0].square().sum()


OPERATIONS: dict[str, tuple[Loss, bool]] = {
    "scatter_reduce": (
        lambda t, w, b: 0.1 * torch.ones(2, dtype=DOUBLE).scatter_reduce(0, PLACES, t * w + 1, "prod").square().sum(),
        True,
    ),
    "scatter_reduce by sums": (
        lambda t, w, b: 0.1 * torch.ones(2, dtype=DOUBLE).scatter_reduce(0, PLACES, t * w + 1, "sum").square().sum(),
        False,
    ),
    "triangular_solve": (old_solve, True),
    "weight_norm": (
        lambda t, w, b: WEIGHT_NORM((t * w).expand(2, 3) * INPUTS[:2], w[:2, None]).tanh().sum(),
        False,
    ),
    "huber_loss": (lambda t, w, b: functional.huber_loss(t * w, w), False),
    "grid_sample": (lambda t, w, b: 0.1 * sampled(2 * t * w) + 0.1 * (t * w).square().sum(), True),
}


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated", "ignore:scatter_reduce")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    inner, by_products = OPERATIONS[name]
    assert_all_agree(inner, by_differences(inner), 1e-8)
    found = bilevel.Forward()(problem(inner), PHI, bilevel.no_batches(STEPS))
    units = {"hessian_product_steps": STEPS, "hessian_product_steps_units": STEPS * 7.0} if by_products else {}
    assert found.diagnostics == units


def test_an_outer_loss_and_an_initial_state_without_forward_mode() -> None:
    subject = bilevel.Problem(
        init=lambda phi: phi * sampled(phi),
        step=lambda theta, phi, batch: theta - 0.1 * (theta - phi),
        outer_loss=lambda theta, phi, batch: sampled(theta) + theta.square().sum() * phi[0],
    )
    expected = bilevel.Reverse()(subject, PHI, bilevel.no_batches(2)).grad
    found = bilevel.Forward()(subject, PHI, bilevel.no_batches(2))
    torch.testing.assert_close(found.grad, expected, rtol=1e-12, atol=1e-12)
    assert found.diagnostics["double_reverse_passes"] == 1


def test_what_forward_mode_lacks_is_found_out_once() -> None:
    calls: list[bool] = []

    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        calls.append(torch._C._are_functorch_transforms_active())
        return OPERATIONS["grid_sample"][0](theta, phi, batch)

    subject = problem(inner)
    bilevel.Forward()(subject, PHI, bilevel.no_batches(STEPS))
    assert calls.count(True) == 1
    calls.clear()
    bilevel.ForwardGradient(2)(subject, PHI, bilevel.no_batches(STEPS))
    assert calls == [False] * STEPS


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_a_packed_sequence(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"cells": getattr(nn, kind)(2, 3, batch_first=True), "out": nn.Linear(3, 1)}).double()
    x, y, lengths = normal(3, 4, 2), normal(3, 1), torch.tensor([4, 2, 3])

    def output(net: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden = net["cells"](packed)[1]
        return net["out"]((hidden[0] if kind == "LSTM" else hidden)[-1])

    def inner(net: Any, phi: Tensor, batch: Any) -> Tensor:
        return (phi[:, None] * (output(net, x) - y).square()).mean()

    subject = bilevel.GradientDescent(
        inner,
        lambda net, phi, batch: (output(net, -x) - y).square().mean(),
        net,
        bilevel.optimizer(torch.optim.SGD, lr=0.2),
    )
    differences = bilevel.ZerothOrder(3, 1e-4, distribution="coordinate")(subject, PHI, bilevel.no_batches(2)).grad
    for estimator in ESTIMATORS.values():
        found = estimator(subject, PHI, bilevel.no_batches(2)).grad
        torch.testing.assert_close(found, differences, rtol=1e-5, atol=1e-10)


def test_attention_under_autocast() -> None:
    """The numbers are those of the reverse pass; half precision has few digits."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True), "out": nn.Linear(4, 1)})
    x, y, phi = torch.randn(3, 4, 4), torch.randn(3, 1), PHI.float()

    def inner(net: Any, phi: Tensor, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = net["out"](net["attention"](x, x, x, need_weights=False)[0].mean(1)).float()
        return (phi[:, None] * (found - y).square()).mean()

    def judged(net: Any, phi: Tensor, batch: Any) -> Tensor:
        return inner(net, torch.ones_like(phi), batch)

    subject = bilevel.GradientDescent(inner, judged, net, bilevel.optimizer(torch.optim.SGD, lr=0.2))
    expected = bilevel.Reverse()(subject, phi, bilevel.no_batches(2)).grad
    found = bilevel.Forward()(subject, phi, bilevel.no_batches(2))
    torch.testing.assert_close(found.grad, expected, rtol=0.05, atol=0.02 * float(expected.norm()))


# -- complex parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.05}),
        (torch.optim.AdamW, {"lr": 0.05}),
        (torch.optim.RMSprop, {"lr": 0.05}),
        (torch.optim.Adagrad, {"lr": 0.05}),
        (torch.optim.Adamax, {"lr": 0.05}),
        (torch.optim.NAdam, {"lr": 0.05}),
    ],
)
def test_complex_parameters(algorithm: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    start = {"c": torch.complex(normal(3), normal(3, seed=1)), "r": normal(2, seed=2)}
    x, y = torch.complex(normal(4, 3, seed=3), normal(4, 3, seed=4)), normal(4, seed=5)
    phi = torch.linspace(0.5, 1.5, 3, dtype=DOUBLE)

    def inner(theta: Any, phi: Tensor, batch: Any) -> Tensor:
        errors = ((x @ theta["c"]).abs().square() - y).square()
        return 0.1 * (errors[:3] * phi).mean() + phi[0] * theta["r"].square().sum()

    def judged(theta: Any, phi: Tensor, batch: Any) -> Tensor:
        return ((x @ theta["c"]).real - y).square().mean() + theta["r"].sum()

    def h(phi: Tensor) -> float:
        theta = {name: t.clone().requires_grad_() for name, t in start.items()}
        optimizer = algorithm(list(theta.values()), **settings)
        for _ in range(STEPS):
            optimizer.zero_grad()
            inner(theta, phi, None).backward()
            optimizer.step()
        return judged(theta, phi, None).item()

    step, expected = 1e-3, torch.zeros_like(phi)
    for i, e in enumerate(torch.eye(3, dtype=DOUBLE)):
        near, far = (h(phi + m * step * e) - h(phi - m * step * e) for m in (1, 2))
        expected[i] = (8 * near - far) / (12 * step)
    subject = bilevel.GradientDescent(inner, judged, copy.copy(start), bilevel.optimizer(algorithm, **settings))
    differences = bilevel.ForwardGradient(3, "coordinate", tangents="difference")
    for estimator in (*ESTIMATORS.values(), differences):
        found = estimator(subject, phi, bilevel.no_batches(STEPS))
        torch.testing.assert_close(found.grad, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.value.item(), h(phi), rtol=1e-8, atol=0)  # NAdam counts in float32


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_two_backward_passes_give_what_forward_mode_gives() -> None:
    a = normal(3, 3)

    def function(x: Tensor, y: Tensor) -> Any:
        return {"product": (a @ x).tanh() * y.sum(), "constant": a[0], "number": 3, "angle": torch.complex(x, y)}

    arguments, tangents = [THETA, PHI], [[normal(4, 3, seed=1)], [normal(4, 3, seed=2)]]
    forward = autodiff.push_forward(function, arguments, tangents)
    reverse = autodiff.push_by_double_reverse(function, arguments, tangents)
    torch.testing.assert_close(reverse.tangents, forward.tangents, rtol=1e-12, atol=1e-14)
    assert reverse.value["number"] == 3
    torch.testing.assert_close(reverse.value["product"], forward.value["product"])


def test_a_run_that_is_repeated_draws_the_same_random_numbers() -> None:
    """The rules change at the first gradient inside of the loss; the noise before it must not."""

    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        noise = torch.randn(3, dtype=DOUBLE)
        return GRADIENTS["layer norm"](theta, phi + 0.1 * noise, batch)

    subject = problem(inner)
    first = bilevel.Reverse()(subject, PHI, bilevel.no_batches(STEPS))
    assert autodiff.memory_of(subject).composite_normalisations
    second = bilevel.Reverse()(subject, PHI, bilevel.no_batches(STEPS))
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-12, atol=1e-14)


def test_a_fault_of_the_user_stays_what_it_is() -> None:
    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        return (theta * phi[:2]).sum()

    for estimator in (bilevel.Forward(), bilevel.Forward(chunk_size=1)):
        with pytest.raises(RuntimeError, match="size of tensor a"):
            estimator(problem(inner), PHI, bilevel.no_batches(STEPS))


def test_nothing_of_pytorch_or_the_user_is_changed() -> None:
    def replaceable() -> list[Any]:
        return [vars(functional)["layer_norm"], vars(functional)["mse_loss"], vars(torch)["_weight_norm"]]

    before = replaceable()
    bilevel.Forward()(problem(GRADIENTS["layer norm"]), PHI, bilevel.no_batches(STEPS))
    assert replaceable() == before
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.is_grad_enabled()
    assert torch._C._is_fwd_grad_enabled()


def test_a_gradient_has_a_graph_only_if_it_depends_on_a_recording_tensor() -> None:
    """A state that was not recorded must not look as if it depended on φ."""
    phi = PHI.clone().requires_grad_()
    losses: list[Callable[[Any], Tensor]] = [
        lambda x: (x[0] ** 2 * phi).sum() + x[1].square().sum(),
        lambda x: x[0].sum(),
    ]
    found = autodiff.gradient(losses[0], [THETA, THETA], differentiable=True)
    assert found is not None
    first, second = found
    assert first is not None
    assert second is not None
    assert first.requires_grad
    assert not second.requires_grad
    torch.testing.assert_close(torch.autograd.grad(first.sum(), phi)[0], 2 * THETA)
    found = autodiff.gradient(losses[1], [THETA], differentiable=True)
    assert found is not None
    (constant,) = found
    assert constant is not None
    assert not constant.requires_grad


def test_a_compiled_loss_without_forward_mode_takes_hessian_products() -> None:
    inner, _ = OPERATIONS["grid_sample"]
    optimizer = bilevel.optimizer(torch.optim.SGD, lr=RATE)
    subject = bilevel.GradientDescent(inner, outer, THETA, optimizer, compile="aot_eager")
    found = bilevel.Forward()(subject, PHI, bilevel.no_batches(STEPS))
    torch.testing.assert_close(found.grad, by_differences(inner), rtol=1e-8, atol=1e-8)
    assert found.diagnostics["hessian_product_steps"] == STEPS


def test_a_model_wrapped_by_torch_compile_runs_as_it_is_while_it_is_differentiated() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    wrapped = torch.compile(copy.deepcopy(plain), backend="aot_eager")

    def subject(net: Any) -> bilevel.GradientDescent:
        return bilevel.GradientDescent(
            lambda net, phi, batch: (phi * net(INPUTS[:3])[:, 0].square()).mean(),
            lambda net, phi, batch: net(-INPUTS).mean(),
            net,
            bilevel.optimizer(torch.optim.SGD, lr=RATE),
        )

    expected = bilevel.Reverse()(subject(plain), PHI, bilevel.no_batches(STEPS)).grad
    for estimator in ESTIMATORS.values():
        found = estimator(subject(wrapped), PHI, bilevel.no_batches(STEPS)).grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_hook_on_a_tensor_inside_of_a_loss_may_look_and_not_change() -> None:
    seen: list[Tensor] = []

    def hooked(hook: Callable[[Tensor], Any]) -> Loss:
        def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
            h = theta * phi
            if h.requires_grad:
                h.register_hook(hook)
            return (h**3).sum() + (theta - phi).square().sum()

        return inner

    plain: Loss = lambda theta, phi, batch: ((theta * phi) ** 3).sum() + (theta - phi).square().sum()  # noqa: E731
    for estimator in ESTIMATORS.values():
        found = estimator(problem(hooked(lambda g: seen.append(g.detach()))), PHI, bilevel.no_batches(STEPS)).grad
        torch.testing.assert_close(found, by_differences(plain), rtol=1e-7, atol=1e-8)
        with pytest.raises(
            bilevel.errors.MissingDerivativeError, match="registered on a tensor inside a loss, changes"
        ):
            estimator(problem(hooked(lambda g: 0.5 * g)), PHI, bilevel.no_batches(STEPS))
    assert seen


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_a_transposed_input_has_the_same_dropout_in_forward_mode() -> None:
    x = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64).reshape(5, 4, 3)

    def inner(theta: Tensor, meta: Tensor, batch: object) -> Tensor:
        return (meta * functional.dropout((x * theta).transpose(0, 2), 0.4)).square().mean()

    problem = bilevel.GradientDescent(
        inner,
        lambda theta, meta, batch: theta.sum(),
        torch.ones(3, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=0.3),
    )
    meta = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    reverse, forward = (e(problem, meta, 3) for e in (bilevel.Reverse(), bilevel.Forward()))
    torch.testing.assert_close(forward.value, reverse.value, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(forward.grad, reverse.grad, rtol=1e-10, atol=1e-14)
