"""`torch.optim` optimisers as pure update rules: (parameters, gradients, state) -> (parameters, state).

`TorchStep` runs PyTorch's own step on copies. An update also clips the gradients, leaves parameters without a gradient
unchanged, and applies learning rates and weight decay that depend on the meta parameters. It applies these around the
step because PyTorch's update is linear in the learning rate, and because in forward mode PyTorch drops the derivative
of a setting that is a tensor. A class that is not one of PyTorch's ten differentiable classes is compared once with its
own steps and with finite differences (`bilevel.optim.verification`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from bilevel import trees
from bilevel.optim import verification
from bilevel.optim.clipping import Bound, Clipping, require_whole
from bilevel.optim.optimizer_state import OptimizerState
from bilevel.optim.settings import of_meta_and_step, one_each, settings_of
from bilevel.optim.torch_step import SECOND_MOMENTS, SPEED_ONLY, TorchStep
from bilevel.trees import Tree

_STAND_INS = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.5, "eps": 0.1}


@dataclass(frozen=True)
class Optimizer:
    """A `torch.optim` class with its settings, not yet bound to parameters. `bilevel.optimizer` makes it."""

    algorithm: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    clipping: Clipping = field(default_factory=Clipping)
    _step: TorchStep = field(init=False, repr=False, compare=False)
    _verified: set[str] = field(init=False, repr=False, compare=False, default_factory=set)
    """The comparisons that have been made of an optimiser that is not part of PyTorch: "values", "derivatives"."""

    def __post_init__(self) -> None:
        if not (isinstance(self.algorithm, type) and issubclass(self.algorithm, torch.optim.Optimizer)):
            raise TypeError(
                f"the algorithm is {described(self.algorithm)}; the class itself and its settings are needed: "
                "bilevel.optimizer(torch.optim.SGD, lr=0.1)"
            )
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        known = settings_of(self.algorithm)
        for name in self.settings:
            if name not in known:
                raise ValueError(f"{self._name} has no setting {name!r}; it has: {', '.join(known)}")
        numbers_only = self.meta_settings.keys() <= {"lr", "weight_decay"}  # these are applied around the step
        step = TorchStep(self.algorithm, self._constants(), self.schedule, numbers_only)
        object.__setattr__(self, "_step", step)

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        clipping = f", {self.clipping!r}" if self.clipping.is_on else ""
        schedule = "" if self.schedule is None else f", schedule={self.schedule!r}"
        return f"optimizer({self._name}{settings}{clipping}{schedule})"

    @property
    def _name(self) -> str:
        of_pytorch = self.algorithm.__module__.startswith("torch.optim.")
        return f"torch.optim.{self.algorithm.__name__}" if of_pytorch else self.algorithm.__name__

    @functools.cached_property
    def meta_settings(self) -> dict[str, Callable[[Tree, int], Any]]:
        """The settings that depend on the meta parameters and the step, or have a value for each parameter."""
        several = {
            name: functools.partial(_constant, value)
            for name in ("lr", "weight_decay")
            if isinstance(value := self.settings.get(name), Mapping | list | tuple)
        }
        functions = {name: of_meta_and_step(value) for name, value in self.settings.items() if callable(value)}
        return {**functions, **several}

    def _constants(self) -> dict[str, Any]:
        """Return settings for PyTorch's constructor, with placeholders for values from the meta parameters."""
        defaults = settings_of(self.algorithm)
        required = inspect.Parameter.empty
        stand_ins = {n: 0.1 if defaults[n] is required else defaults[n] for n in self.meta_settings} | _STAND_INS
        return {**self.settings, **{name: stand_ins[name] for name in self.meta_settings}}

    # -- bound to parameters, updating in place: the outer loop --------------------------------------------------

    def bind(self, parameters: Sequence[Tensor]) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """Make the ordinary PyTorch optimiser and scheduler for these parameters, for the outer loop.

        Args:
            parameters: the tensors that the optimiser updates in place.

        Returns:
            The optimiser, and its scheduler or `None`.

        Raises:
            ValueError: a setting is a function of the meta parameters or differs between parameters, the gradient is
                to be clipped, or the optimiser evaluates the loss several times in a step.
        """
        if self.meta_settings:
            names = ", ".join(self.meta_settings)
            raise ValueError(
                f"{names}: only an inner optimiser can take settings that are functions of meta or differ between "
                "parameters"
            )
        if self.clipping.is_on:
            raise ValueError(
                f"{self.clipping!r}: bilevel.optimizer clips the gradient of an inner step; the hypergradient is "
                "clipped by fit(..., clip_norm=...)"
            )
        needs_closure = inspect.signature(self.algorithm.step).parameters["closure"].default is inspect.Parameter.empty
        if needs_closure and (self.settings.get("max_iter") != 1 or self.settings.get("line_search_fn")):
            raise ValueError(
                f"{self._name} evaluates the loss several times in a step (its step needs a "
                "closure), and an outer step has one hypergradient; take SGD, Adam, RMSprop or another first-order "
                "one, or max_iter=1 without a line search"
            )
        bound = self.algorithm(list(parameters), **self.settings)  # pyright: ignore[reportCallIssue]
        return bound, None if self.schedule is None else self.schedule(bound)

    def bound_to(self, parameters: Any) -> torch.optim.Optimizer:
        """Make an instance of the class over parameters or groups of parameters, for `in_place.InPlaceOptimizer`."""
        constants = {name: value for name, value in self._constants().items() if name not in SPEED_ONLY}
        return self.algorithm(parameters, **constants)  # pyright: ignore[reportCallIssue]

    def settings_at(self, step: int, meta: Tree) -> dict[str, Any]:
        """Return all settings in force at a step, counted from 0; a schedule multiplies a rate that depends on meta."""
        settings = self._step.timetable(step)
        special = {name: function(meta, step) for name, function in self.meta_settings.items()}
        if "lr" in special:
            factor = settings["lr"]
            rates = special["lr"]
            special["lr"] = rates if factor == 1 else _scaled(rates, factor)
        return {**settings, **special}

    def memory_of(self, parameter: Tensor, memory: Mapping[str, Any], updates: int) -> dict[str, Any]:
        """Return what PyTorch keeps in `optimizer.state[parameter]` after so many updates, as a state has it."""
        return self._step.memory_of(parameter, memory, updates)

    @property
    def is_pytorchs_own(self) -> bool:
        """Whether the step is differentiable as PyTorch wrote it."""
        return self._step.is_pytorchs_own

    # -- as a pure function: the inner loop ----------------------------------------------------------------------

    def require_differentiable(self) -> None:
        """Raise unless the updates of this optimiser have a derivative with these settings.

        Raises:
            ValueError: the class or one of its settings has no derivative. The message says what to use instead.
        """
        if issubclass(self.algorithm, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ValueError(
                f"{self._name} has no differentiable=True in torch {torch.__version__}, so "
                "its updates have no derivative; take SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta, "
                "Adamax or ASGD"
            )
        if issubclass(self.algorithm, torch.optim.Rprop):
            raise ValueError(
                f"{self._name} moves by the signs of the gradient alone, so its derivative is zero; any other "
                "optimiser of torch.optim will do"
            )
        closure = inspect.signature(self.algorithm.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{self._name}.step needs a closure, with which it evaluates the loss several times; an inner step has "
                "one gradient. Take an optimiser whose step(closure=None) can be called without arguments"
            )
        for name in self.meta_settings:
            _require_derivative_of_setting(self, name)

    def require_clippable(self, parameters: Sequence[Tensor]) -> None:
        """Raise a ValueError if the gradient of these parameters cannot be clipped by the given bounds."""
        require_whole(self.clipping, parameters)

    def init(self, parameters: Sequence[Tensor]) -> OptimizerState:
        """Return the optimiser's state before the first step.

        Raises:
            ValueError: a parameter has dtype float16, and the optimiser keeps squares of gradients.
        """
        state = self._step.first_state(parameters)
        halves = any(p.dtype == torch.float16 for p in parameters)
        if halves and any(SECOND_MOMENTS & bucket.memory.keys() for bucket in state):
            raise ValueError(
                f"{self._name} keeps squares of gradients, which float16 rounds to zero; take "
                "parameters in bfloat16, float32 or float64"
            )
        return state

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        state: OptimizerState,
        step: int,
        meta: Tree = None,
        params: Tree = None,
    ) -> tuple[list[Tensor], OptimizerState]:
        """Compute one step. Nothing is changed in place.

        Args:
            parameters: the parameters before the step.
            gradients: the gradient of each parameter. A parameter whose gradient is `None` and the optimiser's memory
                of it are left unchanged.
            state: the optimiser's state before the step.
            step: the number of the step, counted from 0.
            meta: the meta parameters, for settings that are functions of them.
            params: the tree whose leaves the parameters are. A tree of learning rates must match it.

        Returns:
            The parameters and the optimiser's state after the step.

        Raises:
            ValueError: a setting does not match the parameters, or the values or derivatives of an optimiser that is
                not part of PyTorch are wrong.
        """
        settings = self._step.timetable(step)
        special = {name: function(meta, step) for name, function in self.meta_settings.items()}
        gradients = self.clipping(gradients, meta, step) if self.clipping.is_on else gradients
        if not self._step.is_pytorchs_own:
            settings = {**settings, **self._inside(special, settings, parameters, params)}
            self._verify(parameters, gradients, settings)
            return self._step(parameters, gradients, state, step, settings)
        learning_rates = decay = None
        if "lr" in special:
            factor = settings["lr"]  # the schedule's factor, because the scheduler runs with a rate of 1
            learning_rates = [factor * lr for lr in one_each(special.pop("lr"), parameters, params, "lr")]
            settings["lr"] = 1.0
        if "weight_decay" in special:
            decay = one_each(special.pop("weight_decay"), parameters, params, "weight_decay")
            settings["weight_decay"] = 0.0
        settings.update(special)

        before = list(parameters)
        if decay is not None and self.decay_is_decoupled:
            rates = learning_rates or [settings["lr"]] * len(before)
            before = [
                p if g is None else p * (1 - rate * d)
                for p, g, rate, d in zip(before, gradients, rates, decay, strict=True)
            ]
        elif decay is not None:
            gradients = [
                None if g is None else g + self.sign * d * p for g, d, p in zip(gradients, decay, before, strict=True)
            ]
        after, new_state = self._step(before, gradients, state, step, settings)
        if learning_rates is not None:
            after = [
                p if g is None else p + rate * (q - p)
                for p, g, q, rate in zip(before, gradients, after, learning_rates, strict=True)
            ]
        return after, new_state

    def _inside(
        self, special: dict[str, Any], settings: Mapping[str, Any], parameters: Sequence[Tensor], params: Tree
    ) -> dict[str, Any]:
        """Return the settings from the meta parameters for a class that is not part of PyTorch: one value for all
        parameters.

        Raises:
            ValueError: a setting differs between parameters.
        """
        for name in special:
            if name in ("lr", "weight_decay"):
                values = one_each(special[name], parameters, params, name)
                if any(value is not values[0] for value in values[1:]):
                    raise ValueError(
                        f"{name} differs between parameters, and the step of {self._name} is run for all of them at "
                        f"once, with one {name}; give one value, or take one of PyTorch's ten differentiable optimisers"
                    )
                special[name] = values[0]
        if "lr" in special:
            special["lr"] = settings["lr"] * special["lr"]  # settings["lr"] is the schedule's factor
        return special

    def _verify(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], settings: Mapping[str, Any]
    ) -> None:
        """Compare an optimiser that is not part of PyTorch once with its own steps and with finite differences."""
        reached = [i for i, g in enumerate(gradients) if g is not None]
        differentiated = torch._C._are_functorch_transforms_active() or any(
            t is not None and t.requires_grad for t in (*parameters, *gradients)
        )
        wanted = {"values", "derivatives"} if differentiated else {"values"}
        if wanted <= self._verified or not reached:
            return
        theta = verification.plain_copies([parameters[i] for i in reached])
        given = verification.plain_copies([g for g in gradients if g is not None])
        numbers = verification.plain_copies([v for v in settings.values() if isinstance(v, Tensor)])
        if theta is None or given is None or numbers is None:
            return  # this is inside torch.vmap over inner loops; the next update outside of it is compared
        remaining = iter(numbers)
        plain = {n: float(next(remaining)) if isinstance(v, Tensor) else v for n, v in settings.items()}
        if plain.get("lr") == 0:
            plain["lr"] = self._step.timetable.defaults["lr"] or 1.0
        with verification.outside_of_transforms():
            self._compare(wanted - self._verified, theta, given, plain)
        self._verified.update(wanted)

    def _compare(
        self, wanted: set[str], theta: list[Tensor], gradients: list[Tensor], settings: Mapping[str, Any]
    ) -> None:
        theta, gradients = verification.moved_off(theta, 5), verification.moved_off(gradients, 6)

        def update(theta: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
            state = self._step.first_state(theta)
            for step, factor in enumerate(verification.FACTORS):
                theta, state = self._step(theta, [factor * g for g in gradients], state, step, settings)
            return theta

        if "values" in wanted:
            gap = verification.difference_in_values(
                update, functools.partial(self._own_steps, settings), theta, gradients
            )
            if verification.is_off(gap):
                raise ValueError(
                    f"{self._name} computes other updates when its step runs on copies of the parameters (relative "
                    f"difference {gap:.2g} after three steps): it remembers something outside of self.state[parameter]"
                    ", or reads something besides the parameters, their .grad and the settings in param_groups. Keep "
                    "what it remembers in self.state[parameter], or describe the whole step by bilevel.Problem"
                )
        if "derivatives" in wanted:
            try:
                gap, what = verification.difference_in_derivatives(update, theta, gradients)
                found = f"has another derivative than its differences show (relative difference {gap:.2g}, {what})"
            except (RuntimeError, TypeError, NotImplementedError) as error:
                gap, found = math.inf, f"cannot be differentiated ({type(error).__name__}: {error})"
            if verification.is_off(gap):
                raise ValueError(
                    f"the step of {self._name} {found}: it takes numbers out of PyTorch (float(...), .tolist(), "
                    "NumPy), or decides by them. Write the step in operations on tensors, clip by "
                    "bilevel.optimizer(..., clip_norm=...), describe the step by bilevel.Problem, or take ZerothOrder"
                )

    def _own_steps(self, settings: Mapping[str, Any], theta: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return the parameters after the optimiser's own steps, as in a loop without this library."""
        plain = [t.detach().clone().requires_grad_() for t in theta]
        constants = {name: value for name, value in self._constants().items() if name not in SPEED_ONLY}
        bound = self.algorithm(plain, **constants)  # pyright: ignore[reportCallIssue]
        bound.param_groups[0].update({name: value for name, value in settings.items() if name not in SPEED_ONLY})
        for factor in verification.FACTORS:
            for parameter, gradient in zip(plain, gradients, strict=True):
                parameter.grad = (factor * gradient).detach()
            with torch.no_grad():
                bound.step()
        return [t.detach() for t in plain]

    @property
    def sign(self) -> int:
        """−1 for an optimiser with `maximize=True`, which descends on the negative loss; else 1."""
        return -1 if self._step.timetable.defaults.get("maximize") else 1

    @property
    def decay_is_decoupled(self) -> bool:
        """Whether weight decay acts on the parameters rather than through the gradient (AdamW)."""
        return bool(self._step.timetable.defaults.get("decoupled_weight_decay", False))

    def coupled_decay(
        self, parameters: Sequence[Tensor], meta: Tree, params: Tree, step: int
    ) -> list[Tensor | float] | None:
        """Return λ of a step for each parameter if it descends on ±g + λ‖θ‖²/2 and not on ±g alone, else `None`."""
        value = self.settings.get("weight_decay", 0.0)
        if self.decay_is_decoupled or (isinstance(value, float | int) and value == 0):
            return None
        if "weight_decay" in self.meta_settings:
            value = self.meta_settings["weight_decay"](meta, step)
        return one_each(value, parameters, params, "weight_decay")


def optimizer(
    algorithm: type[torch.optim.Optimizer] | functools.partial[Any],
    *,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    clip_norm: Bound = None,
    clip_value: Bound = None,
    clip_norm_type: float = 2.0,
    **settings: Any,
) -> Optimizer:
    """Describe an optimiser by its `torch.optim` class and its settings, for the inner or the outer loop.

    Parameters that the loss of a step does not reach are left unchanged at that step, and so are their momentum and
    step count. `torch.optim` does the same for parameters whose `grad` is `None` after `zero_grad()`.

    Args:
        algorithm: the optimiser's class. For the inner loop, this is SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam,
            Adadelta, Adamax or ASGD of `torch.optim`, or a class of your own with a first-order step. The updates and
            derivatives of your own class are compared with its own steps and with finite differences at the first
            update. `functools.partial(torch.optim.SGD, lr=0.1)` stands for the class with these settings.
        schedule: a function that makes a scheduler of `torch.optim.lr_scheduler` for an optimiser, such as
            `functools.partial(CosineAnnealingLR, T_max=100)`. The scheduler advances once per step.
        clip_norm: the largest norm, over all parameters, of the gradient of an inner step. Larger gradients are
            scaled as by `torch.nn.utils.clip_grad_norm_`: g ← g · min(1, clip_norm / (‖g‖ + 1e-6)). A number, or a
            function of the meta parameters.
        clip_value: the bound to which each entry of the gradient is clamped, to [−clip_value, clip_value], as by
            `torch.nn.utils.clip_grad_value_`. It is applied before `clip_norm`. A number, or a function of the meta
            parameters.
        clip_norm_type: p of the p-norm that `clip_norm` bounds; at least 1, or `math.inf`.
        settings: what the class itself takes. For an inner optimiser a setting may be a function of the meta
            parameters, `lr=lambda meta: meta["log_lr"].exp()`, or of the meta parameters and the number of the step
            from 0, `lr=lambda meta, step: meta["rates"][step]`: a function with two required positional parameters
            gets both. This holds for every number, such as momentum, dampening, eps, and `betas` as a pair; a setting
            whose derivative PyTorch would drop is refused. `lr` and `weight_decay` may also be a list with one value
            for each parameter, or a tree that matches the parameters, in which one value may stand for a whole branch:
            for a module, a dict by parameter name. It may be given as it is, or by a function. No decay on biases and
            norms: `weight_decay={name: 0.1 * (p.ndim > 1) for name, p in net.named_parameters()}`. A
            schedule multiplies such a rate by what it makes of a rate of one. `foreach`, `fused`, `capturable` and
            `differentiable` are accepted and have no effect in an inner loop, because they change only the speed.

    Returns:
        The description, for `bilevel.GradientDescent` or for `fit`.

    Raises:
        TypeError: `algorithm` is not an optimiser class, or `schedule` does not make a scheduler.
        ValueError: the class does not have a setting, PyTorch would drop the derivative of a setting, or the updates
            of the class cannot be reproduced or differentiated.

    >>> optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, clip_norm=1.0)
    optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, clip_norm=1.0)
    """
    while isinstance(algorithm, functools.partial):
        if algorithm.args:
            raise TypeError(
                f"the algorithm is {algorithm!r}, which has positional arguments; name the settings: "
                "functools.partial(torch.optim.SGD, lr=0.1)"
            )
        settings = {**algorithm.keywords, **settings}
        algorithm = algorithm.func  # pyright: ignore[reportAssignmentType]
    return Optimizer(algorithm, settings, schedule, Clipping(clip_norm, clip_value, clip_norm_type))


def described(value: Any) -> str:
    """Return a few words, for an error message, on what was passed as an optimiser."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, torch.optim.Optimizer):
        return f"an instance of {type(value).__name__}"
    return f"{value!r} ({type(value).__name__})"


def _constant(value: Any, meta: Tree, step: int) -> Any:
    return value


def _scaled(rates: Any, factor: float) -> Any:
    """Multiply one rate, or each rate of a list or tree."""
    return trees.map_leaves(lambda rate: factor * rate, rates)


def _require_derivative_of_setting(optimizer: Optimizer, name: str) -> None:
    """Raise unless PyTorch carries derivatives with respect to a setting, in both modes.

    Several settings of `torch.optim` reach kernels as plain numbers, which drops their derivative silently. This
    function differentiates eight steps on two numbers in both modes and compares the derivatives with central
    differences, and the result with that of a constant setting. It takes eight steps because RAdam adapts only from the
    sixth step on.

    Raises:
        ValueError: the setting cannot be a meta parameter.
    """
    if name in ("lr", "weight_decay") and optimizer._step.is_pytorchs_own:
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
    points = [torch.tensor(float(v), dtype=torch.float64, device="cpu") for v in trees.leaves(default)]

    def rebuild(values: list[Tensor]) -> Any:
        return trees.unflatten(trees.flatten(default)[1], values)

    constant = Optimizer(optimizer.algorithm, {**optimizer._constants(), "lr": 0.1, name: default})
    subject = Optimizer(optimizer.algorithm, {**constant.settings, name: rebuild})

    def trajectory(*values: Tensor, subject: Optimizer = subject) -> Tensor:
        theta = [torch.tensor([1.0, -2.0], dtype=torch.float64, device="cpu")]
        state = subject.init(theta)
        for step in range(8):
            gradient = theta[0] * theta[0].new_tensor([1.0, 3.0])
            theta, state = subject.update(theta, [gradient], state, step, list(values))
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
        value, plain = trajectory(*points), trajectory(subject=constant)
        if not torch.isclose(value, plain, rtol=1e-10, atol=0):
            raise RuntimeError(f"the parameters are {value.item():.12g} instead of {plain.item():.12g}")
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} of torch.optim.{optimizer.algorithm.__name__} cannot be a meta parameter: torch "
            f"{torch.__version__} does not carry its derivative through the update ({error}); lr and weight_decay can"
        ) from error
