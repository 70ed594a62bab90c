"""Random directions v in R^N with E[v vᵀ] = I, for forward gradients and zeroth-order estimates.

Direction number i of a seed is a function of (seed, i) alone: whoever draws it, in whatever chunk or on whatever
worker, gets the same numbers on every device.

With w_i = ∇h · v_i, the estimate (1/b) Σ w_i v_i is unbiased for each distribution below; what differs is the relative
variance E‖estimate − ∇h‖²/‖∇h‖², given beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilevel import checks, randomness, trees
from bilevel.trees import Tree


@dataclass(frozen=True)
class Distribution:
    """A way to draw directions."""

    sample: Callable[[int, Sequence[int], int], np.ndarray]
    """`sample(seed, indices, size)`: directions of those numbers, `[len(indices), size]`."""
    relative_variance: Callable[[int, int], float]
    """`relative_variance(size, count)`, for the mean over `count` directions."""


def _rademacher(seed: int, indices: Sequence[int], size: int) -> np.ndarray:
    rows = []
    for index in indices:
        bits = np.frombuffer(randomness.generator(seed, randomness.DIRECTION, index).bytes(-(-size // 8)), np.uint8)
        rows.append(np.unpackbits(bits, count=size).astype(np.int8) * 2 - 1)
    return np.stack(rows)


def _gaussian(seed: int, indices: Sequence[int], size: int) -> np.ndarray:
    return np.stack([randomness.generator(seed, randomness.DIRECTION, i).standard_normal(size) for i in indices])


def _coordinate(seed: int, indices: Sequence[int], size: int) -> np.ndarray:
    rows = np.zeros((len(indices), size), dtype=np.float64)
    order = randomness.generator(seed, randomness.DIRECTION).permutation(size)
    rows[np.arange(len(indices)), order[np.asarray(indices) % size]] = np.sqrt(size)
    return rows


DISTRIBUTIONS = {
    # Independent signs: ‖v‖² = N exactly, which makes this the best of the independent choices (paper, Lemma 3.1).
    "rademacher": Distribution(_rademacher, lambda n, b: (n - 1) / b),
    # Independent normal numbers: E‖v‖⁴ = N² + 2N adds 2‖∇h‖²/b.
    "gaussian": Distribution(_gaussian, lambda n, b: (n + 1) / b),
    # √N e_j with distinct j, in the order of one random permutation. The paper draws j with replacement, which has
    # the variance of Rademacher; without, b = N directions give the exact gradient.
    "coordinate": Distribution(_coordinate, lambda n, b: (n - b) / b),
}


def distribution(name: str) -> Distribution:
    """The distribution of that name."""
    return DISTRIBUTIONS[checks.one_of(name, "distribution", DISTRIBUTIONS)]


def draw(name: str, seed: int, indices: Sequence[int], like: Tree) -> list[Tensor]:
    """Directions of those numbers, shaped as the leaves of a tree: `[len(indices), *leaf.shape]` each.

    >>> [v.shape for v in draw("rademacher", 0, range(5), {"a": torch.zeros(3, 2), "b": torch.zeros(())})]
    [torch.Size([5, 3, 2]), torch.Size([5])]
    """
    flat = torch.from_numpy(distribution(name).sample(seed, indices, trees.size(like)))
    result, start = [], 0
    for leaf in trees.leaves(like):
        part = flat[:, start : start + leaf.numel()].to(device=leaf.device, dtype=leaf.dtype)
        result.append(part.reshape(len(indices), *leaf.shape))
        start += leaf.numel()
    return result


def require_count(count: int, size: int, exact_instead: str) -> None:
    """Raise when there are more directions than meta parameters, where the exact gradient is cheaper."""
    if count > size:
        raise ValueError(
            f"directions={count} for {size} meta parameter{'s' * (size > 1)}: {exact_instead} with {size} evaluations; "
            f"take directions <= {size}"
        )


def standard_error(slopes: Tensor, name: str, size: int) -> float:
    """√ of an unbiased estimate of E‖(1/b) Σ w_i v_i − ∇h‖², from the slopes w_i `[b]`.

    E w² = ‖∇h‖² for every isotropic direction, so the mean of w² times the distribution's relative variance does it.
    """
    squared = slopes.square().mean() * distribution(name).relative_variance(size, len(slopes))
    return float(squared.sqrt())
