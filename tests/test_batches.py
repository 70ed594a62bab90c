"""Batches by random access: the batch of step t is the same however and whenever it is reached."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import bilevel
from bilevel.batches import require_batches


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sequence_like_any_other(steps: int) -> None:
    computed = bilevel.batches(lambda t: t * t, steps)
    expected = [t * t for t in range(steps)]
    assert len(computed) == steps
    assert list(computed) == expected
    assert list(reversed(computed)) == expected[::-1]
    assert [computed[-t] for t in range(1, steps + 1)] == expected[::-1]
    for piece in (slice(None), slice(1, None), slice(None, None, -1), slice(0, 100, 2), slice(-2, None)):
        assert computed[piece] == expected[piece]


@pytest.mark.parametrize("index", [3, -4, 100])
def test_there_is_nothing_beyond_the_ends(index: int) -> None:
    with pytest.raises(IndexError, match=f"batch {index} of 3"):
        bilevel.batches(lambda t: t, 3)[index]


def test_nothing_is_computed_before_it_is_asked_for_nor_kept() -> None:
    asked: list[int] = []

    def get(t: int) -> Any:
        asked.append(t)
        return t

    computed = bilevel.batches(get, 1000)
    assert asked == []
    assert (computed[3], computed[3], computed[-1]) == (3, 3, 999)
    assert asked == [3, 3, 999]


def test_no_batches() -> None:
    assert list(bilevel.no_batches(3)) == [None] * 3


@pytest.mark.parametrize("steps", [1, 3, numpy.int64(3)])
def test_a_whole_number_means_so_many_steps_without_data(steps: int) -> None:
    made = require_batches(steps)
    assert [made[t] for t in range(len(made))] == [None] * int(steps)


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_number_of_steps_is_at_least_one(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"inner_batches={wrong}: a whole number of at least 1"):
        require_batches(wrong)


@pytest.mark.parametrize("wrong", [True, 2.0, torch.tensor(3)])
def test_other_numbers_are_no_batches(wrong: Any) -> None:
    with pytest.raises(TypeError, match="the whole number T for T steps without data"):
        require_batches(wrong)


def test_every_verb_takes_a_whole_number_for_a_problem_without_data() -> None:
    problem = bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
        outer_loss=lambda theta, phi, batch: theta.square().sum(),
        params=torch.zeros(3, dtype=torch.float64),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    phi = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(bilevel.Reverse()(problem, phi, 4).grad, 2 * (1 - 0.5**4) ** 2 * phi)
    coarser = bilevel.ForwardGradient(2, control_variate=bilevel.CoarserProblem(steps=2))
    assert torch.equal(coarser(problem, phi, 4).grad, coarser(problem, phi, [None] * 4).grad)
    assert bilevel.plan(problem, phi, 4, memory="1GB").steps == 4
    (row,) = bilevel.compare(problem, phi, 4, estimators=[bilevel.Auto("1GB")])
    assert row.relative_error < 1e-12
