"""`estimate.value` is a term of anybody's loss: in loops by hand, and in the trainers of other packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from estimator_table import ROWS
from torch import Tensor, nn

import bilevel
from bilevel import trees
from bilevel.errors import MissingDerivativeError
from bilevel.estimators.differentiable_value import differentiable_value

SMALL = [(name, estimator) for row in ROWS.values() for name, estimator in row.small.items()]
T, RATE = 3, 0.3
GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) for shape in ((6, 2), (6,)))
CLEAN_X, CLEAN_Y = (torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) for shape in ((5, 2), (5,)))
START = torch.tensor([0.5, -0.25], dtype=torch.float64)


def inner_loss(theta: Tensor, weights: Tensor, batch: Any) -> Tensor:
    return (weights.sigmoid() * (X @ theta - Y) ** 2).mean() + 0.05 * theta.square().sum()


def outer_loss(theta: Tensor, weights: Tensor, batch: Any) -> Tensor:
    return ((CLEAN_X @ theta - CLEAN_Y) ** 2).mean() + 0.01 * weights.square().sum()


PROBLEM = bilevel.GradientDescent(inner_loss, outer_loss, START, bilevel.optimizer(torch.optim.SGD, lr=RATE))


def by_hand(weights: Tensor, inner: Callable[..., Tensor] = inner_loss) -> Tensor:
    """The outer loss after T plain steps, with the graph of all of them."""
    theta = START.clone().requires_grad_()
    for _ in range(T):
        (gradient,) = torch.autograd.grad(inner(theta, weights, None), theta, create_graph=True)
        theta = theta - RATE * gradient
    return outer_loss(theta, weights, None)


def weights(fill: float = 0.2) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-fill, fill, 6, dtype=torch.float64))


class Weigher(nn.Module):
    """A network that computes the meta parameters, from features of the examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self) -> Tensor:
        return self.layers(torch.cat([X, Y[:, None]], 1)).squeeze(1)


# -- the same numbers as by hand ---------------------------------------------------------------------------------------


def test_a_plain_loop_goes_where_the_loop_by_hand_goes() -> None:
    ours, plain = weights(), weights()
    optimizers = [torch.optim.Adam([each], lr=0.1) for each in (ours, plain)]
    for _ in range(4):
        for loss, optimizer in zip(
            (lambda: bilevel.Reverse()(PROBLEM, ours, T).value, lambda: by_hand(plain)), optimizers, strict=True
        ):
            optimizer.zero_grad()
            (2.0 * loss() + 0.1).backward()
            optimizer.step()
    torch.testing.assert_close(ours, plain)
    assert not torch.allclose(ours, weights())


def test_a_network_that_computes_the_meta_parameters_is_trained() -> None:
    ours, plain = Weigher(), Weigher()
    (bilevel.Reverse("sqrt")(PROBLEM, ours(), T).value + 0.5 * ours().mean()).backward()
    (by_hand(plain()) + 0.5 * plain().mean()).backward()
    for found, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


def test_a_module_as_meta_gets_the_gradients_of_its_own_parameters() -> None:
    def inner(theta: Tensor, weigher: Any, batch: Any) -> Tensor:
        return inner_loss(theta, weigher(), batch)

    problem = bilevel.GradientDescent(
        inner, lambda theta, weigher, batch: outer_loss(theta, weigher(), batch), START, PROBLEM.optimizer
    )
    ours, plain = Weigher(), Weigher()
    for module in (ours, plain):
        module.layers[0].bias.requires_grad_(False)
    estimate = bilevel.Reverse()(problem, ours, T)
    estimate.value.backward()
    by_hand(plain()).backward()
    for (name, found), wanted in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if wanted.grad is None:
            assert found.grad is None
            continue
        torch.testing.assert_close(found.grad, wanted.grad)
        torch.testing.assert_close(found.grad, estimate.grad[name])


def test_only_what_requires_gradients_gets_any_and_a_tensor_in_two_places_gets_both() -> None:
    def inner(theta: Tensor, meta: Any, batch: Any) -> Tensor:
        return inner_loss(theta, meta["a"] * meta["fixed"] + meta["also a"], batch)

    problem = bilevel.GradientDescent(
        inner, lambda theta, meta, batch: outer_loss(theta, meta["a"], batch), START, PROBLEM.optimizer
    )
    ours, plain, fixed = weights(), weights(), torch.full((6,), 0.5, dtype=torch.float64)
    bilevel.Reverse()(problem, {"a": ours, "fixed": fixed, "also a": ours}, T).value.backward()
    by_hand(plain, lambda theta, w, batch: inner_loss(theta, w * fixed + w, batch)).backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    assert fixed.grad is None


