"""The content of a checkpoint of an outer loop, and how a loop is restored from it."""

from __future__ import annotations

import copy
import re
import types
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.training.outer_loop import OuterLoop
from bilevel.training.phases import Phase
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.kept_states import restored, stored, without_optimizer
from bilevel.unrolling.unroll import unroll

_COUNTERS = {
    "progress": ("outer_step", "phase", "phase_step", "best", "stalled"),
    "draws": ("draws",),
    "noise": ("signal_squared", "noise_squared", "noisy_steps"),
    "past": ("past_weight",),
}
"""The counters of each part of an outer loop."""


def identity(loop: OuterLoop, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in which a checkpoint and the run that resumes it must agree."""
    leaves = trees.named_leaves(loop.meta_tree(), "meta")
    return {
        "seed": loop.draws.seed,
        "phases": [_without_addresses(phase) for phase in _of_any_length(loop.progress.phases)],
        "optimizer": _without_addresses(loop.optimizer),
        "meta": [f"{name}: {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in leaves],
        "config": dict(config),
        **({} if loop.kept.keep == "last" else {"keep": _of_code(loop.kept.keep)}),
        **({"stream": loop.draws.stream} if loop.draws.stream else {}),
        **({} if loop.update.clip_norm is None else {"clip_norm": loop.update.clip_norm}),
        **({} if loop.update.project is None else {"project": _of_code(loop.update.project)}),
        **({} if not loop.update.max_backtracks else {"max_backtracks": loop.update.max_backtracks}),
        **({} if loop.draws.backend is None else {"compile": loop.draws.backend}),
    }


def state(loop: OuterLoop) -> dict[str, Any]:
    """Return a copy of everything on which the following outer steps depend."""
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


def restore(loop: OuterLoop, content: Mapping[str, Any]) -> None:
    """Restore an outer loop from the result of `state`."""
    with torch.no_grad():
        for parameter, value in zip(loop.parameters, content["meta"], strict=True):
            parameter.copy_(value)
    loop.torch_optimizer.load_state_dict(content["optimizer"])
    # PyTorch casts loaded tensors to the parameter's dtype, but some of them (NAdam's running product) have another.
    for index, remembered in content["optimizer"]["state"].items():
        memory = loop.torch_optimizer.state[loop.parameters[index]]
        for name, value in remembered.items():
            if isinstance(value, Tensor):
                memory[name] = value.to(memory[name].device)
    if loop.scheduler is not None:
        loop.scheduler.load_state_dict(content["scheduler"])
    loop.past.past = _placed_like(loop, content["past"])
    loop.draws.carried = None if content["carried"] is None else _carried_from(loop, content["carried"])
    loop.before = _placed_like(loop, content["before"])
    for part, names in _COUNTERS.items():
        for name in names:
            setattr(getattr(loop, part), name, content["counters"][name])
    loop.seconds = content["counters"]["seconds"]
    loop.kept.restore(content["kept"], loop.parameters)
    loop.progress.go_on()


def _placed_like(loop: OuterLoop, tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Return the tensors, one for each parameter, on the devices of the parameters."""
    return None if tensors is None else [t.to(p.device) for t, p in zip(tensors, loop.parameters, strict=True)]


def _as_dict(carried: WindowEnd) -> dict[str, Any]:
    """Return the content of a checkpoint for the end of a window of a stream.

    It contains the leaves of the inner state, whose tree the problem can make again, and the estimator's memory.

    Raises:
        ValueError: a tensor is spread over processes.
    """
    for name, leaf in [*trees.named_leaves(carried.state, "state"), *trees.named_leaves(carried.memory, "memory")]:
        if trees.is_spread(leaf):
            raise ValueError(
                f"{name} of the stream is spread over processes, and a checkpoint is written by one of them; for a "
                "stream over a sharded model call fit without out="
            )
    content = stored(carried.state)
    kept = {"state": content["leaves"], "optimizer": content["optimizer"]}
    return {**kept, "steps": carried.steps, "memory": carried.memory}


def _carried_from(loop: OuterLoop, content: Mapping[str, Any]) -> WindowEnd:
    """Return the end of a window from the result of `_as_dict`. This is its inverse.

    The inner state is on the devices on which this problem has it, and the memory is on the device of the inner state.
    """
    draws = loop.draws
    inner, outer = draws.batches(draws.draws)
    start = unroll(draws.problem, loop.meta_tree(), inner, outer, draws.seed).start()
    state = restored({"leaves": content["state"], "optimizer": content["optimizer"]}, start)
    device = next(leaf.device for leaf in trees.leaves(without_optimizer(start)) if trees.is_differentiable(leaf))
    memory = trees.map_leaves(lambda x: x.to(device) if isinstance(x, Tensor) else x, content["memory"])
    return WindowEnd(state, content["steps"], memory, agreed=True)


def _of_any_length(phases: Sequence[Phase]) -> list[Phase]:
    """The phases, the last of which may be made longer when a run is resumed."""
    return [*phases[:-1], replace(phases[-1], steps=1)]


def _of_code(value: Any) -> str:
    """Return a description of a function that changes with its code and with the numbers that it closes over."""
    code = getattr(value, "__code__", None)
    if code is None:
        return _without_addresses(value)
    numbers = [_without_addresses(cell.cell_contents) for cell in value.__closure__ or ()]
    content = _without_addresses((_instructions(code), numbers, value.__defaults__, value.__kwdefaults__))
    return f"{value.__qualname__} (code {zlib.crc32(content.encode()):08x})"


def _instructions(code: types.CodeType) -> tuple[Any, ...]:
    constants = [_instructions(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames


def _without_addresses(value: Any) -> str:
    """Return the `repr` of a value without addresses in memory, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
