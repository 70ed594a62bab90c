"""Persistent evolution strategies: unbiased over all windows, its definition by hand, and streams that start over."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import affine, tensor
from torch import Tensor

import bilevel
from bilevel import PersistentES, Reverse, ZerothOrder
from bilevel.directions import distributions as module
from bilevel.training.outer_loop import OuterStep

T, WINDOWS = 2, 3
CASE = affine("", T=T * WINDOWS, M=3, N=2)
OUTER = tensor(CASE.outer.a)
BATCHES: Any = CASE.inner_batches


def window(k: int) -> Any:
    return BATCHES[T * k : T * (k + 1)]


def without_derivatives() -> bilevel.Problem:
    """The same steps, taken out of PyTorch."""
    made: Any = CASE.problem

    def step(state: Any, meta: Tensor, batch: Tensor) -> Any:
        plain = made.step({name: t.detach() for name, t in state.items()}, meta.detach(), batch)
        return {name: torch.from_numpy(np.array(t.numpy())) for name, t in plain.items()}

    return bilevel.Problem(made.init, step, made.outer_loss)


def windows(estimator: bilevel.Estimator, problem: Any = None, seed: int = 0) -> list[bilevel.Estimate]:
    carried, found = None, []
    for k in range(WINDOWS):
        found.append(estimator(problem or CASE.problem, CASE.meta, window(k), OUTER, seed, carried=carried))
        carried = found[-1].carried
    return found


def exact(k: int) -> np.ndarray:
    """The gradient of the outer loss at the end of window k through the whole history."""
    return Reverse()(CASE.problem, CASE.meta, BATCHES[: T * (k + 1)], OUTER).grad.numpy()


def truncated(k: int) -> np.ndarray:
    return windows(Reverse())[k].grad.numpy()


def every_outcome(estimator: PersistentES, monkeypatch: pytest.MonkeyPatch) -> list[list[np.ndarray]]:
    """The estimates of each window, for every value that the signs of three windows can take."""
    signs, drawn = [np.array([s], dtype=float) for s in itertools.product((-1, 1), repeat=2)], []
    fixed = replace(module.DISTRIBUTIONS["rademacher"], sample=lambda seed, indices, part: torch.from_numpy(drawn[0]))
    monkeypatch.setitem(module.DISTRIBUTIONS, "rademacher", fixed)
    outcomes = []
    for rows in itertools.product(signs, repeat=WINDOWS):
        carried, grads = None, []
        for k in range(WINDOWS):
            drawn[:] = [rows[0] if estimator.carry == "same" else rows[k]]
            estimate = estimator(CASE.problem, CASE.meta, window(k), OUTER, carried=carried)
            carried = estimate.carried
            grads.append(estimate.grad.numpy())
        outcomes.append(grads)
    return outcomes


@pytest.mark.parametrize("carry", ["fresh", "same"])
def test_every_window_is_unbiased_through_the_whole_history(carry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expectation itself, over all directions; the outer loss is quadratic, so differences have no bias."""
    outcomes = every_outcome(PersistentES(1, 0.5, carry), monkeypatch)
    for k in range(WINDOWS):
        mean = np.mean([grads[k] for grads in outcomes], axis=0)
        assert mean == pytest.approx(exact(k), rel=1e-9)
    assert np.linalg.norm(truncated(2) - exact(2)) > 0.05 * np.linalg.norm(exact(2))  # so that the past matters


def test_fresh_directions_have_the_variance_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    def variance(carry: Any, k: int) -> float:
        outcomes = every_outcome(PersistentES(1, 0.5, carry), monkeypatch)
        return float(np.mean([np.square(grads[k] - exact(k)).sum() for grads in outcomes]) / np.square(exact(k)).sum())

    assert variance("same", 2) == pytest.approx(1, rel=1e-9)  # (N − 1)/b
    assert variance("fresh", 0) == pytest.approx(1, rel=1e-9)
    assert variance("fresh", 2) > 1.5 * variance("same", 2)


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["fresh", "same"])
def test_steps_without_derivatives_are_unbiased_within_the_standard_error(carry: Any) -> None:
    problem, truth = without_derivatives(), sum(exact(k) for k in range(WINDOWS))
    sums, gaps = [], []
    for draw in range(150):
        found = windows(PersistentES(2, 0.1, carry, draw=draw), problem)
        sums.append(sum(each.grad.numpy() for each in found))
        gap = float(np.square(found[-1].grad.numpy() - exact(WINDOWS - 1)).sum())
        gaps.append((found[-1].standard_error or 0.0) ** 2 - gap)
    grads = np.stack(sums)
    error = grads.std(0, ddof=1) / np.sqrt(len(grads))
    assert np.all(np.abs(grads.mean(0) - truth) < 4 * error)
    assert np.all(4 * error < np.linalg.norm(truth))  # the sample is not too small to mean anything
    assert abs(np.mean(gaps)) < 4 * np.std(gaps, ddof=1) / np.sqrt(len(gaps))  # the claimed errors are right on average


