"""Bilevel problems: an inner loop that computes a state, and an outer loss of the state.

    h(φ) = outer_loss(θ_T(φ), φ),   θ_0 = init(φ),   θ_t = step(θ_{t−1}, φ, batch_t)

φ are the meta parameters, θ the inner state. Everything is a pure function over trees of tensors.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bilevel import autodiff, checks, trees
from bilevel.batches import Batches, no_batches, require_batches
from bilevel.compilation.compiled_gradient import CompiledGradient, backend_named
from bilevel.errors import CompileError, NoDependenceError
from bilevel.models import parameter_hooks
from bilevel.models.buffers import Writes, values_of
from bilevel.models.built_from_meta import Origins, convertible
from bilevel.models.conversion import Memory, as_params, modules_in_use, standing_in, with_buffers
from bilevel.models.discovery import Discovered, updated_tensors
from bilevel.models.module_view import ModuleView, modules_in, views_in
from bilevel.models.sharing import presented
from bilevel.optim.optimizer_state import OptimizerState
from bilevel.optim.update_rule import Optimizer, described
from bilevel.optim.update_rule import optimizer as make_optimizer
from bilevel.trees import Tree


@runtime_checkable
class Unrollable(Protocol):
    """The interface of a user's own class with the three functions of a `Problem` as methods.

    Estimators accept an object of such a class in place of a problem.
    """

    def init(self, meta: Tree, /) -> Tree: ...

    def step(self, state: Tree, meta: Tree, batch: Any, /) -> Tree: ...

    def outer_loss(self, state: Tree, meta: Tree, batch: Any, /) -> Tensor: ...


class BilevelProblem:
    """Base class of `Problem`, `GradientDescent` and `BlackBox`, with the properties of a problem that other code uses.

    The properties of this class are those of a problem that has only inner steps. A subclass overrides what is
    different. No other code tests the class of a problem, so a new kind of problem needs only a new class.
    """

    init: Callable[[Tree], Tree]
    """`init(meta)` returns the inner state before the first step."""
    step: Callable[[Tree, Tree, Any], Tree]
    """`step(state, meta, batch)` returns the inner state after one more step."""
    outer_loss: Callable[[Tree, Tree, Any], Tensor]
    """`outer_loss(state, meta, batch)` returns the outer loss at a state."""

    solve_all: Callable[[Sequence[Tree]], Sequence[Tree]] | None = None
    """A function that runs the inner loop at several meta parameters at once, if there is one."""
    is_black_box: ClassVar[bool] = False
    """Whether the inner loop is a single call without steps, batches or derivatives."""

    @property
    def as_gradient_descent(self) -> GradientDescent | None:
        """The problem itself if its steps are those of an optimiser on an inner loss, otherwise `None`."""
        return None

    @property
    def presents_meta(self) -> bool:
        """Whether the problem itself hands meta to the user's functions in the form in which they passed it, and
        computes these functions with rules for operations that lack derivatives.
        """
        return False

    @property
    def of_one(self) -> BilevelProblem:
        """The problem of one task, for `Tasks`; else the problem itself."""
        return self

    @property
    def is_examined(self) -> bool:
        """Whether nothing is left for `examine` to find out."""
        return True

    def examine(self, meta: Tree) -> Callable[[Any], None] | None:  # noqa: ARG002
        """Find out, once for a problem, what an inner step changes besides parameters; see `GradientDescent`."""
        return None

    @property
    def modules(self) -> list[nn.Module] | None:
        """The modules of an inner state, if they are known before an inner loop is run; else `None`."""
        return None

    def presented(self, state: Tree) -> Tree:
        """Return a state as users see it."""
        return state

    def require_inner_loss(self, who: str, because: str, instead: str) -> GradientDescent:
        """Return the problem as `GradientDescent`, for a method that differentiates the inner loss.

        Args:
            who: the name of the method, which is the subject of the error message.
            because: a relative clause that says why the method needs the inner loss.
            instead: the method to use if there is no inner loss.

        Raises:
            TypeError: the problem has no inner loss.
        """
        problem = self.as_gradient_descent
        if problem is None:
            raise TypeError(
                f"{who} needs the inner loss, {because}; a {type(self).__name__} has only steps. Describe the problem "
                f"with bilevel.GradientDescent, or take {instead}"
            )
        return problem

    def batches_of(self, inner_batches: Any) -> Batches:
        """Check what a user passed as `inner_batches`, and return one batch for each inner step.

        Raises:
            TypeError, ValueError: the batches cannot be used. The message says what to pass.
        """
        return require_batches(inner_batches)

    def steps_of(self, inner_batches: Batches) -> int:
        """Return T, the number of inner steps for these batches."""
        return len(inner_batches)

    # -- compiled code -----------------------------------------------------------------------------------------

    @property
    def backend(self) -> str | None:
        """The backend of `torch.compile` that compiles the inner gradient; `None` if it is not compiled."""
        return None

    @property
    def eager(self) -> BilevelProblem:
        """The same problem without compiled code."""
        return self

    def not_yet_compiled(self) -> BilevelProblem:
        """Return the same problem, with the same backend, for which nothing has been compiled so far."""
        return self

    def check_compiled_again(self) -> None:
        """Compare compiled functions once more with the functions that they stand for, each at its next call."""


@dataclass(frozen=True)
class Problem(BilevelProblem):
    """A bilevel problem in its general form, given by three pure functions.

    Args:
        init: `init(meta) -> state` returns the inner state θ_0. It may depend on meta and may draw random numbers.
        step: `step(state, meta, batch) -> state` computes one inner step Ω_t. The new state must have the structure,
            shapes and dtypes of the old state.
        outer_loss: `outer_loss(state, meta, batch) -> scalar` returns the outer loss at a state, or a vector `[m]` of m
            outer losses (see `Estimate`).

    Random numbers drawn with torch's global generator (dropout, random initialisation) are reproducible. They are a
    function of the estimator's seed and the number of the step.

    >>> import torch, bilevel
    >>> shrink = Problem(
    ...     init=lambda meta: torch.tensor(8.0),
    ...     step=lambda state, meta, batch: state * meta,
    ...     outer_loss=lambda state, meta, batch: state**2,
    ... )
    >>> bilevel.Reverse()(shrink, torch.tensor(0.5), 3).grad  # h = 64 φ⁶
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
class BlackBox(BilevelProblem):
    """A bilevel problem whose inner loop is a program without derivatives. Only `ZerothOrder` accepts it.

    Args:
        solve: `solve(meta) -> state` runs the inner loop: a simulator, a subprocess, or another library. It should
            raise `SolverError` if it fails.
        outer_loss: `outer_loss(state, meta, batch) -> scalar` returns the outer loss at a state, or a vector `[m]` of m
            outer losses (see `Estimate`).
        solve_all: `solve_all(metas) -> states` runs the inner loop for a list of points, in parallel for example (see
            `OutsideProgram`). An estimate then passes all its points at once, and holds all their states in memory.

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
    is_black_box: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.a_function(self.solve, "solve", "solve(meta)")
        checks.a_function(self.outer_loss, "outer_loss", "outer_loss(state, meta, batch)")
        if self.solve_all is not None:
            checks.a_function(self.solve_all, "solve_all", "solve_all(metas)")

    def init(self, meta: Tree) -> Tree:
        """Run the whole inner loop, `solve(meta)`. There are no steps after it."""
        return self.solve(meta)

    def step(self, state: Tree, meta: Tree, batch: Any) -> Tree:  # noqa: ARG002
        """Raise, because there are no steps."""
        raise TypeError("a BlackBox has no inner steps: its solve(meta) is the whole inner loop")

    def batches_of(self, inner_batches: Any) -> Batches:
        """Return one empty batch.

        Raises:
            ValueError: `inner_batches` is not `None`.
        """
        if inner_batches is not None:
            raise ValueError("a BlackBox takes no inner_batches: its solve(meta) is the whole inner loop; pass None")
        return no_batches(1)

    def steps_of(self, inner_batches: Batches) -> int:  # noqa: ARG002
        """Return 0."""
        return 0


class Descent(NamedTuple):
    """The inner state of `GradientDescent`.

    The structure of `optimizer` may change from step to step, because parameters that a loss does not reach are left
    unchanged and have their own count of updates.
    """

    params: Tree
    """The parameters."""
    optimizer: OptimizerState
    """The optimiser's memory."""
    steps: int
    """The number of steps taken."""
    buffers: Mapping[str, Tensor] | tuple[()] = ()
    """Tensors that the modules in `params` update while the inner loss is computed, such as running statistics. The
    keys are their names in `state_dict`, after the module's place in `params` if that is a tree."""


