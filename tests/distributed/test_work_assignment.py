"""How an estimate's parts are dealt out: everything once, and to everybody about as much."""

from __future__ import annotations

from itertools import chain

import pytest

from bilevel.distributed.work_assignment import DIRECTION, WHOLE_LOOP, Assignment, assign

COUNTS, SIZES, CHUNK_SIZES = (1, 2, 7, 16, 64), (1, 2, 3, 8), (None, 1, 2, 3, 100)
VARIATES = ((), (5.0,), (0.0, 1.0), (2.5, 40.0, 1.0))


def load_of(dealt: Assignment, rank: int, costs: tuple[float, ...]) -> float:
    pushed = sum(WHOLE_LOOP + DIRECTION * len(chunk) for chunk in dealt.chunks_of(rank))
    return pushed + sum(costs[number] for number in dealt.variates_of(rank))


@pytest.mark.parametrize("variates", VARIATES)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_everything_is_dealt_once(count: int, size: int, chunk_size: int | None, variates: tuple[float, ...]) -> None:
    dealt = assign(count, size, chunk_size, variates)
    assert list(chain.from_iterable(dealt.chunks)) == list(range(count))
    assert sorted(chain.from_iterable(dealt.numbers_of(rank) for rank in range(size))) == list(range(count))
    assert all(0 < len(chunk) <= (chunk_size or count) for chunk in dealt.chunks)
    owners = [[rank for rank in range(size) if number in dealt.variates_of(rank)] for number in range(len(variates))]
    for cost, those in zip(variates, owners, strict=True):
        assert len(those) == (1 if cost else size)  # what costs nothing, everybody has


@pytest.mark.parametrize("variates", VARIATES)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_nobody_has_more_than_one_part_too_many(size: int, chunk_size: int | None, variates: tuple[float, ...]) -> None:
    dealt = assign(64, size, chunk_size, variates)
    loads = [load_of(dealt, rank, variates) for rank in range(size)]
    largest = WHOLE_LOOP + DIRECTION * (chunk_size or 1)
    for rank, load in enumerate(loads):
        if dealt.chunks_of(rank):  # without its last part it had no more than anybody has in the end
            assert load - largest <= min(loads)


def test_chunks_do_not_depend_on_the_workers_if_they_are_small_enough() -> None:
    for size in SIZES:
        assert assign(64, size, 8, [7.0]).chunks == assign(64, 1, 8).chunks
        assert assign(64, size, 8).owners == [number % size for number in range(8)]


def test_who_computes_a_variate_takes_fewer_directions() -> None:
    alone, shared = assign(16, 2), assign(16, 2, variates=[8.0])
    assert [len(alone.numbers_of(rank)) for rank in range(2)] == [8, 8]
    assert [len(shared.numbers_of(rank)) for rank in range(2)] == [6, 10]  # 8 + 1 + 12 and 1 + 20 units
    assert [len(assign(4, 2, variates=[100.0]).numbers_of(rank)) for rank in range(2)] == [0, 4]
