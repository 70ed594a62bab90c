"""The shape that all estimators share: settings in the constructor, one call, one kind of result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from bilevel import autodiff, trees
from bilevel.batches import Batches
from bilevel.compilation.compiled_gradient import compile_seconds
from bilevel.models.module_view import as_plain_tree, modules_in
from bilevel.problem import BlackBox, GradientDescent, Unrollable
from bilevel.trees import Tree
from bilevel.unrolling import diagnosis
from bilevel.unrolling.inner_loop import Carried
from bilevel.unrolling.unroll import Unroll, unroll


@dataclass(frozen=True)
class Estimate:
    """A hypergradient and what is known about it."""

    value: Tensor
    """The outer loss h(φ)."""
    grad: Tree
    """An estimate of ∇h, with the structure of `meta`; for an `nn.Module`, a dict from parameter name to tensor."""
    state: Tree
    """The final inner state θ_T. With a module inside, `state.params.named_tensors` goes into `load_state_dict`."""
    standard_error: float | None = None
    """Estimated √E‖grad − ∇h‖² over the random directions; `None` for a deterministic method."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """What the method observed on the way, such as the residual of a linear solve."""
    carried: Carried | None = None
    """Where the inner loop ended; passed to the next call as `carried=`, that one goes on from there."""
    compile_seconds: float = 0.0
    """Wall time spent on compiling, of a `GradientDescent(..., compile=True)` whose shapes came up for the first time.
    """


@dataclass(frozen=True)
class Estimator(ABC):
    """A method that estimates ∇h(φ) for h(φ) = outer_loss(θ_T(φ), φ)."""

    needs_derivatives: ClassVar[bool] = True

    def __call__(
        self,
        problem: Unrollable | BlackBox,
        meta: Any,
        inner_batches: Batches | None = None,
        outer_batch: Any = None,
        seed: int = 0,
        carried: Carried | None = None,
    ) -> Estimate:
        """Estimate the hypergradient at `meta`.

        Args:
            problem: a `Problem`, `GradientDescent` or (for `ZerothOrder`) `BlackBox`.
            meta: φ: a tensor, a tree of tensors, or an `nn.Module`. It is not changed.
            inner_batches: T batches by random access, one for each inner step; `None` for a black box.
            outer_batch: passed to the outer loss.
            seed: determines every random number: directions, dropout, random initialisation.
            carried: `estimate.carried` of the window before, for an inner loop that goes on from call to call, at the
                same seed. The estimate then is that of the derivative through these T steps, with the state that they
                start from as a constant; `ForwardGradient(..., carry=...)` looks back further.

        Raises:
            NonFiniteError: the outer loss, an inner state or the hypergradient is NaN or infinite.
            NoDependenceError: the inner loop does not use the meta parameters, or the outer loss not the inner state.
            MissingDerivativeError: an operation lacks the derivative this method needs.
            TypeError, ValueError: an argument is not what it should be; the message says what to pass instead.
        """
        if isinstance(problem, BlackBox) and self.needs_derivatives:
            raise TypeError(
                f"{type(self).__name__} differentiates the inner loop, and a BlackBox has no derivatives; take "
                "ZerothOrder(directions, step_size), or describe the steps with bilevel.Problem"
            )
        run, before = unroll(problem, meta, inner_batches, outer_batch, seed, carried), compile_seconds()
        found = self._of(run)
        return replace(found, compile_seconds=compile_seconds() - before)

    def _of(self, run: Unroll) -> Estimate:
        if not self.needs_derivatives or self.first_order:
            return _checked(run, self._estimate(run))
        with autodiff.differentiable_kernels(modules_in([run.meta, run.start()])):  # which is not held any longer
            return _checked(run, self._estimate(run))

    @property
    def first_order(self) -> bool:
        """Whether first derivatives of the inner loss are enough, so that any kernel will do."""
        return False

    def units(self, steps: int) -> float:
        """About how many inner gradients an estimate over so many steps costs, where that depends on nothing else.

        Plans are made from it, and a control variate of such a cost is dealt out to workers.
        """
        return 4.0 * steps

    @abstractmethod
    def _estimate(self, run: Unroll) -> Estimate:
        """The estimate for checked arguments; `grad` is a tree like `run.meta`."""


def _checked(run: Unroll, estimate: Estimate) -> Estimate:
    diagnosis.require_finite(run, estimate.value, estimate.state, estimate.grad)
    return Estimate(
        value=estimate.value.detach(),
        grad=as_plain_tree(trees.detach(estimate.grad)),
        state=trees.detach(estimate.state),
        standard_error=estimate.standard_error,
        diagnostics=estimate.diagnostics,
        carried=estimate.carried or Carried(trees.detach(estimate.state), run.first_step + run.steps),
    )


def like_meta(run: Unroll, tensors: list[Tensor]) -> Tree:
    """Tensors for the leaves of φ as a tree like φ."""
    return trees.split(run.meta).rebuild(tensors)


def require_gradient_descent(run: Unroll, estimator: Estimator) -> GradientDescent:
    """The problem, if it is a `GradientDescent`, for methods that differentiate its inner loss."""
    if not isinstance(run.problem, GradientDescent):
        raise TypeError(
            f"{type(estimator).__name__} needs the inner loss, whose gradient vanishes at the inner solution; a "
            f"{type(run.problem).__name__} has only steps. Describe the problem with bilevel.GradientDescent, or take "
            "Reverse, Forward or ForwardGradient"
        )
    return run.problem