class Evaluated(NamedTuple):
    """One evaluation of the inner loss."""

    gradient: list[Tensor | None]
    """∇_θ inner_loss, with `None` for leaves that the loss does not reach."""
    buffers: Tree
    """The modules' buffers after the evaluation."""


class GradientDescent(BilevelProblem):
    """A bilevel problem whose inner loop is a `torch.optim` optimiser on an inner loss.

    Meta parameters may be a tensor, a tree of tensors, or an `nn.Module` (or a tree with modules in it).

    Args:
        inner_loss: `inner_loss(params, meta, batch) -> scalar` returns the loss that the inner loop minimises.
        outer_loss: `outer_loss(params, meta, batch) -> scalar` returns the outer loss at the final parameters, or a
            vector `[m]` of m outer losses (see `Estimate`).
        params: an `nn.Module`, or a tree of tensors, or a function `params(meta)` that returns either. The function is
            called for every solve. It may draw random numbers from torch's generator, which is seeded reproducibly, and
            may use the meta parameters. If `params` is a module, both losses receive it as a `ModuleView`, which is
            called like the module: `model(x)`, `model(input_ids=ids)`. Parameters with `requires_grad=False` are
            constants. Plain tensors are trained, except in a tree with an `nn.Parameter` that requires gradients, where
            they are constants. A tensor in several places is one parameter. Tensors that a module updates in its
            forward pass (BatchNorm's running statistics, or its own averages) are part of the inner state, with their
            derivatives. Hooks from `register_hook` change the parameter's gradient as in a backward pass. The module
            itself is never changed.
        optimizer: the inner optimiser, from `bilevel.optimizer`, or `functools.partial(torch.optim.SGD, lr=0.1)`.
            Settings may be functions of meta and of the step.
        compile: whether to compile the gradient of `inner_loss` and the gradient's derivatives. `True` selects the
            backend inductor of `torch.compile`, and a string selects the backend with that name. The code is compiled
            once for every set of shapes, which takes seconds to minutes (see `Estimate.compile_seconds`). The estimates
            are the same up to rounding. `inner_loss` must be a fixed sequence of operations, without branches on
            tensors' values. Values that it reads from elsewhere than its arguments must not change, which is checked
            at the first step of each estimate. The optimiser's update, the outer loss and `init` are not compiled.
            `benchmarks/results/compile.md` reports the gain in speed.

    Raises:
        TypeError, ValueError: an argument cannot be used. The message says what to pass.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, meta, batch: 0.5 * (theta - meta).square().sum(),
    ...     outer_loss=lambda theta, meta, batch: theta.sum(),
    ...     params=torch.zeros(2),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> bilevel.Reverse()(problem, torch.ones(2), 2).grad  # θ_2 = (1 − 0.5²) φ
    tensor([0.7500, 0.7500])
    """

    def __init__(
        self,
        inner_loss: Callable[[Any, Any, Any], Tensor],
        outer_loss: Callable[[Any, Any, Any], Tensor],
        params: nn.Module | Tree | Callable[[Any], nn.Module | Tree],
        optimizer: Optimizer | functools.partial[Any],
        compile: bool | str = False,
    ) -> None:
        checks.a_function(inner_loss, "inner_loss", "inner_loss(params, meta, batch)")
        checks.a_function(outer_loss, "outer_loss", "outer_loss(params, meta, batch)")
        if isinstance(optimizer, functools.partial):
            optimizer = make_optimizer(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is {described(optimizer)}; every solve binds it to new parameters, so name the class and "
                "its settings: optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1)"
            )
        optimizer.require_differentiable()
        self.inner_loss = inner_loss
        self.optimizer = optimizer
        self._outer_loss = outer_loss
        makes_params = callable(params) and not isinstance(params, nn.Module | ModuleView)
        self._builds_params = makes_params
        inside = [] if makes_params else [leaf for leaf in trees.leaves(params) if isinstance(leaf, nn.Module)]
        self._modules = None if makes_params else [*inside, *modules_in(params)]
        self._make_params: Callable[[Any], Any] = params if makes_params else lambda meta: params  # type: ignore[assignment]
        self._discovered = Discovered()
        self._see_gradient: Callable[[list[Tensor | None]], None] | None = None
        self._compile_by(backend_named(compile))

    def _compile_by(self, backend: str | None) -> None:
        self._compiled: CompiledGradient | None = None
        self._eager = self
        if backend is not None:
            self._eager = copy.copy(self)
            self._eager._eager = self._eager
            self._compiled = CompiledGradient(self._eager.gradient, backend)

    @property
    def as_gradient_descent(self) -> GradientDescent:
        """The problem itself."""
        return self

    @property
    def modules(self) -> list[nn.Module] | None:
        """The modules that are trained; `None` if `params` is a function, which makes them."""
        return self._modules

    @property
    def presents_meta(self) -> bool:
        """True."""
        return True

    @property
    def backend(self) -> str | None:
        """The backend of `torch.compile` that compiles the inner gradient; `None` if it is not compiled."""
        return None if self._compiled is None else self._compiled.backend

    @property
    def eager(self) -> GradientDescent:
        """The same problem without compiled code."""
        return self._eager

    def compiled(self, backend: str = "inductor") -> GradientDescent:
        """Return the same problem with a compiled inner gradient. It is compiled at its first call."""
        twin = copy.copy(self.eager)
        twin._compile_by(backend_named(backend))
        return twin

    def not_yet_compiled(self) -> GradientDescent:
        """Return the same problem, with the same backend, for which nothing has been compiled so far."""
        return self if self.backend is None else self.compiled(self.backend)

    def check_compiled_again(self) -> None:
        """Compare compiled functions once more with the functions that they stand for, each at its next call."""
        if self._compiled is not None:
            self._compiled.check_again()

    def init(self, meta: Tree) -> Descent:
        """Return θ_0 and the optimiser's state before its first step.

        Raises:
            ValueError: there is nothing to train.
            CompileError: the inner loss is to be compiled and updates buffers.
        """
        memory = Memory(self._discovered.names, of_normalizations=self._compiled is None)
        params, buffers = self._initial(meta, memory)
        tensors = trees.split(params).differentiable
        if not tensors:
            raise ValueError(
                f"params is {presented(params)!r}, without a floating-point tensor to train; pass an nn.Module some of "
                "whose parameters have requires_grad=True, or a tree of floating-point tensors (.float())"
            )
        self.optimizer.require_clippable(tensors)
        if buffers and self._compiled is not None:
            raise CompileError(
                f"the inner loss updates {next(iter(buffers))!r} (running statistics or another buffer), which a "
                "compiled gradient does not follow; take compile=False, or put that layer in eval mode"
            )
        return Descent(params, self.optimizer.init(tensors), 0, buffers or ())

    def _initial(self, meta: Tree, memory: Memory) -> tuple[Tree, dict[str, Tensor]]:
        """Return θ_0 and the other tensors of modules that are part of the state."""
        with convertible(), Origins() if self._builds_params else nullcontext() as origins:
            made = self._make_params(meta)
        of_meta = {p: view.named_tensors[name] for view in views_in(meta) for p, name in view._layout.names.items()}

        def initial(tensor: Tensor) -> Tensor:
            if tensor in of_meta:  # the same parameter in params and meta: the inner loop starts from meta
                return of_meta[tensor]  # pyright: ignore[reportArgumentType]
            return tensor.detach() if origins is None else origins.initial(tensor)

        return as_params(made, memory, initial)

    @property
    def is_examined(self) -> bool:
        """Whether `examine` has run for this problem."""
        return self._discovered.complete

    def examine(self, meta: Tree) -> Callable[[Any], None] | None:
        """Find out, once for each problem, which tensors of modules an inner step updates or `params(meta)` computes.

        These tensors are part of the inner state from then on. If modules have buffers other than running statistics,
        frozen parameters, or backward hooks, a step must be computed to find out.

        Returns:
            A function that finds out by computing one inner loss on the batch that it is given, or `None` if no step
            has to be computed.
        """
        everything = Memory(everything=True)
        if self._builds_params:
            _, found = self._initial(autodiff.start_graph(meta), everything)
            self._discovered.add(name for name, tensor in found.items() if tensor.requires_grad)
        params, buffers = self._initial(meta, everything)
        parts = trees.split(params)
        if not parts.differentiable:
            return None  # `init` raises the error
        _, known = self._initial(meta, Memory(self._discovered.names))
        watched = any(view._layout.watched for view in views_in(params))
        if not watched and not buffers.keys() - known.keys():
            self._discovered.complete = True
            return None

        def look(batch: Any) -> None:
            if watched:
                self.eager.gradient(params, meta, batch, buffers)
            there = parts.rebuild([t.detach().requires_grad_() for t in parts.differentiable])
            with modules_in_use(there, meta):
                self._discovered.add(
                    updated_tensors(there, buffers, lambda params: self.inner_loss(params, presented(meta), batch))
                )
            self._discovered.complete = True

        return look

    def gradient(self, params: Tree, meta: Tree, batch: Any, buffers: Tree = ()) -> list[Tensor | None]:
        """Compute ∇_θ inner_loss, one tensor for each differentiable leaf of `params`.

        An entry is `None` if the loss does not reach the leaf, as `.grad` is after `zero_grad()` and `backward()`.
        """
        return self.evaluate(params, meta, batch, buffers).gradient

    def evaluate(
        self, params: Tree, meta: Tree, batch: Any, buffers: Tree = (), parts: trees.Split | None = None
    ) -> Evaluated:
        """Compute ∇_θ inner_loss as in `gradient`, and the buffers of the modules after the loss.

        `parts` is `trees.split(params)`, if it is known already.
        """
        if self._compiled is not None:
            return Evaluated(self._compiled.gradient(params, meta, batch), buffers)
        parts, after = trees.split(params) if parts is None else parts, [buffers]
        recorded = any(t.requires_grad for t in parts.differentiable) or autodiff.has_graph([meta, buffers])
        built: list[Any] = [None, None]

        def rebuilt(tensors: Sequence[Tensor]) -> Tree:
            if built[0] is not tensors or type(built[1]) is not ModuleView:  # a loss may change a container
                built[:] = tensors, parts.rebuild(tensors)
            return built[1]

        def loss(tensors: Sequence[Tensor]) -> Tensor:
            value, updated = self._inner(rebuilt(tensors), meta, batch, buffers)
            after[0] = _outside(updated)
            return value

        with modules_in_use(params, meta), autodiff.named_missing_derivatives():
            found = autodiff.gradient(
                loss,
                parts.differentiable,
                differentiable=recorded,
                during=lambda tensors: standing_in(with_buffers(rebuilt(tensors), buffers)[0], meta),
                memory=autodiff.memory_of(self),
            )
        if found is None:
            raise nothing_to_descend_on()
        if not (recorded or torch._C._are_functorch_transforms_active()):
            after[0] = trees.detach(after[0])
        return Evaluated(found, after[0])

    def evaluate_jointly(
        self, params: Tree, meta: Tree, batch: Any, buffers: Tree, weights: Sequence[Tensor]
    ) -> Evaluated:
        """Compute ∇_{θ,φ,b} L with L = inner_loss + Σ_i w_i · b'_i, where b' are the buffers after the loss.

        At w = 0 this is the gradient of the inner loss. L contains all of an inner step except the optimiser's update.
        Its second derivatives are symmetric, so they contain the derivatives of the buffers as well as those of the
        gradient: ∂²L/∂w∂(θ, φ, b) is the Jacobian of b'. An entry is `None` if L does not reach the leaf.

        Args:
            params: θ.
            meta: φ.
            batch: the batch for the inner loss.
            buffers: b.
            weights: w, one tensor for each differentiable leaf of b.
        """
        parts = [trees.split(tree) for tree in (params, meta, buffers)]
        counts, after = [len(part.differentiable) for part in parts], [buffers]

        def loss(tensors: Sequence[Tensor]) -> Tensor:
            given = iter(tensors)
            there = [part.rebuild([next(given) for _ in range(n)]) for part, n in zip(parts, counts, strict=True)]
            value, updated = self._inner(there[0], there[1], batch, there[2])
            after[0] = _outside(updated)
            if weights:
                followed = trees.split(updated).differentiable
                value = value + torch.stack([(w * b).sum() for w, b in zip(weights, followed, strict=True)]).sum()
            return value

        tensors = [t for part in parts for t in part.differentiable]
        with modules_in_use(params, meta), autodiff.named_missing_derivatives():
            recorded = autodiff.has_graph([params, meta, buffers, list(weights)])
            found = autodiff.gradient(loss, tensors, differentiable=recorded, memory=autodiff.memory_of(self))
        return Evaluated([None] * len(tensors) if found is None else found, after[0])

    def inner_value(self, state: Descent, meta: Tree, batch: Any) -> Tensor:
        """Compute the inner loss at a state."""
        with modules_in_use(state.params, meta):
            return self._inner(state.params, meta, batch, state.buffers)[0]

    def push_gradient(
        self, params: Tree, meta: Tree, batch: Any, along: Sequence[Tensor], along_meta: Sequence[Tensor]
    ) -> autodiff.Pushed:
        """Compute ∇_θ inner_loss and its derivatives along k tangents `[k, *leaf.shape]` of the leaves of θ and of φ.

        The value is that of `gradient`. There is a tangent for each of its entries that is not `None`.
        """
        if self._compiled is not None:
            return self._compiled.push(params, meta, batch, along, along_meta)
        return autodiff.push_forward(
            lambda params, meta: self.gradient(params, meta, batch),
            [params, meta],
            [along, along_meta],
            autodiff.memory_of(self),
        )

    def stationarity(self, state: Descent, meta: Tree, batch: Any) -> list[Tensor | None]:
        """Compute the gradient of the function that the inner loop minimises, which is zero at a converged state.

        It is ±∇_θ inner_loss (minus for `maximize=True`, so that the Hessian is positive at a maximum), plus λθ for
        coupled weight decay λ.

        An entry is `None` if the loss does not reach the leaf, which the optimiser then leaves unchanged. Clipping is
        left out, because it has no effect where the gradient is zero.

        Raises:
            ValueError: a parameter has hooks that change its gradient.
        """
        self.require_no_hooks(state.params)
        tensors = trees.split(state.params).differentiable
        last = max(state.steps - 1, 0)
        decay = self.optimizer.coupled_decay(tensors, meta, state.params, last) or [0.0] * len(tensors)
        found = []
        gradient = self.gradient(state.params, meta, batch, state.buffers)
        for g, d, p in zip(gradient, decay, tensors, strict=True):
            signed = -g if g is not None and self.optimizer.sign < 0 else g
            found.append(signed if signed is None or (isinstance(d, float) and d == 0) else signed + d * p)
        return found

    def objective_by_meta(self, state: Descent, meta: Tree, batch: Any) -> list[Tensor | None]:
        """Compute ∂/∂φ of the function that the inner loop minimises, at fixed parameters.

        The objective is ±inner_loss (minus for `maximize=True`), plus λ‖θ‖²/2 for coupled weight decay λ;
        `stationarity` is its gradient with respect to θ. First derivatives are enough, so fused kernels and activation
        checkpointing work. An entry is `None` if the objective does not reach the leaf of φ.
        """
        self.require_no_hooks(state.params)
        parts, tensors = trees.split(meta), trees.split(state.params).differentiable
        last = max(state.steps - 1, 0)

        def objective(leaves: Sequence[Tensor]) -> Tensor:
            there = parts.rebuild(leaves)
            value = self.optimizer.sign * self._inner(state.params, there, batch, state.buffers)[0]
            decay = self.optimizer.coupled_decay(tensors, there, state.params, last) or []
            return sum((0.5 * (d * p.square()).sum() for d, p in zip(decay, tensors, strict=False)), value)

        def during(leaves: Sequence[Tensor]) -> Any:
            return standing_in(with_buffers(state.params, state.buffers)[0], parts.rebuild(leaves))

        with modules_in_use(state.params, meta):
            found = autodiff.gradient(objective, parts.differentiable, differentiable=False, during=during)
        return [None] * len(parts.differentiable) if found is None else found

    def require_no_hooks(self, params: Tree) -> None:
        """Raise if parameters have hooks that change their gradients: the loop then minimises no objective."""
        if parameter_hooks.are_registered(params):
            raise ValueError(
                "a parameter has hooks that change its gradient, so the inner loop does not come to rest where the "
                "gradient of inner_loss vanishes, which this method assumes; take Reverse or ForwardGradient, or "
                "remove the hooks"
            )

    def step(self, state: Descent, meta: Tree, batch: Any) -> Descent:
        """Compute one step of the optimiser."""
        parts = trees.split(state.params)
        found = self.evaluate(state.params, meta, batch, state.buffers, parts)
        if self._see_gradient is not None:
            self._see_gradient(found.gradient)
        return self.apply(state, found.gradient, meta, found.buffers, parts)

    @contextmanager
    def gradients_seen_by(self, function: Callable[[list[Tensor | None]], None]) -> Iterator[None]:
        """Context manager in which a function is given the inner gradient of each step."""
        before, self._see_gradient = self._see_gradient, function
        try:
            yield
        finally:
            self._see_gradient = before

    def apply(
        self,
        state: Descent,
        gradient: Sequence[Tensor | None],
        meta: Tree,
        buffers: Tree | None = None,
        parts: trees.Split | None = None,
    ) -> Descent:
        """Update the state with a given gradient, to which the parameters' hooks are applied first.

        Leaves whose entry in the gradient is `None` are left unchanged.

        Args:
            state: the state before the update.
            gradient: the gradient of each leaf, or `None`.
            meta: φ.
            buffers: the buffers of the new state; by default those of the old state.
            parts: `trees.split(state.params)`, if it is known already.
        """
        parts = trees.split(state.params) if parts is None else parts
        gradient = parameter_hooks.applied(state.params, parts.differentiable, gradient)
        tensors, memory = self.optimizer.update(
            parts.differentiable, gradient, state.optimizer, state.steps, meta, state.params
        )
        after = state.buffers if buffers is None else buffers
        return Descent(parts.rebuild(tensors), memory, state.steps + 1, after)

    def outer_loss(self, state: Descent, meta: Tree, batch: Any) -> Tensor:
        """Compute the user's outer loss at the state's parameters."""
        params, cells = with_buffers(state.params, state.buffers)
        with modules_in_use(params, meta), Writes(cells.values()) if cells else nullcontext():
            return self._outer_loss(params, presented(meta), batch)

    def presented(self, state: Descent) -> Descent:
        """Return a state as users see it, with parameters in the form in which they were passed.

        Modules have the buffers of the state.
        """
        return state._replace(params=with_buffers(state.params, state.buffers, outside=True)[0])

    def _inner(self, params: Tree, meta: Tree, batch: Any, buffers: Tree) -> tuple[Tensor, Tree]:
        """Compute the inner loss, and the modules' buffers after it."""
        there, cells = with_buffers(params, buffers)
        with Writes(cells.values()) if cells else nullcontext():
            value = self.inner_loss(there, presented(meta), batch)
            with torch._C.DisableTorchFunction():  # the rules for a user's operations do not concern this check
                require_scalar(value, "inner_loss")
        return value, values_of(cells) if cells else buffers


