"""Who does which part of an estimate, so that all are done at about the same time.

The parts are the control variates and the directions. Every worker works the deal out for itself, from numbers that
all of them have, so nobody has to be told. Each part in turn goes to the worker who has least so far: with equal parts,
part i to worker i mod size; and whoever has a control variate to compute takes fewer directions.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WHOLE_LOOP, DIRECTION = 1.0, 2.0
"""What a chunk costs, in inner gradients for each inner step: the plain inner loop, and each direction."""


@dataclass(frozen=True)
class Deal:
    """Who has what."""

    chunks: list[range]
    """Directions that are pushed together, by their numbers, in order."""
    owners: list[int]
    """Whose each chunk is."""
    variates: list[int | None]
    """Whose each control variate is; `None` where it costs nothing, so that everybody has it."""

    def chunks_of(self, rank: int) -> list[range]:
        """A worker's chunks."""
        return [chunk for chunk, owner in zip(self.chunks, self.owners, strict=True) if owner == rank]

    @property
    def longest_chunk(self) -> int:
        """The number of directions in the longest chunk of all."""
        return max(len(chunk) for chunk in self.chunks)

    def numbers_of(self, rank: int) -> list[int]:
        """The directions of a worker."""
        return [number for chunk in self.chunks_of(rank) for number in chunk]

    def variates_of(self, rank: int) -> list[int]:
        """The control variates that a worker computes."""
        return [number for number, owner in enumerate(self.variates) if owner in (rank, None)]


def deal(
    count: int,
    size: int,
    chunk_size: int | None = None,
    variates: Sequence[float] = (),
    begun: float = WHOLE_LOOP,
    each: float = DIRECTION,
) -> Deal:
    """Deal `count` directions and control variates of these costs out to `size` workers.

    A chunk of k directions costs `begun` + k · `each`. With a `chunk_size` of at most ⌈count/size⌉, chunks are the same
    for any number of workers; with a larger one, or none, every worker's directions make up one chunk if they fit.

    >>> deal(7, 2, chunk_size=2).owners
    [0, 1, 0, 1]
    >>> deal(16, 2).chunks, deal(16, 2, variates=[8.0]).chunks
    ([range(0, 8), range(8, 16)], [range(0, 6), range(6, 16)])
    """
    loads = [0.0] * size
    owners = [_to_least(loads, [cost])[0] if cost > 0 else None for cost in variates]
    if chunk_size is not None and chunk_size <= -(-count // size):
        chunks = _pieces(range(count), chunk_size)
        return Deal(chunks, _to_least(loads, [begun + each * len(chunk) for chunk in chunks]), owners)
    taken = Counter(_to_least([load + begun for load in loads], [each] * count))
    chunks, chunk_owners, start = [], [], 0
    for rank in range(size):
        mine = range(start, start + taken[rank])
        start = mine.stop
        for piece in _pieces(mine, chunk_size or count):
            chunks.append(piece)
            chunk_owners.append(rank)
    return Deal(chunks, chunk_owners, owners)


def _to_least(loads: list[float], costs: Iterable[float]) -> list[int]:
    """Whose each part is, every one in turn going to the worker with the least load, which grows by it."""
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = []
    for cost in costs:
        load, rank = heap[0]
        heapq.heapreplace(heap, (load + cost, rank))
        loads[rank] = load + cost
        owners.append(rank)
    return owners


def _pieces(numbers: range, length: int) -> list[range]:
    return [numbers[i : i + length] for i in range(0, len(numbers), length)]
