"""The shape that all estimators share: settings in the constructor, one call, one kind of result."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import autodiff, distributed, randomness, trees
from bilevel.batches import Batches
from bilevel.compilation.compiled_gradient import compile_seconds
from bilevel.estimators.differentiable_value import differentiable_value
from bilevel.estimators.reverse_pass import ReversePass
from bilevel.models.conversion import as_plain_tree, original_tensors
from bilevel.models.module_view import modules_in
from bilevel.models.numpy_forms import as_tensors, in_form_of
from bilevel.models.sharing import leaves_once
from bilevel.problem import BilevelProblem, GradientDescent, Unrollable, as_problem
from bilevel.report import tf32
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks, diagnosis, short_check, vectorised_steps
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.unroll import Unroll, follow_later_updates, unroll
from bilevel.vectorised_tasks import Tasks, joined


@dataclass(frozen=True)
class Estimate:
    """A hypergradient, and what is known about it.

    Attributes:
        value: the outer loss h(φ); `[m]` for a vector of outer losses. If meta parameters require gradients,
            `value.backward()` adds cotangent · `grad` to them, so that an estimate is one more term of a loss in any
            training loop. The meta parameters may be those of a module, or tensors that a network computes. Under
            `torch.no_grad()`, or where no meta parameter requires gradients, it is a tensor without a graph. A second
            `backward()` needs `retain_graph=True`, as in PyTorch. `create_graph=True` raises a
            `MissingDerivativeError`, because the derivative of `grad` is not computed. All other fields are detached.
            For a vector, call `backward()` on a scalar made from it.
        grad: an estimate of ∇h, with the structure of `meta`, and NumPy arrays and floats where `meta` has them. For an
            `nn.Module` it is a dict from parameter name to tensor. For a vector of outer losses its leaves are
            `[m, *leaf.shape]`.
        state: the final inner state θ_T. If the inner loop trains a module, `state.params.state_dict()` has its
            parameters and running statistics, in the form that the module's `load_state_dict` takes.
        standard_error: the estimated √E‖grad − ∇h‖² over the random directions; `None` for a deterministic method.
            For a vector of outer losses it is a tensor `[m]`, one error for each.
        diagnostics: what the method observed on the way, such as the residual of a linear solve. Where an operation has
            no forward-mode derivative, `hessian_product_steps` and `double_reverse_passes` count the inner steps and
            functions whose tangents took another route. The same names with `_units` say what they cost in inner
            gradients. `checked` is a text that says what the short check verified for this kind of problem, and when
            (see `bilevel.experimental.short_check`). On a GPU, `tf32` says whether products are computed
            in TF32.
        carried: the end of the inner loop. If it is passed to the next call as `carried=`, that call goes on from
            there.
        compile_seconds: wall time spent on compiling, of a `GradientDescent(..., compile=True)` whose shapes came up
            for the first time.

    An outer loss that returns a vector `[m]` stands for m outer losses of one inner loop, such as one for each query or
    validation example. The numbers are those of m separate estimates at the same seed, for one inner loop:

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
    ...     outer_loss=lambda theta, phi, targets: (theta - targets).square().sum(1),  # [3, 2] -> [3]
    ...     params=torch.zeros(2),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> estimate = bilevel.Reverse()(problem, torch.ones(2), 2, outer_batch=torch.zeros(3, 2))
    >>> estimate.value.shape, estimate.grad.shape
    (torch.Size([3]), torch.Size([3, 2]))

    An estimate as a term of a loss in a loop of one's own:

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
    ...     outer_loss=lambda theta, phi, batch: 0.5 * (theta - 3.0) ** 2,
    ...     params=torch.tensor(0.0),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> phi = torch.nn.Parameter(torch.tensor(0.0))
    >>> optimizer = torch.optim.SGD([phi], lr=0.5)
    >>> for number in range(50):
    ...     loss = bilevel.Reverse()(problem, phi, 10, seed=number).value + 0.001 * phi.square()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> round(phi.item(), 2)
    3.0
    """

    value: Tensor
    grad: Tree
    state: Tree
    standard_error: float | Tensor | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    carried: WindowEnd | None = None
    compile_seconds: float = 0.0

    def __repr__(self) -> str:
        value = f"{self.value.item():.6g}" if self.value.ndim == 0 else trees.summary(self.value)
        error = ""
        if isinstance(self.standard_error, Tensor):
            error = f", standard_error={trees.summary(self.standard_error)}"
        elif self.standard_error is not None:
            error = f", standard_error={self.standard_error:.3g}"
        return f"Estimate(value={value}, grad: {trees.summary(self.grad)}{error})"


@dataclass(frozen=True)
class Estimator(ABC):
    """A method that estimates ∇h(φ) for h(φ) = outer_loss(θ_T(φ), φ)."""

    needs_derivatives: ClassVar[bool] = True
    """Whether the inner loop is differentiated; if so, a `BlackBox` is refused."""
    is_biased: ClassVar[bool] = False
    """Whether an estimate differs from ∇h by more than rounding and the spread of random directions, by design."""
    is_random: ClassVar[bool]
    """Whether an estimate depends on random directions that the estimator draws itself. Every estimator states it.

    Random numbers of the problem (dropout, random initialisation) do not count. A random estimator also defines
    `redrawn`. It cannot be a control variate, and several workers share its directions instead of whole estimates.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "is_random"):
            raise TypeError(
                f"{cls.__name__} does not say whether it draws random directions: write is_random = True and define "
                "redrawn(number), or is_random = False"
            )

    def __call__(
        self,
        problem: BilevelProblem | Unrollable,
        meta: Any,
        inner_batches: Batches | int | None = None,
        outer_batch: Any = None,
        seed: int = 0,
        carried: WindowEnd | None = None,
    ) -> Estimate:
        """Estimate the hypergradient at `meta`.

        Args:
            problem: a `Problem`, `GradientDescent` or (for `ZerothOrder`) `BlackBox`.
            meta: φ: a tensor, a tree of tensors, or an `nn.Module`. It is not changed. NumPy arrays and Python floats
                are taken too. Losses receive tensors for them, and `grad` has arrays and floats in their places.
            inner_batches: T batches by random access, one for each inner step; or the whole number T for a problem
                without data; or batches of a dataset by `bilevel.epochs`; `None` for a black box.
            outer_batch: passed to the outer loss.
            seed: determines every random number: directions, dropout, random initialisation.
            carried: `estimate.carried` of the call before, for an inner loop that goes on from call to call (a stream),
                at the same seed. The estimate is then the derivative through these T steps, with the state from which
                they start as a constant. `StreamingForwardGradient` looks back further.

        Raises:
            NonFiniteError: the outer loss, an inner state or the hypergradient is NaN or infinite.
            NoDependenceError: the inner loop does not use the meta parameters, or the outer loss not the inner state.
            MissingDerivativeError: an operation lacks the derivative this method needs.
            CheckError: the short check found the loop, or a derivative of a step, to be wrong (see
                `bilevel.experimental.short_check`).
            TypeError, ValueError: an argument is not what it should be; the message says what to pass instead.
        """
        problem = as_problem(problem)
        self.require_derivatives_of(problem)
        arguments = (problem, meta, inner_batches, outer_batch, seed, carried)
        before = compile_seconds()
        while True:
            run = unroll(*arguments)
            try:
                checked = None if self.computes_steps_once else short_check.checked_once(run, meta)
                with randomness.preserved(), autodiff.noted_routes() as routes:
                    resolved = self.resolved(run)
                    if isinstance(problem, Tasks) and (parts := problem.parts()):
                        found = _of_parts(resolved, run, problem, parts)
                    else:
                        found = resolved._of(run)
                break
            except autodiff.OutsideUpdateError:
                with randomness.preserved():
                    if not follow_later_updates(run):
                        raise
                short_check.forget()  # with the newly found tensors in the state, the problem is another one
        gradients = leaves_once(found.grad, run.meta)
        return replace(
            found,
            value=differentiable_value(found.value, gradients, original_tensors(as_tensors(meta))),
            grad=in_form_of(meta, found.grad),
            compile_seconds=compile_seconds() - before,
            diagnostics={
                **found.diagnostics,
                **routes,
                **({} if checked is None else {"checked": checked}),
                **tf32.stated_for(trees.split(found.state).differentiable),
            },
        )

    def require_derivatives_of(self, problem: BilevelProblem) -> None:
        """Raise if this estimator differentiates the inner loop, and the problem is a black box."""
        if problem.is_black_box and self.needs_derivatives:
            raise TypeError(
                f"{type(self).__name__} differentiates the inner loop, and a BlackBox has no derivatives; take "
                "ZerothOrder(directions, step_size), or describe the steps with bilevel.Problem"
            )

    # -- what an estimator says about itself ---------------------------------------------------------------------

    def redrawn(self, number: int) -> Estimator:
        """Return the same estimator with other random directions: those of draw `number` = 0, 1, 2, …

        At the same seed, all draws see the same initialisation and the same dropout. Draw 0 is the estimator itself,
        and so is every draw of a deterministic estimator.
        """
        if self.is_random and number:
            raise NotImplementedError(f"{type(self).__name__} is random, so it must define redrawn(number)")
        return self

    @abstractmethod
    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:
        """Return about how many inner gradients one estimate costs on one worker.

        The planner ranks methods by this number, and the work of control variates is assigned to workers by it.

        Args:
            steps: T, the number of inner steps.
            meta_size: N, the number of meta parameters.
            losses: m, the number of entries of the outer loss; 1 for a scalar.
        """

    def reverse_pass(self, run: Unroll) -> ReversePass:  # noqa: ARG002
        """Run the inner loop, and return the way from its final state back to the meta parameters.

        `bilevel.solve` makes the final state differentiable with it. An estimator without such a way raises.

        Raises:
            TypeError: this estimator does not go back from the final state.
        """
        raise TypeError(
            f"{type(self).__name__} has no reverse pass, which makes the state of bilevel.solve differentiable: take "
            "Reverse(), TruncatedReverse(steps), Implicit() or HessianFree(). Any estimator gives the derivative of an "
            "outer loss: estimator(problem, meta, inner_batches, outer_batch).value.backward()"
        )

    def resolved(self, run: Unroll) -> Estimator:  # noqa: ARG002
        """Return the estimator that makes the estimate of this inner loop: itself, unless it chooses another one."""
        return self

    @property
    def computes_steps_once(self) -> bool:
        """Whether each inner step is computed once, so that losses may have a memory; they are not checked then."""
        return False

    @property
    def first_order(self) -> bool:
        """Whether first derivatives of the inner loss are enough, so that any kernel will do."""
        return False

    # -- the estimate ----------------------------------------------------------------------------------------------

    def _of(self, run: Unroll) -> Estimate:
        with self.kernels(run):
            if self.needs_derivatives and not self.first_order:
                _verify_tasks(run)
            return _checked(run, self._estimate(run))

    def kernels(self, run: Unroll) -> AbstractContextManager[None]:
        """Context in which PyTorch takes kernels with the derivatives that this estimator needs."""
        if not self.needs_derivatives or self.first_order:
            return nullcontext()
        inner = run.problem.modules if distributed.current().size == 1 else None
        if inner is None:
            inner = modules_in(run.start())  # which is not held any longer
        return autodiff.differentiable_kernels([*modules_in(run.meta), *inner])

    @abstractmethod
    def _estimate(self, run: Unroll) -> Estimate:
        """Return the estimate for checked arguments; its `grad` is a tree like `run.meta`."""


