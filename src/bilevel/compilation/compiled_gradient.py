"""The inner gradient and its derivatives as compiled code, compiled once for each set of shapes.

The cost of a step of `GradientDescent` is mostly that of the gradient of the inner loss and of the gradient's
derivatives. The optimiser's update takes only a few operations per entry, and would be compiled again at every step
because of its step numbers. Therefore three functions of tensors are compiled, at their first call:

    gradient        (θ, φ, batch) ↦ ∇_θ g
    pulled back     (θ, φ, batch), then w ↦ wᵀ ∂(∇_θ g)/∂(θ, φ): two halves, between which only the tensors that the
                    second half needs are kept (as few as possible, by a minimal cut)
    pushed          (θ, φ, batch, k tangents) ↦ ∇_θ g and its derivative along each

Each function is traced together with its differentiation, by the same code that computes it without compiling. The
effects of `torch.no_grad()` and custom functions on autograd are therefore part of the trace, and nothing is
differentiated afterwards.

A trace contains the operations and not the Python code that led to them. Everything else that a loss reads is therefore
fixed when it is compiled: numbers, flags, and the direction taken at a branch. A branch on a tensor's value is refused.
To detect other changes, the first call of each function in each estimate is compared with the gradient computed without
compiling. A loss that has changed since it was compiled is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.compilation.loss_call import LossCall
from bilevel.compilation.tracing import halves, trace
from bilevel.errors import CompileError, MissingDerivativeError
from bilevel.trees import Tree

Gradient = Callable[[Tree, Tree, Any], "list[Tensor | None]"]
JointGradient = Callable[[Tree, Tree, Any], "list[Tensor]"]
Tensors = Sequence[Tensor]

MOST_CASES = 16
"""The largest number of sets of shapes (and numbers) for which one function is compiled."""


_HAS_CHANGED = (
    "the loss reads something besides its arguments that has changed since it was compiled (a number, a flag, a tensor "
    "that was replaced). Pass what changes in meta or in the batch, as tensors; or leave compile=False"
)


class _Clock:
    seconds = 0.0


def compile_seconds() -> float:
    """Return the wall time in seconds that this process has spent on compiling so far."""
    return _Clock.seconds


@contextmanager
def _timed() -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        _Clock.seconds += time.perf_counter() - began


def backend_named(compile: bool | str) -> str | None:
    """Return the name of the backend of `torch.compile` for a value of `compile=`; `None` for no compiling.

    Raises:
        ValueError: there is no such backend. The message lists the names.
    """
    if compile is False:
        return None
    name = "inductor" if compile is True else compile
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=None)
    if name not in known:
        raise ValueError(
            f"compile={compile!r}: write True or False, or a backend of torch.compile: {', '.join(sorted(known))}"
        )
    return name


@dataclass
class _Case:
    """One function compiled for one set of shapes."""

    run: Callable[[Tensors], Sequence[Tensor]]
    """The compiled function from all inputs to all outputs, of which the gradient is the first."""
    reached: list[bool] | None = None
    """Whether the loss reaches each leaf of θ. The compiled function returns zeros for the other leaves. `None` for a
    product, which has every leaf."""
    back: Callable[[Tensors], Sequence[Tensor]] | None = None
    """The second half of a function in two halves, from the kept tensors and the cotangents to the products."""
    connected: list[bool] = field(default_factory=list)
    """Whether the gradient depends on each of θ and φ, for a function in two halves."""
    checked: int = -1
    """The number of the estimate in which it was last compared with the gradient computed without compiling."""
    largest: float = 0.0
    """The largest norm of a gradient in the comparisons so far."""

    def where_reached(self, found: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradient with `None` for leaves that the loss does not reach."""
        assert self.reached is not None
        return [g if there else None for g, there in zip(found, self.reached, strict=True)]


