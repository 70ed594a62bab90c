"""Small tensors joined into long ones, for operations that go element by element.

Every operation on a tensor costs some microseconds whatever its size, and many times that in forward mode. An optimiser
that treats every number alike can therefore update the numbers of many small parameters in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LIMIT = 2**15
"""The largest number of elements in a bucket of several tensors. Above it the work outweighs the fixed cost of an
operation, and temporary tensors grow."""


@dataclass(frozen=True)
class Buckets:
    """A partition of a list of tensors, or of some of them, into buckets of equal dtype and device.

    >>> tensors = [torch.ones(2, 2), torch.ones(1, dtype=torch.float64), torch.zeros(3)]
    >>> buckets = Buckets.of(tensors)
    >>> buckets.joined(tensors)
    [tensor([1., 1., 1., 1., 0., 0., 0.]), tensor([1.], dtype=torch.float64)]
    >>> {i: tuple(t.shape) for i, t in buckets.parted(buckets.joined(tensors)).items()}
    {0: (2, 2), 2: (3,), 1: (1,)}
    """

    members: tuple[tuple[int, ...], ...]
    """For each bucket, the places of its tensors in the list."""
    shapes: Mapping[int, torch.Size]
    """The shape of every tensor in a bucket, by its place."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor], limit: int = LIMIT) -> Buckets:
        """Join tensors by dtype and device, with at most `limit` elements in a bucket of several tensors.

        Large tensors stay alone. All stay alone if one of them is spread over processes, or belongs to a subclass.
        """
        ordinary = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        members: list[list[int]] = []
        open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
        for i, tensor in enumerate(tensors):
            kind, size = (tensor.dtype, tensor.device), tensor.numel()
            if size > limit or not ordinary:
                members.append([i])
                continue
            bucket, filled = open_buckets.get(kind, ([], limit + 1))
            if filled + size > limit:
                bucket, filled = [], 0
                members.append(bucket)
            bucket.append(i)
            open_buckets[kind] = bucket, filled + size
        return cls(tuple(map(tuple, members)), {i: tensor.shape for i, tensor in enumerate(tensors)})

    def joined(self, tensors: Sequence[Tensor | None], fresh: bool = False) -> list[Tensor]:
        """Join the tensors of each bucket into one, which is flat if the bucket has several members.

        With `fresh=True` no result is an argument itself.
        """
        found = []
        for bucket in self.members:
            group = [tensor for i in bucket if (tensor := tensors[i]) is not None]
            assert len(group) == len(bucket)
            found.append(
                torch.cat([t.reshape(-1) for t in group]) if len(group) > 1 else group[0].clone() if fresh else group[0]
            )
        return found

    def parted(self, joined: Sequence[Tensor]) -> dict[int, Tensor]:
        """Take joined tensors apart: for the place of each member, its part as a view."""
        found = {}
        for tensor, bucket in zip(joined, self.members, strict=True):
            shapes = [self.shapes[i] for i in bucket]
            parts = tensor.split([shape.numel() for shape in shapes]) if len(bucket) > 1 else [tensor]
            found.update((i, part.view(shape)) for i, part, shape in zip(bucket, parts, shapes, strict=True))
        return found
