"""What a bilevel problem is: an inner loop that ends in a state, and an outer loss that judges the state.

    h(φ) = outer_loss(θ_T(φ), φ),   θ_0 = init(φ),   θ_t = step(θ_{t−1}, φ, batch_t)

φ are the meta parameters, θ the inner state. Everything is a pure function over trees of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bilevel import autodiff, checks, trees
from bilevel.compilation.compiled_gradient import CompiledGradient, backend_named
from bilevel.errors import NoDependenceError
from bilevel.models.module_view import (
    ModuleView,
    as_tree,
    convertible,
    left_as_they_were,
    refuse_running_statistics,
    standing_in,
)
from bilevel.optim.update_rule import Optimizer, OptimizerState, described
from bilevel.trees import Tree


@runtime_checkable
class Unrollable(Protocol):
    """An inner loop that can be run step by step: `Problem` and `GradientDescent`."""

    def init(self, meta: Tree, /) -> Tree: ...

    def step(self, state: Tree, meta: Tree, batch: Any, /) -> Tree: ...

    def outer_loss(self, state: Tree, meta: Tree, batch: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class Problem:
    """A bilevel problem in its general form, given by three pure functions.

    Args:
        init: `init(meta) -> state`, the inner state θ_0; it may depend on meta, and may draw random numbers.
        step: `step(state, meta, batch) -> state`, one inner step Ω_t. The new state has the structure, shapes and
            dtypes of the old one.
        outer_loss: `outer_loss(state, meta, batch) -> scalar`.

    Random numbers drawn with torch's global generator (dropout, random initialisation) are reproducible: they are a
    function of the estimator's seed and the number of the step.

    >>> import torch, bilevel
    >>> shrink = Problem(
    ...     init=lambda meta: torch.tensor(8.0),
    ...     step=lambda state, meta, batch: state * meta,
    ...     outer_loss=lambda state, meta, batch: state**2,
    ... )
    >>> bilevel.Reverse()(shrink, torch.tensor(0.5), bilevel.no_batches(3)).grad  # h = 64 φ⁶
    tensor(12.)
    """

    init: Callable[[Tree], Tree]
    step: Callable[[Tree, Tree, Any], Tree]
    outer_loss: Callable[[Tree, Tree, Any], Tensor]

    def __post_init__(self) -> None:
        checks.a_function(self.init, "init", "init(meta)")
        checks.a_function(self.step, "step", "step(state, meta, batch)")
        checks.a_function(self.outer_loss, "outer_loss", "outer_loss(state, meta, batch)")


@dataclass(frozen=True)
class BlackBox:
    """A bilevel problem whose inner loop is a program without derivatives. Only `ZerothOrder` takes it.

    Args:
        solve: `solve(meta) -> state`: a simulator, a subprocess, another library. It raises
            `SolverError` where it fails.
        outer_loss: `outer_loss(state, meta, batch) -> scalar`.
        solve_all: `solve_all(metas) -> states`, the same for a list of points, in parallel for instance (see
            `OutsideProgram`). An estimate then asks for all its points at once, and holds all their states.

    >>> import numpy, torch, bilevel
    >>> box = BlackBox(
    ...     solve=lambda meta: torch.from_numpy(numpy.exp(meta.numpy())),
    ...     outer_loss=lambda state, meta, batch: state.sum(),
    ... )
    >>> bilevel.ZerothOrder(1)(box, torch.zeros(1, dtype=torch.float64)).grad  # d exp(φ)/dφ at 0
    tensor([1.0000], dtype=torch.float64)
    """

    solve: Callable[[Tree], Tree]
    outer_loss: Callable[[Tree, Tree, Any], Tensor]
    solve_all: Callable[[Sequence[Tree]], Sequence[Tree]] | None = None

    def __post_init__(self) -> None:
        checks.a_function(self.solve, "solve", "solve(meta)")
        checks.a_function(self.outer_loss, "outer_loss", "outer_loss(state, meta, batch)")
        if self.solve_all is not None:
            checks.a_function(self.solve_all, "solve_all", "solve_all(metas)")


class Descent(NamedTuple):
    """The inner state of `GradientDescent`: the parameters, the optimiser's memory, and the number of steps taken."""

    params: Tree
    optimizer: OptimizerState
    steps: int


