"""The outer loop against a loop that is written out, to the last bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fit_cases import (
    ALL_OPTIMIZERS,
    FLOAT,
    QUADRATIC,
    START,
    TWO_PHASES,
    noisy_inner_batches,
    noisy_outer_batch,
    tensor,
    train,
    train_noisily,
    without_seconds,
)
from torch import Tensor, nn

from bilevel import (
    BlackBox,
    ForwardGradient,
    Phase,
    Problem,
    ZerothOrder,
    no_batches,
    randomness,
)


@dataclass
class ByHand:
    """An outer loop as one would write it down without this library's."""

    name: str
    seed: int = 0
    project: Callable[[Tensor], Tensor] | None = None

    def run(self, phases: Sequence[Phase]) -> tuple[Tensor, list[dict[str, Any]]]:
        algorithm, settings, schedule = ALL_OPTIMIZERS[self.name]
        parameter = nn.Parameter(START.clone())
        optimizer = algorithm([parameter], **settings)  # pyright: ignore[reportCallIssue]
        scheduler = schedule(optimizer) if schedule else None
        draw, rows = 0, []
        for number, phase in enumerate(phases):
            for _ in range(phase.steps):
                estimates = []
                for k in range(phase.accumulate):
                    seed = randomness.derive(self.seed, randomness.DRAW, len(rows), k)
                    batches = noisy_inner_batches(draw), noisy_outer_batch(draw)
                    estimates.append(phase.estimator(QUADRATIC, parameter.detach(), *batches, seed))
                    draw += 1
                total, loss, squared_errors = torch.zeros_like(START), 0.0, 0.0
                for estimate in estimates:
                    total = total + estimate.grad
                    loss += estimate.value.item()
                    squared_errors += (estimate.standard_error or 0.0) ** 2
                count = len(estimates)
                parameter.grad = total / count
                optimizer.step()
                if self.project is not None:
                    parameter.data.copy_(self.project(parameter.detach()))
                if scheduler is not None:
                    scheduler.step()
                stochastic = isinstance(phase.estimator, ForwardGradient)
                row = {"outer_step": len(rows), "phase": number, "outer_loss": loss / count}
                row["grad_norm"] = (total / count).square().sum().sqrt().item()
                row["standard_error"] = squared_errors**0.5 / count if stochastic else None
                squared, error = (total / count).square().sum().item(), row["standard_error"]
                row["signal_to_noise"] = max(squared - error**2, 0.0) ** 0.5 / error if error else None
                rows.append(row)
        return parameter.detach(), rows


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_every_update_is_that_of_a_loop_written_out(name: str) -> None:
    """Which includes: seeds and batches of each draw, means, pooled standard errors, one outer optimiser for all."""
    expected, rows = ByHand(name, seed=7).run(TWO_PHASES)
    result = train_noisily(name=name, seed=7)
    assert torch.equal(result.meta, expected)
    assert without_seconds(result.history) == rows
    assert not torch.equal(result.meta, train_noisily(name=name, seed=8).meta)


def test_project_is_applied_after_each_step() -> None:
    def project(phi: Tensor) -> Tensor:
        return phi.clamp(-0.5, 0.5)

    expected, _ = ByHand("Adam", project=project).run(TWO_PHASES)
    seen: list[Tensor] = []
    result = train_noisily(project=project, callbacks=[lambda step: seen.append(step.meta)])
    assert torch.equal(result.meta, expected)
    assert all(phi.abs().max() <= 0.5 for phi in seen)
    assert torch.equal(train_noisily(project=lambda phi: phi.clamp_(-0.5, 0.5)).meta, expected)  # in place will do


def test_batches_may_be_fixed() -> None:
    inner, outer = noisy_inner_batches(3), noisy_outer_batch(3)
    fixed = train_noisily(inner_batches=inner, outer_batch=outer)
    as_functions = train_noisily(inner_batches=lambda draw: inner, outer_batch=lambda draw: outer)
    assert torch.equal(fixed.meta, as_functions.meta)
    assert not torch.equal(fixed.meta, train_noisily().meta)


def test_draws_are_numbered_without_gaps_over_steps_and_phases() -> None:
    inner: list[int] = []
    outer: list[int] = []

    def note(numbers: list[int], batches: Callable[[int], Any]) -> Callable[[int], Any]:
        return lambda draw: (numbers.append(draw), batches(draw))[1]

    train_noisily(inner_batches=note(inner, noisy_inner_batches), outer_batch=note(outer, noisy_outer_batch))
    assert inner == outer == list(range(3 + 4 * 3))


def test_accumulation_averages_away_the_variance() -> None:
    """The pooled standard error is what theory says: of n estimates with b directions as of one with n·b."""
    wide = Problem(
        init=lambda phi: torch.zeros((), dtype=FLOAT),
        step=lambda state, phi, batch: phi.sum(),
        outer_loss=lambda state, phi, batch: state,
    )
    size = 50
    meta = torch.zeros(size, dtype=FLOAT)
    (row,) = train([Phase(ForwardGradient(16), 1, accumulate=25)], meta, wide, inner_batches=no_batches(1)).history
    # ∇h is all ones: w = Σ v has E w² = N, and the relative variance of 400 directions is (N − 1)/400. The mean of
    # w² over them has a relative standard deviation of √2/20 (w is close to normal), so its root half of that.
    theory = (size * (size - 1) / 400) ** 0.5
    assert row["standard_error"] == pytest.approx(theory, rel=4 * 2**0.5 / 40)
    # And the error itself: ‖ĝ‖² = ‖∇h‖² + ‖error‖² + 2⟨∇h, error⟩, where ‖∇h‖² = N.
    # The last term is 2N times the relative error of the mean of w², so its standard deviation is N √2/10.
    assert row["grad_norm"] ** 2 == pytest.approx(size + theory**2, abs=4 * size * 2**0.5 / 10)


def test_of_accumulated_estimates_one_at_a_time_is_kept() -> None:
    class Token:
        """Lives as long as the state that it is in."""

    tokens: list[weakref.ref[Token]] = []
    alive: list[int] = []

    def solve(phi: Tensor) -> Any:
        token = Token()
        tokens.append(weakref.ref(token))
        return {"state": 2 * phi, "token": token}

    def outer(state: Any, *_: Any) -> Tensor:
        alive.append(sum(token() is not None for token in tokens))
        return (state["state"] ** 2).sum()

    phases = [Phase(ZerothOrder(1, scheme="forward"), 1, accumulate=6)]
    train(phases, tensor(1.0), BlackBox(solve, outer), inner_batches=None)
    assert len(alive) == 12
    assert max(alive) <= 3  # the last estimate's, the one of this, and the one that this is compared with
