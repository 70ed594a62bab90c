"""Outer loops in which a number stops being finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fit_cases import (
    CURVATURE,
    FLOAT,
    INNER_RATE,
    OPTIMIZERS,
    START,
    checkpoint_of,
    contents,
    exact,
    lines_of,
    noisy_inner_batches,
    tensor,
    train,
    train_noisily,
    without_seconds,
)
from torch import Tensor
from torch.optim import lr_scheduler

import bilevel
from bilevel import (
    ForwardGradient,
    Phase,
    TruncatedReverse,
)
from bilevel.errors import NonFiniteError
from bilevel.optim.update_rule import Optimizer
from bilevel.training import (
    metrics,
)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("step", [0, 4])
def test_an_inner_loop_that_blows_up(step: int, accumulate: int, tmp_path: Path) -> None:
    """The checkpoint holds the last finite meta parameters; with the fault gone, the run goes on from there."""
    bad_draw, bad_inner_step = step * accumulate + accumulate - 1, 2

    def batches(draw: int) -> list[Tensor]:
        found = noisy_inner_batches(draw)
        return [b * float("inf") if (draw, t) == (bad_draw, bad_inner_step) else b for t, b in enumerate(found)]

    phases = [Phase(ForwardGradient(2), 6, accumulate=accumulate)]
    with pytest.raises(NonFiniteError, match=rf"outer step {step}\b.*inner step {bad_inner_step}\b") as caught:
        train_noisily(phases, inner_batches=batches, out=tmp_path)
    reached = train_noisily([Phase(phases[0].estimator, step, accumulate=accumulate)]) if step else None
    meta = START if reached is None else reached.meta

    assert caught.value.inner_step == bad_inner_step
    state = torch.zeros(3, dtype=FLOAT)
    for batch in batches(bad_draw)[:bad_inner_step]:
        state = state - INNER_RATE * CURVATURE * (state - meta - batch)
    torch.testing.assert_close(caught.value.last_finite_state, state)

    stored = checkpoint_of(tmp_path)
    assert torch.equal(stored["meta"][0], meta)
    assert stored["counters"]["outer_step"] == step
    assert len(lines_of(tmp_path)) == step if step else not (tmp_path / metrics.FILE).exists()
    before = contents(tmp_path)
    with pytest.raises(NonFiniteError, match=f"outer step {step}"):
        train_noisily(phases, inner_batches=batches, out=tmp_path, resume=True)
    assert contents(tmp_path) == before
    assert torch.equal(train_noisily(phases, out=tmp_path, resume=True).meta, train_noisily(phases).meta)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_an_outer_optimizer_that_blows_up(name: str, tmp_path: Path) -> None:
    """The checkpoint has its memory as it was before that step, too."""
    algorithm, settings, _ = OPTIMIZERS[name]

    def optimizer(factor: float) -> Optimizer:
        def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
            return lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 3 else factor)

        return bilevel.optimizer(algorithm, schedule=schedule, **settings)

    with pytest.raises(NonFiniteError, match=r"outer step 3\b.*smaller outer learning rate") as caught:
        train_noisily(optimizer=optimizer(float("inf")), out=tmp_path)
    assert caught.value.inner_step is None
    stored = checkpoint_of(tmp_path)
    clean = train_noisily([Phase(TruncatedReverse(2), 3)], optimizer=optimizer(1.0), out=tmp_path / "clean")
    assert torch.equal(stored["meta"][0], clean.meta)
    for name, value in checkpoint_of(tmp_path / "clean")["optimizer"]["state"][0].items():
        assert torch.equal(stored["optimizer"]["state"][0][name], value)
    assert without_seconds(lines_of(tmp_path)) == without_seconds(clean.history)
    # The schedule itself is not part of the configuration, so the fault can be put right.
    result = train_noisily(optimizer=bilevel.optimizer(algorithm, schedule=optimizer(1.0).schedule, **settings))
    assert torch.isfinite(result.meta).all()


def test_a_projection_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"outer step 0\b.*project"):
        train(exact(2), project=lambda phi: phi / 0, out=tmp_path)
    assert torch.equal(checkpoint_of(tmp_path)["meta"][0], START)


def test_meta_parameters_that_are_not_finite_to_start_with(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"meta\['b'\] holds NaN or infinity"):
        train(exact(2), {"a": START, "b": tensor(1.0, float("nan"))}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
