"""A training run in which every example has a weight: what attribution differentiates and repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bilevel import checks
from bilevel.epochs import epochs
from bilevel.errors import DataError, NonFiniteError, ReplayError
from bilevel.estimators.solve import solve
from bilevel.optim.update_rule import Optimizer, optimizer
from bilevel.problem import BilevelProblem, GradientDescent, Unrollable, as_problem

Loss = Callable[[Any, Any], Tensor]
"""`loss(model, batch) -> [b]`: one loss for each example of a batch."""

_INDEX = "bilevel: number of the example"
"""The key under which the numbers of examples travel in a batch that is a dict."""


def _adam() -> Optimizer:
    return optimizer(torch.optim.Adam, lr=0.003, eps=1e-4)


@dataclass(frozen=True)
class Recipe:
    """Describe how a model is trained.

    The default is Adam with a learning rate of 0.003 and an epsilon of 1e-4 instead of PyTorch's 1e-8. With a tiny
    epsilon, a parameter whose gradient is almost zero moves by a full step in the direction of the gradient's sign, and
    jumps where a weight changes that sign; `metasmoothness` measures this. The model matters as much: use an activation
    with a continuous derivative, such as GELU. `benchmarks/results/attribution.md` compares recipes.

    Args:
        optimizer: from `bilevel.optimizer`.
        batch_size: the number of examples in a batch.
        epochs: how often the training goes through the examples, in a new order each time.

    Raises:
        ValueError: a number is not a whole number of at least 1.
    """

    optimizer: Optimizer = field(default_factory=_adam)
    batch_size: int = 100
    epochs: int = 10

    def __post_init__(self) -> None:
        checks.each_field(self, checks.whole_number, "batch_size", "epochs")
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"optimizer is {self.optimizer!r} ({type(self.optimizer).__name__}); name the class and its settings: "
                "optimizer=bilevel.optimizer(torch.optim.Adam, lr=0.003, eps=1e-4)"
            )


@dataclass(frozen=True, eq=False)
class WeightedTraining:
    """A training run that is a function of the weights of its examples.

    Use `WeightedTraining.of(model, dataset, loss, recipe)` unless you have a problem of your own.

    Args:
        problem: a problem whose meta parameters are the weights `[N]`, and whose outer loss returns the losses `[m]` of
            the queries that it receives as its batch. The inner loss must be a sum over examples in which each term is
            multiplied by its weight, without division by the sum of the weights: a weight of 0 then removes an example
            and leaves everything else as it was.
        examples: N, the number of training examples.
        inner_batches: the batches of the run, in the form that estimators take.
        seed: determines the initial model, the order of the batches and dropout. It is the same in every retraining.

    Raises:
        TypeError, ValueError: the problem cannot be used.

    >>> import torch, bilevel
    >>> from bilevel.attribution import WeightedTraining
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda mean, weights, batch: (weights * (mean - x) ** 2).mean(),
    ...     outer_loss=lambda mean, weights, queries: (mean - queries) ** 2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> WeightedTraining(problem, examples=3, inner_batches=4).losses(torch.tensor([4.0]))
    tensor([1.])
    """

    problem: BilevelProblem | Unrollable
    examples: int
    inner_batches: Any
    seed: int = 0
    loss: Loss | None = None
    """The loss of each example, which the gradient cosine needs; `WeightedTraining.of` sets it."""
    dataset: Any = None
    """The examples, which the gradient cosine and the page of a result show; `WeightedTraining.of` sets it."""

    def __post_init__(self) -> None:
        checks.whole_number(self.examples, "examples")
        if as_problem(self.problem).is_black_box:
            raise TypeError(
                "problem is a BlackBox, which has no derivatives; describe the training as a GradientDescent or a "
                "Problem"
            )

    @classmethod
    def of(
        cls,
        model: nn.Module | Callable[[], nn.Module],
        dataset: Any,
        loss: Loss,
        recipe: Recipe | None = None,
        query_loss: Loss | None = None,
        seed: int = 0,
    ) -> WeightedTraining:
        """Build the run from a model, a dataset and a loss. The inner loss of a batch B is Σ_{i ∈ B} w_i ℓ_i / |B|.

        Args:
            model: an `nn.Module`, which is not changed; or a function without arguments that returns a new one, whose
                initial parameters are then a function of the seed.
            dataset: a tensor `[N, …]`, a tuple or dict of them, or a map-style dataset.
            loss: `loss(model, batch) -> [b]` returns one loss for each example of a batch, which has the form of the
                dataset.
            recipe: the optimiser, the batch size and the number of epochs; by default `Recipe()`.
            query_loss: `query_loss(model, queries) -> [m]`; by default `loss`.
            seed: determines the initial model, the order of the batches and dropout.

        Raises:
            TypeError, ValueError: an argument cannot be used.
            NonFiniteError: the dataset holds NaN or infinity.
            ReplayError: an example is another one when it is read again.
        """
        checks.a_function(loss, "loss", "loss(model, batch) -> [b]")
        recipe = Recipe() if recipe is None else recipe
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe is {recipe!r} ({type(recipe).__name__}); write Recipe(optimizer, batch_size=...)")
        if not callable(model):
            raise TypeError(
                f"model is {model!r} ({type(model).__name__}); pass an nn.Module or a function that makes one"
            )
        if isinstance(dataset, DataLoader):
            dataset = dataset.dataset
        count = _size(dataset)
        if recipe.batch_size > count:
            raise ValueError(
                f"the dataset has {count} examples, and batch_size={recipe.batch_size}; take a batch_size of at most "
                f"{count}"
            )
        _require_finite(dataset)
        batches = epochs(_numbered(dataset, count), recipe.batch_size, epochs=recipe.epochs)
        first, again = (batches.at(seed)[0] for _ in range(2))
        if not _equal(first, again):
            raise ReplayError(
                "the dataset returned another example when the same one was read again; attribution repeats every "
                "step, so draw random numbers from torch's global generator, or augment the examples beforehand"
            )

        def inner_loss(model: Any, weights: Tensor, batch: Any) -> Tensor:
            numbers, examples = _apart(batch)
            losses = require_vector(loss(model, examples), "loss", len(numbers))
            return (weights[numbers] * losses).sum() / len(numbers)

        of_queries = loss if query_loss is None else query_loss
        checks.a_function(of_queries, "query_loss", "query_loss(model, queries) -> [m]")
        problem = GradientDescent(
            inner_loss,
            lambda model, weights, queries: require_vector(of_queries(model, queries), "the loss of queries"),
            model if isinstance(model, nn.Module) else lambda weights: model(),
            recipe.optimizer,
        )
        return cls(problem, count, batches, seed, loss, dataset)

    def weights(self) -> Tensor:
        """Return the weights `[N]` of the run as it was: ones, in the default floating-point type."""
        return torch.ones(self.examples)

    def checked(self, weights: Tensor | None) -> Tensor:
        """Return the weights `[N]`, or ones for `None`.

        Raises:
            ValueError: the weights have another shape, are not finite, or are all zero.
        """
        if weights is None:
            return self.weights()
        if not isinstance(weights, Tensor) or weights.shape != (self.examples,) or not weights.is_floating_point():
            shape = f"of shape {tuple(weights.shape)}, {weights.dtype}" if isinstance(weights, Tensor) else "no tensor"
            raise ValueError(f"weights is {shape}; a floating-point tensor of shape ({self.examples},) is needed")
        if not weights.isfinite().all():
            raise ValueError("weights holds NaN or infinity; a finite weight for each example is needed")
        if not weights.any():
            raise ValueError(
                "all weights are 0, so there is nothing to train on; a weight of 1 keeps an example as it is"
            )
        return weights.detach()

    def train(self, weights: Tensor | None = None) -> Any:
        """Train with the given weights `[N]`, and return the final state."""
        return solve(self.problem, self.checked(weights), self.inner_batches, seed=self.seed)

    def losses(self, queries: Any, weights: Tensor | None = None) -> Tensor:
        """Train with the given weights `[N]`, and return the losses of the queries `[m]`."""
        weights = self.checked(weights)
        state = solve(self.problem, weights, self.inner_batches, seed=self.seed)
        with torch.no_grad():
            return as_problem(self.problem).outer_loss(state, weights, queries).detach()


def require_vector(value: Any, name: str, count: int | None = None) -> Tensor:
    """Return the value if it is a vector with one loss for each example."""
    if isinstance(value, Tensor) and value.ndim == 1 and (count is None or len(value) == count):
        return value
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    needed = "a vector with one entry for each example" + ("" if count is None else f", of length {count},")
    raise ValueError(f'{name} returned {what}; {needed} is needed: cross_entropy(model(x), y, reduction="none")')


def _size(dataset: Any) -> int:
    """Return the number of examples. `epochs` reports what else may be wrong with a dataset."""
    if isinstance(dataset, Tensor | np.ndarray):
        return len(dataset) if dataset.ndim else 0
    columns = _columns(dataset)
    if columns:
        sizes = {len(column) for column in columns.values()}
        if len(sizes) > 1:
            raise ValueError(f"the parts of the dataset have {sorted(sizes)} examples; they must have equally many")
        return sizes.pop()
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; a tensor, a tuple or dict of tensors, or a dataset with a length "
            "and random access is needed"
        )
    return len(dataset)


def _columns(dataset: Any) -> dict[Any, Any]:
    """Return the tensors and arrays of a dataset that consists of them."""
    if isinstance(dataset, Tensor | np.ndarray):
        return {"": dataset}
    items = dataset if isinstance(dataset, Mapping) else dict(enumerate(dataset)) if isinstance(dataset, tuple) else {}
    return dict(items) if all(isinstance(value, Tensor | np.ndarray) for value in items.values()) else {}


def _require_finite(dataset: Any) -> None:
    for name, column in _columns(dataset).items():
        values = torch.as_tensor(column)
        if values.is_floating_point() and not values.isfinite().all():
            rows = (~values.isfinite()).reshape(len(values), -1).any(1).nonzero()[:, 0].tolist()
            where = f" in {name!r}" if name != "" else ""
            raise NonFiniteError(
                f"the dataset holds NaN or infinity{where}, in {len(rows)} examples, the first of which is {rows[0]}; "
                "remove or fill them"
            )


class _Numbered(Dataset[Any]):
    """A dataset whose examples come with their numbers."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._dataset[index]


def _numbered(dataset: Any, count: int) -> Any:
    """Return the dataset with the number of each example, in a form from which `_apart` takes it again."""
    numbers = torch.arange(count)
    if isinstance(dataset, Tensor | np.ndarray):
        return numbers, torch.as_tensor(dataset)
    if _columns(dataset):
        return {_INDEX: numbers, **dataset} if isinstance(dataset, Mapping) else (numbers, *dataset)
    if count == 0:
        raise DataError("the dataset has no examples")
    return _Numbered(dataset)


def _apart(batch: Any) -> tuple[Tensor, Any]:
    if isinstance(batch, Mapping):
        return batch[_INDEX], {key: value for key, value in batch.items() if key != _INDEX}
    numbers, *examples = batch
    return torch.as_tensor(numbers), examples[0] if len(examples) == 1 else tuple(examples)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
