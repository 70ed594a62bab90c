"""The estimates of one outer step: the batches and the seed of each, and which worker makes which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import distributed, randomness, trees
from bilevel.directions.distributed_slopes import agreed_tree
from bilevel.distributed.workers import Workers
from bilevel.errors import NonFiniteError, SolverError
from bilevel.estimators import Estimate, Estimator
from bilevel.models.sharing import leaves_once
from bilevel.problem import BilevelProblem
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.unroll import unroll


def batches_of(inner_batches: Any, draw: int, seed: int = 0) -> Any:
    """The inner batches of a draw: `inner_batches` itself, or the result of that function for the draw's number.

    All global generators are set to (seed, draw) while the function runs. So a DataLoader that shuffles inside of it
    gives the same batches on every worker, and again when a run is resumed.
    """
    if callable(inner_batches) and not hasattr(inner_batches, "__getitem__"):
        with randomness.seeded(seed, randomness.INNER_BATCHES, draw):
            made: Any = inner_batches(draw)
        return made
    return inner_batches


def batch_of(outer_batch: Any, draw: int, seed: int = 0) -> Any:
    """The outer batch of a draw: `outer_batch` itself, or the result of that function, called as in `batches_of`."""
    if callable(outer_batch):
        with randomness.seeded(seed, randomness.OUTER_BATCH, draw):
            return outer_batch(draw)
    return outer_batch


class Estimates(NamedTuple):
    """Of one outer step."""

    sums: list[Tensor]
    """Of the gradients."""
    losses: list[float]
    errors: list[float | None]
    last: Estimate
    """The last one that this worker made."""


@dataclass
class Draws:
    """What estimates are made from: the problem, its batches and seeds, and in a stream where the inner loop is."""

    problem: BilevelProblem
    inner_batches: Any
    outer_batch: Any
    seed: int
    stream: bool = False
    draws: int = 0
    """Estimates made so far."""
    carried: WindowEnd | None = None
    """The end of the last window of a stream."""

    @property
    def backend(self) -> str | None:
        """What compiles the inner gradient."""
        return self.problem.backend

    def batches(self, draw: int) -> tuple[Any, Any]:
        """The inner batches and the outer batch of a draw."""
        return batches_of(self.inner_batches, draw, self.seed), batch_of(self.outer_batch, draw, self.seed)

    def estimates(self, estimator: Estimator, count: int, meta: Tree, outer_step: int) -> Estimates:
        """The `count` estimates of one outer step; of each, no more is kept than is needed.

        Workers share the directions of every estimate, if there are any; else they share the estimates, unless each
        goes on where the one before ended.
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
                # One that is left without takes part in nothing, but needs an estimate to show.
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

    def _estimate(self, number: int, estimator: Estimator, meta: Tree, outer_step: int) -> Estimate:
        inner, outer = self.batches(self.draws + number)
        place = (0, 0) if self.stream else (outer_step, number)  # a stream is one history, with one seed
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
