"""The scores of training examples for queries: what `attribute` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from bilevel import checks
from bilevel.attribution import pictures
from bilevel.attribution.baselines import BASELINES
from bilevel.attribution.lds import DatamodelingScore, linear_datamodeling_score
from bilevel.attribution.retraining import retrain
from bilevel.attribution.weighted_training import WeightedTraining
from bilevel.report.files import write_bytes


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each training example helped each query. Made by `bilevel.attribute`."""

    scores: Tensor
    """`[m, N]`: scores[q, i] = −∂ℓ_q/∂w_i. Positive where example i lowered the loss of query q."""
    losses: Tensor
    """`[m]`: the losses of the queries after the training."""
    training: WeightedTraining
    """The run that was differentiated."""
    queries: Any
    """The queries."""
    method: str
    """The estimator with its settings."""
    seconds: float
    """The time that the scores took."""

    def most_helpful(self, count: int = 5) -> Tensor:
        """Return the numbers `[m, count]` of the examples with the largest scores, the largest first."""
        return self._sorted(count, descending=True)

    def most_harmful(self, count: int = 5) -> Tensor:
        """Return the numbers `[m, count]` of the examples with the smallest scores, the smallest first."""
        return self._sorted(count, descending=False)

    def _sorted(self, count: int, descending: bool) -> Tensor:
        examples = self.scores.shape[1]
        if checks.whole_number(count, "count") > examples:
            raise ValueError(f"count={count}: there are {examples} examples")
        return self.scores.argsort(dim=1, descending=descending, stable=True)[:, :count]

    def save(self, folder: str | Path) -> None:
        """Write `scores.safetensors` (with `scores` and `losses`) and `scores.npy`, each whole or not at all.

        >>> import bilevel, numpy, tempfile, torch
        >>> training = WeightedTraining(problem=bilevel.Problem(int, int, int), examples=2, inner_batches=1)
        >>> found = Attribution(torch.tensor([[1.0, -2.0]]), torch.tensor([0.5]), training, None, "Reverse()", 0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found.save(folder)
        ...     numpy.load(Path(folder) / "scores.npy")
        array([[ 1., -2.]], dtype=float32)
        """
        folder = Path(folder)
        tensors = {"scores": self.scores.contiguous(), "losses": self.losses.contiguous()}
        write_bytes(folder / "scores.safetensors", safetensors.torch.save(tensors, metadata={"method": self.method}))
        write_bytes(folder / "scores.npy", pictures.npy_bytes(self.scores))

    def lds(
        self,
        subsets: int = 100,
        fraction: float = 0.9,
        seed: int = 0,
        file: str | Path | None = None,
        baselines: Iterable[str] | Mapping[str, Tensor | Callable[[Any, Any], Tensor]] = (),
        progress: bool = True,
    ) -> dict[str, DatamodelingScore]:
        """Train again on random subsets, and return how well the scores predict the losses.

        Args:
            subsets: the number of retrainings.
            fraction: the part of the examples that each of them keeps, in (0, 1). The scores are a first derivative,
                so the fewer examples are left out, the better they predict; see docs/guides/attribution.md.
            seed: of the subsets and of the bootstrap.
            file: a safetensors file from which an interrupted call goes on.
            baselines: what is judged by the same retrainings: names in `bilevel.attribution.BASELINES`, or a dict from
                a name to scores `[m, N]` or to a function `(training, queries) -> scores`.
            progress: whether a bar with the remaining time is shown on standard error.

        Returns:
            A dict from a name to its `linear_datamodeling_score`; `"attribute"` is this result.

        Raises:
            ValueError: a number is out of its range, or there is no baseline of that name.
            CheckpointError: the file belongs to another run.

        Cost: T units for each subset, besides the baselines.
        """
        if isinstance(baselines, str):
            baselines = (baselines,)
        if not isinstance(baselines, Mapping):
            baselines = {checks.one_of(name, "baselines", BASELINES): BASELINES[name] for name in baselines}
        judged: dict[str, Tensor] = {"attribute": self.scores}
        for name, made in baselines.items():
            judged[name] = made if isinstance(made, Tensor) else made(self.training, self.queries)
        retrained = retrain(self.training, self.queries, subsets, fraction, seed, file, progress)
        return {name: linear_datamodeling_score(scores, retrained, seed=seed) for name, scores in judged.items()}

    def plot(self, queries: int = 5, count: int = 5) -> Any:
        """Draw queries and, beside each, the images of its most helpful and most harmful examples.

        Args:
            queries: the number of queries that are drawn, from the first.
            count: the number of examples of each kind.

        Returns:
            A matplotlib figure.

        Raises:
            TypeError: the queries and examples are no images `[n, …, height, width]` or `[n, pixels]` of a square.
        """
        return pictures.figure_of(self, queries, count)

    def page(self, path: str | Path, queries: int = 10, count: int = 5) -> None:
        """Write a self-contained HTML page with the queries and their most helpful and most harmful examples.

        Images are drawn (see `plot`). Other examples are named by their numbers.
        """
        pictures.write_page(self, Path(path), queries, count)
