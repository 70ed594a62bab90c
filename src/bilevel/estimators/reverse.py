"""Exact hypergradients by reverse-mode unrolling, with a choice of what is stored on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from bilevel import autodiff
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.trees import Tree
from bilevel.unroll import Unroll


@dataclass(frozen=True)
class Reverse(Estimator):
    """Exact hypergradient by going back through the inner steps. The literature's RGU, BPTT and ITD.

    From t = T down, with d_T = ∂outer/∂θ_T `[M]` and c_T = ∂outer/∂φ `[N]`,

        c_{t−1} = c_t + d_t B_t,   d_{t−1} = d_t A_t,   ∇h = c_0 + d_0 B_0,

    where A_t = ∂θ_t/∂θ_{t−1}, B_t = ∂θ_t/∂φ are the Jacobians of one inner step and B_0 = dθ_0/dφ.

    Args:
        checkpoints: what is kept until the way back.
            `"all"`: the T states θ_t; each step is repeated once to be differentiated. T·M memory.
            `"sqrt"`: about √T states; the steps between two of them are run again. 2√T·M memory.
            an int c: c states, evenly spaced. (c + T/c)·M memory.
            `"graph"`: the whole autograd graph, nothing is repeated. T times the graph of a step.

    Cost: in units of one inner gradient, about 3T for `"graph"`, 4T to 5T for `"all"`, 5T to 6T otherwise. Besides
    the states, the graph of one step is held. Bias: none.

    Reference: Shen et al., NeurIPS 2024, eq. 5 and 6; Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017.

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

    checkpoints: Literal["all", "sqrt", "graph"] | int = "all"

    def __post_init__(self) -> None:
        count = self.checkpoints
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count not in ("all", "sqrt", "graph") and not (whole and count >= 1):
            raise ValueError(f'checkpoints={count!r}: there are "all", "sqrt", "graph", or a number of states >= 1')

    def _estimate(self, run: Unroll) -> Estimate:
        if self.checkpoints == "graph":
            return _through_one_graph(run)
        kept, state = _descend_keeping(run, self._spacing(run.steps))
        value, d, c = run.outer_cotangents(state)
        through = run.pull_back(_trail_backwards(run, kept), d)
        run.pull_back_init(d, through)
        return Estimate(value, like_meta(run, run.add_explicit(through, c)), state)

    def _spacing(self, steps: int) -> int:
        """A state is kept every so many steps."""
        if self.checkpoints == "all":
            return 1
        count = math.isqrt(steps) if self.checkpoints == "sqrt" else self.checkpoints
        assert isinstance(count, int)
        return math.ceil(steps / count)


def _through_one_graph(run: Unroll) -> Estimate:
    def final_state(meta: Tree) -> Tree:
        state = run.init(meta)
        for t in range(run.steps):
            with autodiff.RefuseOnceDifferentiable() if t == 0 else nullcontext():
                state = run.step(t, state, meta)
        return state

    jacobian = autodiff.Transpose(final_state, [run.meta])
    value, d, c = run.outer_cotangents(jacobian.value)
    (through,) = jacobian(d, keep=False)
    grad = run.add_explicit(autodiff.fill_zeros(through, run.meta), c)
    return Estimate(value, like_meta(run, grad), jacobian.value)


def _descend_keeping(run: Unroll, spacing: int) -> tuple[dict[int, Tree], Tree]:
    """θ_T, and θ_t for t = 0, spacing, 2·spacing, …"""
    state, kept = run.start(), {}
    for t in range(0, run.steps, spacing):
        kept[t] = state
        state = run.descend(state, t, min(t + spacing, run.steps))
    return kept, state


def _trail_backwards(run: Unroll, kept: dict[int, Tree]) -> Iterator[tuple[int, Tree]]:
    """(t, θ_t) from T − 1 down to 0; what lies between two kept states is computed again. Empties `kept`."""
    stop = run.steps
    while kept:
        start, state = kept.popitem()
        between = [state]
        for t in range(start, stop - 1):
            between.append(run.descend(between[-1], t, t + 1))
        del state
        for t in range(stop - 1, start - 1, -1):
            yield t, between.pop()
        stop = start
