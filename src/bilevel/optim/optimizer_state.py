"""The memory of an optimiser as a tree, with one entry for each bucket of parameters that are updated together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel.optim.buckets import Buckets


class BucketState(NamedTuple):
    """The optimiser's memory of one bucket, whose parameters have been updated at the same steps so far."""

    members: tuple[int, ...]
    """The places of the parameters in the list of all of them."""
    updates: int
    """The number of updates so far. The first update initialises the memory, as in PyTorch."""
    memory: dict[str, Any]
    """The entries of PyTorch's `optimizer.state[parameter]` for the joined parameters. Counters are Python numbers."""


OptimizerState: TypeAlias = "list[BucketState]"
"""The memory of an optimiser for all parameters."""


def buckets_of(state: Iterable[BucketState], parameters: Sequence[Tensor]) -> Buckets:
    """Return the partition of the parameters that a state belongs to."""
    members = tuple(bucket.members for bucket in state)
    return Buckets(members, {i: parameters[i].shape for bucket in members for i in bucket})


def divided(state: OptimizerState, reached: Collection[int], parameters: Sequence[Tensor]) -> OptimizerState:
    """Divide every bucket in which only some parameters have a gradient.

    All parameters of a bucket then have the same history of updates. The parts of a divided bucket are not joined
    again.

    Args:
        state: the memory of the optimiser.
        reached: the places of the parameters that have a gradient.
        parameters: all parameters.

    >>> state = [BucketState((0, 1), 3, {"exp_avg": torch.tensor([1.0, 2.0, 5.0]), "step": 3.0})]
    >>> [bucket.members for bucket in divided(state, {1}, [torch.zeros(2), torch.zeros(1)])]
    [(1,), (0,)]
    """
    found: OptimizerState = []
    for bucket in state:
        inside = tuple(i for i in bucket.members if i in reached)
        if len(inside) in (0, len(bucket.members)):
            found.append(bucket)
            continue
        outside = tuple(i for i in bucket.members if i not in reached)
        parts = [_part(bucket, members, parameters) for members in (inside, outside)]
        found += parts
    return found


def _part(bucket: BucketState, members: tuple[int, ...], parameters: Sequence[Tensor]) -> BucketState:
    whole, part = (Buckets((some,), {i: parameters[i].shape for i in some}) for some in (bucket.members, members))
    memory = {}
    for name, value in bucket.memory.items():
        if isinstance(value, Tensor):
            entries = whole.parted([value])
            (value,) = part.joined([entries.get(i) for i in range(len(parameters))])
        memory[name] = value
    return BucketState(members, bucket.updates, memory)


def is_first_update(bucket: BucketState) -> bool:
    """Whether the parameters of a bucket have never been updated."""
    return bucket.updates == 0


def same_device(state: OptimizerState, parameters: Sequence[Tensor]) -> OptimizerState:
    """Return the state with every tensor on the device of the parameters that it belongs to."""
    return [
        bucket._replace(
            memory={
                name: value.to(parameters[bucket.members[0]].device) if isinstance(value, torch.Tensor) else value
                for name, value in bucket.memory.items()
            }
        )
        for bucket in state
    ]
