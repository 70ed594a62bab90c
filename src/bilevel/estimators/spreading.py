"""Directions spread over workers: each pushes its own chunks, and all slopes come together on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel import trees
from bilevel.diagnosis import require_finite
from bilevel.distributed import Workers
from bilevel.trees import Tree
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


def all_rows(
    what: str, count: int, chunk: int, mine: Sequence[list[Tensor]], state: Tree, workers: Workers
) -> list[Tensor]:
    """Tangents `[count, *leaf.shape]` of all directions, a stack for each leaf of a state, from everybody's chunks."""
    leaves = trees.split(state).differentiable
    if workers.size > 1 and any(map(trees.is_spread, leaves)):
        raise ValueError(
            "the tangents of a sharded inner model are carried on by one worker alone; pass sharers=bilevel.Workers(), "
            'or take carry="nothing"'
        )
    own = (
        [torch.cat(parts) for parts in zip(*mine, strict=True)] if mine else [t.new_zeros(0, *t.shape) for t in leaves]
    )
    if workers.size == 1:
        return own
    starts = range(0, count, chunk)
    most = -(-len(starts) // workers.size) * chunk
    result = []
    for rows in own:
        received = workers.gather_rows(what, torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]))
        # Worker r's chunks are r, r + size, …: taken in turns they come in their order.
        turns = received.unflatten(1, (-1, chunk)).transpose(0, 1)
        pieces = [
            turns[i // workers.size, i % workers.size, : min(chunk, count - start)] for i, start in enumerate(starts)
        ]
        result.append(torch.cat(pieces))
    return result


def agreed_state(state: Tree, workers: Workers) -> Tree:
    """The first worker's: those of others, who had other directions for company, may differ in their last bits, and so
    would what begins there.
    """
    parts = trees.split(state)
    mine = [*parts.differentiable, *parts.other]
    firsts = workers.broadcast_tensors("the state", [trees.local(t) for t in mine])
    tensors = [trees.spread_like(t, like) for t, like in zip(firsts, mine, strict=True)]
    count = len(parts.differentiable)
    return parts.rebuild(tensors[:count], tensors[count:])


def gathered(what: str, count: int, mine: Sequence[Tensor], workers: Workers) -> Tensor:
    """All `[count]` numbers from each worker's share of them."""
    if workers.size == 1:
        return torch.stack(list(mine))
    sent = torch.zeros(-(-count // workers.size), dtype=torch.float64)
    sent[: len(mine)] = torch.tensor([float(value) for value in mine])
    return workers.gather(what, sent).T.reshape(-1)[:count]
