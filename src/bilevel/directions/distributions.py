"""Random directions v in R^N, for forward gradients and zeroth-order estimates.

Direction number i of a seed is a function of (seed, i) alone. Every chunk, worker and device gets the same signs, and
the same normal numbers to rounding. They are made on the device of φ. Over the seeds, E[v vᵀ] = I.

With w_i = ∇h · v_i, the estimate (1/b) Σ w_i v_i is unbiased for each distribution below. The distributions differ in
the relative variance E‖estimate − ∇h‖²/‖∇h‖², which is stated beside each of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel import checks, philox, randomness

Shapes = Sequence[tuple[int, ...]]
"""The shapes of the leaves of φ."""


class Part(NamedTuple):
    """Consecutive leaves of φ, of one type and on one device, whose entries of the directions are drawn together."""

    shapes: Shapes
    """The shapes of all leaves of φ."""
    leaves: range
    """The numbers of the leaves of this part."""
    dtype: torch.dtype
    device: torch.device

    @property
    def start(self) -> int:
        """The first entry of the part."""
        return _size(self.shapes[: self.leaves.start])

    @property
    def stop(self) -> int:
        """The entry after the last one of the part."""
        return self.start + _size([self.shapes[leaf] for leaf in self.leaves])


@dataclass(frozen=True)
class Distribution:
    """A way to draw directions."""

    sample: Callable[[int, Sequence[int], Part], Tensor]
    """`sample(seed, indices, part)` draws a part of the directions with these numbers, `[len(indices), entries]`."""
    excess: Callable[[Shapes, int], np.ndarray]
    """`excess(shapes, b)` returns the numbers κ_i `[b]` for which (1/b²) Σ κ_i w_i² is an unbiased estimate of
    E‖(1/b) Σ w_i v_i − ∇h‖²."""
    from_basis: bool = False
    """Whether the b directions are drawn without replacement from one orthogonal basis of N vectors of length √N. The
    second moment of one, given the others, is then (N I − Σ v_j v_jᵀ)/(N − b + 1). Otherwise they are independent."""
    by_leaf: bool = False
    """Whether direction i lies in a single leaf, whose number is `leaf_of(seed, i, leaves)`."""


def _size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _key(seed: int) -> int:
    return randomness.derive(seed, randomness.DIRECTION)


def _rademacher(seed: int, indices: Sequence[int], part: Part) -> Tensor:
    return philox.signs(_key(seed), indices, part.start, part.stop, dtype=part.dtype, device=part.device)


def _gaussian(seed: int, indices: Sequence[int], part: Part) -> Tensor:
    return philox.normals(_key(seed), indices, part.start, part.stop, dtype=part.dtype, device=part.device)


def _coordinate(seed: int, indices: Sequence[int], part: Part) -> Tensor:
    size, start, stop = _size(part.shapes), part.start, part.stop
    rows = torch.zeros(len(indices), stop - start, dtype=part.dtype, device=part.device)
    for row, index in zip(rows, _order(seed, tuple(indices), size), strict=True):
        if start <= index < stop:
            row[index - start] = math.sqrt(size)
    return rows


def _orthogonal(seed: int, indices: Sequence[int], part: Part) -> Tensor:
    # The Hartley basis cos(2πkn/N) + sin(2πkn/N), orthogonal for every N and of length √N, under random signs.
    size = _size(part.shapes)
    frequencies = torch.tensor(_order(seed, tuple(indices), size), device=part.device).unsqueeze(1)
    rows = philox.signs(_key(seed), [0], part.start, part.stop, part=1, dtype=part.dtype, device=part.device)
    rows = rows.repeat(len(indices), 1)
    width = max(1, philox.CHUNK // max(1, len(indices)))
    for number, columns in enumerate(rows.split(width, 1)):
        first = part.start + number * width
        entries = torch.arange(first, first + columns.shape[1], device=part.device)
        angles = (frequencies * entries % size).double() * (2 * math.pi / size)
        columns *= angles.cos() + angles.sin()
    return rows


@functools.lru_cache(maxsize=4)  # every part of φ asks for it
def _order(seed: int, indices: tuple[int, ...], size: int) -> list[int]:
    """Return the entries at these places of a random order of `size` entries."""
    order = randomness.generator(seed, randomness.DIRECTION).permutation(size)
    return order[np.asarray(indices) % size].tolist()


def _low_rank(seed: int, indices: Sequence[int], part: Part) -> Tensor:
    rows = []
    for leaf in part.leaves:
        shape = part.shapes[leaf]
        first = shape[0] if len(shape) > 1 else 1
        rest = math.prod(shape) // first if first else 0
        left, right = (
            philox.signs(_key(seed), indices, 0, length, part=1 + 2 * leaf + side, dtype=part.dtype, device=part.device)
            for side, length in enumerate((first, rest))
        )
        rows.append((left.unsqueeze(2) * right.unsqueeze(1)).flatten(1))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def leaf_of(seed: int, index: int, leaves: int) -> int:
    """Return the number of the leaf in which block direction `index` lies.

    Consecutive directions lie in consecutive leaves. The leaf of the first direction is random.
    """
    return (int(randomness.generator(seed, randomness.DIRECTION).integers(leaves)) + index) % leaves


def _block(seed: int, indices: Sequence[int], part: Part) -> Tensor:
    drawn, count = _rademacher(seed, indices, part).mul_(math.sqrt(len(part.shapes))), len(part.shapes)
    first = leaf_of(seed, 0, count)
    for row, index in zip(drawn, indices, strict=True):
        leaf = (first + index) % count
        start = _size(part.shapes[:leaf]) - part.start
        row[: max(start, 0)] = 0
        row[max(start + math.prod(part.shapes[leaf]), 0) :] = 0
    return drawn


DISTRIBUTIONS = {
    # Independent signs. ‖v‖² = N holds exactly, which makes this the best of the independent choices (paper, Lemma
    # 3.1). The relative variance is (N − 1)/b.
    "rademacher": Distribution(_rademacher, lambda shapes, b: np.full(b, _size(shapes) - 1.0)),
    # Independent normal numbers. E‖v‖⁴ = N² + 2N adds 2‖∇h‖²/b to the variance. The relative variance is (N + 1)/b.
    "gaussian": Distribution(_gaussian, lambda shapes, b: np.full(b, _size(shapes) + 1.0)),
    # √N e_j with distinct j, in the order of one random permutation. The paper draws j with replacement, which has
    # the variance of Rademacher directions. Without replacement, b = N directions give the exact gradient. The relative
    # variance is (N − b)/b.
    "coordinate": Distribution(_coordinate, lambda shapes, b: np.full(b, float(_size(shapes) - b)), from_basis=True),
    # Distinct rows of a random orthogonal basis whose entries all have about the same size. The relative variance is
    # (N − b)/b as for coordinates. The slopes are of similar size, which makes the standard error reliable.
    "orthogonal": Distribution(_orthogonal, lambda shapes, b: np.full(b, float(_size(shapes) - b)), from_basis=True),
    # For each leaf with two or more dimensions, the outer product of two sign vectors (the first dimension by the
    # others). A direction takes the memory of a row and a column. ‖v‖² = N, and the relative variance is (N − 1)/b.
    "low-rank": Distribution(_low_rank, lambda shapes, b: np.full(b, _size(shapes) - 1.0)),
    # √L times signs on one of the L leaves, each leaf in its turn; b is a multiple of L. The variance is
    # (L/b) Σ_l (N_l − 1) ‖∇h_l‖² over the leaves l. It is smaller than that of Rademacher directions where small leaves
    # (learning rates) have large derivatives and large leaves (images) have small derivatives, and larger in the
    # opposite case.
    "block": Distribution(_block, lambda shapes, b: _block_excess(shapes, b), by_leaf=True),
}


def _block_excess(shapes: Shapes, count: int) -> np.ndarray:
    """Return κ_i for directions of which the first lies in leaf 0. `Directions.variance` permutes them."""
    return np.array([len(shapes) * (math.prod(shapes[i % len(shapes)]) - 1.0) for i in range(count)])


def distribution(name: str) -> Distribution:
    """Return the distribution with this name.

    Raises:
        ValueError: there is no such distribution. The message lists the names.
    """
    return DISTRIBUTIONS[checks.one_of(name, "distribution", DISTRIBUTIONS)]


def seed_of_draw(seed: int, draw: int) -> int:
    """Return the seed for the directions of draw number 0, 1, 2, … of an estimate with this seed."""
    return randomness.derive(seed, randomness.DIRECTION, draw) if draw else seed


@dataclass(frozen=True)
class Directions:
    """b random directions of one distribution, for all entries of φ or for those that a mask selects.

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
    """A mask for each leaf of the entries on which directions may differ from 0; `None` for all entries."""

    @property
    def distribution(self) -> Distribution:
        """The distribution of the directions."""
        return distribution(self.name)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the leaves. With a mask, each shape is the number of entries that the mask selects."""
        if self.support is None:
            return [tuple(leaf.shape) for leaf in self.like]
        return [(int(mask.sum()),) for mask in self.support]

    @property
    def size(self) -> int:
        """N, the number of entries in which directions may differ from 0."""
        return _size(self.shapes)

    @property
    def leaves(self) -> list[int]:
        """The number of the leaf in which each direction lies, for distributions with `by_leaf`."""
        return [leaf_of(self.seed, i, len(self.like)) for i in range(self.count)]

    def draw(self, indices: Sequence[int]) -> list[Tensor]:
        """Draw the directions with these numbers, `[len(indices), *leaf.shape]` for each leaf."""
        result = []
        for part in self._parts(len(indices)):
            sizes = [math.prod(part.shapes[number]) for number in part.leaves]
            drawn = self.distribution.sample(self.seed, indices, part).split(sizes, 1)
            for number, entries in zip(part.leaves, drawn, strict=True):
                leaf = self.like[number]
                if self.support is not None:
                    spread = leaf.new_zeros(len(indices), *leaf.shape)
                    spread[:, self.support[number]] = entries
                    entries = spread
                result.append(entries.reshape(len(indices), *leaf.shape))
        return result

    def _parts(self, count: int) -> Iterator[Part]:
        """Divide the leaves for `count` directions. Small leaves are drawn together, which takes less time."""
        shapes, first = self.shapes, 0
        for stop in range(1, len(shapes) + 1):
            here = self.like[first]
            if stop < len(shapes):
                following = self.like[stop]
                fits = count * _size(shapes[first : stop + 1]) <= philox.CHUNK
                if fits and (following.dtype, following.device) == (here.dtype, here.device):
                    continue
            yield Part(shapes, range(first, stop), here.dtype, here.device)
            first = stop

    def variance(self, slopes: Tensor) -> float:
        """Return an unbiased estimate of E‖(1/b) Σ w_i v_i − ∇h‖² from the slopes w_i `[b]`.

        The estimate is exactly 0 for a whole basis.
        """
        excess = self.distribution.excess(self.shapes, self.count)
        if self.distribution.by_leaf:
            excess = excess[np.asarray(self.leaves)]
        weights = torch.from_numpy(excess).to(slopes.device)
        return float((weights * slopes.double().square()).sum()) / self.count**2

    def require_count(self, exact_instead: str) -> None:
        """Raise if the number of directions does not fit the meta parameters.

        Args:
            exact_instead: how to compute the exact gradient, for the error message.

        Raises:
            ValueError: there are more directions than meta parameters, so that the exact gradient is cheaper, or the
                distribution goes by leaf and the number is not a multiple of the number of leaves.
        """
        if self.count > self.size:
            raise ValueError(
                f"directions={self.count} for {self.size} {'' if self.support is None else 'reached '}meta "
                f"parameter{'s' * (self.size != 1)}: {exact_instead} with {self.size} evaluations; "
                f"take directions <= {self.size}"
            )
        if self.distribution.by_leaf and self.count % len(self.like):
            raise ValueError(
                f'directions={self.count} with distribution="{self.name}": each of the {len(self.like)} tensors in '
                f"meta needs as many directions, so take a multiple of {len(self.like)}"
            )
