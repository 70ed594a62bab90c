"""The assignment of the parts of an estimate to workers, such that all workers finish at about the same time.

The parts are the control variates and the directions. Every worker computes the assignment by itself, from numbers that
all of them have. Each part in turn goes to the worker with the least work so far. With equal parts, part i goes to
worker i mod size. A worker that computes a control variate takes fewer directions.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WHOLE_LOOP, DIRECTION = 1.0, 2.0
"""The cost of a chunk in inner gradients per inner step: of the plain inner loop, and of each direction."""


@dataclass(frozen=True)
class Assignment:
    """The worker of each chunk of directions and of each control variate."""

    chunks: list[range]
    """The numbers of the directions that are pushed together, in order."""
    owners: list[int]
    """The rank of the worker that pushes each chunk."""
    variates: list[int | None]
    """The rank of the worker that computes each control variate; `None` where it costs nothing and all compute it."""

    def chunks_of(self, rank: int) -> list[range]:
        """Return the chunks of a worker."""
        return [chunk for chunk, owner in zip(self.chunks, self.owners, strict=True) if owner == rank]

    @property
    def longest_chunk(self) -> int:
        """The number of directions in the longest chunk of all."""
        return max(len(chunk) for chunk in self.chunks)

    def numbers_of(self, rank: int) -> list[int]:
        """Return the numbers of the directions of a worker."""
        return [number for chunk in self.chunks_of(rank) for number in chunk]

    def variates_of(self, rank: int) -> list[int]:
        """Return the numbers of the control variates that a worker computes."""
        return [number for number, owner in enumerate(self.variates) if owner in (rank, None)]


def assign(
    count: int,
    size: int,
    chunk_size: int | None = None,
    variates: Sequence[float] = (),
    begun: float = WHOLE_LOOP,
    each: float = DIRECTION,
) -> Assignment:
    """Assign directions and control variates to workers.

    Args:
        count: the number of directions.
        size: the number of workers.
        chunk_size: the largest number of directions that are pushed together; `None` for no limit. With at most
            ⌈count/size⌉, the chunks are the same for any number of workers. With more, or with `None`, the directions
            of a worker make up one chunk if the chunk size allows it.
        variates: the cost of each control variate, in inner gradients per inner step.
        begun: the cost of a chunk without directions. A chunk of k directions costs `begun` + k · `each`.
        each: the cost of each direction.

    >>> assign(7, 2, chunk_size=2).owners
    [0, 1, 0, 1]
    >>> assign(16, 2).chunks, assign(16, 2, variates=[8.0]).chunks
    ([range(0, 8), range(8, 16)], [range(0, 6), range(6, 16)])
    """
    loads = [0.0] * size
    owners = [_to_least(loads, [cost])[0] if cost > 0 else None for cost in variates]
    if chunk_size is not None and chunk_size <= -(-count // size):
        chunks = _pieces(range(count), chunk_size)
        return Assignment(chunks, _to_least(loads, [begun + each * len(chunk) for chunk in chunks]), owners)
    taken = Counter(_to_least([load + begun for load in loads], [each] * count))
    chunks, chunk_owners, start = [], [], 0
    for rank in range(size):
        mine = range(start, start + taken[rank])
        start = mine.stop
        for piece in _pieces(mine, chunk_size or count):
            chunks.append(piece)
            chunk_owners.append(rank)
    return Assignment(chunks, chunk_owners, owners)


def _to_least(loads: list[float], costs: Iterable[float]) -> list[int]:
    """Give each part in turn to the worker with the least load; return the ranks and add the costs to the loads."""
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
