"""A step of many tasks compared with the step of one of them, value and derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.batches import batches
from bilevel.problem import BilevelProblem
from bilevel.trees import Tree
from bilevel.unrolling.unroll import Unroll


def verify(run: Unroll, of_one: BilevelProblem, seed_of_one: int) -> None:
    """Raise unless the first inner step of the first task is that of a single estimate, with its derivatives.

    With a random cotangent u of the first task and zeros for the others, uA and uB of all tasks must be those of a
    single step. Costs one step
    backwards of all tasks, and one of a single task.

    Raises:
        ValueError: they differ by more than rounding.
    """
    if not run.steps:
        return
    state = run.start()
    there = trees.map_leaves(_first, state)
    alone = replace(
        run,
        problem=of_one,
        inner_batches=batches(lambda t: trees.map_leaves(_first, run.inner_batches[t]), run.steps),
        outer_batch=None,
        seed=seed_of_one,
        carried=None,
    )
    after = _stacks(alone.descend(there, 0, 1))  # a step may change the layout of an optimiser's memory
    with randomness.torch_seeded(run.seed, randomness.TASK):
        u = [torch.randn_like(t) for t in after]
    others = len(_stacks(state)[0]) - 1
    probe = [torch.cat([v.unsqueeze(0), v.new_zeros(others, *v.shape)]) for v in u]
    with torch.enable_grad():
        together, single = run.pull_back_step(0, state, probe), alone.pull_back_step(0, there, u)
    found = [
        [t[0] for t in _stacks(together.after)],
        [t[0] for t in autodiff.fill_zeros(together.down, state)],
        autodiff.fill_zeros(together.across, run.meta),
    ]
    expected = [
        trees.split(single.after).differentiable,
        autodiff.fill_zeros(single.down, there),
        autodiff.fill_zeros(single.across, run.meta),
    ]
    names = ("another state", "another derivative by the state", "another derivative by the meta parameters")
    for name, a, b in zip(names, found, expected, strict=True):
        if _differ(a, b):
            raise ValueError(
                f"Tasks: torch.vmap gives {name} than a step of a single task: PyTorch has an operation whose batching "
                "rule is wrong, or a loss or step mixes tasks or remembers something; take "
                "Tasks(..., chunk_size=1), which computes one task after the other"
            )


def _first(leaf: Any) -> Any:
    return leaf[0] if isinstance(leaf, Tensor) else leaf


def _stacks(state: Tree) -> list[Tensor]:
    return trees.split(state).differentiable


def _differ(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors differ by more than rounding, measured by the largest of them."""
    scale = max([float(b.abs().max()) for b in expected if b.numel()], default=0.0)
    off = max([float((a - b).abs().max()) for a, b in zip(found, expected, strict=True) if b.numel()], default=0.0)
    eps = max(torch.finfo(b.dtype).eps for b in expected)
    return off > eps**0.5 * max(scale, torch.finfo(torch.float32).tiny)