def test_kept_directions_are_differences_of_whole_solves() -> None:
    last = windows(PersistentES(2, 0.1, "same"), seed=3)[-1]
    whole = ZerothOrder(2, 0.1)(CASE.problem, CASE.meta, BATCHES, OUTER, 3)
    assert last.grad.numpy() == pytest.approx(whole.grad.numpy(), rel=1e-10)
    assert torch.equal(last.value, whole.value)


def test_it_is_the_formula_of_pes() -> None:
    """With ξ the sum of the noise so far: mean of ξ (h⁺ − h⁻)/2 / σ², each pair going on from its own states."""
    sigma, made = 0.3, CASE.problem
    found = windows(PersistentES(2, sigma), seed=1)
    labels = [estimate.carried.memory["labels"][0] for estimate in found]  # type: ignore[union-attr]
    noise = [sigma * (now - before) for now, before in zip(labels, [torch.zeros(2, 2), *labels[:-1]], strict=True)]
    assert not torch.equal(noise[0], noise[1])
    assert all(torch.equal(each.abs(), torch.full((2, 2), sigma, dtype=torch.float64)) for each in noise[:1])
    states: Any = {}
    for k in range(WINDOWS):
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(2):
            losses = {}
            for sign in (1, -1):
                phi = CASE.meta + sign * noise[k][i]
                state = states.get((i, sign)) or made.init(phi)
                for batch in window(k):
                    state = made.step(state, phi, batch)
                states[i, sign], losses[sign] = state, made.outer_loss(state, phi, OUTER)
            total += sum(each[i] for each in noise[: k + 1]) * (losses[1] - losses[-1]) / 2 / sigma**2 / 2
        torch.testing.assert_close(found[k].grad, total, rtol=1e-10, atol=1e-12)


# -- in fit ------------------------------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    pass


def fit(
    estimator: bilevel.Estimator, out: Path | None = None, stop_at: int = 99, resume: bool = False, **more: Any
) -> Any:
    def stop(step: OuterStep) -> None:
        if step.number > stop_at:
            raise Stop

    return bilevel.fit(
        more.pop("problem", CASE.problem),
        CASE.meta,
        lambda draw: window(draw % WINDOWS),
        OUTER,
        estimator=estimator,
        steps=8,
        stream=more.pop("stream", WINDOWS),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=more.pop("lr", 1e-2)),
        callbacks=[stop],
        out=None if out is None else bilevel.RunFolder(out, resume=resume),
        progress=False,
        **more,
    )


@pytest.mark.parametrize("stop_at", [2, 3, 4])
@pytest.mark.parametrize("estimator", [PersistentES(2), PersistentES(2, carry="same")], ids=["PES", "NRES"])
def test_a_stream_that_starts_over_resumes_exactly(estimator: PersistentES, stop_at: int, tmp_path: Path) -> None:
    straight = fit(estimator)
    with pytest.raises(Stop):
        fit(estimator, tmp_path, stop_at=stop_at)
    resumed = fit(estimator, tmp_path, resume=True)
    assert torch.equal(straight.meta, resumed.meta)
    assert [row["outer_loss"] for row in straight.history] == [row["outer_loss"] for row in resumed.history]


def test_a_stream_starts_over_after_so_many_windows() -> None:
    losses = [row["outer_loss"] for row in fit(PersistentES(2), lr=1e-300).history]
    assert losses[:WINDOWS] == losses[WINDOWS : 2 * WINDOWS]
    assert len(set(losses[:WINDOWS])) == WINDOWS
    endless = [row["outer_loss"] for row in fit(PersistentES(2), lr=1e-300, stream=True).history]
    assert endless[:WINDOWS] == losses[:WINDOWS]
    assert endless[WINDOWS] != losses[WINDOWS]
    norms = [row["grad_norm"] for row in fit(PersistentES(2, distribution="gaussian"), lr=1e-300).history]
    assert norms[0] != norms[WINDOWS]  # the directions are other ones


def test_each_history_has_random_numbers_of_its_own() -> None:
    made: Any = CASE.problem
    random_start = bilevel.Problem(
        lambda phi: {**made.init(phi), "theta": torch.randn(3, dtype=torch.float64)}, made.step, made.outer_loss
    )
    losses = [row["outer_loss"] for row in fit(Reverse(), lr=1e-300, problem=random_start).history]
    assert len(set(losses)) == 8


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="distribution='orthogonal'"):
        PersistentES(2, distribution="orthogonal")
    first = PersistentES(2)(CASE.problem, CASE.meta, window(0), OUTER)
    with pytest.raises(ValueError, match="directions=3, but carried holds 2 pairs"):
        PersistentES(3)(CASE.problem, CASE.meta, window(1), OUTER, carried=first.carried)
    other = bilevel.StreamingForwardGradient(2)(CASE.problem, CASE.meta, window(0), OUTER)
    with pytest.raises(ValueError, match="not the copies of the inner loop"):
        PersistentES(2)(CASE.problem, CASE.meta, window(1), OUTER, carried=other.carried)
    for stream in (0, 1.5):
        with pytest.raises(ValueError, match="stream="):
            fit(PersistentES(2), stream=stream)
