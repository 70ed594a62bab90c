"""A dataset that samples from several sources in proportions that may change while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from bilevel import randomness


class MixedSources(IterableDataset[Any]):
    """An endless stream of examples, each from a source that is drawn by the current proportions.

    Within a source, examples come in a random order, and none comes again before all of them came. A `DataLoader`, and
    `transformers.Trainer` with `max_steps`, read it as any other `IterableDataset`. The proportions lie in shared
    memory, so a change reaches the worker processes of a `DataLoader` too, after the batches that they have read ahead.

    Args:
        sources: for each name, a dataset with `__len__` and `__getitem__`.
        proportions: what to start with, a number for each source; they are divided by their sum. Uniform by default.
        seed: determines the order, together with the proportions. Each reading starts the order anew.

    Raises:
        TypeError, ValueError: the sources or proportions cannot be used.

    >>> data = MixedSources({"a": ["a1", "a2"], "b": ["b1"]}, proportions={"a": 1.0, "b": 0.0})
    >>> stream = iter(data)
    >>> sorted([next(stream), next(stream)])
    ['a1', 'a2']
    """

    def __init__(
        self, sources: Mapping[str, Any], proportions: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        if not isinstance(sources, Mapping):
            raise TypeError(
                f"sources is a {type(sources).__name__}; a dict from names to datasets is needed: "
                '{"web": web_dataset, "books": books_dataset}'
            )
        if len(sources) < 2:
            raise ValueError(f"sources holds {len(sources)} source; a mixture needs at least two")
        for name, source in sources.items():
            if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
                raise TypeError(
                    f"the source {name!r} is a {type(source).__name__} without a length and random access; pass a list "
                    "or a map-style dataset"
                )
            if len(source) == 0:
                raise ValueError(f"the source {name!r} is empty; leave it out")
        randomness.check_seed(seed)
        self.sources = dict(sources)
        self.seed = seed
        self._shares = torch.full((len(self.sources),), 1 / len(self.sources), dtype=torch.float64).share_memory_()
        if proportions is not None:
            self.proportions = proportions

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return list(self.sources)

    @property
    def proportions(self) -> dict[str, float]:
        """The current proportions, which add up to 1."""
        return dict(zip(self.names, self._shares.tolist(), strict=True))

    @proportions.setter
    def proportions(self, new: Mapping[str, float]) -> None:
        if set(new) != set(self.sources):
            raise ValueError(f"proportions has the names {sorted(new)}; the sources are {sorted(self.sources)}")
        shares = torch.tensor([float(new[name]) for name in self.names], dtype=torch.float64)
        if not (shares.isfinite().all() and (shares >= 0).all() and shares.sum() > 0):
            raise ValueError(
                f"proportions={dict(new)}: a finite number of at least 0 is needed for each source, and one above 0"
            )
        self._shares.copy_(shares / shares.sum())

    def example_numbers(self, name: str, count: int, counter: int) -> Sequence[int]:
        """Return `count` random numbers of examples of a source, a function of the seed and a counter."""
        generator = randomness.generator(self.seed, randomness.SOURCE_EXAMPLES, self.names.index(name), counter)
        return generator.integers(0, len(self.sources[name]), count).tolist()

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        generator = randomness.generator(self.seed, randomness.SOURCE_ORDER, 0 if worker is None else worker.id)
        orders = {name: _endless(len(source), generator) for name, source in self.sources.items()}
        names = self.names
        while True:
            name = names[_drawn(self._shares, float(generator.random()))]
            yield self.sources[name][next(orders[name])]


def _drawn(shares: Tensor, uniform: float) -> int:
    """Return the number of the source in whose part of [0, 1) a uniform number lies."""
    edges = np.cumsum(shares.numpy())
    return min(int(np.searchsorted(edges, uniform * edges[-1], side="right")), len(edges) - 1)


def _endless(count: int, generator: np.random.Generator) -> Iterator[int]:
    """Return random permutations of the numbers below `count`, one after the other."""
    while True:
        yield from generator.permutation(count).tolist()
