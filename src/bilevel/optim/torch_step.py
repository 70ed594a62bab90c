"""One step of a `torch.optim` class as a pure function: the step itself, run on copies of parameters and memory.

The arithmetic is PyTorch's own. Small parameters are joined (`bilevel.optim.buckets`). A derivative through the plain
step would be NaN or silently wrong in some places. This module avoids that as follows:

- *Second moments have a lower bound.* Adam and related optimisers divide by √v. A coordinate whose gradient has always
  been zero (a dead ReLU, a pixel that is always black) has v = 0, where √ has no derivative, and one NaN makes the
  whole hypergradient NaN. Here v is never below `100 · finfo(dtype).tiny` (1.2e-36 in float32). Its root is negligible
  beside any eps, so the trajectory stays that of the plain optimiser. At a zero gradient the derivative is 1/eps, as
  for the plain optimiser. (An epsilon *under* the root does not help: from 1e-16 up it changes the hypergradient's
  direction.)
- *Momentum starts as zeros.* `torch.optim.SGD` makes its first buffer a detached copy of the gradient. A buffer of
  zeros, without dampening at the first update, gives the same numbers and keeps the derivative.
- *Counters are numbers.* Step counts and numbers computed from them are kept as Python floats. Bias corrections are
  therefore exact in float64 (except ASGD's rates, which PyTorch rounds to the default dtype).
- *A learning rate of 0 leaves the parameters unchanged.* With `differentiable=True`, Adam's code divides by the
  learning rate. If the rate is 0, the memory is updated with a rate of 1 and the parameters are not updated.

The step of the ten classes in `TEN` has a `differentiable` flag, which makes it suitable. Every other class runs inside
`DifferentiableStep`, parameter by parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode

from bilevel import trees
from bilevel.optim.buckets import LIMIT, Buckets
from bilevel.optim.differentiable_steps import DifferentiableStep
from bilevel.optim.numbers_with_derivatives import SettingNumber
from bilevel.optim.optimizer_state import BucketState, OptimizerState, buckets_of, divided
from bilevel.optim.schedules import Timetable

TEN = (SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta, Adamax, ASGD)
"""The classes of `torch.optim` that accept `differentiable=True`."""
SECOND_MOMENTS = frozenset({"exp_avg_sq", "square_avg", "sum"})
SPEED_ONLY = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings that determine how fast a step is and not what it computes. An inner loop sets its own values for them."""

_AVERAGE = "ax"
"""ASGD's running average of the parameters. The parameters never depend on it. It is kept without derivatives, because
PyTorch overwrites its weight before a backward pass could use it."""
_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})


