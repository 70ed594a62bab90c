"""Random directions v in R^N, for forward gradients and zeroth-order estimates.

Direction number i of a seed is a function of (seed, i) alone: whoever draws it, in whatever chunk or on whatever
worker, gets the same numbers on every device. Over the seeds, E[v vᵀ] = I.

With w_i = ∇h · v_i, the estimate (1/b) Σ w_i v_i is unbiased for each distribution below; what differs is its relative
variance E‖estimate − ∇h‖²/‖∇h‖², given beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilevel import checks, randomness

Shapes = Sequence[tuple[int, ...]]
"""The shapes of the leaves of φ."""


@dataclass(frozen=True)
class Distribution:
    """A way to draw directions."""

    sample: Callable[[int, Sequence[int], Shapes], np.ndarray]
    """`sample(seed, indices, shapes)`: directions of those numbers, `[len(indices), N]`."""
    excess: Callable[[Shapes, int], np.ndarray]
    """`excess(shapes, b)`: numbers κ_i `[b]` for which (1/b²) Σ κ_i w_i² estimates E‖(1/b) Σ w_i v_i − ∇h‖² without
    bias."""
    from_basis: bool = False
    """Whether the b directions are drawn without replacement from one orthogonal basis of N vectors of length √N, so
    that the others leave (N I − Σ v_j v_jᵀ)/(N − b + 1) as the second moment of each; else they are independent."""
    by_leaf: bool = False
    """Whether direction i lies in one leaf alone, that of number `leaf_of(seed, i, leaves)`."""


def _size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _signs(size: int, seed: int, *counters: int) -> np.ndarray:
    bits = np.frombuffer(randomness.generator(seed, randomness.DIRECTION, *counters).bytes(-(-size // 8)), np.uint8)
    return np.unpackbits(bits, count=size).astype(np.int8) * 2 - 1


def _rademacher(seed: int, indices: Sequence[int], shapes: Shapes) -> np.ndarray:
    return np.stack([_signs(_size(shapes), seed, index) for index in indices])


def _gaussian(seed: int, indices: Sequence[int], shapes: Shapes) -> np.ndarray:
    size = _size(shapes)
    return np.stack([randomness.generator(seed, randomness.DIRECTION, i).standard_normal(size) for i in indices])


def _coordinate(seed: int, indices: Sequence[int], shapes: Shapes) -> np.ndarray:
    size = _size(shapes)
    rows = np.zeros((len(indices), size), dtype=np.float64)
    rows[np.arange(len(indices)), _order(seed, size)[np.asarray(indices) % size]] = np.sqrt(size)
    return rows


def _orthogonal(seed: int, indices: Sequence[int], shapes: Shapes) -> np.ndarray:
    # The Hartley basis cos(2πkn/N) + sin(2πkn/N), orthogonal for every N and of length √N, under random signs.
    size = _size(shapes)
    frequencies = _order(seed, size)[np.asarray(indices) % size]
    angles = 2 * np.pi / size * (np.multiply.outer(frequencies, np.arange(size)) % size)
    return (np.cos(angles) + np.sin(angles)) * _signs(size, seed, 0, 0)


def _order(seed: int, size: int) -> np.ndarray:
    return randomness.generator(seed, randomness.DIRECTION).permutation(size)


def _low_rank(seed: int, indices: Sequence[int], shapes: Shapes) -> np.ndarray:
    rows = []
    for index in indices:
        parts = []
        for leaf, shape in enumerate(shapes):
            first = shape[0] if len(shape) > 1 else 1
            rest = math.prod(shape) // first if first else 0
            left, right = _signs(first, seed, index, leaf, 0), _signs(rest, seed, index, leaf, 1)
            parts.append(np.outer(left, right).reshape(-1))
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def leaf_of(seed: int, index: int, leaves: int) -> int:
    """The leaf in which block direction `index` lies: one after the other, from a random first one."""
    return (int(randomness.generator(seed, randomness.DIRECTION).integers(leaves)) + index) % leaves


def _block(seed: int, indices: Sequence[int], shapes: Shapes) -> np.ndarray:
    rows = np.zeros((len(indices), _size(shapes)), dtype=np.float64)
    starts = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
    for row, index in zip(rows, indices, strict=True):
        leaf = leaf_of(seed, index, len(shapes))
        part = slice(starts[leaf], starts[leaf + 1])
        row[part] = np.sqrt(len(shapes)) * _signs(starts[leaf + 1] - starts[leaf], seed, index)
    return rows


DISTRIBUTIONS = {
    # Independent signs: ‖v‖² = N exactly, which makes this the best of the independent choices (paper, Lemma 3.1).
    # Relative variance (N − 1)/b.
    "rademacher": Distribution(_rademacher, lambda shapes, b: np.full(b, _size(shapes) - 1.0)),
    # Independent normal numbers: E‖v‖⁴ = N² + 2N adds 2‖∇h‖²/b. Relative variance (N + 1)/b.
    "gaussian": Distribution(_gaussian, lambda shapes, b: np.full(b, _size(shapes) + 1.0)),
    # √N e_j with distinct j, in the order of one random permutation. The paper draws j with replacement, which has
    # the variance of Rademacher; without, b = N directions give the exact gradient. Relative variance (N − b)/b.
    "coordinate": Distribution(_coordinate, lambda shapes, b: np.full(b, float(_size(shapes) - b)), from_basis=True),
    # Distinct rows of a random orthogonal basis whose entries all have about the same size. Relative variance
    # (N − b)/b as for coordinates, but the slopes are of equal size, so the standard error is reliable.
    "orthogonal": Distribution(_orthogonal, lambda shapes, b: np.full(b, float(_size(shapes) - b)), from_basis=True),
    # For each leaf with two or more dimensions the outer product of two sign vectors (its first dimension by the
    # others), so a direction takes the memory of a row and a column. ‖v‖² = N: relative variance (N − 1)/b.
    "low-rank": Distribution(_low_rank, lambda shapes, b: np.full(b, _size(shapes) - 1.0)),
    # √L times signs on one of the L leaves at a time, each leaf in its turn, b a multiple of L. Variance
    # (L/b) Σ_l (N_l − 1) ‖∇h_l‖² over the leaves l: better than Rademacher where small leaves (learning rates) have
    # large derivatives beside big leaves (images) with small ones, worse the other way round.
    "block": Distribution(_block, lambda shapes, b: _block_excess(shapes, b), by_leaf=True),
}


def _block_excess(shapes: Shapes, count: int) -> np.ndarray:
    """Of directions that start with leaf 0; `Directions.excess` turns them."""
    return np.array([len(shapes) * (math.prod(shapes[i % len(shapes)]) - 1.0) for i in range(count)])


def distribution(name: str) -> Distribution:
    """The distribution of that name."""
    return DISTRIBUTIONS[checks.one_of(name, "distribution", DISTRIBUTIONS)]


def seed_of_draw(seed: int, draw: int) -> int:
    """The seed of the directions of draw number 0, 1, 2, … of an estimate's seed."""
    return randomness.derive(seed, randomness.DIRECTION, draw) if draw else seed


