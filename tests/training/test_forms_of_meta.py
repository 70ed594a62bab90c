"""Meta parameters in all forms that `fit` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import CURVATURE, FLOAT, INNER_RATE, START, exact, inner_step, outer_loss, outer_optimizer, train
from torch import Tensor, nn

import bilevel
from bilevel import (
    GradientDescent,
    Problem,
)
from bilevel.training.outer_loop import OuterStep


class Shift(nn.Module):
    """A module as meta parameters; `fixed` is not trained."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())
        self.fixed = nn.Parameter(torch.ones(1, dtype=FLOAT), requires_grad=False)

    def forward(self) -> Tensor:
        return self.value * self.fixed


class Parts(nn.Module):
    """Parameters of equal shapes whose names are not in alphabetical order: a mistaken order would go unnoticed."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(value[:1].clone())
        self.m = nn.Parameter(value[1:2].clone())
        self.a = nn.Parameter(value[2:].clone())

    def forward(self) -> Tensor:
        return torch.cat([self.z, self.m, self.a])


# How to build meta parameters from START, how a loss reads φ out of them, and how a result holds it.
FORMS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "tensor": (START.clone, lambda meta: meta),
    "requires grad": (lambda: START.clone().requires_grad_(), lambda meta: meta),
    "dict": (
        lambda: {"b": START[:1].clone(), "a": {"x": START[1].clone(), "y": [START[2:].clone()]}},
        lambda meta: torch.cat([meta["b"], meta["a"]["x"].reshape(1), meta["a"]["y"][0]]),
    ),
    "tuple": (lambda: (START[:2].clone(), START[2:].clone()), torch.cat),
    "module": (lambda: Shift(START), lambda meta: meta()),
    "module of several parameters": (lambda: Parts(START), lambda meta: meta()),
    "tree with a module": (
        lambda: {"net": Shift(START[:2]), "rest": START[2:].clone()},
        lambda meta: torch.cat([meta["net"](), meta["rest"]]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_meta_parameters_in_every_form(form: str, tmp_path: Path) -> None:
    make, read = FORMS[form]
    problem = GradientDescent(
        inner_loss=lambda theta, meta, batch: 0.5 * (CURVATURE * (theta - read(meta)) ** 2).sum(),
        outer_loss=outer_loss,
        params=torch.zeros(3, dtype=FLOAT),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=INNER_RATE),
    )
    meta, seen = make(), []
    before = read(meta).detach().clone()

    def look(step: OuterStep) -> None:
        seen.append(read(step.meta))
        assert torch.equal(read(meta), before)  # what the user holds changes only at the end, and only a module

    adam = {"optimizer": outer_optimizer("Adam")}
    result = train(exact(4), meta, problem, callbacks=[look], out=tmp_path, **adam)
    expected: list[Tensor] = []
    train(exact(4), callbacks=[lambda step: expected.append(step.meta)], **adam)
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(read(result.meta), seen[-1])
    assert not any(t.requires_grad for t in seen)

    if "module" in form:
        module, trained = (meta["net"], result.meta["net"]) if isinstance(meta, dict) else (meta, result.meta)
        assert trained is module
        if isinstance(module, Shift):
            assert torch.equal(module.fixed, torch.ones(1, dtype=FLOAT))
            assert module.value.requires_grad
    else:
        assert torch.equal(read(meta), before)

    again = train(exact(4), make(), problem, out=tmp_path, resume=True, **adam)
    assert torch.equal(read(again.meta), seen[-1])


def test_a_module_is_projected_as_a_callable_view() -> None:
    start = torch.zeros(3, dtype=FLOAT)
    problem = Problem(lambda meta: start, lambda theta, meta, batch: inner_step(theta, meta(), batch), outer_loss)

    def project(view: Any) -> Any:
        assert torch.equal(view(), view.value)
        view.named_tensors["value"].clamp_(max=0.5)
        return view

    result = train(exact(3), Shift(START), problem, project=project)
    assert torch.equal(result.meta.value, train(exact(3), project=lambda phi: phi.clamp(max=0.5)).meta)
