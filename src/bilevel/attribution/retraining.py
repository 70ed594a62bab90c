"""Retraining on random subsets of the examples: what scores of examples are judged by."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bilevel import checks, randomness
from bilevel.attribution.weighted_training import WeightedTraining, require_vector
from bilevel.errors import CheckpointError, NonFiniteError
from bilevel.report.files import write_bytes
from bilevel.report.progress import bar

_SECONDS_BETWEEN_FILES = 10.0


@dataclass(frozen=True, eq=False)
class Retrained:
    """The losses of queries after retraining on random subsets of the training examples. Made by `retrain`."""

    kept: Tensor
    """`[subsets, N]`, bool: the examples that each retraining kept."""
    losses: Tensor
    """`[subsets, m]`: the losses of the queries after each retraining."""
    seconds: float
    """The time of the retrainings that this call made; those that a file held already take none."""


def retrain(
    training: WeightedTraining,
    queries: Any,
    subsets: int = 100,
    fraction: float = 0.9,
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Retrained:
    """Train again on random subsets of the examples, and return the losses of the queries.

    A subset is trained on by setting the weights of the other examples to 0. The initial model, the order of the
    batches and their size stay as they are, so the retrainings differ in the examples alone.

    Args:
        training: the run that is repeated.
        queries: the queries that `attribute` received.
        subsets: the number of retrainings.
        fraction: the part of the examples that each subset keeps, in (0, 1).
        seed: of the subsets. Subset s is a function of (seed, s), so a larger number of them begins with the same ones.
        file: a safetensors file to which finished retrainings are written. If it exists, they are read from it and only
            the others are made.
        progress: whether a bar with the remaining time is shown on standard error.

    Raises:
        ValueError: a number is out of its range.
        CheckpointError: the file belongs to another run, or cannot be read.
        NonFiniteError: a retraining ends in a loss that is NaN or infinite.

    Cost: T units for each subset.

    >>> import torch, bilevel
    >>> from bilevel.attribution import Recipe, WeightedTraining, retrain
    >>> x = torch.arange(8.0)[:, None]
    >>> training = WeightedTraining.of(
    ...     model=torch.nn.Linear(1, 1),
    ...     dataset=(x, 2 * x),
    ...     loss=lambda model, batch: (model(batch[0]) - batch[1]).square()[:, 0],
    ...     recipe=Recipe(bilevel.optimizer(torch.optim.SGD, lr=0.01), batch_size=4, epochs=2),
    ... )
    >>> found = retrain(training, (x[:3], x[:3]), subsets=5, fraction=0.75, progress=False)
    >>> tuple(found.losses.shape), found.kept.sum(1)
    ((5, 3), tensor([6, 6, 6, 6, 6]))
    """
    checks.whole_number(subsets, "subsets", at_least=2)
    keep = round(training.examples * checks.fraction(fraction, "fraction"))
    if not 0 < keep < training.examples:
        raise ValueError(
            f"fraction={fraction} of {training.examples} examples keeps {keep}; a subset must keep at least one "
            "and leave out at least one"
        )
    kept = torch.zeros(subsets, training.examples, dtype=torch.bool)
    for number in range(subsets):
        order = randomness.generator(seed, randomness.SUBSETS, number).permutation(training.examples)
        kept[number, torch.from_numpy(order[:keep].copy())] = True
    whole = require_vector(training.losses(queries), "the outer loss")
    run = _fingerprint(training, whole, fraction, seed)
    rows = [] if file is None else _read(Path(file), run, len(whole))[:subsets]
    began = written = time.monotonic()
    with bar("Retraining", subsets, len(rows), show=progress) as shown:
        while len(rows) < subsets:
            number = len(rows)
            losses = training.losses(queries, kept[number].to(whole.dtype))
            if not losses.isfinite().all():
                raise NonFiniteError(
                    f"the retraining on subset {number} ended in a loss that is NaN or infinite; a lower learning rate "
                    "may help"
                )
            rows.append(losses)
            shown.advance()
            late = time.monotonic() - written > _SECONDS_BETWEEN_FILES
            if file is not None and (late or len(rows) == subsets):
                _write(Path(file), run, torch.stack(rows))
                written = time.monotonic()
    return Retrained(kept, torch.stack(rows), time.monotonic() - began)


def _fingerprint(training: WeightedTraining, whole: Tensor, fraction: float, seed: int) -> str:
    """Return a text that changes with the run, the queries and the subsets. The run's own losses stand for the run."""
    numbers = np.round(whole.double().numpy(force=True), 6 - math.ceil(math.log10(float(whole.abs().max()) + 1e-30)))
    content = f"{training.examples} {training.seed} {fraction!r} {seed!r} {whole.dtype} ".encode() + numbers.tobytes()
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, run: str, losses: Tensor) -> None:
    write_bytes(path, safetensors.torch.save({"losses": losses.contiguous()}, metadata={"run": run}))


def _read(path: Path, run: str, queries: int) -> list[Tensor]:
    if not path.exists():
        return []
    try:
        with safetensors.safe_open(path, framework="pt") as content:
            found, losses = (content.metadata() or {}).get("run"), content.get_tensor("losses")
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of retrainings ({error}); remove it or name another"
        ) from error
    if found != run or losses.shape[1:] != (queries,):
        raise CheckpointError(
            f"{path} holds retrainings of another run: the training, the queries, the fraction or the seed differ; "
            "remove the file or name another"
        )
    return list(losses)