class TorchStep:
    """The steps of one class with constant settings, as a function of parameters, gradients and memory."""

    def __init__(
        self,
        algorithm: type[torch.optim.Optimizer],
        constants: Mapping[str, Any],
        schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None,
        numbers_only: bool,
    ) -> None:
        """Set up the steps of a class.

        Args:
            algorithm: the class.
            constants: the settings for the constructor of the class.
            schedule: a function that makes a scheduler for an optimiser; `None` for constant settings.
            numbers_only: whether no setting inside the step is a tensor with a derivative.
        """
        self.algorithm = algorithm
        self.is_pytorchs_own = algorithm in TEN
        """Whether the class is one of PyTorch's ten differentiable classes."""
        self._constants = {name: value for name, value in constants.items() if name not in SPEED_ONLY}
        self._flags = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
        if self.is_pytorchs_own:
            self._flags["differentiable"] = not (numbers_only and _adam_may_count_with_numbers(algorithm, constants))
        self._divides_by_rate = algorithm in (Adam, AdamW) and self._flags["differentiable"]
        self.timetable = Timetable(algorithm, self._constants, schedule)

    def first_state(self, parameters: Sequence[Tensor]) -> OptimizerState:
        """Return the memory of the optimiser before the first step."""
        parameters = _as_real(parameters)
        buckets = Buckets.of(parameters, LIMIT if self.is_pytorchs_own else 0)
        joined = buckets.joined(parameters, fresh=True)
        memories = self._first_memories(joined, self.timetable(0))
        return [BucketState(members, 0, memory) for members, memory in zip(buckets.members, memories, strict=True)]

    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        state: OptimizerState,
        step: int,
        settings: Mapping[str, Any],
    ) -> tuple[list[Tensor], OptimizerState]:
        """Update the parameters that have a gradient, and the memory of them.

        A class that is not part of PyTorch receives all parameters, as in a loop without this library. It may also
        change parameters whose `grad` is `None`.

        Args:
            parameters: the parameters before the step.
            gradients: the gradient of each parameter, or `None`.
            state: the memory before the step.
            step: the number of the step, counted from 0.
            settings: the settings in force at this step.

        Returns:
            The parameters and the memory after the step.
        """
        if self._is_plain(parameters, gradients, state, settings):
            return _plain_descent(parameters, gradients, state, settings)
        given_parameters, parameters, gradients = parameters, _as_real(parameters), _as_real(gradients)
        reached = {i for i, g in enumerate(gradients) if g is not None or not self.is_pytorchs_own}
        state = divided(state, reached, parameters)
        moving = [number for number, bucket in enumerate(state) if bucket.members[0] in reached]
        active = [self._begun(state[number], parameters, step, settings) for number in moving]
        buckets = buckets_of(active, parameters)
        clones = buckets.joined(parameters, fresh=True)
        if self.is_pytorchs_own:
            given: Sequence[Tensor | None] = buckets.joined(gradients)
        else:  # other classes may write into their gradients
            given = [None if (g := gradients[bucket.members[0]]) is None else g.clone() for bucket in active]
        after, new_state = list(parameters), list(state)
        rate = settings.get("lr")
        standing = self._divides_by_rate and not isinstance(rate, Tensor) and rate == 0
        memories = self._moved(clones, given, active, {**settings, "lr": 1.0} if standing else settings)
        for number, bucket, memory in zip(moving, active, memories, strict=True):
            new_state[number] = BucketState(bucket.members, bucket.updates + 1, memory)
        if not standing:
            for i, moved in buckets.parted(clones).items():
                after[i] = moved
        places = zip(after, given_parameters, strict=True)
        return [torch.view_as_complex(p) if before.is_complex() else p for p, before in places], new_state

    def _is_plain(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        state: OptimizerState,
        settings: Mapping[str, Any],
    ) -> bool:
        """Whether the step is that of SGD without momentum, with settings that are numbers."""
        return (
            self.algorithm is SGD
            and type(settings["momentum"]) in (int, float)
            and settings["momentum"] == 0
            and type(settings["lr"]) in (int, float)
            and type(settings["weight_decay"]) in (int, float)
            and not any(bucket.memory for bucket in state)
            and not any(
                p.is_complex() or (g is not None and g.dtype != p.dtype)
                for p, g in zip(parameters, gradients, strict=True)
            )
        )

    def _moved(
        self,
        clones: list[Tensor],
        gradients: Sequence[Tensor | None],
        state: OptimizerState,
        settings: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Run the step on the clones, in place. Return the new memories."""
        instance = self.timetable.blank()
        has_tensors = any(isinstance(leaf, Tensor) for leaf in trees.leaves(dict(settings)))
        settings = self._with_flags(settings)
        if has_tensors and "differentiable" in settings:
            # PyTorch's differentiable code hands some settings to kernels as plain numbers; the mode below does not.
            settings["differentiable"] = False
        instance.param_groups = [
            {**settings, **special, "params": [clones[number] for number in numbers]}
            for numbers, special in self._groups(state, settings)
        ]
        for clone, gradient, bucket in zip(clones, gradients, state, strict=True):
            clone.grad = gradient
            instance.state[clone] = self._thawed(bucket.memory)
        step = inspect.unwrap(self.algorithm.step)  # without hooks, and without the no_grad around it
        if self.is_pytorchs_own and not has_tensors:
            with _BatchingRules() if any(map(is_batchedtensor, clones)) else nullcontext():
                step(instance)
        else:
            for group in instance.param_groups:
                group.update({n: _as_numbers(v) for n, v in group.items() if n != "params"})
            with DifferentiableStep([clone for clone, g in zip(clones, gradients, strict=True) if g is None]):
                step(instance)
        found = [self._frozen(instance.state[clone]) for clone in clones]
        for memory, bucket in zip(found, state, strict=True):
            if "has_begun" in bucket.memory:
                memory["has_begun"] = bucket.memory["has_begun"] or _may_be_nonzero(settings["momentum"])
        return found

    def _groups(self, state: OptimizerState, settings: Mapping[str, Any]) -> list[tuple[list[int], Mapping[str, Any]]]:
        """Return the buckets in groups of equal settings. SGD's first momentum buffer is made without dampening."""
        everything = list(range(len(state)))
        if self.algorithm is not SGD or not _may_be_nonzero(settings["momentum"]):
            return [(everything, {})]
        first = [number for number in everything if not state[number].memory.get("has_begun")]
        later = [number for number in everything if state[number].memory.get("has_begun")]
        return [(first, {"dampening": 0.0}), (later, {})]

    def _begun(
        self, bucket: BucketState, parameters: Sequence[Tensor], step: int, settings: Mapping[str, Any]
    ) -> BucketState:
        """Return a bucket whose memory is initialised as by PyTorch, with the settings in force at its first update."""
        if not self.is_pytorchs_own:
            return bucket
        late = bucket.updates == 0 and step > 0
        if self.algorithm is SGD:
            late = _may_be_nonzero(settings["momentum"]) and "momentum_buffer" not in bucket.memory
        elif self.algorithm is RMSprop and bucket.updates > 0:
            self._require_momentum_from_the_start(bucket, step, settings)
        if not late:
            return bucket
        joined = buckets_of([bucket], parameters).joined(parameters, fresh=True)
        return bucket._replace(memory=self._first_memories(joined, settings)[0])

    def _require_momentum_from_the_start(self, bucket: BucketState, step: int, settings: Mapping[str, Any]) -> None:
        if _may_be_nonzero(settings["momentum"]) and "momentum_buffer" not in bucket.memory:
            raise ValueError(
                f"the schedule turns momentum on at step {step} (to {settings['momentum']}), after steps without any; "
                f"let torch.optim.{self.algorithm.__name__} have momentum from its first step on"
            )

    def _first_memories(self, joined: Sequence[Tensor], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the memories before the first update, as the optimiser itself initialises them."""
        if not self.is_pytorchs_own:
            return self._made_by_constructor(joined)
        clones = [clone.detach() for clone in joined]
        if self.algorithm is SGD:
            on = _may_be_nonzero(settings["momentum"])
            return [{"momentum_buffer": torch.zeros_like(clone), "has_begun": False} if on else {} for clone in clones]
        for clone in clones:
            clone.grad = torch.zeros_like(clone)
        instance = self.timetable.blank()
        # A setting that depends on the meta parameters enters the memory as a number.
        numbers = {n: v.detach() if isinstance(v, Tensor) else v for n, v in settings.items()}
        initialise = instance._init_group  # pyright: ignore[reportAttributeAccessIssue]
        lists = ([] for _ in list(inspect.signature(initialise).parameters)[1:])
        initialise({**self._with_flags(numbers), "params": clones}, *lists)
        return [self._frozen(instance.state[clone]) for clone in clones]

    def memory_of(self, parameter: Tensor, memory: Mapping[str, Any], updates: int) -> dict[str, Any]:
        """Return what an ordinary instance keeps of one parameter after so many updates, in the form of a state."""
        if not updates:
            return self._first_memories([parameter.detach()], self.timetable(0))[0]
        found = self._frozen(memory)
        if self.algorithm is SGD and "momentum_buffer" in found:
            found["has_begun"] = True
        return found

    def _made_by_constructor(self, joined: Sequence[Tensor]) -> list[dict[str, Any]]:
        with DifferentiableStep():
            instance = self.algorithm(list(joined), **self._constants)  # pyright: ignore[reportCallIssue]
        return [self._frozen(instance.state.get(clone, {})) for clone in joined]

    def _with_flags(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, **{name: value for name, value in self._flags.items() if name in settings}}

    def _frozen(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a memory with counters as numbers. `_thawed` is the inverse."""
        if not issubclass(self.algorithm, TEN):
            return dict(state)
        known = {name: value for name, value in state.items() if value is not None}
        return {name: _frozen_entry(name, value) for name, value in known.items()}

    def _thawed(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of a memory that the step may change in place."""
        if not issubclass(self.algorithm, TEN):
            return trees.map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, dict(memory))
        return {name: _thawed_entry(name, value) for name, value in memory.items() if name != "has_begun"}


def _plain_descent(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    state: OptimizerState,
    settings: Mapping[str, Any],
) -> tuple[list[Tensor], OptimizerState]:
    """Compute the step of SGD without momentum, θ − η (±g + λθ), in the operations of `torch.optim.SGD`.

    There is no memory to thread through the step, so nothing has to be joined, and a parameter takes one operation.
    """
    rate, decay, maximize = settings["lr"], settings["weight_decay"], settings.get("maximize")
    after = list(parameters)
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        if g is None:
            continue
        if maximize:
            g = -g
        if decay != 0:
            g = g.add(p, alpha=decay)
        after[i] = p.add(g, alpha=-rate)
    reached = {i for i, g in enumerate(gradients) if g is not None}
    if len(reached) == len(gradients):
        return after, [BucketState(b.members, b.updates + 1, b.memory) for b in state]
    state = divided(state, reached, parameters)
    return after, [BucketState(b.members, b.updates + 1, b.memory) if b.members[0] in reached else b for b in state]


class _BatchingRules(TorchFunctionMode):
    """Computes operations in place without a batching rule out of place, which `torch.vmap` does at once for all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out_of_place = _OUT_OF_PLACE.get(func)
        if out_of_place is None:
            return func(*args, **(kwargs or {}))
        return args[0].copy_(out_of_place(*args, **(kwargs or {})))


_OUT_OF_PLACE: dict[Any, Callable[..., Tensor]] = {
    Tensor.lerp_: torch.lerp,
    Tensor.addcmul_: torch.addcmul,
    Tensor.addcdiv_: torch.addcdiv,
}

Part = TypeVar("Part", Tensor, "Tensor | None")


def _as_real(tensors: Sequence[Part]) -> list[Part]:
    """Return complex tensors as pairs of real numbers, which is how PyTorch's optimisers update them."""
    return [torch.view_as_real(t.resolve_conj()) if t is not None and t.is_complex() else t for t in tensors]


def _frozen_entry(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    counts = name in _COUNTERS and value.ndim == 0
    return float(value.detach()) if counts else value.detach() if name == _AVERAGE else value


def _thawed_entry(name: str, value: Any) -> Any:
    if name in _COUNTERS and isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor):
        return value
    if name in SECOND_MOMENTS:
        return value.clamp(min=100 * torch.finfo(value.dtype).tiny)
    return value.clone()


def _as_numbers(value: Any) -> Any:
    """A setting with numbers that have derivatives in place of its scalar tensors."""
    if isinstance(value, tuple):
        return tuple(_as_numbers(each) for each in value)
    return SettingNumber(value) if isinstance(value, Tensor) and value.ndim == 0 else value


def _may_be_nonzero(value: Any) -> bool:
    return isinstance(value, Tensor) or value != 0


def _adam_may_count_with_numbers(algorithm: type[torch.optim.Optimizer], constants: Mapping[str, Any]) -> bool:
    """Whether Adam may correct its bias with numbers, as it does with `differentiable=False`.

    With `differentiable=True` Adam corrects its bias with tensors, for settings that are tensors. If no setting is a
    tensor, the code for `differentiable=False` has the same derivative and takes fewer operations. In forward mode it
    also avoids symbolic zero tensors, which PyTorch handles slowly. (This does not hold with `amsgrad=True`, for which
    that code writes into an `out=` without derivative.)
    """
    inside = {name: value for name, value in constants.items() if name not in SPEED_ONLY}
    usual = inside.keys() <= {"lr", "betas", "eps", "weight_decay", "maximize"}
    numbers = all(isinstance(value, float | int) for value in trees.leaves(inside))
    return algorithm in (Adam, AdamW) and usual and numbers
