"""Exact hypergradients by reverse-mode unrolling, with a choice of what is stored on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bilevel import autodiff, checks
from bilevel.estimators.base import Estimate, Estimator, like_meta
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

    def _estimate(self, run: Unroll) -> Estimate:
        if self.checkpoints == "graph":
            return _through_one_graph(run, self.chunk_size)
        with Trail(run, self.checkpoints, self.offload) as trail:
            state = trail.descend()
            value, d, c = run.outer_cotangents(state)
            losses = Losses.of(value, self.chunk_size)
            through = run.pull_back(trail.backwards(), state, d, losses)
        run.pull_back_init(d, through, losses)
        return Estimate(value, like_meta(run, run.add_explicit(through, c)), state)


def _through_one_graph(run: Unroll, chunk_size: int | None) -> Estimate:
    def final_state(meta: Tree) -> Tree:
        state = run.init(meta)
        for t in range(run.steps):
            state = run.step(t, state, meta)
        return state

    jacobian = autodiff.Transpose(final_state, [run.meta], run.memory)
    value, d, c = run.outer_cotangents(jacobian.value)
    count = Losses.of(value).number
    (through,) = jacobian(d, keep=False) if count is None else jacobian.many_or_none(d, at_once=chunk_size)
    grad = run.add_explicit(autodiff.fill_zeros(through, run.meta, count), c)
    return Estimate(value, like_meta(run, grad), jacobian.value)
