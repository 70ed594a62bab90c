"""`HessianFree` as SAMA: its difference without second derivatives, and its look-ahead, against plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from closed_forms import descent, tensor
from test_penalty import (
    BATCHES,
    META,
    OUTER,
    inner_loss,
    language_model,
    mixture,
    network,
    operations,
    outer_loss,
    problem,
)
from torch import Tensor

import bilevel
from bilevel import HessianFree, TruncatedReverse

SAMA = HessianFree(preconditioner="optimizer", mixed="difference")


def adam_by_hand(step_size: float, lookahead: bool) -> dict[str, Tensor]:
    """SAMA's formula: a loop with torch.optim.Adam, Adam's scale of d by hand, and a difference of two gradients."""
    rate, beta_1, beta_2, eps = 0.01, 0.9, 0.999, 1e-8
    meta = {name: leaf.clone().requires_grad_() for name, leaf in META.items()}
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def step(batch: Any) -> list[Tensor]:
        optimizer.zero_grad()
        inner_loss(model, META, batch).backward()
        gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        return gradient

    for batch in BATCHES:
        step(batch)
    parameters = list(model.parameters())
    theta = [p.detach().clone() for p in parameters]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    gradient = step(BATCHES[-1])
    if not lookahead:
        with torch.no_grad():
            for p, value in zip(parameters, theta, strict=True):
                p.copy_(value)
    found = torch.autograd.grad(outer_loss(model, meta, OUTER), [*parameters, meta["weights"]])
    count, vector = len(BATCHES) + 1, []
    for d, g, memory in zip(found, gradient, moments, strict=False):
        m = (beta_1 * memory["exp_avg"] + (1 - beta_1) * g) / (1 - beta_1**count)
        root = ((beta_2 * memory["exp_avg_sq"] + (1 - beta_2) * g**2) / (1 - beta_2**count)).sqrt()
        late_1, late_2 = (1 - beta_1) / (1 - beta_1**count), (1 - beta_2) / (1 - beta_2**count)
        vector.append(rate * (late_1 / (root + eps) - m / (root + eps) ** 2 * late_2 * g / root) * d)
    length, speed = (torch.cat([t.reshape(-1) for t in ts]).norm() for ts in (theta, vector))
    epsilon = step_size * length / speed

    def beside(sign: int) -> Tensor:
        with torch.no_grad():
            for p, value, v in zip(parameters, theta, vector, strict=True):
                p.copy_(value + sign * epsilon * v)
        return torch.autograd.grad(inner_loss(model, meta, BATCHES[-1]), meta["weights"])[0]

    return {"weights": found[-1] - (beside(1) - beside(-1)) / (2 * epsilon)}


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("step_size", [0.3, 1e-4])
def test_sama_is_its_definition(lookahead: bool, step_size: float) -> None:
    made = problem(torch.optim.Adam, {"lr": 0.01}, False)
    estimator = HessianFree(1.0, "optimizer", "difference", step_size, lookahead)
    found = estimator(made, META, BATCHES, OUTER)
    truth = adam_by_hand(step_size, lookahead)["weights"]
    # Adam's scale of a gradient g divides by |g|, and the library starts its second moment at 1e-30.
    torch.testing.assert_close(found.grad["weights"], truth, rtol=1e-6, atol=1e-9)
    other = HessianFree(1.0, "optimizer", "difference", step_size, not lookahead)(made, META, BATCHES, OUTER)
    assert float((other.grad["weights"] - truth).norm()) > 1e-3 * float(truth.norm())  # so that it matters


@pytest.mark.parametrize("preconditioner", ["identity", "optimizer"])
@pytest.mark.parametrize("lookahead", [False, True])
def test_the_difference_converges_to_the_product_with_second_order(preconditioner: Any, lookahead: bool) -> None:
    made = problem(torch.optim.Adam, {"lr": 0.01}, True)

    def grad(estimator: bilevel.Estimator) -> Tensor:
        found = estimator(made, META, BATCHES, OUTER).grad
        return torch.cat([found["weights"], found["log_decay"].reshape(1)])

    exact = grad(HessianFree(1.0, preconditioner, lookahead=lookahead))
    sizes = (0.04, 0.02, 0.01)
    errors = [
        float((grad(HessianFree(1.0, preconditioner, "difference", size, lookahead)) - exact).norm()) for size in sizes
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)  # O(ε²), and the next term is O(ε⁴)
    default = grad(HessianFree(1.0, preconditioner, "difference", lookahead=lookahead))
    assert float((default - exact).norm() / exact.norm()) < 1e-8


@pytest.mark.parametrize("mixed", ["exact", "difference"])
@pytest.mark.parametrize(
    "settings", [{"momentum": 0.8}, {"weight_decay": 0.3}, {"maximize": True, "weight_decay": 0.3}, {"explicit": True}]
)
def test_the_lookahead_is_the_exact_derivative_through_one_more_step(settings: Any, mixed: Any) -> None:
    """That is what `TruncatedReverse(1)` gives of an inner loop with one step more, whose last batch is that before."""
    case = descent("", T=3, **settings)
    problem, batch, outer = case.problem, case.inner_batches[0], tensor(case.outer.a)  # type: ignore[index]
    longer = TruncatedReverse(1)(problem, case.meta, [batch] * 4, outer)
    found = HessianFree(1.0, "optimizer", mixed, lookahead=True)(problem, case.meta, [batch] * 3, outer)
    torch.testing.assert_close(found.grad, longer.grad, rtol=1e-8, atol=1e-10)
    assert found.value != longer.value  # the outer loss is still that at θ_T


def test_sama_leaves_fused_attention_and_checkpointing_as_they_are() -> None:
    made = mixture(language_model(checkpointing=True), bfloat16=True)
    found, seen = operations(lambda: SAMA(made, torch.zeros(2), 2))
    assert any("_scaled_dot_product_flash_attention_for_cpu_backward" in name for name in seen)
    assert not any("attention_math" in name for name in seen)
    assert bool(torch.isfinite(found.grad).all())


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r'step_size=0\.1 has no effect with mixed="exact"'):
        HessianFree(step_size=0.1)
    with pytest.raises(ValueError, match="mixed="):
        HessianFree(mixed="forward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lookahead=2"):
        HessianFree(lookahead=2)  # type: ignore[arg-type]
