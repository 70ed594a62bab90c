"""What control variates, supports, differences and the running mean do, beyond being unbiased."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import UNROLLED, affine, tensor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel import Constant, Forward, ForwardGradient, Phase, Reverse, RunningMean, ZerothOrder

BIG = affine("many parameters", T=2, M=3, N=64)


def squared_errors(estimator_of: Any, calls: int = 60) -> tuple[np.ndarray, np.ndarray]:
    found = [BIG(estimator_of(draw)) for draw in range(calls)]
    errors = [BIG.error(estimate) ** 2 for estimate in found]
    claimed = [(estimate.standard_error or 0.0) ** 2 / float(np.sum(BIG.gradient**2)) for estimate in found]
    return np.array(errors), np.array(claimed)


@pytest.mark.parametrize("name", ["rademacher", "orthogonal"])
def test_the_variance_is_that_of_what_the_variate_leaves(name: str) -> None:
    # A variate with cosine ρ to ∇h and the best scale leaves 1 − ρ² of ‖∇h‖²; fitting it to b − 1 = 31 others adds
    # (1 − ρ²)/31 or so, and the part of a further direction of slope 0 another (1/32²)².
    rng = np.random.default_rng(0)
    off = rng.standard_normal(64)
    off -= off @ BIG.gradient / (BIG.gradient @ BIG.gradient) * BIG.gradient
    off *= 0.3 * np.linalg.norm(BIG.gradient) / np.linalg.norm(off)
    variate = Constant(tensor(-7 * (BIG.gradient + off)))  # any scale will do, of any sign
    b = 32
    errors, claimed = squared_errors(lambda draw: ForwardGradient(b, name, control_variate=variate, draw=draw))
    left = 1 - 1 / 1.09
    theory = (63 if name == "rademacher" else 64 - b) / b * (left * (1 + 1 / 31) + 1 / 32**4)
    error = errors.std(ddof=1) / np.sqrt(len(errors))
    assert abs(errors.mean() - theory) < 4 * error + 0.1 * theory
    assert abs(claimed.mean() - errors.mean()) < 4 * error + 4 * claimed.std(ddof=1) / np.sqrt(len(claimed))


def test_variance_left_is_reported() -> None:
    estimate = BIG(ForwardGradient(16, control_variate=Constant(tensor(BIG.gradient))))
    assert estimate.diagnostics["variance_left"] < 0.02
    assert not BIG(ForwardGradient(16)).diagnostics


@pytest.mark.parametrize("case", UNROLLED, ids=lambda case: case.name)
def test_differences_of_first_order_gradients(case: Any) -> None:
    # ∛ε² = 4e-11 from rounding, some 10 for the condition and the length of the inner loops.
    estimate = case(ForwardGradient(case.N, "coordinate", tangents="difference"))
    assert case.error(estimate) < 1e-9


@pytest.mark.parametrize("chunk_size", [1, 3, 4, None])
def test_chunks_can_share_the_inner_steps(chunk_size: int | None) -> None:
    calls = []

    def inner_loss(theta: Tensor, phi: Tensor, batch: Tensor) -> Tensor:
        calls.append(1)
        kept = torch.nn.functional.dropout(theta, 0.5, training=True)
        return (kept * theta @ theta - batch @ phi).square() + (theta.sin() @ phi[:3])

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda theta, phi, batch: theta.square().sum() + phi.prod(),
        lambda phi: phi[1:4] / 10,
        bilevel.optimizer(torch.optim.Adam, lr=0.1),
    )
    phi = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    batches = list(torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = ForwardGradient(4, chunk_size=chunk_size, tangents="shared", control_variate=None)(problem, phi, batches)
    assert len(calls) == len(batches)  # once a step, in however many chunks
    exact = ForwardGradient(4)(problem, phi, batches)
    assert found.grad.numpy() == pytest.approx(exact.grad.numpy(), rel=1e-10)
    assert found.standard_error == pytest.approx(exact.standard_error, rel=1e-10)


def test_steps_to_share_need_an_inner_loss() -> None:
    with pytest.raises(TypeError, match=r"bilevel\.GradientDescent"):
        BIG(ForwardGradient(4, tangents="shared"))
    unused = bilevel.GradientDescent(
        lambda theta, phi, batch: phi.sum(),
        lambda theta, phi, batch: theta.sum(),
        torch.zeros(2),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(bilevel.NoDependenceError, match="inner_loss does not depend on the parameters"):
        ForwardGradient(2, tangents="shared")(unused, torch.ones(2), bilevel.no_batches(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)
        self.outside = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            y = self.inside(x).unsqueeze(0).unsqueeze(0)
            return scaled_dot_product_attention(y, y, y)[0, 0]

        return self.outside(checkpoint(block, x, use_reentrant=False)).squeeze(1)  # type: ignore[operator]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 5e-3)])
def test_differences_take_fused_attention_and_activation_checkpointing(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 4).to(dtype)
    model = Attention().to(dtype)

    def problem(of: nn.Module) -> bilevel.GradientDescent:
        return bilevel.GradientDescent(
            lambda view, meta, batch: (view(inputs) - meta).square().mean(),
            lambda view, meta, batch: view(inputs).square().mean(),
            of,
            bilevel.optimizer(torch.optim.Adam, lr=0.05),
        )

    meta, steps = torch.arange(5.0).to(dtype), bilevel.no_batches(4)
    found = ForwardGradient(5, "coordinate", tangents="difference")(problem(model), meta, steps)

    class Plain(Attention):
        def forward(self, x: Tensor) -> Tensor:
            y = self.inside(x)
            return self.outside(torch.softmax(y @ y.T / 2, 1) @ y).squeeze(1)

    plain = Plain().to(dtype)
    plain.load_state_dict(model.state_dict())
    exact = Forward()(problem(plain), meta, steps)
    assert float((found.grad - exact.grad).norm() / exact.grad.norm()) < tolerance


def weighted() -> tuple[bilevel.GradientDescent, Any]:
    """A weight for each of 40 examples, of which mini-batches reach 6."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 3).double(), torch.randn(40).double()
    chosen = [torch.tensor([3, 8]), torch.tensor([3, 30]), torch.tensor([39, 0]), torch.tensor([8, 1])]
    return bilevel.GradientDescent(
        lambda w, meta, batch: (meta[batch].exp() * (inputs[batch] @ w - targets[batch]).square()).mean(),
        lambda w, meta, batch: (inputs @ w - targets).square().mean(),
        torch.zeros(3).double(),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    ), chosen