class GradientDescent:
    """A bilevel problem whose inner loop is a `torch.optim` optimiser on an inner loss.

    Args:
        inner_loss: `inner_loss(params, meta, batch) -> scalar`, descended on.
        outer_loss: `outer_loss(params, meta, batch) -> scalar`, evaluated at the final parameters.
        params: an `nn.Module`, or a tree of tensors, or a function `params(meta)` that makes either: afresh for every
            solve, from torch's (reproducibly seeded) generator, or from the meta parameters. With a module, both
            losses receive it as a `ModuleView`, called as the module itself: `model(x)`, `model(input_ids=ids)`.
        optimizer: from `bilevel.optimizer`; learning rates and weight decay may be functions of meta.
        compile: `True` compiles the gradient of `inner_loss` and that gradient's derivatives by `torch.compile`'s
            backend inductor, or by the backend of that name, for every set of shapes once (seconds to minutes; see
            `Estimate.compile_seconds`). Estimators give the same but for rounding. `inner_loss` has to be a fixed
            sequence of operations, without branches on tensors' values; what it reads besides its arguments must not
            change, and is checked at the first step of each estimate. The optimiser's update, the outer loss and
            `init` are not compiled. What it brings: `benchmarks/results/compile.md`.

    Meta parameters may be a tensor, a tree of tensors, or an `nn.Module` (or a tree with modules in it).

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, meta, batch: 0.5 * (theta - meta).square().sum(),
    ...     outer_loss=lambda theta, meta, batch: theta.sum(),
    ...     params=torch.zeros(2),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> bilevel.Reverse()(problem, torch.ones(2), bilevel.no_batches(2)).grad  # θ_2 = (1 − 0.5²) φ
    tensor([0.7500, 0.7500])
    """

    def __init__(
        self,
        inner_loss: Callable[[Any, Any, Any], Tensor],
        outer_loss: Callable[[Any, Any, Any], Tensor],
        params: nn.Module | Tree | Callable[[Any], nn.Module | Tree],
        optimizer: Optimizer,
        compile: bool | str = False,
    ) -> None:
        checks.a_function(inner_loss, "inner_loss", "inner_loss(params, meta, batch)")
        checks.a_function(outer_loss, "outer_loss", "outer_loss(params, meta, batch)")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is {described(optimizer)}; every solve binds it to parameters anew, so name the class and "
                "its settings: optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1)"
            )
        optimizer.require_differentiable()
        self.inner_loss = inner_loss
        self.optimizer = optimizer
        self._outer_loss = outer_loss
        makes_params = callable(params) and not isinstance(params, nn.Module | ModuleView)
        self._make_params: Callable[[Any], Any] = params if makes_params else lambda meta: params  # type: ignore[assignment]
        self._compile_by(backend_named(compile))

    def _compile_by(self, backend: str | None) -> None:
        self._compiled: CompiledGradient | None = None
        self.eager = self
        """The same problem, not compiled."""
        if backend is not None:
            self.eager = copy.copy(self)
            self.eager.eager = self.eager
            self._compiled = CompiledGradient(self.eager.gradient, self.eager.joint_gradient, backend)

    @property
    def backend(self) -> str | None:
        """The backend of `torch.compile` that compiles the inner gradient; `None` if it is not compiled."""
        return None if self._compiled is None else self._compiled.backend

    def compiled(self, backend: str = "inductor") -> GradientDescent:
        """The same problem with its inner gradient compiled, and nothing compiled yet."""
        twin = copy.copy(self.eager)
        twin._compile_by(backend_named(backend))
        return twin

    def check_compiled_again(self) -> None:
        """From here on, compare compiled functions once more with what they stand for, each at its next call."""
        if self._compiled is not None:
            self._compiled.check_again()

    def init(self, meta: Tree) -> Descent:
        """θ_0 and the optimiser's state before its first step."""
        with convertible():
            params = self._make_params(meta)
        if isinstance(params, nn.Module):
            refuse_running_statistics(params, "params")
        params = as_tree(params)
        tensors = trees.split(params).differentiable
        if not tensors:
            raise ValueError(
                f"params is {params!r}, without a floating-point tensor to train; pass an nn.Module some of whose "
                "parameters have requires_grad=True, or a tree of floating-point tensors (.float())"
            )
        return Descent(params, self.optimizer.init(tensors), 0)

    def gradient(self, params: Tree, meta: Tree, batch: Any) -> list[Tensor]:
        """∇_θ inner_loss, one tensor for each differentiable leaf of `params`."""
        if self._compiled is not None:
            return self._compiled.gradient(params, meta, batch)
        parts = trees.split(params)

        def loss(tensors: Sequence[Tensor]) -> Tensor:
            return require_scalar(self.inner_loss(parts.rebuild(tensors), meta, batch), "inner_loss")

        with left_as_they_were(params, meta), autodiff.named_missing_derivatives():
            found = autodiff.gradient(
                loss,
                parts.differentiable,
                differentiable=autodiff.has_graph([params, meta]),
                during=lambda tensors: standing_in(parts.rebuild(tensors), meta),
            )
        if found is None:
            raise NoDependenceError(
                "inner_loss does not depend on the parameters, so there is nothing to descend on; compute it from "
                "the params it is given (for a module: call the model passed to inner_loss, not one from outside), "
                "and keep .detach(), .item() and torch.no_grad() out of it"
            )
        return found

    def joint_gradient(self, params: Tree, meta: Tree, batch: Any) -> list[Tensor]:
        """∇_{θ,φ} inner_loss, one tensor for each differentiable leaf of `params`, then of `meta`; zeros for those that
        inner_loss does not depend on.
        """
        parts, meta_parts = trees.split(params), trees.split(meta)
        count = len(parts.differentiable)

        def loss(tensors: Sequence[Tensor]) -> Tensor:
            value = self.inner_loss(parts.rebuild(tensors[:count]), meta_parts.rebuild(tensors[count:]), batch)
            return require_scalar(value, "inner_loss")

        tensors = [*parts.differentiable, *meta_parts.differentiable]
        with left_as_they_were(params, meta), autodiff.named_missing_derivatives():
            found = autodiff.gradient(loss, tensors, differentiable=autodiff.has_graph([params, meta]))
        return [torch.zeros_like(t) for t in tensors] if found is None else found

    def push_gradient(
        self, params: Tree, meta: Tree, batch: Any, along: Sequence[Tensor], along_meta: Sequence[Tensor]
    ) -> autodiff.Pushed:
        """∇_θ inner_loss and its derivatives along k tangents `[k, *leaf.shape]` of the leaves of θ and of φ."""
        if self._compiled is not None:
            return self._compiled.push(params, meta, batch, along, along_meta)
        return autodiff.push_forward(
            lambda params, meta: self.gradient(params, meta, batch), [params, meta], [along, along_meta]
        )

    def joint_product(self, params: Tree, meta: Tree, batch: Any, along: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of ∇_{θ,φ} inner_loss along one direction in θ: the Hessian's first columns times it."""
        if self._compiled is not None:
            return self._compiled.joint_product(params, meta, batch, along)
        direction = [t.unsqueeze(0) for t in along]
        pushed = autodiff.push_forward(lambda params: self.joint_gradient(params, meta, batch), [params], [direction])
        return [tangent[0] for tangent in pushed.tangents]

    def stationarity(self, state: Descent, meta: Tree, batch: Any) -> list[Tensor]:
        """What vanishes where the inner loop comes to rest, the gradient of what it descends on: ±∇_θ inner_loss (minus
        for `maximize=True`, so that the Hessian is positive at a maximum), plus λθ for coupled weight decay λ.
        """
        found = self.gradient(state.params, meta, batch)
        if self.optimizer.sign < 0:
            found = [-g for g in found]
        tensors = trees.split(state.params).differentiable
        decay = self.optimizer.coupled_decay(tensors, meta, state.params)
        if decay is None:
            return found
        return [g + d * p for g, d, p in zip(found, decay, tensors, strict=True)]

    def step(self, state: Descent, meta: Tree, batch: Any) -> Descent:
        """One step of the optimiser."""
        return self.apply(state, self.gradient(state.params, meta, batch), meta)

    def apply(self, state: Descent, gradient: Sequence[Tensor], meta: Tree) -> Descent:
        """The optimiser's update with a given gradient."""
        parts = trees.split(state.params)
        tensors, memory = self.optimizer.update(
            parts.differentiable, gradient, state.optimizer, state.steps, meta, state.params
        )
        return Descent(parts.rebuild(tensors), memory, state.steps + 1)

    def outer_loss(self, state: Descent, meta: Tree, batch: Any) -> Tensor:
        """The user's outer loss at the state's parameters."""
        with left_as_they_were(state.params, meta):
            return self._outer_loss(state.params, meta, batch)


def require_scalar(value: Any, name: str) -> Tensor:
    """The value, if it is a real tensor without dimensions; else an error that says what it is."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} returned {value!r} ({type(value).__name__}); return the loss as a tensor without dimensions, not "
            "taken out of PyTorch by .item() or float()"
        )
    if value.ndim:
        raise ValueError(
            f"{name} returned a tensor of shape {tuple(value.shape)}; a scalar is needed: write .mean() or .sum()"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} returned a {value.dtype} scalar; a real floating-point loss is needed")
    return value
