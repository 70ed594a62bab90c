"""Batches of a dataset in epochs, as a function of a seed and the number of the estimate, and of nothing else."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from bilevel import checks, randomness
from bilevel.batches import ComputedBatches


def epochs(
    dataset: Any,
    batch_size: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    workers: int | None = None,
) -> Epochs:
    """Describe batches of a dataset, for `inner_batches` (or `outer_batch`) of every function of this library.

    Each estimate begins an epoch of its own. Batch t of estimate k is a function of (seed, k, t) alone, so a step that
    is computed again, another worker, and a run that is resumed see the same batch. In `fit`, k counts the estimates
    of the run; in a single call of an estimator k = 0, and the seed is that of the call.

    Args:
        dataset: one of
            a tensor or an array `[n, …]`, or a tuple or dict of them with equal n: a batch has the same form;
            a pandas frame (a batch is a dict from column to tensor, or to a list if the column holds strings);
            a dataset with `__len__` and `__getitem__`, or a list of examples, which `collate_fn` joins;
            a `DataLoader`, for its dataset, batch size, collate function, order and number of workers.
        batch_size: the number of examples in a batch.
        steps: T, the number of inner steps. Epochs follow each other until there are that many.
        epochs: instead of `steps`, the number of epochs; by default one.
        shuffle: whether each epoch has a random order of its own. By default it has, except with a `DataLoader` that
            does not shuffle.
        drop_last: leave out the last batch of an epoch if it is smaller. By default it is kept, as in a `DataLoader`.
        collate_fn: joins a list of examples to a batch; by default that of `DataLoader`.
        workers: the number of processes that read examples ahead; 0 reads them in this process. The batches are the
            same. Random numbers that a dataset draws from global generators are a function of (seed, k, t) too.

    As `outer_batch` of `fit`, estimate k gets batch k of an endless series of epochs.

    Raises:
        TypeError, ValueError: the dataset or a setting cannot be used; the message says what is needed.

    >>> import torch
    >>> x, y = torch.arange(5.0), torch.arange(5)
    >>> batches = epochs((x, y), batch_size=2, steps=4, shuffle=False).at(seed=0)
    >>> torch.cat([labels for _, labels in batches])
    tensor([0, 1, 2, 3, 4, 0, 1])
    """
    loader = dataset if isinstance(dataset, DataLoader) else None
    if loader is not None:
        dataset = loader.dataset
        batch_size = loader.batch_size if batch_size is None else batch_size
        collate_fn = loader.collate_fn if collate_fn is None else collate_fn
        drop_last = loader.drop_last if drop_last is None else drop_last
        workers = loader.num_workers if workers is None else workers
        if batch_size is None:
            raise ValueError("the DataLoader has a batch_sampler and no batch_size; pass batch_size= to epochs")
        if shuffle is None:
            if not isinstance(loader.sampler, SequentialSampler | RandomSampler):
                raise ValueError(
                    f"the DataLoader's order comes from a {type(loader.sampler).__name__}, which is no function of a "
                    "seed; pass shuffle=True or shuffle=False for an order of whole epochs, or bilevel.batches(get, "
                    "steps) for one of your own"
                )
            shuffle = isinstance(loader.sampler, RandomSampler)
    if batch_size is None:
        raise ValueError("batch_size is missing: epochs(dataset, batch_size=64, steps=100)")
    if steps is not None and epochs is not None:
        raise ValueError(f"steps={steps!r} and epochs={epochs!r}: pass one of them")
    source = _source_of(dataset, collate_fn)
    size = checks.whole_number(batch_size, "batch_size")
    per_epoch = source.size // size if drop_last else -(-source.size // size)
    if per_epoch == 0:
        raise ValueError(
            f"the dataset has {source.size} examples, which make no batch of {size}; take a smaller batch_size"
            + (" or drop_last=False" if source.size else "")
        )
    if steps is None:
        steps = per_epoch * checks.whole_number(1 if epochs is None else epochs, "epochs")
    return Epochs(
        source,
        size,
        checks.whole_number(steps, "steps"),
        per_epoch,
        True if shuffle is None else bool(shuffle),
        checks.whole_number(0 if workers is None else workers, "workers", at_least=0),
    )


@dataclass(frozen=True, eq=False)
class Epochs:
    """Batches of a dataset in epochs. Made by `epochs`."""

    _source: _Source = field(repr=False)
    batch_size: int
    steps: int
    """T, the number of inner steps."""
    steps_per_epoch: int
    shuffle: bool
    workers: int = 0
    _readers: list[_Readers] = field(init=False, repr=False, default_factory=list)

    def at(self, seed: int, number: int = 0) -> Sequence[Any]:
        """Return the batches of one estimate, by random access.

        Args:
            seed: that of the run, or of a single call of an estimator.
            number: of the estimate, from 0.
        """
        randomness.check_seed(seed)
        if not self.workers:
            return ComputedBatches(lambda t: self._read(seed, number, t), self.steps, draws_nothing=True)
        if not self._readers:
            self._readers.append(_Readers(self._source, self.workers))
        ahead = _Ahead(self, self._readers[0], seed, number)
        return ComputedBatches(ahead.get, self.steps, draws_nothing=True)

    def batch(self, seed: int, number: int) -> Any:
        """Return batch `number` of an endless series of epochs, for an outer loss."""
        return self._read(seed, 0, number, randomness.OUTER_BATCH)

    def _indices(self, seed: int, number: int, t: int, purpose: int) -> np.ndarray:
        epoch, place = divmod(t, self.steps_per_epoch)
        order = (
            randomness.permutation(self._source.size, seed, purpose, number, epoch)
            if self.shuffle
            else np.arange(self._source.size)
        )
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def _read(self, seed: int, number: int, t: int, purpose: int = randomness.INNER_BATCHES) -> Any:
        indices = self._indices(seed, number, t, purpose)
        if not self._source.runs_users_code:
            return self._source.read(indices)
        return randomness.evaluate(lambda _: self._source.read(indices), seed, randomness.EXAMPLES, purpose, number, t)


# -- where examples come from ------------------------------------------------------------------------------------------


class _Source:
    """Examples by their numbers."""

    size: int
    runs_users_code = False

    def read(self, indices: np.ndarray) -> Any:
        """Return the batch of these examples."""
        raise NotImplementedError


class _Columns(_Source):
    """Tensors (or lists) whose first dimension counts the examples, in a tuple, in a dict, or alone."""

    def __init__(self, columns: Any) -> None:
        self._columns = columns
        each = columns.values() if isinstance(columns, dict) else columns if isinstance(columns, tuple) else [columns]
        sizes = [len(column) for column in each]
        if len(set(sizes)) != 1:
            raise ValueError(f"the parts of the dataset have {sizes} examples; all need the same number")
        self.size = sizes[0]

    def read(self, indices: np.ndarray) -> Any:
        places = torch.from_numpy(indices.copy())

        def rows(column: Any) -> Any:
            return column[places.to(column.device)] if isinstance(column, Tensor) else [column[i] for i in indices]

        if isinstance(self._columns, dict):
            return {name: rows(column) for name, column in self._columns.items()}
        return tuple(map(rows, self._columns)) if isinstance(self._columns, tuple) else rows(self._columns)


class _Examples(_Source):
    """A map-style dataset, read example by example."""

    runs_users_code = True

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate, self.size = dataset, collate, len(dataset)

    def read(self, indices: np.ndarray) -> Any:
        numbers = indices.tolist()
        several = getattr(self._dataset, "__getitems__", None)
        return self._collate(several(numbers) if several else [self._dataset[i] for i in numbers])


def _source_of(dataset: Any, collate_fn: Callable[[list[Any]], Any] | None) -> _Source:
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"the dataset is a {type(dataset).__name__}, which can only be read from the beginning, and steps are "
            "computed more than once; pass a dataset with __len__ and __getitem__, or list(dataset)"
        )
    plain = collate_fn is None or collate_fn is default_collate
    if type(dataset) is TensorDataset and plain:
        return _Columns(tuple(dataset.tensors))
    if (column := _column(dataset, "dataset")) is not None:
        found: Any = column
    elif _is_frame(dataset):
        frame: Any = dataset
        found = {name: _column(frame[name], f"column {name!r}") for name in frame.columns}
    elif isinstance(dataset, Mapping) or (isinstance(dataset, tuple) and any(_is_array(each) for each in dataset)):
        named = dataset.items() if isinstance(dataset, Mapping) else enumerate(dataset)
        columns = {name: _column(each, f"dataset[{name!r}]") for name, each in named}
        for name, each in columns.items():
            if each is None:
                raise TypeError(
                    f"dataset[{name!r}] is a {type(dataset[name]).__name__}; a tensor or an array with the examples "
                    "along its first dimension is needed"
                )
        found = columns if isinstance(dataset, Mapping) else tuple(columns.values())
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, str):
        return _Examples(dataset, default_collate if collate_fn is None else collate_fn)
    else:
        raise TypeError(
            f"the dataset is {dataset!r} ({type(dataset).__name__}); tensors, arrays, a pandas frame, a DataLoader or "
            "a dataset with __len__ and __getitem__ is needed"
        )
    if not plain:
        raise ValueError(
            "collate_fn joins examples, and a dataset of tensors or arrays is indexed as a whole; leave it out"
        )
    return _Columns(found)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) or hasattr(value, "iloc")


def _is_frame(value: Any) -> bool:
    return hasattr(value, "iloc") and hasattr(value, "columns")


def _column(value: Any, name: str) -> Tensor | list[Any] | None:
    """A tensor (or a list of strings and the like) for a tensor, an array or a pandas series; else `None`."""
    if not _is_array(value) or _is_frame(value):
        return None
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind in "OUST":
            return array.tolist()
        if array.dtype.kind not in "fiubc":
            raise TypeError(f"{name} has dtype {array.dtype}, of which there are no tensors; convert it to numbers")
        value = torch.from_numpy(array if array.flags.writeable and array.dtype.isnative else array.copy())
    if value.ndim == 0:
        raise ValueError(f"{name} has no dimension; the first one counts the examples")
    return value.detach()


# -- reading ahead -----------------------------------------------------------------------------------------------------

_IN_READER: list[_Source] = []
"""The examples, in a process that reads them."""


def _start_reader(source: _Source) -> None:
    torch.set_num_threads(1)
    _IN_READER[:] = [source]


def _read_in_reader(indices: np.ndarray, seed: int, *counters: int) -> bytes:
    with randomness.seeded(seed, *counters):
        return pickle.dumps(_IN_READER[0].read(indices), protocol=pickle.HIGHEST_PROTOCOL)


class _Readers:
    """Processes that read examples; they end with this object."""

    def __init__(self, source: _Source, count: int) -> None:
        self.count = count
        self.pool = ProcessPoolExecutor(count, initializer=_start_reader, initargs=(source,))
        weakref.finalize(self, self.pool.shutdown, wait=False, cancel_futures=True)


class _Ahead:
    """The batches of one estimate, read ahead in the direction in which they were asked for last."""

    def __init__(self, epochs: Epochs, readers: _Readers, seed: int, number: int) -> None:
        self._epochs, self._readers, self._place = epochs, readers, (seed, number)
        self._coming: dict[int, Future[bytes]] = {}
        self._last = -1

    def get(self, t: int) -> Any:
        direction = -1 if t < self._last else 1
        self._last = t
        wanted = [t + direction * k for k in range(1 + 2 * self._readers.count)]
        wanted = [k for k in wanted if 0 <= k < self._epochs.steps]
        for k in list(self._coming):
            if k not in wanted:
                self._coming.pop(k).cancel()
        for k in wanted:
            if k not in self._coming:
                seed, number = self._place
                purpose = randomness.INNER_BATCHES
                indices = self._epochs._indices(seed, number, k, purpose)
                arguments = (indices, seed, randomness.EXAMPLES, purpose, number, k)
                self._coming[k] = self._readers.pool.submit(_read_in_reader, *arguments)
        return pickle.loads(self._coming[t].result())
