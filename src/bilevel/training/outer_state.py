"""What a checkpoint holds of an outer loop, and how a loop goes back to it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.training.outer_loop import OuterLoop
from bilevel.unrolling.inner_loop import Carried
from bilevel.unrolling.unroll import unroll

_COUNTERS = {
    "progress": ("outer_step", "phase", "phase_step", "best", "stalled"),
    "draws": ("draws",),
    "noise": ("signal_squared", "noise_squared", "noisy_steps"),
    "past": ("past_weight",),
}
"""The numbers that each part of a loop counts."""


def identity(loop: OuterLoop, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must have in common."""
    leaves = trees.named_leaves(loop.meta_tree(), "meta")
    return {
        "seed": loop.draws.seed,
        "phases": [_without_addresses(phase) for phase in loop.progress.phases],
        "optimizer": _without_addresses(loop.optimizer),
        "meta": [f"{name}: {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in leaves],
        "config": dict(config),
        **({"stream": True} if loop.draws.stream else {}),
        **({} if loop.clip_norm is None else {"clip_norm": loop.clip_norm}),
        **({} if loop.draws.backend is None else {"compile": loop.draws.backend}),
    }


def state(loop: OuterLoop) -> dict[str, Any]:
    """A copy of everything that the following steps depend on."""
    counters = {name: getattr(getattr(loop, part), name) for part, names in _COUNTERS.items() for name in names}
    return copy.deepcopy(
        {
            "meta": [p.detach() for p in loop.parameters],
            "optimizer": loop.torch_optimizer.state_dict(),
            "scheduler": None if loop.scheduler is None else loop.scheduler.state_dict(),
            "past": loop.past.past,
            "carried": None if loop.draws.carried is None else _as_dict(loop.draws.carried),
            "before": loop.before,
            "counters": {**counters, "seconds": loop.seconds},
        }
    )


def restore(loop: OuterLoop, stored: Mapping[str, Any]) -> None:
    """Go back (or forward) to a `state`."""
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


def _placed_like(loop: OuterLoop, tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    """One for each parameter, on its device."""
    return None if tensors is None else [t.to(p.device) for t, p in zip(tensors, loop.parameters, strict=True)]


def _as_dict(carried: Carried) -> dict[str, Any]:
    """For a checkpoint: the leaves of the state instead of its tree, which the problem can make again."""
    for name, leaf in trees.named_leaves(carried.state, "state"):
        if trees.is_spread(leaf):
            raise ValueError(
                f"{name} of the stream is spread over processes, and a checkpoint is written by one of them; for a "
                "stream over a sharded model call fit without out="
            )
    return {**{f.name: getattr(carried, f.name) for f in fields(carried)}, "state": trees.leaves(carried.state)}


def _carried_from(loop: OuterLoop, stored: Mapping[str, Any]) -> Carried:
    """What `_as_dict` made, in the form and on the devices of this problem's inner states."""
    draws = loop.draws
    inner, outer = draws.batches(draws.draws)
    like, spec = trees.flatten(unroll(draws.problem, loop.meta_tree(), inner, outer, draws.seed).start())

    def placed(leaves: Sequence[Any], places: Sequence[Any]) -> list[Any]:
        return [x.to(y.device) if isinstance(x, Tensor) else x for x, y in zip(leaves, places, strict=True)]

    inner_state = trees.unflatten(spec, placed(stored["state"], like))
    parts = ("tangents", trees.split(inner_state).differentiable), ("labels", loop.parameters)
    kept = {name: None if stored[name] is None else placed(stored[name], places) for name, places in parts}
    return Carried(inner_state, stored["steps"], first_norm=stored["first_norm"], **kept)


def _without_addresses(value: Any) -> str:
    """Its `repr`, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
