"""Directions spread over workers: each pushes its own chunks, and all slopes come together on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel import trees
from bilevel.diagnosis import require_finite
from bilevel.distributed import Workers
from bilevel.unroll import Slopes, Unroll


def spread_slopes(
    run: Unroll, count: int, chunk: int, push: Callable[[Sequence[range]], Slopes], workers: Workers
) -> Slopes:
    """The slopes of all `count` directions, chunk j pushed by worker j mod size; `push` takes the chunks' numbers.

    Which numbers share a chunk has an effect on their last bits, and which worker has the chunk none. The outer loss is
    the first worker's.
    """
    starts = range(0, count, chunk)

    def mine() -> Slopes:
        chunks = [range(starts[i], min(starts[i] + chunk, count)) for i in workers.share(len(starts))]
        if not chunks:  # more workers than chunks
            return Slopes(*run.value(), trees.leaves(run.meta)[0].new_zeros(0), False)
        pushed = push(chunks)
        if workers.size > 1:  # while it is known whose they are
            require_finite(run, pushed.value, pushed.state, pushed.slopes)
        return pushed

    pushed = workers.together("directions", mine)
    if workers.size == 1:
        return pushed
    most = -(-len(starts) // workers.size) * chunk
    sent = torch.zeros(2 + most, dtype=torch.float64)
    sent[0], sent[1], sent[2 : 2 + len(pushed.slopes)] = pushed.value, pushed.moved, pushed.slopes.cpu()
    received = workers.gather("slopes", sent)
    slopes = received.new_empty(count)
    taken = [2] * workers.size
    for number, start in enumerate(starts):
        owner, length = number % workers.size, min(chunk, count - start)
        slopes[start : start + length] = received[owner, taken[owner] : taken[owner] + length]
        taken[owner] += length
    return Slopes(received[0, 0].to(pushed.value), pushed.state, slopes.to(pushed.slopes), bool(received[:, 1].any()))


def gathered(what: str, count: int, mine: Sequence[Tensor], workers: Workers) -> Tensor:
    """All `[count]` numbers from each worker's share of them."""
    if workers.size == 1:
        return torch.stack(list(mine))
    sent = torch.zeros(-(-count // workers.size), dtype=torch.float64)
    sent[: len(mine)] = torch.tensor([float(value) for value in mine])
    return workers.gather(what, sent).T.reshape(-1)[:count]
