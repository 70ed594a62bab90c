"""`torch.optim` optimisers as pure update rules: (parameters, gradients, state) -> (parameters, state).

The arithmetic is PyTorch's own, run on clones, small ones joined (`bilevel.optim.buckets`). Four things are done
around it, because a derivative through the plain optimiser would be NaN or silently wrong:

- *A floor under second moments.* Adam and its kin divide by √v. A coordinate whose gradient has always been zero (a
  dead ReLU, a pixel that is always black) has v = 0, where √ has no derivative, and one NaN spoils everything. Here v
  is never below `100 · finfo(dtype).tiny` (1.2e-36 in float32): far below what any eps lets through, so the trajectory
  stays that of the plain optimiser, and at a zero gradient the derivative is the plain optimiser's own, 1/eps.
  (Epsilons *under* the root are no remedy: from 1e-16 up they turn the hypergradient's direction.)
- *Momentum starts as zeros.* `torch.optim.SGD` makes its first buffer a detached copy of the gradient. A buffer of
  zeros, without dampening in the first step, gives the same numbers and keeps the derivative.
- *Counters are numbers.* Step counts and what follows from them are kept as Python floats, so bias corrections are
  exact in float64 (ASGD's rates excepted, which PyTorch rounds to the default dtype).
- *Learning rates and weight decay that depend on the meta parameters* are applied outside of PyTorch's update (which
  is linear in the learning rate), since in forward mode PyTorch drops the derivative of a tensor-valued setting.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from bilevel import trees
from bilevel.models.module_view import ModuleView
from bilevel.optim.buckets import LIMIT, Buckets
from bilevel.optim.schedules import Timetable
from bilevel.trees import Tree

OptimizerState: TypeAlias = "list[dict[str, Tensor | float]]"
"""What the optimiser remembers about every bucket of parameters."""

_SECOND_MOMENTS = frozenset({"exp_avg_sq", "square_avg", "sum"})
_AVERAGE = "ax"
"""ASGD's running average of the parameters, on which they never depend. It is kept without derivatives: PyTorch
overwrites its weight before a backward pass could use it."""
_STAND_INS = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.5, "eps": 0.1}


@dataclass(frozen=True)
class Optimizer:
    """A `torch.optim` class with its settings, not yet bound to parameters. Made by `optimizer`."""

    algorithm: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    _timetable: Timetable = field(init=False, repr=False, compare=False)
    _counters: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.algorithm, type) and issubclass(self.algorithm, torch.optim.Optimizer)):
            raise TypeError(
                f"the algorithm is {described(self.algorithm)}; the class itself and its settings are needed: "
                "bilevel.optimizer(torch.optim.SGD, lr=0.1)"
            )
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        signature = inspect.signature(self.algorithm).parameters
        for name in self.settings:
            if name not in signature or name == "params":
                known = ", ".join(n for n in signature if n != "params")
                raise ValueError(f"torch.optim.{self.algorithm.__name__} has no setting {name!r}; it has: {known}")
        constants = self._constants()
        if self._may_count_with_numbers(constants):
            constants = {"differentiable": False, **constants}
        object.__setattr__(self, "_timetable", Timetable(self.algorithm, constants, self.schedule))
        object.__setattr__(self, "_counters", frozenset())
        if _is_differentiable(self.algorithm):
            probe = self._initial_states([torch.zeros(2)])[0]
            object.__setattr__(self, "_counters", frozenset(name for name, value in probe.items() if value.ndim == 0))

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        schedule = "" if self.schedule is None else f", schedule={self.schedule!r}"
        return f"optimizer(torch.optim.{self.algorithm.__name__}{settings}{schedule})"

    @property
    def meta_settings(self) -> dict[str, Callable[[Tree], Any]]:
        """The settings that are functions of the meta parameters."""
        return {name: value for name, value in self.settings.items() if callable(value)}

    def _constants(self) -> dict[str, Any]:
        """Settings for PyTorch's constructor, stand-ins where the value comes from the meta parameters."""
        defaults = inspect.signature(self.algorithm).parameters
        return {
            **self.settings,
            **{name: _STAND_INS.get(name, defaults[name].default) for name in self.meta_settings},
        }

    def _may_count_with_numbers(self, constants: Mapping[str, Any]) -> bool:
        """Whether Adam may correct its bias with numbers, as it does when nobody asks for a derivative.

        `differentiable=True` makes it do so with tensors, for settings that are tensors. Where none is, the other code
        has the same derivative in fewer operations, and in forward mode without tensors that only seem to be zeros,
        which PyTorch handles slowly. (Not with `amsgrad=True`, for which it writes into an `out=` without derivative.)
        """
        usual = constants.keys() <= {"lr", "betas", "eps", "weight_decay", "maximize"}
        numbers = all(isinstance(value, float | int) for value in trees.leaves(constants))
        outside = self.meta_settings.keys() <= {"lr", "weight_decay"}  # applied around the update
        return self.algorithm in (torch.optim.Adam, torch.optim.AdamW) and usual and numbers and outside

    # -- bound to parameters, updating in place: the outer loop --------------------------------------------------

    def bind(self, parameters: Sequence[Tensor]) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """The ordinary PyTorch optimiser (and scheduler) over these parameters."""
        if self.meta_settings:
            names = ", ".join(self.meta_settings)
            raise ValueError(f"{names}: only an inner optimiser can take settings that are functions of meta")
        needs_closure = inspect.signature(self.algorithm.step).parameters["closure"].default is inspect.Parameter.empty
        if needs_closure and (self.settings.get("max_iter") != 1 or self.settings.get("line_search_fn")):
            raise ValueError(
                f"torch.optim.{self.algorithm.__name__} evaluates the loss several times in a step (its step needs a "
                "closure), and an outer step has one hypergradient; take SGD, Adam, RMSprop or another first-order "
                "one, or max_iter=1 without a line search"
            )
        bound = self.algorithm(list(parameters), **self.settings)  # pyright: ignore[reportCallIssue]
        return bound, None if self.schedule is None else self.schedule(bound)

    # -- as a pure function: the inner loop ----------------------------------------------------------------------

    def require_differentiable(self) -> None:
        """Raise unless PyTorch can differentiate through this optimiser with these settings."""
        if not _is_differentiable(self.algorithm):
            raise ValueError(
                f"torch.optim.{self.algorithm.__name__} has no differentiable=True in torch {torch.__version__}, so "
                "its updates have no derivative; take SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta, "
                "Adamax or ASGD"
            )
        if issubclass(self.algorithm, torch.optim.Rprop):
            raise ValueError(
                "torch.optim.Rprop moves by the signs of the gradient alone, so its derivative is zero; any other "
                "optimiser of torch.optim will do"
            )
        for name in self.meta_settings:
            _require_derivative_of_setting(self, name)

    def init(self, parameters: Sequence[Tensor]) -> OptimizerState:
        """The state before the first step."""
        states = self._initial_states(parameters)
        halves = any(p.dtype == torch.float16 for p in parameters)
        if halves and any(_SECOND_MOMENTS & state.keys() for state in states):
            raise ValueError(
                f"torch.optim.{self.algorithm.__name__} keeps squares of gradients, which float16 rounds to zero; take "
                "parameters in bfloat16, float32 or float64"
            )
        return [self._frozen(state) for state in states]

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: OptimizerState,
        step: int,
        meta: Tree = None,
        params: Tree = None,
    ) -> tuple[list[Tensor], OptimizerState]:
        """One step, number `step` counted from 0. Nothing is changed in place.

        `params` is the tree whose leaves the parameters are, which a tree of learning rates has to match.
        """
        settings = self._timetable(step)
        special = {name: function(meta) for name, function in self.meta_settings.items()}
        learning_rates = decay = None
        if "lr" in special:
            factor = settings["lr"]  # the schedule's, on a base of one
            learning_rates = [factor * lr for lr in _one_each(special.pop("lr"), parameters, params, "lr")]
            settings["lr"] = 1.0
        if "weight_decay" in special:
            decay = _one_each(special.pop("weight_decay"), parameters, params, "weight_decay")
            settings["weight_decay"] = 0.0
        settings.update(special)

        before = list(parameters)
        if decay is not None and self.decay_is_decoupled:
            rates = learning_rates or [settings["lr"]] * len(before)
            before = [p * (1 - rate * d) for p, rate, d in zip(before, rates, decay, strict=True)]
        elif decay is not None:
            gradients = [g + self.sign * d * p for g, d, p in zip(gradients, decay, before, strict=True)]
        after, new_state = self._torch_step(before, gradients, state, step, settings)
        if learning_rates is not None:
            after = [p + rate * (q - p) for p, q, rate in zip(before, after, learning_rates, strict=True)]
        return after, new_state

    @property
    def sign(self) -> int:
        """−1 for an optimiser that ascends (`maximize=True`), which is to descend on the negative loss; else 1."""
        return -1 if self._timetable.defaults.get("maximize") else 1

    @property
    def decay_is_decoupled(self) -> bool:
        """Whether weight decay acts on the parameters rather than through the gradient (AdamW)."""
        return bool(self._timetable.defaults.get("decoupled_weight_decay", False))

    def coupled_decay(self, parameters: Sequence[Tensor], meta: Tree, params: Tree) -> list[Tensor | float] | None:
        """λ for each parameter if the optimiser descends on ±g + λ‖θ‖²/2 rather than on ±g alone; else `None`."""
        value = self.settings.get("weight_decay", 0.0)
        if self.decay_is_decoupled or (not callable(value) and value == 0):
            return None
        return _one_each(value(meta) if callable(value) else value, parameters, params, "weight_decay")

    def _initial_states(self, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        """What the optimiser would remember before its first step, made by its own lazy initialisation."""
        clones = [p.detach() for p in self._buckets(parameters).joined(parameters, fresh=True)]
        for clone in clones:
            clone.grad = torch.zeros_like(clone)
        instance = self._timetable.blank()
        group = {**self._timetable(0), "params": clones}  # a scheduler may have changed what the constructor was given
        initialise = instance._init_group  # pyright: ignore[reportAttributeAccessIssue]
        initialise(group, *([] for _ in list(inspect.signature(initialise).parameters)[1:]))
        if isinstance(instance, torch.optim.SGD) and group["momentum"] != 0:
            return [{"momentum_buffer": torch.zeros_like(clone)} for clone in clones]
        return [instance.state[clone] for clone in clones]

    def _torch_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: OptimizerState,
        step: int,
        settings: dict[str, Any],
    ) -> tuple[list[Tensor], OptimizerState]:
        if step == 0 and issubclass(self.algorithm, torch.optim.SGD):
            settings["dampening"] = 0.0
        self._require_memory_of_momentum(state, step, settings)
        # Shards, which come as ordinary tensors for the time of an update, have a memory each.
        buckets = Buckets.of(parameters, limit=0) if len(state) == len(parameters) else self._buckets(parameters)
        clones, gradients = buckets.joined(parameters, fresh=True), buckets.joined(gradients)
        instance = self._timetable.blank()
        instance.param_groups = [{**settings, "params": clones}]
        for clone, gradient, memory in zip(clones, gradients, state, strict=True):
            clone.grad = gradient
            instance.state[clone] = {name: _thaw(name, value) for name, value in memory.items()}
        inspect.unwrap(self.algorithm.step)(instance)  # bare of the hooks and of the no_grad around it
        new_state = [self._frozen(instance.state[clone]) for clone in clones]
        return buckets.parted(clones), new_state

    def _buckets(self, parameters: Sequence[Tensor]) -> Buckets:
        """Which parameters are updated together: PyTorch's own optimisers go element by element, others may not."""
        return Buckets.of(parameters, LIMIT if self.algorithm.__module__.startswith("torch.optim.") else 0)

    def _require_memory_of_momentum(self, state: OptimizerState, step: int, settings: Mapping[str, Any]) -> None:
        momentum = settings.get("momentum", 0.0)
        turned_on = not isinstance(momentum, Tensor) and momentum != 0
        if turned_on and not all("momentum_buffer" in memory for memory in state):
            raise ValueError(
                f"the schedule turns momentum on at step {step} (to {momentum}), after steps without any; let "
                f"torch.optim.{self.algorithm.__name__} have momentum from its first step on"
            )

    def _frozen(self, state: Mapping[str, Any]) -> dict[str, Tensor | float]:
        """What `_thaw` undoes: counters as numbers."""
        known = {name: value for name, value in state.items() if value is not None}
        cut_off = {n: v.detach() if n in self._counters or n == _AVERAGE else v for n, v in known.items()}
        return {name: float(value) if name in self._counters else value for name, value in cut_off.items()}


