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
            value, state = run.value()
            return Slopes(value, state, trees.leaves(run.meta)[0].new_zeros(0, *value.shape), False), computed
        pushed = push(chunks)
        if workers.size > 1:  # while it is known whose they are
            require_finite(run, pushed.value, pushed.state, pushed.slopes)
        return pushed, computed

    pushed, computed = workers.together("directions", mine)
    variates = everybodys_variates(run, deal, computed, workers, pushed.value.shape)
    if workers.size == 1:
        return pushed, variates
    value = pushed.value.detach().cpu().double().reshape(-1)
    flag = value.new_tensor([float(pushed.moved)])
    numbers = _padded(pushed.slopes.cpu().double(), deal, workers)
    received = workers.gather("slopes", torch.cat([value, flag, numbers.reshape(-1)]))
    m = len(value)
    slopes = _in_order(workers, deal, received[:, m + 1 :].reshape(len(received), *numbers.shape))
    value, moved = received[0, :m].reshape(pushed.value.shape).to(pushed.value), bool(received[:, m].any())
    return Slopes(value, pushed.state, slopes.to(pushed.slopes), moved), variates


def everybodys_variates(
    run: Unroll, deal: Assignment, computed: dict[int, list[Tensor]], workers: Workers, lead: torch.Size
) -> list[list[Tensor]]:
    """Return the control variates' gradients, each from the worker that computed it.

    `lead` is the shape of the outer loss, which the gradients have in front of that of their leaf.
    """
    found = []
    for number, owner in enumerate(deal.variates):
        # What another worker computed has the same shapes, and fills these tensors.
        mine = computed.get(number) or [leaf.expand((*lead, *leaf.shape)) for leaf in trees.leaves(run.meta)]
        found.append(mine if owner is None else workers.broadcast_tensors("control variates", mine, owner))
    return found


def everybodys_numbers(what: str, deal: Assignment, mine: Tensor, workers: Workers) -> Tensor:
    """Return the numbers of each direction, `[b]` or `[b, m]`, in their order, from each worker's for its own."""
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