class CompiledGradient:
    """The compiled gradient and its derivatives, which `GradientDescent(..., compile=...)` uses."""

    def __init__(self, gradient: Gradient, backend: str) -> None:
        self._gradient, self.backend = gradient, backend
        self._cases: dict[str, dict[Hashable, _Case]] = {}
        self._estimate = 0

    def check_again(self) -> None:
        """Compare every function with the gradient computed without compiling again, at its next call."""
        self._estimate += 1

    def gradient(self, params: Tree, meta: Tree, batch: Any) -> list[Tensor | None]:
        """Compute ∇_θ g, with a graph if θ or φ has one. The result has `None` for leaves that g does not reach."""
        _require_no_transform()
        call = LossCall(params, meta, batch)
        if autodiff.has_graph([params, meta]):
            case = self._case("pulled back", call, lambda: self._pulled_back(call))
            self._check(case, call, case.run)
            return case.where_reached(_Differentiable.apply(case, call.count, call.rest, *call.theta, *call.phi))
        reached: list[bool] = []

        def gradient(primals: Tensors, _: Tensors) -> list[Tensor]:
            with call.with_inputs(primals) as (params, meta, batch):
                return [g.detach() for g in self._filled(params, meta, batch, reached)]

        case = self._case("gradient", call, lambda: _Case(self._compiled(gradient, call.inputs, []), reached))
        self._check(case, call, case.run)
        return case.where_reached(_run(case.run, call.inputs))

    def push(
        self, params: Tree, meta: Tree, batch: Any, along: Sequence[Tensor], along_meta: Sequence[Tensor]
    ) -> autodiff.Pushed:
        """Compute ∇_θ g and its derivatives along k tangents `[k, *leaf.shape]` of the leaves of θ and of φ.

        The value is that of `gradient`. There is a tangent for each of its entries that is not `None`.
        """
        call = LossCall(params, meta, batch)
        tangents = [t.contiguous() for t in (*along, *along_meta)]
        reached: list[bool] = []

        def pushed(primals: Tensors, tangents: Tensors) -> list[Tensor]:
            with call.with_inputs(primals) as (params, meta, batch):
                found = autodiff.push_forward(
                    lambda params, meta: self._filled(params, meta, batch, reached),
                    [params, meta],
                    [tangents[: call.count], tangents[call.count :]],
                )
            return [*found.value, *found.tangents]

        kind = f"pushed along {len(tangents[0])}"
        case = self._case(kind, call, lambda: _Case(self._compiled(pushed, call.inputs, tangents), reached))
        self._check(case, call, lambda inputs: case.run([*inputs, *tangents]))
        found = _run(case.run, [*call.inputs, *tangents])
        value, moved = (case.where_reached(part) for part in (found[: call.count], found[call.count :]))
        return autodiff.Pushed(value, [tangent for tangent in moved if tangent is not None])

    def _pulled_back(self, call: LossCall) -> _Case:
        connected: list[bool] = []
        reached: list[bool] = []

        def joint(primals: Tensors, cotangents: Tensors) -> list[Tensor]:
            with call.with_inputs(primals) as (params, meta, batch):
                value, products = autodiff.pull_back(
                    lambda params, meta: self._filled(params, meta, batch, reached), [params, meta], cotangents
                )
            found = [part for group in products for part in group]
            connected[:] = [part is not None for part in found]
            return [*value, *(part for part in found if part is not None)]

        traced = self._traced(joint, call.inputs, call.theta)
        if not any(connected):
            return _Case(self._built(traced, [*call.inputs, *call.theta]), reached, None, connected)
        first, second = halves(traced, call.count)
        run = self._built(first, call.inputs)
        kept = _run(run, call.inputs)[call.count :]
        back = self._built(second, [*kept, *(t.contiguous() for t in call.theta)])
        return _Case(run, reached, back, connected)

    def _filled(self, params: Tree, meta: Tree, batch: Any, reached: list[bool]) -> list[Tensor]:
        """Return the uncompiled gradient with zeros for `None`. Store in `reached` which entries are not `None`."""
        found = self._gradient(params, meta, batch)
        reached[:] = [g is not None for g in found]
        return autodiff.fill_zeros(found, params)

    def _compiled(
        self, function: Callable[[Tensors, Tensors], list[Tensor]], primals: Tensors, tangents: Tensors
    ) -> Callable[[Tensors], Sequence[Tensor]]:
        return self._built(self._traced(function, primals, tangents), [*primals, *tangents])

    def _traced(
        self, function: Callable[[Tensors, Tensors], list[Tensor]], primals: Tensors, tangents: Tensors
    ) -> torch.fx.GraphModule:
        try:
            return trace(function, primals, tangents)
        except (CompileError, MissingDerivativeError):
            raise
        except Exception as error:  # tracing raises errors of many kinds
            raise CompileError(
                f"inner_loss can't be compiled: {type(error).__name__}: {_first_line(error)}. A compiled loss is a "
                "fixed sequence of operations: write torch.where for a branch on a tensor's value, no .item() or "
                "float(), and no shapes that depend on values (x[x > 0]); or leave compile=False"
            ) from error

    def _built(self, graph: torch.fx.GraphModule, inputs: Tensors) -> Callable[[Tensors], Sequence[Tensor]]:
        """Compile the graph by the backend, and run it once."""
        from torch._dynamo import lookup_backend
        from torch._inductor import config

        inputs = [t.detach() for t in inputs]
        try:
            # Random numbers are drawn in the same way as without compiling, so that they are equal. CUDA graphs would
            # write the results of each call over those of the call before, and an inner loop keeps them.
            with torch.no_grad(), config.patch({"fallback_random": True, "triton.cudagraphs": False}):
                made: Any = lookup_backend(self.backend)(graph, inputs)
                made(*inputs)
        except Exception as error:
            raise CompileError(
                f"the backend {self.backend!r} of torch.compile failed on inner_loss: {type(error).__name__}: "
                f"{_first_line(error)}. On a CPU, inductor needs a C++ compiler (g++ or clang++ on PATH, or the "
                "variable CXX), on a GPU Triton; compile='aot_eager' needs neither and is not faster; or leave "
                "compile=False"
            ) from error
        return lambda inputs: made(*inputs)

    def _case(self, kind: str, call: LossCall, make: Callable[[], _Case]) -> _Case:
        cases = self._cases.setdefault(kind, {})
        key = call.key
        if key not in cases:
            if len(cases) == MOST_CASES:
                raise CompileError(
                    f"inner_loss has been compiled for {MOST_CASES} different sets of shapes, dtypes and numbers, the "
                    "most allowed, and this call needs another; let batches have few shapes (drop the last one, pad), "
                    "and pass numbers that change as tensors; or leave compile=False"
                )
            with randomness.replayed(randomness.generator_states()):
                self._reference(call)  # an error that also occurs without compiling is raised here
                with _timed():
                    cases[key] = make()
        return cases[key]

    def _reference(self, call: LossCall) -> tuple[list[Tensor], list[bool]]:
        """Return the gradient computed without compiling, and whether the loss reaches each leaf."""
        reached: list[bool] = []
        with call.with_inputs(call.inputs) as (params, meta, batch):
            return self._filled(params, meta, batch, reached), reached

    @torch.no_grad()
    def _check(self, case: _Case, call: LossCall, run: Callable[[Tensors], Sequence[Tensor]]) -> None:
        """Compare a function with the gradient computed without compiling, once in each estimate.

        The rounding errors differ. The tolerance is the fourth root of the machine epsilon, 1e-4 in float64 and 2e-2 in
        float32. It is large enough for cancellation in the gradient, and too small for a different loss.

        Raises:
            CompileError: the gradients differ.
        """
        if case.checked == self._estimate:
            return
        states = randomness.generator_states()
        with randomness.replayed(states):
            expected, reached = self._reference(call)
        with randomness.replayed(states):
            found = _run(run, call.inputs)[: call.count]
        if case.reached is not None and case.reached != reached:
            raise CompileError(
                f"the compiled gradient reaches {sum(case.reached)} of the {len(reached)} parameters, and inner_loss "
                f"now reaches {sum(reached)}{' others' * (sum(case.reached) == sum(reached))}: {_HAS_CHANGED}"
            )
        own = float(trees.squared_norm(expected).sqrt())
        apart = float(trees.squared_norm([a - b for a, b in zip(found, expected, strict=True)]).sqrt())
        root = max(torch.finfo(t.dtype).eps for t in call.theta) ** 0.25
        if own < float("inf"):  # an infinite gradient is diagnosed later
            case.largest = max(case.largest, own)
            if not apart <= root * max(own, root * case.largest):
                raise CompileError(
                    f"the compiled gradient differs from that of inner_loss by {apart:.3g}, at a norm of {own:.3g}: "
                    f"{_HAS_CHANGED}"
                )
        case.checked = self._estimate


class _Differentiable(torch.autograd.Function):
    """Compute ∇_θ g(θ, φ), and its backward pass, by two compiled halves."""

    @staticmethod
    def forward(ctx: Any, case: _Case, count: int, rest: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.case = case
        found = case.run([t.detach() for t in (*tensors, *rest)])
        ctx.save_for_backward(*found[count:])
        return tuple(found[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise MissingDerivativeError(
                "a compiled inner gradient can be differentiated only once, and a second derivative is needed; "
                "take compile=False"
            )
        case: _Case = ctx.case
        inputs = [*ctx.saved_tensors, *(w.contiguous() for w in cotangents)]
        found = iter(() if case.back is None else case.back(inputs))
        return None, None, None, *(next(found) if connected else None for connected in case.connected)


@torch.no_grad()
def _run(function: Callable[[Tensors], Sequence[Tensor]], inputs: Tensors) -> list[Tensor]:
    return list(function(inputs))


def _require_no_transform() -> None:
    if torch._C._are_functorch_transforms_active():
        raise CompileError(
            "a compiled inner gradient can't be differentiated by torch.func or carried by torch.vmap from outside; "
            "take the problem without: problem.eager, or compile=False"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
