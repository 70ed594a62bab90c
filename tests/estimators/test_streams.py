"""Streams: an inner loop that goes on from window to window, with its state alone or with its tangents."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import tensor
from torch import Tensor

import bilevel
from bilevel import ForwardGradient, Phase, Reverse, StreamingForwardGradient, TruncatedReverse, randomness
from bilevel.directions import distributions as module
from bilevel.training.outer_loop import OuterStep

T, WINDOWS, N = 3, 4, 3
CARRIES: tuple[Any, ...] = ("same", "fresh")


def inner_loss(theta: Tensor, phi: Tensor, batch: Tensor) -> Tensor:
    kept = torch.nn.functional.dropout(theta, 0.3, training=True)  # random numbers of a step are those of its place
    return ((kept * theta).sum() - batch @ phi).square() + 0.1 * (theta - phi).square().sum()


def make(optimizer: Any = torch.optim.Adam) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        inner_loss,
        lambda theta, phi, batch: (theta.square() * batch).sum() + 0.1 * phi.square().sum(),
        torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64),
        bilevel.optimizer(optimizer, lr=0.1),
    )


PHI = tensor([0.4, 1.1, -0.7])
OUTER = tensor([1.0, 2.0, -0.5])
BATCHES = list(torch.randn(T * WINDOWS, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def windows(estimator: bilevel.Estimator, problem: Any = None, seed: int = 5) -> bilevel.Estimate:
    """The last of K windows at the same φ."""
    carried, estimate = None, None
    for k in range(WINDOWS):
        window = BATCHES[T * k : T * (k + 1)]
        estimate = estimator(problem or make(), PHI, window, OUTER, seed, carried=carried)
        carried = estimate.carried
    assert estimate is not None
    return estimate


def whole(estimator: bilevel.Estimator, problem: Any = None, seed: int = 5) -> bilevel.Estimate:
    """One window of as many steps."""
    return estimator(problem or make(), PHI, BATCHES, OUTER, seed)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("tangents", ["exact", "difference"])
@pytest.mark.parametrize("name", ["rademacher", "orthogonal"])
@pytest.mark.parametrize("variate", [None, bilevel.Constant(tensor([1.0, 0.0, 2.0]))])
def test_windows_with_carried_tangents_are_one_long_window(
    optimizer: Any, tangents: Any, name: str, variate: Any
) -> None:
    estimator = ForwardGradient(2, name, control_variate=variate, tangents=tangents)
    long = whole(estimator, make(optimizer))
    last = windows(
        StreamingForwardGradient(2, "same", name, control_variate=variate, tangents=tangents), make(optimizer)
    )
    assert torch.equal(last.value, long.value)
    assert last.grad.numpy() == pytest.approx(long.grad.numpy(), rel=1e-10, abs=1e-12)
    assert last.standard_error == pytest.approx(long.standard_error, rel=1e-10)
    assert last.carried is not None
    assert last.carried.steps == T * WINDOWS


@pytest.mark.parametrize("carry", ["same", "fresh"])
@pytest.mark.parametrize("tangents", ["exact", "difference"])
def test_chunks_carry_what_all_at_once_carry(carry: Any, tangents: Any) -> None:
    estimator = StreamingForwardGradient(3, carry, tangents=tangents)
    once = windows(estimator)
    for size in (1, 2):
        chunks = windows(replace(estimator, chunk_size=size))
        assert chunks.grad.numpy() == pytest.approx(once.grad.numpy(), rel=1e-12, abs=1e-14)
        assert chunks.carried is not None
        assert once.carried is not None
        for one, other in zip(chunks.carried.memory["tangents"], once.carried.memory["tangents"], strict=True):
            assert one.numpy() == pytest.approx(other.numpy(), rel=1e-12, abs=1e-14)


def test_all_coordinates_carried_give_the_exact_gradient_of_the_whole_history() -> None:
    exact = whole(Reverse()).grad
    assert windows(StreamingForwardGradient(N, "same", "coordinate")).grad.numpy() == pytest.approx(
        exact.numpy(), rel=1e-10
    )


def test_dropping_tangents_is_biased_and_is_what_truncation_gives() -> None:
    exact = whole(Reverse()).grad
    dropped = windows(ForwardGradient(N, "coordinate")).grad
    assert dropped.numpy() == pytest.approx(windows(Reverse()).grad.numpy(), rel=1e-10)
    assert dropped.numpy() == pytest.approx(whole(TruncatedReverse(T)).grad.numpy(), rel=1e-10)
    assert float((dropped - exact).norm() / exact.norm()) > 0.1


@pytest.mark.parametrize("estimator", [Reverse("sqrt"), Reverse("graph"), bilevel.Forward(), bilevel.HessianFree()])
def test_every_estimator_goes_on_from_where_the_window_before_ended(estimator: bilevel.Estimator) -> None:
    last, long = windows(estimator), whole(Reverse())
    assert torch.equal(last.value, long.value)
    assert torch.equal(last.state.params, long.state.params)


@pytest.mark.slow
def test_fresh_directions_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expectation itself: over every value that the directions of three windows can take, one direction each."""
    signs = [np.array([s], dtype=float) for s in itertools.product((-1, 1), repeat=N)]
    drawn: list[np.ndarray] = []
    fixed = replace(module.DISTRIBUTIONS["rademacher"], sample=lambda seed, indices, part: torch.from_numpy(drawn[0]))
    monkeypatch.setitem(module.DISTRIBUTIONS, "rademacher", fixed)
    mean = np.zeros(N)
    problem, estimator = make(torch.optim.SGD), StreamingForwardGradient(1)
    for rows in itertools.product(signs, repeat=3):
        carried, estimate = None, None
        for k, row in enumerate(rows):
            drawn[:] = [row]
            estimate = estimator(problem, PHI, BATCHES[T * k : T * (k + 1)], OUTER, 5, carried=carried)
            carried = estimate.carried
        assert estimate is not None
        mean += estimate.grad.numpy() / len(signs) ** 3
    exact = Reverse()(problem, PHI, BATCHES[: 3 * T], OUTER, 5).grad
    truncated = TruncatedReverse(T)(problem, PHI, BATCHES[: 3 * T], OUTER, 5).grad
    assert mean == pytest.approx(exact.numpy(), rel=1e-9)
    assert float((truncated - exact).norm() / exact.norm()) > 0.1  # so that the past matters


