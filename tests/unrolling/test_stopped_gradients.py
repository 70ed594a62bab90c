"""A tape of stopped gradients: what is replayed at a moved point, and what is only noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bilevel.unrolling.stopped_gradients import AnotherPathError, Tape

POINT = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
ALONG = torch.tensor([0.5, 0.1, -0.4], dtype=torch.float64)


def difference(function: Callable[[Tensor], Tensor], tape: Tape, step: float = 1e-5) -> Tensor:
    """A central difference with stopped gradients replayed."""
    with tape.running():
        function(POINT.clone().requires_grad_())

    def at(s: float) -> Tensor:
        tape.rewind()
        with tape.running():
            found = function((POINT + s * ALONG).requires_grad_())
        return found.detach()

    return (at(step) - at(-step)) / (2 * step)


class Rounded(torch.autograd.Function):
    """Rounds, with the identity as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        return gradient


class Halves(torch.autograd.Function):
    """Two outputs, one of them of whole numbers, and a backward pass that is not the derivative of forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(labels := (x > 0).long())
        return x.sign() * y, labels

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * x.cos(), 2 * gradient


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        target = (x * 3).sin()
        kept = torch.zeros(3, dtype=x.dtype)
        kept.add_(x)
        kept[0] = x[1]
    return (x - target - kept).square().sum()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: (0.7 * x - x.detach()).square().sum(),
    "data": lambda x: (0.7 * x - x.data).square().sum(),
    "no_grad, with writes in place": under_no_grad,
    "straight-through": lambda x: (x + (x.round() - x).detach()).square().sum(),
    "a custom function": lambda x: (Rounded.apply(3 * x) - x).square().sum(),  # type: ignore[operator]
    "two outputs": lambda x: (Halves.apply(x, x.exp())[0] * x).sum(),  # type: ignore[operator]
    "hard Gumbel softmax": lambda x: (
        torch.manual_seed(0) and functional.gumbel_softmax(x, hard=True) @ torch.arange(3.0, dtype=x.dtype)
    ),
    "nothing stopped": lambda x: x.exp().sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_differences_are_the_derivative_that_autograd_takes(name: str) -> None:
    function = FUNCTIONS[name]
    x = POINT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(difference(function, Tape()), gradient @ ALONG, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("nothing stopped", "two outputs")])
def test_without_replay_the_difference_is_another_one(name: str) -> None:
    """So the tests above test something."""
    function = FUNCTIONS[name]
    x = POINT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    plain = (function(POINT + 1e-5 * ALONG) - function(POINT - 1e-5 * ALONG)) / 2e-5
    assert abs(plain - gradient @ ALONG) > 1e-3


def test_places_are_named_where_a_stop_moves() -> None:
    tape = Tape()
    difference(FUNCTIONS["detach"], tape)
    assert [place.split(":")[0] for place in tape.replayed] == ["test_stopped_gradients.py"]
    assert not tape.not_replayed
    still = Tape()
    difference(lambda x: (x - torch.ones(3).detach()).square().sum(), still)
    assert not still.replayed, "a constant is no stop-gradient"


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: x.sum() * x.sum().item(), "item"),
        (lambda x: x.sum() * x.sum().tolist(), "tolist"),
        (lambda x: torch.autograd.grad(x.exp().sum(), x)[0].sum() * x.sum(), "create_graph"),
    ],
)
def test_numbers_and_inner_gradients_are_noted(function: Callable[[Tensor], Tensor], word: str) -> None:
    tape = Tape()
    difference(function, tape)
    (place,) = tape.not_replayed
    assert word in place
    assert place.startswith("test_stopped_gradients.py:")


def test_another_path_is_noticed() -> None:
    def branches(x: Tensor) -> Tensor:
        return x.detach().sum() + (x[1].detach() if x[0] > 0.3 else x.sum())

    with pytest.raises(AnotherPathError):
        difference(branches, Tape())


def test_custom_functions_are_put_back() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    tape = Tape()
    with pytest.raises(ZeroDivisionError), tape.running():
        raise ZeroDivisionError
    assert torch.autograd.Function.__dict__["apply"] is before
