"""Exact hypergradients by reverse-mode unrolling, with a choice of what is stored on the way."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bilevel import autodiff, checks
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.estimators.reverse_pass import ReversePass
from bilevel.trees import Tree
from bilevel.unrolling import checkpoint_schedules
from bilevel.unrolling.checkpoint_schedules import Checkpoints, Trail
from bilevel.unrolling.state_storage import OFFLOADS, Offload
from bilevel.unrolling.unroll import Losses, Unroll


@dataclass(frozen=True)
class Reverse(Estimator):
    """Exact hypergradient by going back through the inner steps. The literature's RGU, BPTT and ITD.

    From t = T down, with d_T = ∂outer/∂θ_T `[M]` and c_T = ∂outer/∂φ `[N]`,

        c_{t−1} = c_t + d_t B_t,   d_{t−1} = d_t A_t,   ∇h = c_0 + d_0 B_0,

    where A_t = ∂θ_t/∂θ_{t−1}, B_t = ∂θ_t/∂φ are the Jacobians of one inner step and B_0 = dθ_0/dφ.

    Args:
        checkpoints: what is kept until the way back, besides the final state.
            `"all"`: the T states θ_t; each step is repeated once to be differentiated. T·M memory.
            `"sqrt"`: the fewest states, about √(2T), with which no step is computed more than twice besides that.
            `"log"`: log₂T states; a step is computed r times, r growing like log T (4 at T = 1000, 5 at 2000).
            an int c: c states, with the fewest computations that this allows (binomial schedule, "revolve").
            `"graph"`: the whole autograd graph, nothing is repeated. T times the graph of a step.
        offload: where the kept states lie: on their device (`None`), `"cpu"` for the host's memory (which on a machine
            without a GPU changes nothing), or `"disk"` for a temporary file in TMPDIR. They are fetched ahead.
        chunk_size: how many entries of a vector of outer losses are pulled back at once; `None` for all. Smaller chunks
            take less memory: the inner loop is not run again for them.

    Cost: in units of one inner gradient, 3T for `"graph"`, else 3T and the steps computed, at most (3 + r)·T: 4T for
    `"all"` (r = 1), at most 5T for `"sqrt"` (r = 2). A vector of m outer losses adds 2(m − 1)·T: the inner loop is run,
    and run again, once for all of them. Memory: besides the states, the graph of one step is held. Layers wrapped in
    `bilevel.experimental.Recomputed` keep their inputs alone in it. For m outer losses, m cotangents of a state and the
    backward passes of one chunk come on top. Bias: none.

    Reference: Shen et al., NeurIPS 2024, eq. 5 and 6; Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017. The
    schedule: Griewank and Walther, ACM TOMS 2000.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta**2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> bilevel.Reverse("sqrt")(problem, torch.tensor(2.0), bilevel.no_batches(4)).grad  # 2 (1 − 0.5⁴)² φ
    tensor(3.5156)
    """

    checkpoints: Checkpoints | Literal["graph"] = "all"
    offload: Offload = None
    chunk_size: int | None = None
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checkpoint_schedules.check(self.checkpoints)
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")
        if self.offload is not None:
            checks.one_of(self.offload, "offload", OFFLOADS)
            if self.checkpoints == "graph":
                raise ValueError(
                    f'offload={self.offload!r} moves kept states, and checkpoints="graph" keeps none; take "all"'
                )

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        there_and_back = (1.0 + 2.0 * losses) * steps
        if self.checkpoints == "graph":
            return there_and_back
        made = checkpoint_schedules.steps_computed(steps, checkpoint_schedules.slots(self.checkpoints, steps))
        return made + there_and_back

    @property
    def computes_steps_once(self) -> bool:
        return self.checkpoints == "graph"

    def reverse_pass(self, run: Unroll) -> ReversePass:
        if self.checkpoints == "graph":
            return _OneGraph(run, self.chunk_size)
        return _StepByStep(run, self.checkpoints, self.offload, self.chunk_size)  # pyright: ignore[reportArgumentType]

    def _estimate(self, run: Unroll) -> Estimate:
        return estimate_by(self.reverse_pass(run), run)


def estimate_by(way: ReversePass, run: Unroll) -> Estimate:
    """Return the estimate d · dθ_T/dφ + c that a reverse pass gives, and close the pass."""
    with way:
        value, d, c = run.outer_cotangents(way.state)
        through = way.pull_back(way.state, d, count=Losses.of(value).number)
    return Estimate(value, like_meta(run, run.add_explicit(through, c, way.from_start)), way.state)


class _StepByStep(ReversePass):
    """Goes back through all steps from kept states, each of which is used up."""

    def __init__(self, run: Unroll, checkpoints: Checkpoints, offload: Offload, chunk_size: int | None) -> None:
        self._run, self._chunk_size = run, chunk_size
        self._checkpoints: Checkpoints = checkpoints
        self._offload: Offload = offload
        self._trail: Trail | None = None
        self.state = self._descend()

    def _descend(self) -> Tree:
        trail = Trail(self._run, self._checkpoints, self._offload)
        self.close = weakref.finalize(self, trail.__exit__)  # pyright: ignore[reportAttributeAccessIssue]
        self._trail = trail.__enter__()
        try:
            return trail.descend()
        except BaseException:
            self.close()
            raise

    def pull_back(
        self,
        last: Tree,
        d: Sequence[Tensor],
        keep: bool = False,  # noqa: ARG002
        count: int | None = None,
    ) -> list[Tensor]:
        if self._trail is None:
            self._descend()
        assert self._trail is not None
        trail, self._trail, cotangents = self._trail, None, list(d)
        losses = Losses(count, self._chunk_size)
        try:
            through = self._run.pull_back(trail.backwards(), last, cotangents, losses)
        finally:
            self.close()
        self._run.pull_back_init(cotangents, through, losses)
        return through


class _OneGraph(ReversePass):
    """Holds the graph of all steps."""

    def __init__(self, run: Unroll, chunk_size: int | None) -> None:
        def final_state(meta: Tree) -> Tree:
            state = run.init(meta)
            for t in range(run.steps):
                state = run.step(t, state, meta)
            return state

        self._meta, self._chunk_size = run.meta, chunk_size
        self._jacobian: autodiff.Transpose | None = autodiff.Transpose(final_state, [run.meta], run.memory)
        self.state = self._jacobian.value

    def pull_back(
        self,
        last: Tree,  # noqa: ARG002
        d: Sequence[Tensor],
        keep: bool = False,
        count: int | None = None,
    ) -> list[Tensor]:
        assert self._jacobian is not None
        if count is None:
            (through,) = self._jacobian(d, keep=keep)
        else:
            (through,) = self._jacobian.many_or_none(d, at_once=self._chunk_size)
        return autodiff.fill_zeros(through, self._meta, count)

    def close(self) -> None:
        self._jacobian = None