@pytest.mark.slow
def test_fresh_directions_know_their_error() -> None:
    exact = whole(Reverse()).grad
    found = [windows(StreamingForwardGradient(3, draw=draw)) for draw in range(200)]
    errors = np.array([float((f.grad - exact).square().sum()) for f in found])
    claimed = np.array([(f.standard_error or 0.0) ** 2 for f in found])
    spread = np.hypot(errors.std(ddof=1), claimed.std(ddof=1)) / np.sqrt(len(found))
    assert abs(errors.mean() - claimed.mean()) < 4 * spread
    labels = [f.carried.memory["labels"] for f in found[:2]]  # type: ignore[union-attr]
    assert not torch.equal(labels[0][0], labels[1][0])


@pytest.mark.parametrize("draw", [0, 1])
def test_fresh_labels_are_the_old_ones_rescaled_by_the_lengths_and_new_signs(draw: int) -> None:
    """Labels are l' = l/a + u with a = √(‖l‖ ‖Γu‖/(‖y‖ ‖u‖)), and ‖Γu‖ is the first window's in all windows."""
    count, carried, drawn, first, found = 2, None, [], None, []
    for k in range(WINDOWS):
        estimator = StreamingForwardGradient(count, draw=draw)
        window = BATCHES[T * k : T * (k + 1)]
        estimate = estimator(make(torch.optim.SGD), PHI, window, OUTER, 5, carried=carried)
        after = estimate.carried
        assert after is not None
        assert after.steps == T * (k + 1)
        labels, tangents = (torch.cat([t.flatten(1) for t in after.memory[kept]], 1) for kept in ("labels", "tangents"))
        fresh = labels
        if found:
            old, y = found[-1]
            balance = float((old.norm() * first / (y.norm() * (count * N) ** 0.5)).sqrt())
            fresh = labels - old / balance
        first = tangents.norm() if first is None else first
        assert after.memory["first_norm"] == pytest.approx(float(first), rel=1e-12)
        assert fresh.abs().numpy() == pytest.approx(np.ones((count, N)), rel=1e-10)
        drawn.append(fresh.sign())
        found.append((labels, tangents))
        carried = after
    assert len({tuple(signs.flatten().tolist()) for signs in drawn}) == WINDOWS  # each window draws its own
    lengths = [float(tangents.norm()) for _, tangents in found]
    assert max(lengths) > 1.05 * min(lengths)  # so that it matters whose length is taken


@pytest.mark.parametrize("carry", CARRIES)
def test_other_draws_of_a_stream_are_other_directions_of_the_same_history(carry: Any) -> None:
    first, again, other = (windows(StreamingForwardGradient(2, carry, draw=draw)) for draw in (1, 1, 2))
    assert torch.equal(first.grad, again.grad)
    assert not torch.equal(first.grad, other.grad)
    assert torch.equal(first.value, other.value)


def test_a_stream_keeps_counting_its_steps_through_estimators() -> None:
    """Dropout of a step goes by its place in the whole history, also where another estimator takes over."""
    carried, values = None, []
    estimators = (
        Reverse(),
        ForwardGradient(2),
        StreamingForwardGradient(2, carry="fresh"),
        StreamingForwardGradient(2, carry="same"),
    )
    for k, estimator in enumerate(estimators):
        if carried is not None and k == 3:  # tangents with labels do not go on along the same directions
            carried = replace(carried, memory=None)
        estimate = estimator(make(), PHI, BATCHES[T * k : T * (k + 1)], OUTER, 5, carried=carried)
        carried = estimate.carried
        assert carried is not None
        assert carried.steps == T * (k + 1)
        values.append(estimate.value)
    assert torch.equal(values[-1], whole(Reverse()).value)


