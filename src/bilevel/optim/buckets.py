"""Small tensors joined into long ones, for operations that go element by element.

Every operation on a tensor costs some microseconds whatever its size, in forward mode many times that. An optimiser
that treats each number alike can therefore as well treat the numbers of many small parameters in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LIMIT = 2**15
"""Elements of a bucket: beyond that the work outweighs what an operation costs by itself, and temporaries grow."""


@dataclass(frozen=True)
class Buckets:
    """A partition of a list of tensors by their shapes, dtypes and devices alone.

    Large tensors stay alone. So do all if one of them is spread over processes, or of a class of the user's.

    >>> tensors = [torch.ones(2, 2), torch.ones(1, dtype=torch.float64), torch.zeros(3)]
    >>> buckets = Buckets.of(tensors)
    >>> buckets.joined(tensors)
    [tensor([1., 1., 1., 1., 0., 0., 0.]), tensor([1.], dtype=torch.float64)]
    >>> [tuple(t.shape) for t in buckets.parted(buckets.joined(tensors))]
    [(2, 2), (1,), (3,)]
    """

    members: tuple[tuple[int, ...], ...]
    """The numbers of the tensors in every bucket."""
    shapes: tuple[torch.Size, ...]
    """Of all tensors."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor], limit: int = LIMIT) -> Buckets:
        """The partition with at most `limit` elements in a bucket of several tensors."""
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
        return cls(tuple(map(tuple, members)), tuple(t.shape for t in tensors))

    def joined(self, tensors: Sequence[Tensor], fresh: bool = False) -> list[Tensor]:
        """A tensor for every bucket, flat if it has several members; no argument itself if they are to be `fresh`."""
        groups = [[tensors[i] for i in bucket] for bucket in self.members]
        return [
            torch.cat([t.reshape(-1) for t in group]) if len(group) > 1 else group[0].clone() if fresh else group[0]
            for group in groups
        ]

    def parted(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """The tensors again in their order, views of what was joined."""
        found = {}
        for tensor, bucket in zip(joined, self.members, strict=True):
            shapes = [self.shapes[i] for i in bucket]
            parts = tensor.split([shape.numel() for shape in shapes]) if len(bucket) > 1 else [tensor]
            found.update((i, part.view(shape)) for i, part, shape in zip(bucket, parts, shapes, strict=True))
        return [found[i] for i in range(len(self.shapes))]
