"""Slopes and control variates computed by several workers: each computes its share, and all receive every result."""

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
    """Compute the slopes of all directions and the gradients of all control variates on several workers.

    The result does not depend on which worker computes a chunk. The division of the directions into chunks affects the
    last bits of the slopes.

    Args:
        run: the inner loop.
        deal: the assignment of chunks and control variates to workers.
        push: computes the slopes of the directions in a worker's chunks.
        variate: computes the gradient of the control variate with this number.
        workers: the workers, all of which call this function.

    Returns:
        The slopes `[b]` with the outer loss of the first worker, and the gradient of each control variate.
    """

    def mine() -> tuple[Slopes, dict[int, list[Tensor]]]:
        computed = {number: variate(number) for number in deal.variates_of(workers.rank)}
        chunks = deal.chunks_of(workers.rank)
        if not chunks:  # there are more workers than chunks
            value, state = run.value()
            return Slopes(value, state, trees.leaves(run.meta)[0].new_zeros(0, *value.shape), False), computed
        pushed = push(chunks)
        if workers.size > 1:  # here it is still known which worker computed them
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
    """Collect the control variates' gradients on every worker, each from the worker that computed it.

    `lead` is the shape of the outer loss. The gradients have it in front of the shape of their leaf.
    """
    found = []
    for number, owner in enumerate(deal.variates):
        # The gradients of another worker have the same shapes. The broadcast fills in the values.
        mine = computed.get(number) or [leaf.expand((*lead, *leaf.shape)) for leaf in trees.leaves(run.meta)]
        found.append(mine if owner is None else workers.broadcast_tensors("control variates", mine, owner))
    return found


def everybodys_numbers(what: str, deal: Assignment, mine: Tensor, workers: Workers) -> Tensor:
    """Collect one number for each direction on every worker, as `[b]` or `[b, m]` in the order of the directions.

    Args:
        what: the name of the numbers in error messages.
        deal: the assignment of directions to workers.
        mine: the numbers of this worker's directions.
        workers: the workers, all of which call this function.
    """
    return _in_order(workers, deal, workers.gather(what, _padded(mine, deal, workers)))


def everybodys_rows(
    what: str, deal: Assignment, mine: Sequence[list[Tensor]], state: Tree, workers: Workers
) -> list[Tensor]:
    """Collect the tangents of all directions on every worker, as `[b, *leaf.shape]` for each leaf of a state.

    Args:
        what: the name of the tangents in error messages.
        deal: the assignment of directions to workers.
        mine: the tangents of each of this worker's chunks.
        state: the state to which the tangents belong.
        workers: the workers, all of which call this function.

    Raises:
        ValueError: the state is sharded over several workers.
    """
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
    """Append zeros up to the length of the longest share."""
    most = max(len(deal.numbers_of(rank)) for rank in range(workers.size))
    return torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])


def _in_order(workers: Workers, deal: Assignment, received: Tensor) -> Tensor:
    """Rearrange shares `[size, most, ...]` to the rows `[b, ...]` of all directions."""
    shares = [deal.numbers_of(rank) for rank in range(workers.size)]
    result = received.new_empty(sum(map(len, shares)), *received.shape[2:])
    for share, rows in zip(shares, received, strict=True):
        result[share] = rows[: len(share)]
    return result


def agreed_tree(tree: Tree, workers: Workers) -> Tree:
    """Return the first worker's tree of tensors, on every worker.

    The trees of the other workers may differ from it in their last bits, because each worker computes with other
    directions. Without this agreement, all later results would differ as well.
    """
    parts = trees.split(tree)
    mine = [*parts.differentiable, *parts.other]
    if not mine:
        return tree
    firsts = workers.broadcast_tensors("the state", [trees.local(t) for t in mine])
    tensors = [trees.spread_like(t, like) for t, like in zip(firsts, mine, strict=True)]
    count = len(parts.differentiable)
    return parts.rebuild(tensors[:count], tensors[count:])
