"""Directions and control variates spread over workers: each does its share, and all have everything in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel import trees
from bilevel.distributed.work_assignment import Assignment
from bilevel.distributed.workers import Workers
from bilevel.trees import Tree
from bilevel.unrolling.diagnosis import require_finite
from bilevel.unrolling.tangents import Slopes
from bilevel.unrolling.unroll import Unroll


def spread_slopes(
    run: Unroll,
    deal: Assignment,
    push: Callable[[Sequence[range]], Slopes],
    variate: Callable[[int], list[Tensor]],
    workers: Workers,
) -> tuple[Slopes, list[list[Tensor]]]:
    """The slopes of all directions, and all control variates' gradients.

    `push` takes a worker's chunks, `variate` the number of a control variate. Which numbers share a chunk has an effect
    on their last bits, and which worker has the chunk none. The outer loss is the first worker's.
    """

    def mine() -> tuple[Slopes, dict[int, list[Tensor]]]:
        computed = {number: variate(number) for number in deal.variates_of(workers.rank)}
        chunks = deal.chunks_of(workers.rank)
        if not chunks:  # more workers than chunks
            return Slopes(*run.value(), trees.leaves(run.meta)[0].new_zeros(0), False), computed
        pushed = push(chunks)
        if workers.size > 1:  # while it is known whose they are
            require_finite(run, pushed.value, pushed.state, pushed.slopes)
        return pushed, computed

    pushed, computed = workers.together("directions", mine)
    variates = everybodys_variates(run, deal, computed, workers)
    if workers.size == 1:
        return pushed, variates
    first_two = torch.tensor([float(pushed.value), float(pushed.moved)], dtype=torch.float64, device="cpu")
    numbers = _padded(pushed.slopes.cpu().double(), deal, workers)
    received = workers.gather("slopes", torch.cat([first_two, numbers]))
    slopes = _in_order(workers, deal, received[:, 2:])
    value, moved = received[0, 0].to(pushed.value), bool(received[:, 1].any())
    return Slopes(value, pushed.state, slopes.to(pushed.slopes), moved), variates


def everybodys_variates(
    run: Unroll, deal: Assignment, computed: dict[int, list[Tensor]], workers: Workers
) -> list[list[Tensor]]:
    """The control variates' gradients, each from the worker that computed it."""
    found = []
    for number, owner in enumerate(deal.variates):
        mine = computed.get(number) or trees.leaves(run.meta)  # of the same shapes, to be filled
        found.append(mine if owner is None else workers.broadcast_tensors("control variates", mine, owner))
    return found


def everybodys_numbers(what: str, deal: Assignment, mine: Tensor, workers: Workers) -> Tensor:
    """A number for each direction `[b]`, in their order, from each worker's for its own."""
    return _in_order(workers, deal, workers.gather(what, _padded(mine, deal, workers)))


def everybodys_rows(
    what: str, deal: Assignment, mine: Sequence[list[Tensor]], state: Tree, workers: Workers
) -> list[Tensor]:
    """Tangents `[b, *leaf.shape]` of all directions, a stack for each leaf of a state, from everybody's chunks."""
    leaves = trees.split(state).differentiable
    if workers.size > 1 and any(map(trees.is_spread, leaves)):
        raise ValueError(
            "the tangents of a sharded inner model can be carried on by one worker only; pass "
            "sharers=bilevel.experimental.Workers(), or take ForwardGradient, which carries no tangents on"
        )
    own = (
        [torch.cat(parts) for parts in zip(*mine, strict=True)] if mine else [t.new_zeros(0, *t.shape) for t in leaves]
    )
    if workers.size == 1:
        return own
    return [_in_order(workers, deal, workers.gather_rows(what, _padded(rows, deal, workers))) for rows in own]


def _padded(rows: Tensor, deal: Assignment, workers: Workers) -> Tensor:
    """With zeros up to the length of the longest share."""
    most = max(len(deal.numbers_of(rank)) for rank in range(workers.size))
    return torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])


def _in_order(workers: Workers, deal: Assignment, received: Tensor) -> Tensor:
    """Shares `[size, most, ...]` as the rows `[b, ...]` of all directions."""
    shares = [deal.numbers_of(rank) for rank in range(workers.size)]
    result = received.new_empty(sum(map(len, shares)), *received.shape[2:])
    for share, rows in zip(shares, received, strict=True):
        result[share] = rows[: len(share)]
    return result


def agreed_tree(tree: Tree, workers: Workers) -> Tree:
    """Return the first worker's tree of tensors, on every worker.

    The trees of other workers may differ from it in their last bits, since each pushes other directions, and so would
    everything that goes on from there.
    """
    parts = trees.split(tree)
    mine = [*parts.differentiable, *parts.other]
    if not mine:
        return tree
    firsts = workers.broadcast_tensors("the state", [trees.local(t) for t in mine])
    tensors = [trees.spread_like(t, like) for t, like in zip(firsts, mine, strict=True)]
    count = len(parts.differentiable)
    return parts.rebuild(tensors[:count], tensors[count:])
