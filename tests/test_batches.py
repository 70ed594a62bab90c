"""Batches by random access: the batch of step t is the same however and whenever it is reached."""

from __future__ import annotations

from typing import Any

import pytest

import bilevel


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
