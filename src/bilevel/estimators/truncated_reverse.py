"""Reverse-mode unrolling through the last steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bilevel import checks
from bilevel.estimators.base import Estimate, Estimator
from bilevel.estimators.reverse import estimate_by
from bilevel.estimators.reverse_pass import ReversePass
from bilevel.trees import Tree
from bilevel.unrolling.unroll import Losses, Unroll


@dataclass(frozen=True)
class TruncatedReverse(Estimator):
    """Biased hypergradient by going back through the last `steps` inner steps. The literature's TRGU, truncated BPTT.

    The recursion of `Reverse` stopped after s steps: with d_T = ∂outer/∂θ_T `[M]`, c_T = ∂outer/∂φ `[N]`,

        c_{t−1} = c_t + d_t B_t,   d_{t−1} = d_t A_t   for t = T, …, T − s + 1,   ∇h ≈ c_{T−s}.

    Args:
        steps: s, at most the number of inner steps T. At s = T the result is exact (the initial state's dependence on
            φ is then included).
        chunk_size: how many entries of a vector of outer losses are pulled back at once; `None` for all. Smaller chunks
            take less memory: the inner loop is not run again for them.

    Cost: T + 3s units; a vector of m outer losses adds 2(m − 1)·s. Memory: s states and the graph of one step.
    Bias: at most (1 − ηα)^s/(ηα) · ‖d_T‖ · max_{t ≤ T−s} ‖B_t‖, with B_0 = dθ_0/dφ, for gradient descent with rate
    η ≤ 2/(α + L) on an inner loss that is α-strongly convex and L-smooth; it does not shrink with more outer batches.

    Reference: Shaban et al., AISTATS 2019, Proposition 3.1; Shen et al., NeurIPS 2024, Appendix B.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: theta,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> bilevel.TruncatedReverse(2)(problem, torch.tensor(2.0), bilevel.no_batches(4)).grad  # exact: 0.9375
    tensor(0.7500)
    """

    steps: int = 1
    chunk_size: int | None = None
    is_biased: ClassVar[bool] = True
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.whole_number(self.steps, "steps")
        if self.chunk_size is not None:
            checks.whole_number(self.chunk_size, "chunk_size")

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return steps + (1.0 + 2.0 * losses) * self.steps

    def reverse_pass(self, run: Unroll) -> ReversePass:
        if self.steps > run.steps:
            raise ValueError(
                f"TruncatedReverse(steps={self.steps}) of an inner loop with {run.steps} steps; take steps <= "
                f"{run.steps}, or Reverse() to go back through all of them"
            )
        return _LastSteps(run, self.steps, self.chunk_size)

    def _estimate(self, run: Unroll) -> Estimate:
        return estimate_by(self.reverse_pass(run), run)


class _LastSteps(ReversePass):
    """Goes back through the last steps from the states before them, each of which is used up."""

    def __init__(self, run: Unroll, steps: int, chunk_size: int | None) -> None:
        self._run, self._first = run, run.steps - steps
        self._chunk_size = chunk_size
        self.from_start = self._first == 0
        self._trail: list[tuple[int, Tree]] = []
        self.state = self._descend()

    def _descend(self) -> Tree:
        run = self._run
        self._trail = [(self._first, run.descend(run.start(), stop=self._first))]
        for t in range(self._first, run.steps - 1):
            self._trail.append((t + 1, run.descend(self._trail[-1][1], t, t + 1)))
        return run.descend(self._trail[-1][1], run.steps - 1)

    def pull_back(
        self,
        last: Tree,
        d: Sequence[Tensor],
        keep: bool = False,  # noqa: ARG002
        count: int | None = None,
    ) -> list[Tensor]:
        if not self._trail:
            self._descend()
        trail, cotangents = self._trail, list(d)
        losses = Losses(count, self._chunk_size)
        through = self._run.pull_back((trail.pop() for _ in range(len(trail))), last, cotangents, losses)
        if self.from_start:
            self._run.pull_back_init(cotangents, through, losses)
        return through

    def close(self) -> None:
        self._trail = []
