"""Small tensors joined into long ones, for operations that work element by element.

Every operation on a tensor costs some microseconds whatever its size, and many times as much in forward mode. An
optimiser that treats every number in the same way can update the numbers of many small parameters in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LIMIT = 2**15
"""The largest number of elements in a bucket of several tensors. Above it the fixed cost of an operation is small
compared with its work, and temporary tensors grow."""


@dataclass(frozen=True)
class Buckets:
    """A partition of tensors of a list into buckets of equal dtype and device. It may leave tensors out.

    >>> tensors = [torch.ones(2, 2), torch.ones(1, dtype=torch.float64), torch.zeros(3)]
    >>> buckets = Buckets.of(tensors)
    >>> buckets.joined(tensors)
    [tensor([1., 1., 1., 1., 0., 0., 0.]), tensor([1.], dtype=torch.float64)]
    >>> {i: tuple(t.shape) for i, t in buckets.parted(buckets.joined(tensors)).items()}
    {0: (2, 2), 2: (3,), 1: (1,)}
    """

    members: tuple[tuple[int, ...], ...]
    """The places in the list of the tensors of each bucket."""
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

        Args:
            tensors: the tensors of the list; each bucket has either all of its tensors or `None` for all.
            fresh: whether every result is a copy, also that of a bucket with a single member.
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
        """Split joined tensors. Return the part of each member as a view, by its place in the list."""
        found = {}
        for tensor, bucket in zip(joined, self.members, strict=True):
            shapes = [self.shapes[i] for i in bucket]
            parts = tensor.split([shape.numel() for shape in shapes]) if len(bucket) > 1 else [tensor]
            found.update((i, part.view(shape)) for i, part, shape in zip(bucket, parts, shapes, strict=True))
        return found