def optimizer(
    algorithm: type[torch.optim.Optimizer],
    *,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    **settings: Any,
) -> Optimizer:
    """Name a `torch.optim` class and its settings, for the inner or the outer loop.

    Args:
        algorithm: for the inner loop, any class of `torch.optim` with a `differentiable` flag: SGD, Adam, AdamW,
            RMSprop, Adagrad, NAdam, RAdam, Adadelta, Adamax, ASGD.
        schedule: makes a scheduler of `torch.optim.lr_scheduler` for an optimiser, such as
            `functools.partial(CosineAnnealingLR, T_max=100)`; it advances once per step.
        settings: what the class itself takes. For an inner optimiser a setting may be a function of the meta
            parameters: `lr=lambda meta: meta["log_lr"].exp()`. `lr` and `weight_decay` may then also be a list with
            one value for each parameter (per-layer rates), or a tree that matches the parameters: for a module, a
            dict by parameter name. A schedule multiplies such a rate by what it
            makes of a rate of one.

    Raises:
        ValueError: for a setting that the class does not have, or one whose derivative PyTorch would drop.

    >>> optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    """
    return Optimizer(algorithm, settings, schedule)


def described(value: Any) -> str:
    """What was passed as an optimiser, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, torch.optim.Optimizer):
        return f"an instance of {type(value).__name__}"
    return f"{value!r} ({type(value).__name__})"


def _is_differentiable(algorithm: type[torch.optim.Optimizer]) -> bool:
    return "differentiable" in inspect.signature(algorithm).parameters


def _thaw(name: str, value: Tensor | float) -> Tensor:
    """A tensor that the optimiser may change in place."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    if name in _SECOND_MOMENTS:
        return value.clamp(min=100 * torch.finfo(value.dtype).tiny)
    return value.clone()


