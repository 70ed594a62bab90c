"""A buffer that a later inner step is the first to update: it is followed as the plain loop follows it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_training import numerical_gradient, train
from torch import Tensor, nn

import bilevel

D = torch.float64
torch.manual_seed(0)
X, Y = torch.randn(8, 3, dtype=D), torch.randn(8, 1, dtype=D)
META = torch.linspace(-1, 1, 8, dtype=D)
BATCHES = [0, 0, 1, 0, 1]


class Centred(nn.Module):
    """Keeps an average of the inputs of some batches."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(3, 1), how
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, x: Tensor, update: bool) -> Tensor:
        centre: Any = self.centre
        if update and self.training:
            if self.how == "assigned":
                self.centre = 0.5 * centre + 0.5 * x.mean(0)
            elif self.how == "in place":
                centre.mul_(0.5).add_(0.5 * x.mean(0))
            else:
                with torch.no_grad():
                    centre.lerp_(x.mean(0), 0.5)
        return self.inner(x - self.centre)


def inner_loss(model: Any, meta: Tensor, batch: int) -> Tensor:
    return (meta.sigmoid()[:, None] * (model(X + batch, bool(batch)) - Y).square()).mean()


def outer_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
    model.eval()
    return (model(-X, False) - Y).square().mean()


def network(how: str) -> nn.Module:
    torch.manual_seed(1)
    return Centred(how).to(D)


@pytest.mark.parametrize("how", ["assigned", "in place", "without gradients"])
@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.Reverse(),
        bilevel.Reverse("graph"),
        bilevel.Forward(),
        bilevel.ForwardGradient(8, "coordinate", tangents="shared"),
        bilevel.ForwardGradient(8, "coordinate", tangents="difference"),
        bilevel.ZerothOrder(8, 1e-5, distribution="coordinate"),
    ],
    ids=str,
)
def test_it_is_followed(estimator: bilevel.Estimator, how: str) -> None:
    def h(meta: Tensor) -> float:
        model = network(how)
        train(lambda batch: inner_loss(model, meta, batch), BATCHES, torch.optim.SGD(model.parameters(), lr=0.1))
        return outer_loss(model, meta, None).item()

    module = network(how)
    before = copy.deepcopy(module.state_dict())
    problem = bilevel.GradientDescent(inner_loss, outer_loss, module, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    for _ in range(2):
        found = estimator(problem, META, BATCHES)
        assert found.value.item() == pytest.approx(h(META), rel=1e-12)
        torch.testing.assert_close(found.grad, numerical_gradient(h, META, offset=1e-5), rtol=1e-5, atol=1e-9)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_an_update_that_depends_on_more_than_the_batch_is_refused_by_name() -> None:
    """At the initial parameters no batch makes the loss do it, so it can't be found out beforehand."""

    def hides(model: Any, meta: Tensor, batch: int) -> Tensor:
        moved = not torch.equal(model.inner.weight.detach(), network("assigned").inner.weight.detach())  # type: ignore[union-attr]
        return (meta.sigmoid()[:, None] * (model(X, moved) - Y).square()).mean()

    problem = bilevel.GradientDescent(
        hides, outer_loss, network("assigned"), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    with pytest.raises(ValueError, match="Centred changed its tensor 'centre' while a loss was computed"):
        bilevel.Reverse()(problem, META, BATCHES)