def test_a_support_needs_as_many_directions_as_entries_are_reached() -> None:
    problem, chosen = weighted()
    meta = torch.zeros(40, dtype=torch.float64)
    exact = Reverse()(problem, meta, chosen)
    found = ForwardGradient(6, "coordinate", support="reached")(problem, meta, chosen)
    assert (exact.grad != 0).sum() == 6
    assert found.grad.numpy() == pytest.approx(exact.grad.numpy(), abs=1e-12)
    with pytest.raises(ValueError, match="directions=7 for 6 reached"):
        ForwardGradient(7, support="reached")(problem, meta, chosen)


def test_other_draws_are_other_directions_at_the_same_seed() -> None:
    first, again, other = (BIG(ForwardGradient(4, draw=draw)).grad for draw in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# -- in fit --------------------------------------------------------------------------------------------------------


def fit(estimator: bilevel.Estimator, steps: int, out: Path | None = None, resume: bool = False) -> bilevel.FitResult:
    return bilevel.fit(
        BIG.problem,
        BIG.meta,
        BIG.inner_batches,
        tensor(BIG.outer.a),
        phases=[Phase(estimator, steps=12)],
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=1e-6),
        callbacks=[lambda step: _stop(step.number, steps)],
        out=out,
        resume=resume,
        progress=False,
    )


class Stop(KeyboardInterrupt):
    pass


def _stop(number: int, at: int) -> None:
    if number > at:
        raise Stop


@pytest.mark.parametrize("kind", [ForwardGradient, ZerothOrder])
def test_a_running_mean_lowers_the_error_as_the_past_grows(kind: Any) -> None:
    plain, with_past = (
        [row["standard_error"] for row in fit(kind(16, control_variate=v), 12).history] for v in (None, RunningMean())
    )
    assert with_past[0] == plain[0]
    assert np.mean(with_past[6:]) < 0.8 * np.mean(plain[6:])


def test_a_running_mean_is_in_the_checkpoint(tmp_path: Path) -> None:
    estimator = ForwardGradient(16, control_variate=RunningMean(0.7))
    whole = fit(estimator, 12)
    with pytest.raises(Stop):
        fit(estimator, 5, tmp_path)
    resumed = fit(estimator, 12, tmp_path, resume=True)
    assert torch.equal(whole.meta, resumed.meta)
    numbers = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (whole, resumed)]
    assert numbers[0] == numbers[1]


def test_a_running_mean_outside_of_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only inside bilevel\.fit"):
        BIG(ForwardGradient(2, control_variate=RunningMean()))


def test_signal_and_noise_are_logged_and_noise_is_warned_of_once() -> None:
    flat = bilevel.Problem(
        init=lambda phi: torch.zeros(1, dtype=torch.float64),
        step=lambda state, phi, batch: state + phi.sum() * batch,
        outer_loss=lambda state, phi, batch: state.sum(),
    )
    meta = torch.zeros(4000, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # One direction for 4000 parameters: the expected ratio is 1/√3999 = 0.016.
        result = bilevel.fit(
            flat, meta, [1.0], phases=[Phase(ForwardGradient(1), steps=25)], progress=False,
            optimizer=bilevel.optimizer(torch.optim.SGD, lr=1e-9),
        )  # fmt: skip
    assert len([w for w in caught if "estimates are noise" in str(w.message)]) == 1
    for row in result.history:
        squared = row["grad_norm"] ** 2 - row["standard_error"] ** 2
        assert row["signal_to_noise"] == pytest.approx(max(squared, 0.0) ** 0.5 / row["standard_error"], abs=1e-6)


@pytest.mark.parametrize("control_variate", [3, "reverse", (Reverse(), None)])
def test_what_is_no_variate(control_variate: Any) -> None:
    with pytest.raises(TypeError, match="a deterministic estimator is needed"):
        ForwardGradient(2, control_variate=control_variate)


def test_random_variates_are_refused() -> None:
    with pytest.raises(ValueError, match="must not depend on random directions"):
        ForwardGradient(2, control_variate=ForwardGradient(2))
