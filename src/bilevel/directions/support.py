"""Find the meta parameters that an inner loop depends on. All others have derivative zero and need no directions."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.unrolling.unroll import Unroll


def reached(run: Unroll) -> list[Tensor]:
    """Return a mask for each leaf of φ of the entries on which θ_0, an inner step or the outer loss depends.

    Entry j is in the mask if (uᵀB_t)_j ≠ 0 for a random normal u at any t = 0..T, or if ∂outer/∂φ_j ≠ 0. If column j of
    B_t is not zero, (uᵀB_t)_j is zero with probability 0. The cost is one vector-Jacobian product for each step, about
    3T units in total. The memory is that of one step.
    """
    masks = [torch.zeros_like(leaf, dtype=torch.bool) for leaf in trees.leaves(run.meta)]

    def note(function: autodiff.Transpose, number: int) -> None:
        with randomness.torch_seeded(run.seed, randomness.SUPPORT_PROBE, number):
            probe = [torch.randn_like(t) for t in trees.split(function.value).differentiable]
        for mask, part in zip(masks, function(probe, keep=False)[0], strict=True):
            if part is not None:
                mask |= part != 0

    start = autodiff.Transpose(run.init, [run.meta])
    note(start, 0)
    state = start.value
    for t in range(run.steps):
        step = autodiff.Transpose(lambda meta, t=t, state=state: run.step(t, state, meta), [run.meta])
        note(step, t + 1)
        state = step.value
    note(autodiff.Transpose(lambda meta: run.outer_loss(state, meta), [run.meta]), run.steps + 1)
    return masks
