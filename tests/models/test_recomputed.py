"""Layers that are computed again: the same derivatives to the last digits, in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.planning.live_memory import counting


class Block(nn.Module):
    """Attention and a perceptron with dropout, called with keywords, which returns a tuple with a number in it."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attend = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, scale: Tensor | None = None, mask: Tensor) -> tuple[Tensor, int]:
        q, k, v = self.attend(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e9)
        x = x + scores.softmax(-1) @ v
        return x + self.dropout(self.down(self.up(x).tanh())) * (1 if scale is None else scale), 1


class Network(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        for block in self.blocks:
            x, _ = block(x, scale=scale, mask=mask)
        return self.head(x)


def problem(
    recomputed: bool, dropout: float = 0.0, inner: int = 6, depth: int = 3, frozen: bool = False, n: int = 5
) -> Any:
    torch.manual_seed(0)
    x, y = torch.randn(n, 4, 4, dtype=torch.float64), torch.randint(3, (n, 4))
    blocks: list[nn.Module] = [Block(4, inner, dropout) for _ in range(depth)]
    blocks[-1] = blocks[0]  # tied: the same layer twice
    if frozen:
        for parameter in blocks[1].parameters():
            parameter.requires_grad = False
    wrapped = {id(block): bilevel.experimental.Recomputed(block) if recomputed else block for block in blocks}
    network = Network([wrapped[id(block)] for block in blocks]).double()

    def loss(model: Any, meta: Any) -> Tensor:
        return cross_entropy(model(x + meta["shift"], meta["scale"]).flatten(0, 1), y.flatten())

    meta = {"shift": torch.zeros(4, dtype=torch.float64), "scale": torch.tensor(0.7, dtype=torch.float64)}
    return (
        bilevel.GradientDescent(
            lambda model, meta, batch: loss(model, meta),
            lambda model, meta, batch: loss(model, meta),
            network,
            bilevel.optimizer(torch.optim.Adam, lr=0.05),
        ),
        meta,
        bilevel.no_batches(6),
    )


def close(found: Any, expected: Any, relative: float = 1e-10) -> None:
    for name, value in expected.items():
        assert (found[name] - value).norm() <= relative * value.norm(), name
        assert value.norm() > 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.Reverse(),
        bilevel.Reverse("graph"),
        bilevel.Reverse("sqrt"),
        bilevel.TruncatedReverse(3),
        bilevel.Forward(),
        bilevel.ForwardGradient(2),
        bilevel.HessianFree(),
        bilevel.Implicit(bilevel.Neumann(iterations=3)),
    ],
    ids=repr,
)
def test_the_gradient_is_that_of_the_layers_themselves(estimator: Any, frozen: bool) -> None:
    expected, found = (estimator(*problem(recomputed, frozen=frozen)) for recomputed in (False, True))
    close(found.grad, expected.grad)
    assert found.value == expected.value


def test_dropout_is_drawn_alike() -> None:
    """In the first computation as in the later ones, and differently from layer to layer."""
    plain, again = (bilevel.Reverse()(*problem(recomputed, dropout=0.4)) for recomputed in (False, True))
    assert again.value == plain.value
    close(again.grad, plain.grad)
    assert again.value != bilevel.Reverse()(*problem(True)).value


def test_modes_are_those_of_the_first_time() -> None:
    """A loss may put its model in eval mode for a moment; the layers are computed again when it is over."""
    descent, meta, batches = problem(True, dropout=0.9)
    inner = descent.inner_loss

    def quiet(model: Any, meta: Any, batch: Any) -> Tensor:
        model.eval()
        value = inner(model, meta, batch)
        model.train()
        return value

    descent.inner_loss = quiet
    without = problem(False, dropout=0.0)
    descent._outer_loss = without[0]._outer_loss
    outer = descent._outer_loss
    descent._outer_loss = lambda model, meta, batch: outer(model.eval(), meta, batch)
    close(bilevel.Reverse()(descent, meta, batches).grad, bilevel.Reverse()(*without).grad)


def test_less_memory() -> None:
    """Of seven wide layers the graph of a step holds one, and what lies between them."""
    peaks = []
    for recomputed in (False, True):
        arguments = problem(recomputed, inner=60, depth=7, n=200)
        with counting() as live:
            bilevel.Reverse()(*arguments)
        peaks.append(live.peak)
    assert peaks[1] < 0.5 * peaks[0]


def test_nothing_stays_behind() -> None:
    arguments = problem(True)
    with counting() as live:
        estimate = bilevel.Reverse()(*arguments)
        del estimate
        assert live.now == 0


def test_a_third_derivative_is_refused() -> None:
    layer = bilevel.experimental.Recomputed(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    x = torch.ones(2, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(bilevel.errors.MissingDerivativeError, match="a third was asked for"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


def test_plain_use_is_that_of_the_layer() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    layer = bilevel.experimental.Recomputed(copy.deepcopy(plain))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    plain(x).sum().backward()
    for found, expected in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)  # pyright: ignore[reportArgumentType]
