"""Estimates are the same under torch's global settings, and leave those settings as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel

D = torch.float64
X = torch.linspace(-1, 1, 24, dtype=D, device="cpu").reshape(8, 3).sin()
Y = torch.linspace(1, 2, 8, dtype=D, device="cpu").cos()
T = 4

ESTIMATORS = {
    "reverse": bilevel.Reverse(),
    "offloaded": bilevel.Reverse("sqrt", offload="disk"),
    "graph": bilevel.Reverse("graph"),
    "truncated": bilevel.TruncatedReverse(2),
    "forward": bilevel.Forward(),
    "forward-chunked": bilevel.Forward(chunk_size=2),
    "forward-gradient": bilevel.ForwardGradient(3, chunk_size=2, control_variate=bilevel.TruncatedReverse(2)),
    "shared": bilevel.ForwardGradient(2, tangents="shared"),
    "difference": bilevel.ForwardGradient(2, tangents="difference"),
    "reached": bilevel.ForwardGradient(2, support="reached"),
    "zeroth-order": bilevel.ZerothOrder(2, 1e-3),
    "implicit": bilevel.Implicit(bilevel.Nystrom(rank=3, damping=1.0)),
    "hessian-free": bilevel.HessianFree(preconditioner="optimizer"),
}


def inner(model: Any, meta: Any, batch: Any) -> Tensor:
    fit = (meta["weights"] * (model(X).squeeze(1) - Y) ** 2).mean()
    return fit + meta["decay"].exp() * sum(p.square().sum() for p in model.parameters())


def outer(model: Any, meta: Any, batch: Any) -> Tensor:
    return ((model(X).squeeze(1) - Y) ** 2).mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4, dtype=D, device="cpu"), nn.Tanh(), nn.Linear(4, 1, dtype=D, device="cpu")
    return nn.Sequential(*layers)


OPTIMIZERS: dict[str, Any] = {
    "learned rate": lambda: bilevel.optimizer(torch.optim.SGD, lr=lambda meta: 2 * meta["decay"].exp(), momentum=0.9),
    "adam": lambda: bilevel.optimizer(torch.optim.Adam, lr=0.01),
}


def meta() -> dict[str, Tensor]:
    """Leaves of two dtypes."""
    return {
        "weights": torch.linspace(0.5, 1.5, 8, dtype=D, device="cpu"),
        "decay": torch.tensor(-3.0, dtype=torch.float32, device="cpu"),
    }


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Any] = {
    "default device meta": default_device,
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(D),
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),  # which leaves float64 alone
    "deterministic": deterministic,
}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:Implicit")
def test_estimates_do_not_depend_on_global_settings(name: str, optimizer: str, setting: str) -> None:
    def estimate() -> bilevel.Estimate:
        problem = bilevel.GradientDescent(inner, outer, network(), OPTIMIZERS[optimizer]())
        return ESTIMATORS[name](problem, meta(), [None] * T)

    expected = estimate()
    with SETTINGS[setting]():
        modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
        found = estimate()
        assert modes == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device())
    assert torch.equal(found.value, expected.value)
    for key, leaf in meta().items():
        assert found.grad[key].dtype == leaf.dtype
        assert found.grad[key].device == leaf.device
        assert torch.allclose(found.grad[key], expected.grad[key], rtol=1e-6, atol=1e-12)
    assert float(expected.grad["weights"].norm()) > 0


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("enabled", [True, False])
def test_an_estimate_that_raises_leaves_the_settings_as_they_were(name: str, enabled: bool) -> None:
    def failing(model: Any, meta: Any, batch: Any) -> Tensor:
        if batch == T - 1:
            raise KeyError("the user's own error")
        return inner(model, meta, batch)

    problem = bilevel.GradientDescent(failing, outer, network(), OPTIMIZERS["adam"]())
    random_state, math = torch.get_rng_state(), torch.backends.cuda.flash_sdp_enabled()
    with torch.set_grad_enabled(enabled):
        with pytest.raises(KeyError, match="own error"):
            ESTIMATORS[name](problem, meta(), list(range(T)))
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.cuda.flash_sdp_enabled() == math
    assert torch._C._is_fwd_grad_enabled()


def test_inference_mode_is_refused() -> None:
    problem = bilevel.GradientDescent(inner, outer, network(), OPTIMIZERS["adam"]())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        bilevel.Reverse()(problem, meta(), [None] * T)


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32, D])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_forward_keeps_the_digits_and_the_range_of_every_leaf(first: torch.dtype, chunk_size: int | None) -> None:
    """H = Σ φ_a (0.9 + 10⁵ Σ φ_b) after one step θ = φ: leaves of two dtypes, slopes beyond the range of float16."""
    problem = bilevel.Problem(
        init=lambda phi: torch.zeros(2, dtype=D),
        step=lambda theta, phi, batch: torch.stack([phi["a"].double().sum(), phi["b"].sum()]),
        outer_loss=lambda theta, phi, batch: theta[0] * (0.9 + 1e5 * theta[1]),
    )
    phi = {"a": torch.tensor([0.5, 0.25], dtype=first), "b": torch.tensor([1.0 / 3, 0.125], dtype=D)}
    grad = bilevel.Forward(chunk_size)(problem, phi, [None]).grad
    exact = 0.9 + 1e5 * (1.0 / 3 + 0.125)
    assert grad["a"].dtype == first
    assert torch.equal(grad["a"], torch.full((2,), exact, dtype=D).to(first))
    assert torch.allclose(grad["b"], torch.full((2,), 0.75e5, dtype=D), rtol=1e-15, atol=0)


def test_sums_of_the_library_are_not_rounded_by_autocast() -> None:
    """In float32, which autocast would turn into bfloat16; the loss itself is elementwise and stays as it is."""
    problem = bilevel.Problem(
        init=lambda phi: torch.zeros(50),
        step=lambda theta, phi, batch: 0.9 * theta + phi.sin(),
        outer_loss=lambda theta, phi, batch: theta.square().mean(),
    )
    phi = torch.linspace(0.1, 1, 50)
    estimator = bilevel.ForwardGradient(20, control_variate=bilevel.TruncatedReverse(1))
    expected = estimator(problem, phi, [None] * T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimator(problem, phi, [None] * T)
    assert torch.allclose(found.grad, expected.grad, rtol=1e-6, atol=1e-8)