# -- in fit --------------------------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    pass


def fit(estimators: list[Any], out: Path | None = None, stop_at: int = 99, resume: bool = False, **more: Any) -> Any:
    def stop(step: OuterStep) -> None:
        if step.number > stop_at:
            raise Stop

    return bilevel.fit(
        make(),
        PHI,
        lambda draw: BATCHES[T * (draw % WINDOWS) : T * (draw % WINDOWS + 1)],
        OUTER,
        phases=[Phase(estimator, steps=4) for estimator in estimators],
        optimizer=more.pop("optimizer", bilevel.optimizer(torch.optim.SGD, lr=1e-2)),
        callbacks=[stop],
        out=None if out is None else bilevel.RunFolder(out, resume=resume),
        progress=False,
        stream=more.pop("stream", True),
        **more,
    )


def numbers(result: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]


@pytest.mark.parametrize(
    "estimators",
    [
        [ForwardGradient(2), ForwardGradient(2, "gaussian")],
        *([StreamingForwardGradient(2, carry), StreamingForwardGradient(2, carry, "gaussian")] for carry in CARRIES),
    ],
    ids=["nothing", *CARRIES],
)
def test_a_stream_resumes_exactly(estimators: list[bilevel.Estimator], tmp_path: Path) -> None:
    straight = fit(estimators)
    with pytest.raises(Stop):
        fit(estimators, tmp_path, stop_at=3)
    resumed = fit(estimators, tmp_path, resume=True)
    assert torch.equal(straight.meta, resumed.meta)
    assert numbers(straight) == numbers(resumed)


def test_a_stream_without_outer_movement_is_one_history() -> None:
    still = bilevel.optimizer(torch.optim.SGD, lr=1e-300)
    result = fit([StreamingForwardGradient(N, "same", "coordinate")], optimizer=still)
    seed = randomness.derive(0, randomness.DRAW, 0, 0)
    exact = whole(Reverse(), seed=seed)
    assert result.history[-1]["outer_loss"] == float(exact.value)
    assert result.history[-1]["grad_norm"] == pytest.approx(float(exact.grad.norm()), rel=1e-10)
    losses = {fit([Reverse()], optimizer=still, stream=s).history[-1]["outer_loss"] for s in (True, False)}
    assert len(losses) == 2  # without stream every window starts from the beginning


def test_tangents_begin_with_the_phase_that_carries_them() -> None:
    assert len(fit([Reverse(), StreamingForwardGradient(2)]).history) == 8


# -- what is refused -----------------------------------------------------------------------------------------------


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="takes no control_variate"):
        StreamingForwardGradient(4, control_variate=Reverse())
    with pytest.raises(ValueError, match="independent directions"):
        StreamingForwardGradient(4, distribution="orthogonal")
    with pytest.raises(ValueError, match="would bring a bias"):
        StreamingForwardGradient(4, "same", control_variate=bilevel.RunningMean())
    with pytest.raises(ValueError, match="'exact', 'difference'"):
        StreamingForwardGradient(4, tangents="shared")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="carry="):
        StreamingForwardGradient(4, carry="everything")  # type: ignore[arg-type]


def test_what_cannot_be_carried_on() -> None:
    first = StreamingForwardGradient(2, "same")(make(), PHI, BATCHES[:T], OUTER)
    with pytest.raises(ValueError, match="directions=3, but carried holds the tangents of 2"):
        StreamingForwardGradient(3, "same")(make(), PHI, BATCHES[:T], OUTER, carried=first.carried)
    with pytest.raises(ValueError, match="whose directions are not kept"):
        StreamingForwardGradient(2)(make(), PHI, BATCHES[:T], OUTER, carried=first.carried)
    other = replace(first.carried, memory=[torch.zeros(2)])  # type: ignore[type-var]
    with pytest.raises(ValueError, match="memory of another estimator"):
        StreamingForwardGradient(2)(make(), PHI, BATCHES[:T], OUTER, carried=other)
    box = bilevel.BlackBox(lambda phi: phi.square(), lambda state, phi, batch: state.sum())
    with pytest.raises(ValueError, match="BlackBox solves from the beginning"):
        bilevel.ZerothOrder(2)(box, PHI, carried=first.carried)
    with pytest.raises(ValueError, match="BlackBox solves from the beginning"):
        bilevel.fit(box, PHI, phases=[Phase(bilevel.ZerothOrder(2), 1)], stream=True, progress=False)
