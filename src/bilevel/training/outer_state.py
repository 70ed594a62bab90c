"""The content of a checkpoint of an outer loop, and how a loop is restored from it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.optim.optimizer_state import BucketState, same_device
from bilevel.problem import Descent
from bilevel.training.outer_loop import OuterLoop
from bilevel.training.phases import Phase
from bilevel.trees import Tree
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.unroll import unroll

_COUNTERS = {
    "progress": ("outer_step", "phase", "phase_step", "best", "stalled"),
    "draws": ("draws",),
    "noise": ("signal_squared", "noise_squared", "noisy_steps"),
    "past": ("past_weight",),
}
"""The numbers that each part of a loop counts."""


def identity(loop: OuterLoop, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in which a checkpoint and the run that resumes it must agree."""
    leaves = trees.named_leaves(loop.meta_tree(), "meta")
    return {
        "seed": loop.draws.seed,
        "phases": [_without_addresses(phase) for phase in _of_any_length(loop.progress.phases)],
        "optimizer": _without_addresses(loop.optimizer),
        "meta": [f"{name}: {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in leaves],
        "config": dict(config),
        **({} if loop.kept.keep == "last" else {"keep": _without_addresses(loop.kept.keep)}),
        **({"stream": True} if loop.draws.stream else {}),
        **({} if loop.update.clip_norm is None else {"clip_norm": loop.update.clip_norm}),
        **({} if loop.draws.backend is None else {"compile": loop.draws.backend}),
    }


def state(loop: OuterLoop) -> dict[str, Any]:
    """Return a copy of everything that the following outer steps depend on."""
    counters = {name: getattr(getattr(loop, part), name) for part, names in _COUNTERS.items() for name in names}
    return copy.deepcopy(
        {
            "meta": [p.detach() for p in loop.parameters],
            "optimizer": loop.torch_optimizer.state_dict(),
            "scheduler": None if loop.scheduler is None else loop.scheduler.state_dict(),
            "past": loop.past.past,
            "carried": None if loop.draws.carried is None else _as_dict(loop.draws.carried),
            "before": loop.before,
            "kept": loop.kept.state(),
            "counters": {**counters, "seconds": loop.seconds},
        }
    )


def restore(loop: OuterLoop, stored: Mapping[str, Any]) -> None:
    """Restore a loop to a `state`."""
    with torch.no_grad():
        for parameter, value in zip(loop.parameters, stored["meta"], strict=True):
            parameter.copy_(value)
    loop.torch_optimizer.load_state_dict(stored["optimizer"])
    # PyTorch casts what it loads to the parameter's dtype; but NAdam's running product, for one, has its own.
    for index, remembered in stored["optimizer"]["state"].items():
        memory = loop.torch_optimizer.state[loop.parameters[index]]
        for name, value in remembered.items():
            if isinstance(value, Tensor):
                memory[name] = value.to(memory[name].device)
    if loop.scheduler is not None:
        loop.scheduler.load_state_dict(stored["scheduler"])
    loop.past.past = _placed_like(loop, stored["past"])
    loop.draws.carried = None if stored["carried"] is None else _carried_from(loop, stored["carried"])
    loop.before = _placed_like(loop, stored["before"])
    for part, names in _COUNTERS.items():
        for name in names:
            setattr(getattr(loop, part), name, stored["counters"][name])
    loop.seconds = stored["counters"]["seconds"]
    loop.kept.restore(stored["kept"], loop.parameters)
    loop.progress.go_on()


def _placed_like(loop: OuterLoop, tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    """One for each parameter, on its device."""
    return None if tensors is None else [t.to(p.device) for t, p in zip(tensors, loop.parameters, strict=True)]


def _as_dict(carried: WindowEnd) -> dict[str, Any]:
    """Return what a checkpoint stores of a stream: the leaves of the inner state, since the problem can make its tree
    again, and the estimator's memory as it is.
    """
    for name, leaf in [*trees.named_leaves(carried.state, "state"), *trees.named_leaves(carried.memory, "memory")]:
        if trees.is_spread(leaf):
            raise ValueError(
                f"{name} of the stream is spread over processes, and a checkpoint is written by one of them; for a "
                "stream over a sharded model call fit without out="
            )
    optimizer = carried.state.optimizer if isinstance(carried.state, Descent) else None
    leaves = trees.leaves(_without_optimizer(carried.state))
    return {"state": leaves, "optimizer": optimizer, "steps": carried.steps, "memory": carried.memory}


def _without_optimizer(state: Tree) -> Tree:
    """Return the state without the optimiser's memory, whose layout depends on the steps so far."""
    return state._replace(optimizer=[]) if isinstance(state, Descent) else state


def _carried_from(loop: OuterLoop, stored: Mapping[str, Any]) -> WindowEnd:
    """Return what `_as_dict` stored, with the inner state on the devices where this problem has it, and the memory on
    the device of the inner state.
    """
    draws = loop.draws
    inner, outer = draws.batches(draws.draws)
    start = unroll(draws.problem, loop.meta_tree(), inner, outer, draws.seed).start()
    like, spec = trees.flatten(_without_optimizer(start))
    leaves = [x.to(y.device) if isinstance(x, Tensor) else x for x, y in zip(stored["state"], like, strict=True)]
    state = trees.unflatten(spec, leaves)
    if isinstance(state, Descent):
        optimizer = [BucketState(*bucket) for bucket in stored["optimizer"]]
        state = state._replace(optimizer=same_device(optimizer, trees.split(state.params).differentiable))
    device = next(leaf.device for leaf in like if trees.is_differentiable(leaf))
    memory = trees.map_leaves(lambda x: x.to(device) if isinstance(x, Tensor) else x, stored["memory"])
    return WindowEnd(state, stored["steps"], memory, agreed=True)


def _of_any_length(phases: Sequence[Phase]) -> list[Phase]:
    """The phases, the last of which may be made longer when a run is resumed."""
    return [*phases[:-1], replace(phases[-1], steps=1)]


def _without_addresses(value: Any) -> str:
    """Its `repr`, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
