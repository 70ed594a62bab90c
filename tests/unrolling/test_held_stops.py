"""A stop-gradient means the same in methods that take differences of gradients as in those that do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bilevel

D = torch.float64
torch.manual_seed(0)
X, Y = torch.randn(6, 3, dtype=D), torch.randn(6, dtype=D)
META = torch.linspace(0.5, 1.5, 6, dtype=D)
TOTAL = float(META.sum())


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)


def weighted(errors: Tensor, meta: Tensor) -> Tensor:
    return (meta * errors).mean()


def detached(model: Any, meta: Tensor, batch: Any) -> Tensor:
    out = model(X)[:, 0]
    return weighted((out - Y).square() + (out - 0.5 * out.detach() * meta).square(), meta)


def data(model: Any, meta: Tensor, batch: Any) -> Tensor:
    out = model(X)[:, 0]
    return weighted((out - Y).square() * out.data.abs(), meta)


def target_without_gradients(model: Any, meta: Tensor, batch: Any) -> Tensor:
    with torch.no_grad():
        target = model(X + 0.1)[:, 0] + meta.square()
    return weighted((model(X)[:, 0] - target).square() + (model(X)[:, 0] - Y).square(), meta)


def decorated(model: Any, meta: Tensor, batch: Any) -> Tensor:
    @torch.no_grad()
    def running_scale(out: Tensor) -> Tensor:
        scale = torch.ones(1, dtype=D)
        scale.mul_(out.abs().mean())
        return scale

    out = model(X)[:, 0]
    return weighted((out / running_scale(out) - Y).square(), meta)


def checkpointed(model: Any, meta: Tensor, batch: Any) -> Tensor:
    out: Any = checkpoint(model, X, use_reentrant=False)
    return weighted((out[:, 0] - Y).square() * (1 + out[:, 0].detach().square()), meta)


def unchecked(model: Any, meta: Tensor, batch: Any) -> Tensor:
    """The same without the checkpoint."""
    out = model(X)
    return weighted((out[:, 0] - Y).square() * (1 + out[:, 0].detach().square()), meta)


def nothing_stopped(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return weighted((model(X)[:, 0] - Y).square(), meta)


LOSSES = [detached, data, target_without_gradients, decorated, checkpointed, nothing_stopped]


def problem(loss: Callable[..., Tensor], **settings: Any) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        loss,
        lambda model, meta, batch: (model(-X)[:, 0] - Y).square().mean() + 0.1 * meta.square().mean(),
        net(),
        bilevel.optimizer(torch.optim.Adam, lr=0.05, eps=1e-3),
        **settings,
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_differences_stop_where_the_other_methods_stop(loss: Callable[..., Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
        exact = bilevel.Reverse("graph")(problem(unchecked if loss is checkpointed else loss), META, 4).grad
        found = bilevel.ForwardGradient(6, "coordinate", tangents="difference")(problem(loss), META, 4).grad
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", [each for each in LOSSES if each is not checkpointed], ids=lambda loss: loss.__name__)
def test_so_does_the_difference_of_sama(loss: Callable[..., Tensor]) -> None:
    """It holds the values of one of its two points, which are another 1e-5 of them."""
    exact = bilevel.HessianFree()(problem(loss), META, 4).grad
    found = bilevel.HessianFree(mixed="difference")(problem(loss), META, 4).grad
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)


def test_a_loss_that_takes_another_path_is_warned_of() -> None:
    """How often a value is stopped depends on φ, to the last digit."""

    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        out = model(X)[:, 0]
        times = 1 + int(meta.sum().item() != TOTAL)
        return weighted(sum(((out - Y).square() * out.detach() for _ in range(times)), torch.zeros(())), meta) / times

    with pytest.warns(UserWarning, match="inner_loss takes another path at a moved point"):
        bilevel.ForwardGradient(1, "coordinate", tangents="difference")(problem(loss), META, 2)  # no sum of signs is 0


def test_a_loss_in_which_nothing_stops_is_watched_at_the_point_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.unrolling import stopped_gradients

    watched = []
    own = stopped_gradients.Tape.running
    monkeypatch.setattr(
        stopped_gradients.Tape, "running", lambda tape, **settings: watched.append(1) or own(tape, **settings)
    )
    bilevel.ForwardGradient(2, tangents="difference")(problem(nothing_stopped), META, 3)
    assert len(watched) == 3
    bilevel.ForwardGradient(2, tangents="difference")(problem(detached), META, 3)
    assert len(watched) == 3 + 3 * (1 + 2 * 2)