def _one_each(value: Any, parameters: Sequence[Tensor], params: Tree, name: str) -> list[Any]:
    """A setting for each parameter: from one value for all, a list in their order, or a tree that matches `params`."""
    if isinstance(params, ModuleView) and isinstance(value, Mapping) and value.keys() == params.named_tensors.keys():
        values = [value[parameter_name] for parameter_name in params.named_tensors]
    elif isinstance(value, list | tuple) and len(value) == len(parameters):
        values = list(value)
    elif isinstance(value, Tensor | float | int):
        values = [value] * len(parameters)
    elif trees.flatten(value)[1] == trees.flatten(params)[1]:
        values = trees.leaves(value)
    else:
        names = list(params.named_tensors) if isinstance(params, ModuleView) else trees.flatten(params)[1]
        raise ValueError(
            f"{name} gave {value!r} for {len(parameters)} parameters; it must give one value for all of them, a list "
            f"with one for each, or a tree that matches them: {names}"
        )
    for each, parameter in zip(values, parameters, strict=True):
        if isinstance(each, Tensor) and each.shape not in (torch.Size(), parameter.shape):
            raise ValueError(
                f"{name} gave a tensor of shape {tuple(each.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}; a scalar is needed, or the parameter's own shape; for one value per "
                "parameter write list(...) around a vector"
            )
    return values