def _verify_tasks(run: Unroll) -> None:
    """Compare a step of many tasks with that of one, once for each problem."""
    tasks = run.problem
    if isinstance(tasks, Tasks) and not tasks.is_verified and run.carried is None:
        vectorised_steps.verify(run, tasks.of_one, tasks.seed_of_first(run.seed))
        tasks.is_verified = True


def _of_parts(estimator: Estimator, run: Unroll, tasks: Tasks, parts: Sequence[Tasks]) -> Estimate:
    """Make an estimate of many tasks from those of parts of them, one part in memory at a time."""
    found: list[Estimate] = []
    if run.carried_memory is not None:
        raise ValueError(
            f"{type(estimator).__name__} carries tangents along a stream, which Tasks(..., chunk_size=...) cannot "
            "part; take chunk_size=None"
        )
    for number, part in enumerate(parts):
        carried = run.carried
        here = replace(
            run,
            problem=part,
            inner_batches=tasks.sliced_batches(run.inner_batches, part),
            outer_batch=tasks.sliced(run.outer_batch, part),
            seed=part.seed_of_part(run.seed),
            carried=carried and replace(carried, state=tasks.sliced(carried.state, part)),
        )
        directions = estimator.redrawn(number) if part.number > 1 else estimator  # one task has a seed of its own
        found.append(directions._of(here))
    weights = [part.number / tasks.number for part in parts]
    per_task, errors = tasks.per_task, [estimate.standard_error for estimate in found]

    def together(tensors: Sequence[Tensor]) -> Tensor:
        if per_task:
            return torch.cat(list(tensors))
        return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(0)

    error: float | Tensor | None = None
    if all(e is not None for e in errors):  # each part has random directions of its own
        known = [torch.as_tensor(e) for e in errors]
        error = (
            torch.cat(known) if per_task else math.hypot(*(w * float(e) for w, e in zip(weights, known, strict=True)))
        )
    return Estimate(
        value=together([estimate.value for estimate in found]),
        grad=trees.map_leaves(lambda *leaves: together(leaves), *(estimate.grad for estimate in found)),
        state=joined([estimate.state for estimate in found]),
        standard_error=error,
        diagnostics={
            name: sum(w * e.diagnostics[name] for w, e in zip(weights, found, strict=True))
            for name in found[0].diagnostics
        },
        carried=run.window_end(joined([e.carried.state for e in found if e.carried is not None])),
    )