def _outside(buffers: Tree) -> Tree:
    """Convert tensors that were computed inside `torch.func.grad` for use outside of it."""
    if not torch._C._are_functorch_transforms_active():
        return buffers
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    level = functorch.maybe_current_level()
    return trees.map_leaves(lambda t: functorch._unwrap_for_grad(t, level), buffers)


def as_problem(value: Any) -> BilevelProblem:
    """Return a problem as a `BilevelProblem`.

    An object of the user's own class with the methods `init`, `step` and `outer_loss` is converted to a `Problem`.

    Raises:
        TypeError: the value is not a problem.
    """
    if isinstance(value, BilevelProblem):
        return value
    if isinstance(value, Unrollable) and not isinstance(value, type):
        return Problem(value.init, value.step, value.outer_loss)
    what = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
    raise TypeError(
        f"problem is {what}; an instance of bilevel.Problem, GradientDescent or BlackBox is needed: estimators are "
        "called as estimator(problem, meta, inner_batches, outer_batch)"
    )


def require_losses(value: Any, name: str) -> Tensor:
    """Return the value if it is one real loss or a vector `[m]` of them; else raise an error that says what it is."""
    if not isinstance(value, Tensor) or value.ndim != 1:
        return require_scalar(value, name)
    if not len(value):
        raise ValueError(
            f"{name} returned a vector without entries; return one loss, or a vector with one entry for each"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} returned a {value.dtype} vector; real floating-point losses are needed")
    return value


def nothing_to_descend_on() -> NoDependenceError:
    """Return the error for an inner loss that does not depend on the parameters."""
    return NoDependenceError(
        "inner_loss does not depend on the parameters, so there is nothing to descend on; compute it from "
        "the params it is given (for a module: call the model passed to inner_loss, not one from outside), "
        "and keep .detach(), .item() and torch.no_grad() out of it"
    )


def require_scalar(value: Any, name: str) -> Tensor:
    """Return the value, if it is a real floating-point tensor without dimensions.

    Raises:
        TypeError, ValueError: the value is something else. The message says what it is.
    """
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