@dataclass(frozen=True)
class Directions:
    """b directions of one distribution for the leaves of φ, or for those of their entries that a mask names.

    >>> like = [torch.zeros(3, 2), torch.zeros(())]
    >>> [v.shape for v in Directions("rademacher", 0, 5, like).draw(range(5))]
    [torch.Size([5, 3, 2]), torch.Size([5])]
    """

    name: str
    seed: int
    count: int
    like: Sequence[Tensor]
    """The leaves of φ."""
    support: Sequence[Tensor] | None = None
    """For each leaf a mask of the entries on which directions may differ from 0; `None` for all."""

    @property
    def distribution(self) -> Distribution:
        """How they are drawn."""
        return distribution(self.name)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the leaves; of a leaf under a mask, the number of its entries."""
        if self.support is None:
            return [tuple(leaf.shape) for leaf in self.like]
        return [(int(mask.sum()),) for mask in self.support]

    @property
    def size(self) -> int:
        """N, or how much of it the mask leaves."""
        return _size(self.shapes)

    @property
    def leaves(self) -> list[int]:
        """For distributions by leaf: the leaf of each direction."""
        return [leaf_of(self.seed, i, len(self.like)) for i in range(self.count)]

    def draw(self, indices: Sequence[int]) -> list[Tensor]:
        """Directions of those numbers, `[len(indices), *leaf.shape]` for each leaf."""
        shapes = self.shapes
        flat = torch.from_numpy(self.distribution.sample(self.seed, indices, shapes))
        result, start = [], 0
        for number, leaf in enumerate(self.like):
            stop = start + math.prod(shapes[number])
            part = flat[:, start:stop].to(device=leaf.device, dtype=leaf.dtype)
            if self.support is None:
                result.append(part.reshape(len(indices), *leaf.shape))
            else:
                spread = leaf.new_zeros(len(indices), *leaf.shape)
                spread[:, self.support[number]] = part
                result.append(spread)
            start = stop
        return result

    def variance(self, slopes: Tensor) -> float:
        """An unbiased estimate of E‖(1/b) Σ w_i v_i − ∇h‖² from the slopes w_i `[b]`; exact zeros for a whole basis."""
        excess = self.distribution.excess(self.shapes, self.count)
        if self.distribution.by_leaf:
            excess = excess[np.asarray(self.leaves)]
        weights = torch.from_numpy(excess).to(slopes.device)
        return float((weights * slopes.double().square()).sum()) / self.count**2

    def require_count(self, exact_instead: str) -> None:
        """Raise when there are more directions than meta parameters, where the exact gradient is cheaper."""
        if self.count > self.size:
            raise ValueError(
                f"directions={self.count} for {self.size} {'' if self.support is None else 'reached '}meta "
                f"parameter{'s' * (self.size != 1)}: {exact_instead} with {self.size} evaluations; "
                f"take directions <= {self.size}"
            )
        if self.distribution.by_leaf and self.count % len(self.like):
            raise ValueError(
                f'directions={self.count} with distribution="{self.name}": each of the {len(self.like)} tensors in '
                f"meta takes its turn, so take a multiple of {len(self.like)}"
            )