@pytest.mark.parametrize(("name", "estimator"), SMALL, ids=[name for name, _ in SMALL])
def test_every_estimator_gives_its_estimate(name: str, estimator: bilevel.Estimator) -> None:
    problem = PROBLEM
    if not estimator.needs_derivatives:
        problem = bilevel.BlackBox(lambda meta: meta.tanh(), lambda state, meta, batch: state.square().sum())
    phi = weights()
    estimate = estimator(problem, phi, None if problem is not PROBLEM else T)
    (3.0 * estimate.value).backward()
    torch.testing.assert_close(phi.grad, 3.0 * estimate.grad)
    assert not any(t.requires_grad for t in tensors([estimate.grad, estimate.state, estimate.carried]))


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves(tree) if isinstance(leaf, Tensor)]


def test_the_gradient_has_the_dtype_of_the_meta_parameter() -> None:
    phi = nn.Parameter(torch.tensor(0.5))
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: 0.5 * (theta - meta) ** 2,
        lambda theta, meta, batch: theta**2,
        torch.tensor(0.0, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    value = bilevel.Reverse()(problem, phi, 2).value
    assert value.dtype == torch.float64
    value.backward()
    assert phi.grad is not None
    assert phi.grad.dtype == torch.float32
    torch.testing.assert_close(phi.grad, torch.tensor(2 * 0.75**2 * 0.5))


# -- as PyTorch does it ------------------------------------------------------------------------------------------------


def test_a_second_backward_needs_the_graph_to_be_kept() -> None:
    phi = weights()
    estimate = bilevel.Reverse()(PROBLEM, phi, T)
    estimate.value.backward(retain_graph=True)
    estimate.value.backward()
    torch.testing.assert_close(phi.grad, 2 * estimate.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        estimate.value.backward()


def test_a_derivative_of_the_gradient_is_refused() -> None:
    phi = weights()
    value = bilevel.Reverse()(PROBLEM, phi, T).value
    with pytest.raises(MissingDerivativeError, match="derivative of that gradient is not known"):
        value.backward(create_graph=True)
    with pytest.raises(MissingDerivativeError, match="create_graph=True"):
        torch.autograd.grad(value, phi, create_graph=True)


def test_function_transforms_which_always_record_are_refused() -> None:
    def value(phi: Tensor) -> Tensor:
        return differentiable_value(torch.ones(()), [torch.ones(6, dtype=torch.float64)], [phi])

    with pytest.raises(MissingDerivativeError, match="derivative of that gradient is not known"):
        torch.func.grad(value)(weights().detach())


def test_without_gradients_it_is_a_plain_number() -> None:
    with torch.no_grad():
        value = bilevel.Reverse()(PROBLEM, weights(), T).value
    assert value.grad_fn is None
    assert not value.requires_grad
    assert bilevel.Reverse()(PROBLEM, weights().detach(), T).value.grad_fn is None


def test_nothing_that_fit_keeps_has_a_graph(tmp_path: Path) -> None:
    phi, seen = weights(), []
    result = bilevel.fit(
        PROBLEM, phi, T, estimator=bilevel.Reverse(), steps=2, progress=False, out=tmp_path, callbacks=[seen.append]
    )
    kept = [seen[0].estimate.value, *tensors([seen[0].meta, seen[0].estimate.state, result.meta, result.history])]
    assert len(kept) > 3
    assert not any(t.requires_grad for t in kept)
    assert phi.grad is None


def test_a_vector_of_outer_losses_takes_a_cotangent_for_each() -> None:
    phi, jacobian = weights(), torch.arange(12.0, dtype=torch.float64).reshape(2, 6)
    value = differentiable_value(jacobian @ phi.detach(), [jacobian], [phi])
    value.backward(torch.tensor([2.0, -1.0]).double())
    torch.testing.assert_close(phi.grad, 2 * jacobian[0] - jacobian[1])


def test_estimates_are_printed_in_one_short_line() -> None:
    shown = repr(bilevel.ForwardGradient(2)(PROBLEM, weights(), T))
    assert shown.startswith("Estimate(value=")
    assert "grad: tensor of shape (6,), standard_error=" in shown
    assert len(shown) < 120


# -- trainers of other packages ----------------------------------------------------------------------------------------

STEPS = 3


def trained_by_hand() -> list[Tensor]:
    module = Weigher()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        by_hand(module()).backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def require_as_by_hand(module: nn.Module) -> None:
    start = [p.detach() for p in Weigher().parameters()]
    for found, wanted, before in zip(module.parameters(), trained_by_hand(), start, strict=True):
        torch.testing.assert_close(found.detach(), wanted)
        assert not torch.allclose(found, before)


def test_lightning_trains_on_it(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="the package lightning is not installed")

    class Learner(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weigher = Weigher()

        def training_step(self, batch: Any, number: int) -> Tensor:  # noqa: ARG002
            return bilevel.Reverse()(PROBLEM, self.weigher(), T, seed=number).value

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    learner = Learner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(learner, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(STEPS))))
    require_as_by_hand(learner.weigher)


def test_accelerate_trains_on_it() -> None:
    accelerate = pytest.importorskip("accelerate", reason="the package accelerate is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        module = Weigher()
        module, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.5))
        for number in range(2 * STEPS):  # two equal halves of each step
            with accelerator.accumulate(module):
                loss = bilevel.Reverse()(PROBLEM, module(), T, seed=number).value
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    require_as_by_hand(module)