def _require_derivative_of_setting(optimizer: Optimizer, name: str) -> None:
    """Raise unless PyTorch carries derivatives with respect to a setting, in both modes.

    Several settings of `torch.optim` reach kernels as plain numbers, which drops their derivative without a word. So
    eight steps (RAdam adapts from the sixth on) on two numbers are differentiated in both modes and compared with
    central differences.
    """
    if name in ("lr", "weight_decay"):
        if name == "lr" and issubclass(optimizer.algorithm, torch.optim.ASGD):
            raise ValueError(
                f"torch.optim.{optimizer.algorithm.__name__} takes its learning rate as a plain number, without a "
                "derivative; the other optimisers can have it as a meta parameter"
            )
        return
    default = optimizer._constants()[name]
    if default is None or isinstance(default, bool):
        raise ValueError(
            f"{name} of torch.optim.{optimizer.algorithm.__name__} is a switch, not a number, so it cannot be a meta "
            f"parameter; write {name}=True or {name}=False"
        )
    points = [torch.tensor(float(v), dtype=torch.float64) for v in trees.leaves(default)]
    rebuild = functools.partial(trees.unflatten, trees.flatten(default)[1])
    subject = Optimizer(optimizer.algorithm, {**optimizer._constants(), "lr": 0.1, name: rebuild})

    def trajectory(*values: Tensor) -> Tensor:
        theta = [torch.tensor([1.0, -2.0], dtype=torch.float64)]
        state = subject.init(theta)
        for step in range(8):
            theta, state = subject.update(theta, [theta[0] * torch.tensor([1.0, 3.0])], state, step, list(values))
        return theta[0].sum()

    offset = 1e-5
    try:
        for i, point in enumerate(points):
            shifted = [[*points[:i], point + sign * offset, *points[i + 1 :]] for sign in (1, -1)]
            difference = (trajectory(*shifted[0]) - trajectory(*shifted[1])) / (2 * offset)
            if difference == 0:
                raise ValueError(
                    f"{name} of torch.optim.{optimizer.algorithm.__name__} cannot be a meta parameter: with these "
                    "settings no step uses it"
                )
            direction = tuple(torch.ones_like(p) if j == i else torch.zeros_like(p) for j, p in enumerate(points))
            forward = torch.func.jvp(trajectory, tuple(points), direction)[1]
            reverse = torch.func.grad(trajectory, argnums=i)(*points)
            for found in (forward, reverse):
                if not torch.isclose(found, difference, rtol=1e-4, atol=1e-7):
                    raise RuntimeError(f"derivative {found.item():.6g}, central difference {difference.item():.6g}")
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} of torch.optim.{optimizer.algorithm.__name__} cannot be a meta parameter: torch "
            f"{torch.__version__} does not carry its derivative through the update ({error}); lr and weight_decay can"
        ) from error
