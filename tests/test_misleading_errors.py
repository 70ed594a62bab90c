"""Input that once met an error which misled: it works, or the error names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional

import bilevel

D = torch.float64
torch.manual_seed(0)
X, Y = torch.randn(6, 3, dtype=D), torch.randn(6, 1, dtype=D)
META = torch.linspace(0.5, 1.5, 6, dtype=D)
ESTIMATORS = [
    bilevel.Reverse(),
    bilevel.Reverse("sqrt"),
    bilevel.Forward(),
    bilevel.ForwardGradient(6, "coordinate", tangents="shared"),
    bilevel.ForwardGradient(6, "coordinate", tangents="difference"),
]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


def weighted(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (meta[:, None] * (model(X) - Y).square()).mean()


def outer(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (model(-X) - Y).square().mean()


def problem(inner: Any = weighted, **settings: Any) -> bilevel.GradientDescent:
    torch.manual_seed(1)
    optimizer = settings.pop("optimizer", None) or bilevel.optimizer(torch.optim.SGD, lr=0.1)
    return bilevel.GradientDescent(inner, outer, nn.Linear(3, 1).to(D), optimizer, **settings)


def expected(optimizer: Any = None) -> Tensor:
    return bilevel.Reverse("graph")(problem(optimizer=optimizer), META, 3).grad


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7 * float(wanted.norm()))


@each_estimator
def test_a_loss_that_pops_from_its_batch(estimator: bilevel.Estimator) -> None:
    def pops(model: Any, meta: Tensor, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return (meta[:, None] * (model(**batch) - labels).square()).mean()

    batches = [{"input": X, "labels": Y}] * 3
    same(estimator(problem(pops), META, batches).grad, expected())
    assert all(set(batch) == {"input", "labels"} for batch in batches)


@pytest.mark.parametrize(
    "setting",
    [
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"fused": None},
        {"differentiable": False},
        {"capturable": False},
    ],
    ids=str,
)
@each_estimator
def test_settings_that_choose_an_implementation(estimator: bilevel.Estimator, setting: dict[str, Any]) -> None:
    adam = bilevel.optimizer(torch.optim.Adam, lr=0.1, eps=1e-3)
    chosen = bilevel.optimizer(torch.optim.Adam, lr=0.1, eps=1e-3, **setting)
    same(estimator(problem(optimizer=chosen), META, 3).grad, expected(adam))


@each_estimator
def test_an_expanded_meta_tensor(estimator: bilevel.Estimator) -> None:
    wanted = bilevel.Reverse("graph")(problem(), torch.ones(6, dtype=D), 3).grad
    same(estimator(problem(), torch.ones(1, dtype=D).expand(6), 3).grad, wanted)


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Reverse("sqrt"), bilevel.Forward()], ids=str)
def test_a_state_that_grows_after_its_first_step(estimator: bilevel.Estimator) -> None:
    """h = Σ_i θ_i of θ_0 = φ_{0:2}, θ ← φ_0 θ, then θ ← (θ, φ_0), then θ ← φ_0 θ."""

    def step(state: Tensor, meta: Tensor, batch: int) -> Tensor:
        return torch.cat([state, meta[:1]]) if batch == 1 else state * meta[0]

    grows = bilevel.Problem(lambda meta: meta[:2], step, lambda state, meta, batch: state.sum())
    a, b = META[0], META[1]
    wanted = torch.zeros(6, dtype=D)
    wanted[0], wanted[1] = 3 * a**2 + 2 * a * b + 2 * a, a**2
    same(estimator(grows, META, [0, 1, 2]).grad, wanted)


@each_estimator
def test_a_normalisation_with_a_bias_and_no_weight(estimator: bilevel.Estimator) -> None:
    def normalised(model: Any, meta: Tensor, batch: Any, composite: bool = False) -> Tensor:
        out, bias = model(X) * X, torch.tensor([0.1, 0.2, 0.3], dtype=D)
        if composite:
            off = out - out.mean(-1, keepdim=True)
            out = off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt() + bias
        else:
            out = functional.layer_norm(out, (3,), None, bias)
        return (meta[:, None] * (out - Y).square()).mean() + 0.1 * model(X).square().mean()

    by_hand = problem(lambda *arguments: normalised(*arguments, composite=True))
    same(estimator(problem(normalised), META, 3).grad, bilevel.Reverse("graph")(by_hand, META, 3).grad)


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.ForwardGradient(6, "coordinate")], ids=str)
def test_compiled_losses_of_two_batch_sizes(estimator: bilevel.Estimator) -> None:
    def batched(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return meta.mean() * (model(batch[0]) - batch[1]).square().mean()

    batches = [(X, Y), (X[:4], Y[:4]), (X, Y)]
    wanted = bilevel.Reverse("graph")(problem(batched), META, batches).grad
    same(estimator(problem(batched, compile="aot_eager"), META, batches).grad, wanted)


def test_tensors_that_are_saved_on_the_cpu_are_not_called_checkpoints() -> None:
    def saved(model: Any, meta: Tensor, batch: Any) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return weighted(model, meta, batch)

    with pytest.raises(bilevel.errors.MissingDerivativeError, match="save_on_cpu") as caught:
        bilevel.Reverse()(problem(saved), META, 3)
    assert "activation checkpointing" not in str(caught.value)

    def checkpointed(model: Any, meta: Tensor, batch: Any) -> Tensor:
        out: Any = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
        return (meta[:, None] * (out - Y).square()).mean()

    with pytest.raises(bilevel.errors.MissingDerivativeError, match="activation checkpointing"):
        bilevel.Reverse()(problem(checkpointed), META, 3)


@pytest.mark.slow
def test_frozen_flags_of_pytorch() -> None:
    """`torch.backends.disable_global_flags()` can't be undone, so it is called in a process of its own."""
    program = (
        "import torch; torch.backends.disable_global_flags()\n"
        "import bilevel, test_misleading_errors as t\n"
        "for estimator in t.ESTIMATORS: t.same(estimator(t.problem(), t.META, 3).grad, t.expected())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
