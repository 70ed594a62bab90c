"""The estimates of one outer step, with the batches and the seed of each, and their assignment to workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import distributed, randomness, trees
from bilevel.directions.distributed_slopes import agreed_tree
from bilevel.distributed.workers import Workers
from bilevel.epochs import Epochs
from bilevel.errors import NonFiniteError, SolverError
from bilevel.estimators import Estimate, Estimator
from bilevel.models.sharing import leaves_once
from bilevel.problem import BilevelProblem
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.unroll import unroll


def batches_of(inner_batches: Any, draw: int, seed: int = 0) -> Any:
    """Return the inner batches of a draw: `inner_batches` itself, or the result of that function for the draw's number.

    All global generators are set to (seed, draw) while the function runs. A DataLoader that shuffles inside the
    function therefore returns the same batches on every worker, and also when a run is resumed.
    """
    if isinstance(inner_batches, Epochs):
        return inner_batches.at(seed, draw)
    if callable(inner_batches) and not hasattr(inner_batches, "__getitem__"):
        with randomness.seeded(seed, randomness.INNER_BATCHES, draw):
            made: Any = inner_batches(draw)
        return made
    return inner_batches


def batch_of(outer_batch: Any, draw: int, seed: int = 0) -> Any:
    """Return the outer batch of a draw: `outer_batch` itself, or the result of that function for the draw's number.

    All global generators are set to (seed, draw) while the function runs.
    """
    if isinstance(outer_batch, Epochs):
        return outer_batch.batch(seed, draw)
    if callable(outer_batch):
        with randomness.seeded(seed, randomness.OUTER_BATCH, draw):
            return outer_batch(draw)
    return outer_batch


class Estimates(NamedTuple):
    """The estimates of one outer step."""

    sums: list[Tensor]
    """The sums of the gradients, one tensor for each leaf of φ."""
    losses: list[float]
    errors: list[float | None]
    last: Estimate
    """The last estimate that this worker made."""


@dataclass
class Draws:
    """The data for estimates: the problem, its batches and seeds, and the position of the inner loop in a stream."""

    problem: BilevelProblem
    inner_batches: Any
    outer_batch: Any
    seed: int
    stream: bool | int = False
    """Whether each estimate continues the inner loop of the estimate before. With a whole number n, the inner loop
    starts again after every n estimates."""
    draws: int = 0
    """The number of estimates made so far."""
    carried: WindowEnd | None = None
    """The end of the last window of a stream."""

    @property
    def backend(self) -> str | None:
        """The backend that compiles the inner gradient; `None` if it is not compiled."""
        return self.problem.backend

    def batches(self, draw: int) -> tuple[Any, Any]:
        """Return the inner batches and the outer batch of a draw."""
        return batches_of(self.inner_batches, draw, self.seed), batch_of(self.outer_batch, draw, self.seed)

    def estimates(self, estimator: Estimator, count: int, meta: Tree, outer_step: int) -> Estimates:
        """Compute the `count` estimates of one outer step, and their sum.

        Workers share the directions of every estimate, if it has directions. Otherwise they share the estimates, except
        in a stream, where each estimate starts from the state in which the one before ended.

        Args:
            estimator: the method.
            count: the number of estimates.
            meta: φ.
            outer_step: the number of the outer step, for the seeds and for error messages.
        """
        workers = distributed.current()
        if workers.size == 1 or count == 1 or self.stream:
            return self._these(range(count), estimator, meta, outer_step)
        inner, outer = self.batches(self.draws)
        estimator = estimator.resolved(unroll(self.problem, meta, inner, outer, self.seed))
        if estimator.is_random:
            return self._these(range(count), estimator, meta, outer_step)
        mine = workers.share(count)

        def share() -> Estimates:
            with Workers().sharing():
                # A worker without estimates contributes nothing; it still needs one to report progress.
                return self._these(mine or range(1), estimator, meta, outer_step)

        found = workers.together("accumulated estimates", share)
        losses = torch.zeros(count, dtype=torch.float64, device="cpu")
        losses[list(mine)] = losses.new_tensor(found.losses[: len(mine)])
        sums = found.sums if mine else [torch.zeros_like(total) for total in found.sums]
        (losses,) = workers.sum("accumulated losses", [losses])
        sums = workers.sum("accumulated gradients", sums)
        return Estimates(sums, losses.tolist(), [None] * count, found.last)

    def _these(self, numbers: Sequence[int], estimator: Estimator, meta: Tree, outer_step: int) -> Estimates:
        sums = [torch.zeros_like(leaf) for leaf in trees.split(meta).differentiable]
        losses: list[float] = []
        errors: list[float | None] = []
        estimate: Estimate | None = None
        for number in numbers:
            estimate = self._estimate(number, estimator, meta, outer_step)
            sums = [total + part for total, part in zip(sums, leaves_once(estimate.grad, meta), strict=True)]
            losses.append(float(estimate.value))
            errors.append(None if estimate.standard_error is None else float(estimate.standard_error))
        assert estimate is not None
        return Estimates(sums, losses, errors, estimate)

    def value(self, number: int, meta: Tree, outer_step: int) -> float:
        """Return the outer loss that the estimate of this number would have."""
        inner, outer = self.batches(self.draws + number)
        seed = randomness.derive(self.seed, randomness.DRAW, outer_step, number)
        with randomness.preserved():
            return float(unroll(self.problem, meta, inner, outer, seed).value()[0])

    def _estimate(self, number: int, estimator: Estimator, meta: Tree, outer_step: int) -> Estimate:
        draw = self.draws + number
        inner, outer = self.batches(draw)
        place = (outer_step, number)
        if self.stream:  # each history has one seed
            length = None if self.stream is True else self.stream
            place = (0 if length is None else draw // length, 0)
            if length is not None and draw % length == 0:
                self.carried = None
        seed = randomness.derive(self.seed, randomness.DRAW, *place)
        try:
            found = estimator(self.problem, meta, inner, outer, seed, self.carried)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"outer step {outer_step}: {error}", error.inner_step, error.last_finite_state
            ) from error
        except SolverError as error:
            raise SolverError(f"outer step {outer_step}: {error}") from error
        argument_checks.one_outer_loss(found.value, "fit descends on", "; single estimates take the vector as it is")
        if self.stream and found.carried is not None:
            self.carried = found.carried
            if not found.carried.agreed:
                workers = distributed.current()
                state, memory = (agreed_tree(tree, workers) for tree in (found.carried.state, found.carried.memory))
                self.carried = replace(found.carried, state=state, memory=memory, agreed=True)
        return found
