"""What a bilevel problem is: an inner loop that ends in a state, and an outer loss that judges the state.

    h(φ) = outer_loss(θ_T(φ), φ),   θ_0 = init(φ),   θ_t = step(θ_{t−1}, φ, batch_t)

φ are the meta parameters, θ the inner state. Everything is a pure function over trees of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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
from bilevel.models.module_view import ModuleView, views_in
from bilevel.models.sharing import presented
from bilevel.optim.optimizer_state import OptimizerState
from bilevel.optim.update_rule import Optimizer, described
from bilevel.trees import Tree


@runtime_checkable
class Unrollable(Protocol):
    """A class of the user's own with the three functions of a `Problem` as methods. Estimators accept it as well."""

    def init(self, meta: Tree, /) -> Tree: ...

    def step(self, state: Tree, meta: Tree, batch: Any, /) -> Tree: ...

    def outer_loss(self, state: Tree, meta: Tree, batch: Any, /) -> Tensor: ...


class BilevelProblem:
    """Base class of `Problem`, `GradientDescent` and `BlackBox`: it answers what other code asks about a problem.

    The answers of this class are those of a problem that has inner steps and nothing else. A subclass states what is
    different about it. No other code tests of which class a problem is, so a new kind of problem is one class.
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
    def is_examined(self) -> bool:
        """Whether nothing is left for `examine` to find out."""
        return True

    def examine(self, meta: Tree) -> Callable[[Any], None] | None:  # noqa: ARG002
        """Find out, once for a problem, what an inner step changes besides parameters; see `GradientDescent`."""
        return None

    def presented(self, state: Tree) -> Tree:
        """Return a state as users see it."""
        return state

    def require_inner_loss(self, who: str, because: str, instead: str) -> GradientDescent:
        """Return the problem as `GradientDescent`, for a method that differentiates the inner loss.

        Args:
            who: the method, the subject of the error's sentence.
            because: a relative clause that says what the method needs the inner loss for.
            instead: what to take if there is no inner loss.

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
            TypeError, ValueError: it cannot be used; the message says what to pass.
        """
        return require_batches(inner_batches)

    def steps_of(self, inner_batches: Batches) -> int:
        """T, the number of inner steps that these batches stand for."""
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
        """The same problem, with the same backend, for which nothing has been compiled so far."""
        return self

    def check_compiled_again(self) -> None:
        """Compare compiled functions once more with the functions that they stand for, each at its next call."""


@dataclass(frozen=True)
class Problem(BilevelProblem):
    """A bilevel problem in its general form, given by three pure functions.

    Args:
        init: `init(meta) -> state`, the inner state θ_0; it may depend on meta, and may draw random numbers.
        step: `step(state, meta, batch) -> state`, one inner step Ω_t. The new state has the structure, shapes and
            dtypes of the old one.
        outer_loss: `outer_loss(state, meta, batch) -> scalar`, or a vector `[m]` of m outer losses (see `Estimate`).

    Random numbers drawn with torch's global generator (dropout, random initialisation) are reproducible: they are a
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
    """A bilevel problem whose inner loop is a program without derivatives. Only `ZerothOrder` takes it.

    Args:
        solve: `solve(meta) -> state`: a simulator, a subprocess, another library. It raises
            `SolverError` where it fails.
        outer_loss: `outer_loss(state, meta, batch) -> scalar`, or a vector `[m]` of m outer losses (see `Estimate`).
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
    is_black_box: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.a_function(self.solve, "solve", "solve(meta)")
        checks.a_function(self.outer_loss, "outer_loss", "outer_loss(state, meta, batch)")
        if self.solve_all is not None:
            checks.a_function(self.solve_all, "solve_all", "solve_all(metas)")

    def init(self, meta: Tree) -> Tree:
        """Run the whole inner loop, `solve(meta)`: no step follows."""
        return self.solve(meta)

    def step(self, state: Tree, meta: Tree, batch: Any) -> Tree:  # noqa: ARG002
        """Raise, because there are no steps."""
        raise TypeError("a BlackBox has no inner steps: its solve(meta) is the whole inner loop")

    def batches_of(self, inner_batches: Any) -> Batches:
        """Return one empty batch; `inner_batches` must be `None`."""
        if inner_batches is not None:
            raise ValueError("a BlackBox takes no inner_batches: its solve(meta) is the whole inner loop; pass None")
        return no_batches(1)

    def steps_of(self, inner_batches: Batches) -> int:  # noqa: ARG002
        """Return 0."""
        return 0


class Descent(NamedTuple):
    """The inner state of `GradientDescent`.

    The structure of `optimizer` may change from step to step: parameters that a loss does not reach are left alone,
    with a count of updates of their own.
    """

    params: Tree
    """The parameters."""
    optimizer: OptimizerState
    """What the optimiser remembers."""
    steps: int
    """The number of steps taken."""
    buffers: Mapping[str, Tensor] | tuple[()] = ()
    """Tensors that the modules in `params` update while the inner loss is computed, such as running statistics, by the
    names that `state_dict` gives them (behind the module's place in `params`, if that is a tree)."""


class Evaluated(NamedTuple):
    """One evaluation of the inner loss."""

    gradient: list[Tensor | None]
    """`None` where the loss does not reach a leaf."""
    buffers: Tree
    """What the modules' buffers are afterwards."""


class GradientDescent(BilevelProblem):
    """A bilevel problem whose inner loop is a `torch.optim` optimiser on an inner loss.

    Args:
        inner_loss: `inner_loss(params, meta, batch) -> scalar`, descended on.
        outer_loss: `outer_loss(params, meta, batch) -> scalar`, evaluated at the final parameters; or a vector `[m]` of
            m outer losses (see `Estimate`).
        params: an `nn.Module`, or a tree of tensors, or a function `params(meta)` that makes either: afresh for every
            solve, from torch's (reproducibly seeded) generator, or from the meta parameters. With a module, both
            losses receive it as a `ModuleView`, called as the module itself: `model(x)`, `model(input_ids=ids)`.
            Parameters with `requires_grad=False` are constants; so are plain tensors in a tree that also holds an
            `nn.Parameter` which requires gradients. Otherwise plain tensors are trained. A tensor in several places
            is one parameter. What a module updates in its forward pass (BatchNorm's running statistics, an average of
            its own) is part of the inner state, with its derivative. Hooks from `register_hook` change the
            parameter's gradient as in a backward pass. The module itself is never changed.
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
    >>> bilevel.Reverse()(problem, torch.ones(2), 2).grad  # θ_2 = (1 − 0.5²) φ
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
        self._builds_params = makes_params
        self._make_params: Callable[[Any], Any] = params if makes_params else lambda meta: params  # type: ignore[assignment]
        self._discovered = Discovered()
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
        """The same problem with its inner gradient compiled, and nothing compiled yet."""
        twin = copy.copy(self.eager)
        twin._compile_by(backend_named(backend))
        return twin

    def not_yet_compiled(self) -> GradientDescent:
        """The same problem, with the same backend, for which nothing has been compiled so far."""
        return self if self.backend is None else self.compiled(self.backend)

    def check_compiled_again(self) -> None:
        """Compare compiled functions once more with the functions that they stand for, each at its next call."""
        if self._compiled is not None:
            self._compiled.check_again()

    def init(self, meta: Tree) -> Descent:
        """θ_0 and the optimiser's state before its first step."""
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
        """θ_0 and the other tensors of modules that are part of the state."""
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
        """Find out, once for a problem, which tensors of modules an inner step updates or `params(meta)` computes.

        They are part of the inner state from then on. Where modules have buffers besides running statistics, frozen
        parameters, or backward hooks, a step has to be looked at: returns a function that does so, given a batch, at
        the cost of one inner loss. Otherwise returns `None`.
        """
        everything = Memory(everything=True)
        if self._builds_params:
            _, found = self._initial(autodiff.start_graph(meta), everything)
            self._discovered.add(name for name, tensor in found.items() if tensor.requires_grad)
        params, buffers = self._initial(meta, everything)
        parts = trees.split(params)
        if not parts.differentiable:
            return None  # refused by `init`
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

        An entry is `None` where the loss does not reach the leaf, as `.grad` is after `zero_grad()` and `backward()`.
        """
        return self.evaluate(params, meta, batch, buffers).gradient

    def evaluate(self, params: Tree, meta: Tree, batch: Any, buffers: Tree = ()) -> Evaluated:
        """Compute ∇_θ inner_loss as in `gradient`, and the buffers of the modules after the loss."""
        if self._compiled is not None:
            return Evaluated(self._compiled.gradient(params, meta, batch), buffers)
        parts, after = trees.split(params), [buffers]
        recorded = autodiff.has_graph([params, meta, buffers])

        def loss(tensors: Sequence[Tensor]) -> Tensor:
            value, updated = self._inner(parts.rebuild(tensors), meta, batch, buffers)
            after[0] = _outside(updated)
            return value

        with modules_in_use(params, meta), autodiff.named_missing_derivatives():
            found = autodiff.gradient(
                loss,
                parts.differentiable,
                differentiable=recorded,
                during=lambda tensors: standing_in(with_buffers(parts.rebuild(tensors), buffers)[0], meta),
                memory=autodiff.memory_of(self),
            )
        if found is None:
            raise NoDependenceError(
                "inner_loss does not depend on the parameters, so there is nothing to descend on; compute it from "
                "the params it is given (for a module: call the model passed to inner_loss, not one from outside), "
                "and keep .detach(), .item() and torch.no_grad() out of it"
            )
        if not (recorded or torch._C._are_functorch_transforms_active()):
            after[0] = trees.detach(after[0])
        return Evaluated(found, after[0])

    def evaluate_jointly(
        self, params: Tree, meta: Tree, batch: Any, buffers: Tree, weights: Sequence[Tensor]
    ) -> Evaluated:
        """Compute ∇_{θ,φ,b} L with L = inner_loss + Σ_i w_i · b'_i, where b' are the buffers after the loss.

        At w = 0 this is the gradient of the inner loss. L contains all of an inner step but the optimiser's update.
        Its second derivatives are symmetric, so they serve for the buffers as well as for the gradient:
        ∂²L/∂w∂(θ, φ, b) is the Jacobian of b'. An entry is `None` where L does not reach the leaf.

        Args:
            params: θ.
            meta: φ.
            batch: handed on to the inner loss.
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

        The value is that of `gradient`; there are tangents for those of its entries that are not `None`.
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
        """Compute the gradient of what the inner loop descends on, which vanishes where the loop comes to rest.

        It is ±∇_θ inner_loss (minus for `maximize=True`, so that the Hessian is positive at a maximum), plus λθ for
        coupled weight decay λ.

        An entry is `None` where the loss does not reach the leaf, which the optimiser then leaves alone. Clipping is
        left out: it has no effect where the gradient vanishes.
        """
        if parameter_hooks.are_registered(state.params):
            raise ValueError(
                "a parameter has hooks that change its gradient, so the inner loop does not come to rest where the "
                "gradient of inner_loss vanishes, which Implicit and HessianFree assume; take Reverse or "
                "ForwardGradient, or remove the hooks"
            )
        tensors = trees.split(state.params).differentiable
        decay = self.optimizer.coupled_decay(tensors, meta, state.params) or [0.0] * len(tensors)
        found = []
        gradient = self.gradient(state.params, meta, batch, state.buffers)
        for g, d, p in zip(gradient, decay, tensors, strict=True):
            signed = -g if g is not None and self.optimizer.sign < 0 else g
            found.append(signed if signed is None or (isinstance(d, float) and d == 0) else signed + d * p)
        return found

    def step(self, state: Descent, meta: Tree, batch: Any) -> Descent:
        """One step of the optimiser."""
        found = self.evaluate(state.params, meta, batch, state.buffers)
        return self.apply(state, found.gradient, meta, found.buffers)

    def apply(
        self, state: Descent, gradient: Sequence[Tensor | None], meta: Tree, buffers: Tree | None = None
    ) -> Descent:
        """Update the state with a given gradient, after the parameters' hooks, and with given buffers, if any.

        Leaves whose entry in the gradient is `None` are left alone.
        """
        parts = trees.split(state.params)
        gradient = parameter_hooks.applied(state.params, parts.differentiable, gradient)
        tensors, memory = self.optimizer.update(
            parts.differentiable, gradient, state.optimizer, state.steps, meta, state.params
        )
        after = state.buffers if buffers is None else buffers
        return Descent(parts.rebuild(tensors), memory, state.steps + 1, after)

    def outer_loss(self, state: Descent, meta: Tree, batch: Any) -> Tensor:
        """The user's outer loss at the state's parameters."""
        params, cells = with_buffers(state.params, state.buffers)
        with modules_in_use(params, meta), Writes(cells.values()) if cells else nullcontext():
            return self._outer_loss(params, presented(meta), batch)

    def presented(self, state: Descent) -> Descent:
        """A state as users see it: its parameters in the form in which they were passed, modules with their buffers."""
        return state._replace(params=with_buffers(state.params, state.buffers)[0])

    def _inner(self, params: Tree, meta: Tree, batch: Any, buffers: Tree) -> tuple[Tensor, Tree]:
        """The inner loss, and the modules' buffers after it."""
        there, cells = with_buffers(params, buffers)
        with Writes(cells.values()) if cells else nullcontext():
            value = self.inner_loss(there, presented(meta), batch)
        return require_scalar(value, "inner_loss"), values_of(cells) if cells else buffers


def _outside(buffers: Tree) -> Tree:
    """Tensors that were computed inside of `torch.func.grad` as they are outside of it."""
    if not torch._C._are_functorch_transforms_active():
        return buffers
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    level = functorch.maybe_current_level()
    return trees.map_leaves(lambda t: functorch._unwrap_for_grad(t, level), buffers)


def as_problem(value: Any) -> BilevelProblem:
    """Return the problem as one that answers questions about itself.

    An object of the user's own class with the methods `init`, `step` and `outer_loss` becomes a `Problem`.

    Raises:
        TypeError: the value describes no problem.
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


def require_scalar(value: Any, name: str) -> Tensor:
    """Return the value if it is a real tensor without dimensions; else raise an error that says what it is."""
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