def _checked(run: Unroll, estimate: Estimate) -> Estimate:
    _require_shapes(run, estimate)
    diagnosis.require_finite(run, estimate.value, estimate.state, estimate.grad)
    state = trees.detach(estimate.state)
    return Estimate(
        value=estimate.value.detach(),
        grad=as_plain_tree(trees.detach(estimate.grad)),
        state=run.problem.presented(state),
        standard_error=estimate.standard_error,
        diagnostics=estimate.diagnostics,
        carried=estimate.carried or run.window_end(state),
    )


def _require_shapes(run: Unroll, estimate: Estimate) -> None:
    """Raise if an estimator returned gradients of the wrong shapes, as one does that was not written for vectors."""
    lead = estimate.value.shape
    for leaf, found in zip(trees.leaves(run.meta), trees.leaves(estimate.grad), strict=True):
        if found.shape != (*lead, *leaf.shape):
            losses = f"a vector of {len(estimate.value)} outer losses" if lead else "one outer loss"
            raise ValueError(
                f"the estimator returned a gradient of shape {tuple(found.shape)} for a meta parameter of shape "
                f"{tuple(leaf.shape)} and {losses}; {(*lead, *leaf.shape)} is needed. If it takes no vectors of outer "
                "losses, call it once for each, with an outer_loss that returns that entry"
            )


def like_meta(run: Unroll, tensors: list[Tensor]) -> Tree:
    """Tensors for the leaves of φ as a tree like φ."""
    return trees.split(run.meta).rebuild(tensors)


def require_one_outer_loss(estimator: Estimator, value: Tensor) -> None:
    """Raise if `outer_loss` returned a vector of losses, for a method that takes a single one."""
    argument_checks.one_outer_loss(
        value,
        f"{type(estimator).__name__} takes",
        ", call it once for each with an outer_loss that returns that entry, or take Reverse, Implicit, HessianFree, "
        "ForwardGradient or ZerothOrder, which take the vector as it is",
    )


def require_gradient_descent(run: Unroll, estimator: Estimator) -> GradientDescent:
    """The problem, if it is a `GradientDescent`, for methods that differentiate its inner loss."""
    return run.problem.require_inner_loss(
        type(estimator).__name__,
        "whose gradient vanishes at the inner solution",
        instead="Reverse, Forward or ForwardGradient",
    )
