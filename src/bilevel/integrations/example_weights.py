"""A scikit-learn classifier that learns how much each training example should count. It needs scikit-learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel.training.fit as training
from bilevel import checks
from bilevel.batches import batches, no_batches
from bilevel.estimators.reverse import Reverse
from bilevel.estimators.solve import solve
from bilevel.optim.update_rule import optimizer
from bilevel.problem import GradientDescent
from bilevel.report import page

MakeModel = Callable[[int, int], nn.Module]
"""`model(features, classes)` returns a new network."""


class ExampleWeights(ClassifierMixin, BaseEstimator):
    """A classifier that learns a weight for each training example, such that trusted examples are classified well.

    The weights w_i = sigmoid(φ_i) `[N]` multiply the losses of the training examples, Σ w_i ℓ_i / Σ w_i. The
    hypergradient of the loss on the trusted examples, through T steps of training, trains φ. Examples that end with a
    small weight made the classifier worse on the trusted examples, often because their label is wrong. If a list of
    wrong labels is all you want, first try the loss of each example in a model that is trained on the trusted examples
    alone: `benchmarks/results/example_weights.md` shows that it ranks them better.

    Args:
        model: a network, which is copied; or `model(features, classes)` that returns a new one; or `None` for one
            hidden layer of 32 units. It receives inputs `[b, …]` in float32 and returns logits `[b, classes]`.
        inner_steps: T, the number of training steps through which the hypergradient is taken.
        outer_steps: the number of updates of the weights.
        batch_size: the number of examples in an inner step; `None` for all.
        learning_rate: of the network: SGD with momentum 0.9.
        weight_learning_rate: of φ: Adam.
        validation_fraction: without trusted examples, the fraction of the examples that is held out in their place. Two
            runs hold out different examples, so that every example gets a weight. The held-out labels may be wrong too,
            and the weights then say little: on digits, the area under the ROC curve is 0.7 with 10 % wrong labels, and
            0.5 (chance) with 40 %. A few trusted examples are worth much more.
        standardize: whether inputs with two dimensions are scaled to mean 0 and variance 1 by the training examples.
        random_state: an int, a NumPy `RandomState`, or `None`.
        progress: whether a bar with the remaining time is shown on standard error.

    Attributes:
        weights_: `[N]`, between 0 and 1, in the order of the training examples.
        ranking_: `[N]`, the numbers of the training examples, the one with the smallest weight first.
        model_: the network, trained with the weights.
        classes_: the labels.

    Cost: 4T units for each outer step (see `Reverse`), twice that without trusted examples. Memory: T copies
    of the parameters.

    Reference: Shen et al., NeurIPS 2024, Section 4 (data cleaning); Franceschi et al., ICML 2017.

    >>> import numpy as np
    >>> from bilevel.integrations.example_weights import ExampleWeights
    >>> x = np.random.default_rng(0).normal(size=(60, 2))
    >>> right = (x[:, 0] > 0).astype(int)
    >>> y = right.copy()
    >>> y[:6] = 1 - y[:6]
    >>> found = ExampleWeights(outer_steps=20, random_state=0).fit(x[:40], y[:40], X_clean=x[40:], y_clean=right[40:])
    >>> float(found.weights_[:6].mean()) < float(found.weights_[6:].mean())
    True
    """

    def __init__(
        self,
        model: nn.Module | MakeModel | None = None,
        *,
        inner_steps: int = 50,
        outer_steps: int = 50,
        batch_size: int | None = None,
        learning_rate: float = 0.05,
        weight_learning_rate: float = 0.1,
        validation_fraction: float = 0.2,
        standardize: bool = True,
        random_state: Any = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.inner_steps = inner_steps
        self.outer_steps = outer_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_learning_rate = weight_learning_rate
        self.validation_fraction = validation_fraction
        self.standardize = standardize
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any, *, X_clean: Any = None, y_clean: Any = None) -> ExampleWeights:
        """Learn the weights, and train the network with them.

        Args:
            X: inputs `[N, …]`: an array, a frame or a tensor.
            y: labels `[N]`.
            X_clean: trusted inputs `[n, …]`; `None` to hold out a part of X.
            y_clean: trusted labels `[n]`, each of which also occurs in y.

        Raises:
            ValueError: the data or a setting cannot be used.
        """
        self._check_settings()
        if (X_clean is None) != (y_clean is None):
            raise ValueError("X_clean and y_clean belong together: pass both, or neither to hold out a part of X")
        nd = self.model is not None
        X, y = validate_data(self, _on_host(X), _on_host(y), ensure_min_samples=2, allow_nd=nd)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class, {self.classes_[0]!r}; at least two classes are needed")
        self._set_scale(X)
        seed = int(check_random_state(self.random_state).randint(2**31))
        inputs, targets = self._inputs(X), torch.from_numpy(labels)
        if X_clean is not None:
            X_clean, y_clean = validate_data(self, _on_host(X_clean), _on_host(y_clean), reset=False, allow_nd=nd)
            unknown = sorted(set(np.unique(y_clean)) - set(self.classes_))
            if unknown:
                raise ValueError(f"y_clean holds the labels {unknown}, which do not occur in y")
            clean = self._inputs(X_clean), torch.from_numpy(np.searchsorted(self.classes_, y_clean))
            weights = self._weights(inputs, targets, clean, seed)
        else:
            weights = self._weights_by_holding_out(inputs, targets, labels, seed)
        self.weights_ = weights.numpy()
        self.ranking_ = np.argsort(self.weights_, kind="stable")
        self.model_ = self._trained(inputs, targets, weights, seed)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the classes `[n, classes]`."""
        check_is_fitted(self)
        X = validate_data(self, _on_host(X), reset=False, allow_nd=self.model is not None)
        with torch.no_grad():
            return self.model_.eval()(self._inputs(X)).double().softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable labels `[n]`."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def plot(self) -> Any:
        """Draw a histogram of the weights as a matplotlib figure."""
        check_is_fitted(self)
        fig, axis = page.figure(figsize=(5, 3))
        axis.hist(self.weights_, bins=30, color="C0")
        axis.set(xlabel="weight", ylabel="training examples", title="small weights are suspicious")
        axis.spines[["top", "right"]].set_visible(False)
        return fig

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's description of the estimator."""
        tags = super().__sklearn_tags__()
        tags.non_deterministic = False
        return tags

    # -- the bilevel problem -------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        checks.each_field(self, checks.whole_number, "inner_steps", "outer_steps")
        checks.each_field(self, checks.positive, "learning_rate", "weight_learning_rate", "validation_fraction")
        if self.batch_size is not None:
            checks.whole_number(self.batch_size, "batch_size")
        if self.validation_fraction >= 1:
            raise ValueError(f"validation_fraction={self.validation_fraction}: a number between 0 and 1 is needed")

    def _set_scale(self, X: np.ndarray) -> None:
        scaled = self.standardize and X.ndim == 2
        self._mean = X.mean(0) if scaled else 0.0
        spread = X.std(0) if scaled else 1.0
        self._scale = np.where(spread > 0, spread, 1.0)

    def _inputs(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray((X - self._mean) / self._scale, dtype=np.float32))

    def _network(self, inputs: Tensor) -> nn.Module:
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model)
        features, classes = inputs[0].numel(), len(self.classes_)
        if self.model is not None:
            return self.model(features, classes)
        return nn.Sequential(nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, classes))

    def _batches(self, count: int, seed: int) -> Any:
        if self.batch_size is None or self.batch_size >= count:
            return no_batches(self.inner_steps)
        size, per_epoch = self.batch_size, count // self.batch_size

        def get(t: int) -> Tensor:
            order = np.random.default_rng([seed, t // per_epoch]).permutation(count)
            return torch.from_numpy(order[t % per_epoch * size :][:size].copy())

        return batches(get, self.inner_steps)

    def _problem(self, inputs: Tensor, targets: Tensor, clean: tuple[Tensor, Tensor] | None = None) -> GradientDescent:
        def inner_loss(model: Any, phi: Tensor, chosen: Tensor | None) -> Tensor:
            here = slice(None) if chosen is None else chosen
            weights = phi[here].sigmoid()
            losses = cross_entropy(model(inputs[here]), targets[here], reduction="none")
            return (weights * losses).sum() / weights.sum()

        def outer_loss(model: Any, phi: Tensor, batch: Any) -> Tensor:
            assert clean is not None
            return cross_entropy(model(clean[0]), clean[1])

        descent = optimizer(torch.optim.SGD, lr=self.learning_rate, momentum=0.9)
        return GradientDescent(inner_loss, outer_loss, lambda phi: self._network(inputs), descent)

    def _weights(self, inputs: Tensor, targets: Tensor, clean: tuple[Tensor, Tensor], seed: int) -> Tensor:
        """Return the weights `[N]` under which training does best on the trusted examples."""
        found = training.fit(
            self._problem(inputs, targets, clean),
            torch.zeros(len(inputs)),
            self._batches(len(inputs), seed),
            seed=seed,
            estimator=Reverse("all"),
            steps=self.outer_steps,
            optimizer=optimizer(torch.optim.Adam, lr=self.weight_learning_rate),
            progress=self.progress,
        )
        return found.meta.detach().sigmoid()

    def _weights_by_holding_out(self, inputs: Tensor, targets: Tensor, labels: np.ndarray, seed: int) -> Tensor:
        count = len(inputs)
        held_out = round(self.validation_fraction * count)
        if held_out < 1 or 2 * held_out > count:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of {count} examples holds out {held_out}; two runs "
                f"hold out different ones, so at least 1 and at most {count // 2} are needed; or pass X_clean, y_clean"
            )
        first = _choose(labels, np.arange(count), held_out, seed)
        second = _choose(labels, np.setdiff1d(np.arange(count), first), held_out, seed + 1)
        total, runs = torch.zeros(count), torch.zeros(count)
        for number, out in enumerate((first, second)):
            rest = torch.from_numpy(np.setdiff1d(np.arange(count), out))
            held = torch.from_numpy(out)
            total[rest] += self._weights(inputs[rest], targets[rest], (inputs[held], targets[held]), seed + number)
            runs[rest] += 1
        return total / runs

    def _trained(self, inputs: Tensor, targets: Tensor, weights: Tensor, seed: int) -> nn.Module:
        state = solve(self._problem(inputs, targets), weights.logit(), self._batches(len(inputs), seed), seed=seed)
        network = self._network(inputs)
        network.load_state_dict(state.params.state_dict())
        return network.eval()


def _choose(labels: np.ndarray, among: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose examples, from each class in proportion where every class has enough of them."""
    counts = np.unique(labels[among], return_counts=True)[1]
    if count >= len(counts) and counts.min() >= 2 and len(among) - count >= len(counts):
        split = StratifiedShuffleSplit(1, test_size=count, random_state=seed % 2**31)
        return np.sort(among[next(split.split(among, labels[among]))[1]])
    return np.sort(np.random.default_rng(seed).choice(among, count, replace=False))


def _on_host(data: Any) -> Any:
    return data.detach().cpu().numpy() if isinstance(data, Tensor) else data
