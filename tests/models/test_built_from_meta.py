"""Inner models that `params(meta)` builds from meta parameters keep their derivative, however they are built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import numerical_gradient
from torch import Tensor, nn

import bilevel

DOUBLE = torch.float64
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
META = torch.tensor([1.0, 0.4, -0.3], dtype=DOUBLE)
ESTIMATORS: list[bilevel.Estimator] = [
    bilevel.Reverse(),
    bilevel.Reverse("sqrt"),
    bilevel.Reverse("graph"),
    bilevel.Forward(),
    bilevel.Forward(chunk_size=1),
    bilevel.ForwardGradient(3, "coordinate", tangents="shared"),
    bilevel.ForwardGradient(3, "coordinate", tangents="difference"),
]
torch.manual_seed(0)
BASE = nn.Linear(3, 1).double()


def assigned(meta: Tensor) -> Any:
    made = copy.deepcopy(BASE)
    made.weight = nn.Parameter(BASE.weight.detach() * meta)
    return made


def loaded(meta: Tensor) -> nn.Module:
    made = copy.deepcopy(BASE)
    made.load_state_dict({"weight": meta.view(1, 3) ** 2, "bias": meta[:1].sin()})
    return made


def loaded_by_assignment(meta: Tensor) -> nn.Module:
    made = copy.deepcopy(BASE)
    made.load_state_dict({"weight": meta.view(1, 3) ** 2, "bias": meta[:1].sin()}, assign=True)
    return made


def from_a_vector(meta: Tensor) -> nn.Module:
    made = copy.deepcopy(BASE)
    nn.utils.vector_to_parameters(torch.cat([meta**2, meta[:1]]), made.parameters())
    return made


def copied(meta: Tensor) -> nn.Module:
    return copy.deepcopy(assigned(meta))


def converted(meta: Tensor) -> nn.Module:
    made = nn.Linear(3, 1)
    made.weight = nn.Parameter(meta.view(1, 3) * 2)
    made.bias = nn.Parameter(torch.zeros(1))
    return made.double()


def overwritten(meta: Tensor) -> Any:
    made = assigned(meta)
    made.bias = nn.Parameter(meta[1:2] * 2)
    nn.init.zeros_(made.weight)
    return made


def overwritten_through_data(meta: Tensor) -> Any:
    made = assigned(meta)
    made.bias = nn.Parameter(meta[1:2] * 2)
    made.weight.data.fill_(0.5)
    return made


class Scaled(nn.Module):
    """A linear layer whose inputs are scaled by a tensor that is not trained."""

    def __init__(self, scale: Tensor, kind: str) -> None:
        super().__init__()
        self.layer = copy.deepcopy(BASE)
        if kind == "buffer":
            self.register_buffer("scale", scale)
        elif kind == "frozen":
            self.scale = nn.Parameter(scale, requires_grad=False)
        else:
            self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


MAKES: dict[str, Callable[[Tensor], nn.Module]] = {
    make.__name__: make
    for make in (
        assigned, loaded, loaded_by_assignment, from_a_vector, copied, converted, overwritten, overwritten_through_data
    )
}  # fmt: skip
MAKES |= {kind: lambda meta, kind=kind: Scaled(meta.cos(), kind) for kind in ("buffer", "frozen", "attribute")}


@pytest.mark.parametrize("name", MAKES)
def test_modules_built_from_meta_keep_their_derivative(name: str) -> None:
    make = MAKES[name]

    def inner(model: Any, meta: Tensor, batch: None) -> Tensor:
        return (model(X) - 1).square().mean() + 0.1 * meta[2] ** 2 * sum(p.square().sum() for p in model.parameters())

    def outer(model: Any, meta: Tensor, batch: None) -> Tensor:
        return (model(-X) - 1).square().mean()

    def h(meta: Tensor) -> float:
        model = make(meta)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            inner(model, meta, None).backward()
            optimizer.step()
        return outer(model, meta, None).item()

    expected = numerical_gradient(h, META, 1e-4)
    new = nn.Parameter.__new__
    problem = bilevel.GradientDescent(inner, outer, make, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    for estimator in ESTIMATORS:
        estimate = estimator(problem, META, [None] * 3)
        assert abs(estimate.value.item() - h(META)) < 1e-10
        torch.testing.assert_close(estimate.grad, expected, rtol=1e-6, atol=1e-9, msg=repr(estimator))
    assert nn.Parameter.__new__ is new


def test_a_detached_meta_parameter_stays_a_constant() -> None:
    def make(meta: Tensor) -> nn.Module:
        made = copy.deepcopy(BASE)
        made.weight = nn.Parameter(meta.detach().view(1, 3) * 2)
        return made

    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (model(X) - 1).square().mean(),
        lambda model, meta, batch: model(X).mean(),
        make,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(bilevel.errors.NoDependenceError):
        bilevel.Reverse()(problem, META, [None] * 2)
