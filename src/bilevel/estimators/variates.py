"""Control variates: cheap biased gradients that reduce the variance of a random estimate without biasing it.

A deterministic estimator can be a control variate; `CoarserProblem`, `RunningMean` and `Constant` are others. How they
enter an estimate, and why they leave no bias, is explained in `bilevel.directions.control_variates`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from bilevel import autodiff, checks, trees
from bilevel.batches import batches
from bilevel.estimators.base import Estimator
from bilevel.estimators.reverse import Reverse
from bilevel.models.module_view import modules_in
from bilevel.trees import Tree
from bilevel.unrolling.unroll import Unroll

AnyEstimator = TypeVar("AnyEstimator", bound=Estimator)


class Variate(ABC):
    """A control variate that is not an estimator."""

    @abstractmethod
    def gradient(self, run: Unroll) -> list[Tensor]:
        """Return a gradient, one tensor for each leaf of φ. It must not depend on the random directions."""

    def units(self, run: Unroll) -> float:  # noqa: ARG002
        """Return about how many inner gradients that costs."""
        return 0.0


@dataclass(frozen=True)
class CoarserProblem(Variate):
    """Takes the gradient of a cheaper problem, with fewer inner steps or smaller batches, as a control variate.

    Args:
        steps: only this many inner steps are made, from the first one on; `None` for all.
        batch: a function that makes a smaller batch of each inner batch: `lambda batch: batch[:8]`.
        estimator: a deterministic method for the coarser problem.

    Cost: that of the estimator for so many steps.

    >>> import torch, bilevel
    >>> bilevel.ForwardGradient(8, control_variate=bilevel.CoarserProblem(steps=5)).control_variate.steps
    5
    """

    steps: int | None = None
    batch: Callable[[Any], Any] | None = None
    estimator: Estimator = dataclasses.field(default_factory=Reverse)

    def __post_init__(self) -> None:
        if self.steps is not None:
            checks.whole_number(self.steps, "steps")
        if self.batch is not None:
            checks.a_function(self.batch, "batch", "batch(inner_batch)")
        require_deterministic(self.estimator)

    def gradient(self, run: Unroll) -> list[Tensor]:
        steps = run.steps if self.steps is None else self.steps
        if steps > run.steps:
            raise ValueError(f"CoarserProblem(steps={steps}) of an inner loop with {run.steps} steps is no coarser one")
        cut, inner = self.batch or (lambda batch: batch), run.inner_batches
        coarser = dataclasses.replace(run, inner_batches=batches(lambda t: cut(inner[t]), steps))
        return trees.leaves(self.estimator._estimate(coarser).grad)

    def units(self, run: Unroll) -> float:
        part = 1.0
        if self.batch is not None and (size := trees.size(whole := run.at_step(0, lambda batch: batch))):
            part = trees.size(self.batch(whole)) / size
        return part * self.estimator.units(self.steps or run.steps, run.meta_size)


@dataclass(frozen=True)
class RunningMean(Variate):
    """Takes the exponential mean of past estimates as a control variate. `fit` keeps it over phases and in checkpoints.

    The directions of past estimates are independent of the present ones, so the estimate stays unbiased given the past.
    At the first outer step there is no past, and no control variate is used.

    Args:
        decay: the factor by which the weight of an estimate falls at each outer step; 0 keeps the last estimate alone.

    Cost: nothing.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= checks.not_negative(self.decay, "decay") < 1:
            raise ValueError(f"decay={self.decay!r}: a number in [0, 1) is needed")

    def gradient(self, run: Unroll) -> list[Tensor]:  # noqa: ARG002
        raise ValueError(
            "control_variate=RunningMean() has a past only inside bilevel.fit; for a single estimate write "
            "control_variate=Constant(gradient) with the gradient that you have"
        )


@dataclass(frozen=True, eq=False)
class Constant(Variate):
    """Takes a gradient that is already known, of an earlier step or of a similar problem, as a control variate.

    Args:
        value: a tree with the leaves of `meta`. For a vector of m outer losses, its leaves may also be
            `[m, *leaf.shape]`, a gradient for each. It must not depend on the seed of the estimate.
    """

    value: Tree

    def gradient(self, run: Unroll) -> list[Tensor]:
        found, wanted = trees.leaves(self.value), trees.leaves(run.meta)
        shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (found, wanted)]
        for_each = [shape[1:] for shape in shapes[0]]
        if shapes[1] not in (shapes[0], for_each):
            raise ValueError(f"Constant holds tensors of shapes {shapes[0]}; meta has {shapes[1]}")
        return [a.to(device=b.device, dtype=b.dtype) for a, b in zip(found, wanted, strict=True)]


ControlVariate = Estimator | Variate | tuple[Estimator | Variate, ...]
"""One control variate, or several."""


def as_tuple(variate: ControlVariate | None) -> tuple[Estimator | Variate, ...]:
    """Return the control variates as a tuple, and raise for what is none."""
    several = () if variate is None else tuple(variate) if isinstance(variate, tuple | list) else (variate,)
    for each in several:
        if not isinstance(each, Estimator | Variate):
            raise TypeError(
                f"control_variate holds {each!r} ({type(each).__name__}); a deterministic estimator is needed, such as "
                "bilevel.TruncatedReverse(5), or CoarserProblem, RunningMean or Constant, or a tuple of them"
            )
        if isinstance(each, Estimator):
            require_deterministic(each)
    return several


def require_deterministic(estimator: Any) -> None:
    """Raise for an estimator that draws directions, which would be those of the estimate since the seed is the same."""
    if not isinstance(estimator, Estimator) or estimator.is_random:
        raise ValueError(
            f"{estimator!r} cannot be a control variate: it must not depend on random directions; take "
            "TruncatedReverse, HessianFree, Implicit, or CoarserProblem"
        )


def with_past(estimator: AnyEstimator, past: Sequence[Tensor] | None) -> AnyEstimator:
    """Return the estimator with the past in the place of `RunningMean`, or without it if there is no past yet."""
    if running_mean_of(estimator) is None:
        return estimator
    several = [v for v in as_tuple(getattr(estimator, "control_variate")) if not isinstance(v, RunningMean)]  # noqa: B009
    if past is not None:
        several.append(Constant(list(past)))
    return dataclasses.replace(estimator, control_variate=tuple(several) or None)  # pyright: ignore[reportCallIssue]


def running_mean_of(estimator: Estimator) -> RunningMean | None:
    """Return the running mean among the control variates of an estimator, if there is one."""
    several = as_tuple(getattr(estimator, "control_variate", None))
    return next((v for v in several if isinstance(v, RunningMean)), None)


def gradient_of(variate: Estimator | Variate, run: Unroll) -> list[Tensor]:
    """Return the gradient of one control variate, one tensor for each leaf of φ."""
    with autodiff.differentiable_kernels(modules_in([run.meta, run.start()])):
        found = variate.gradient(run) if isinstance(variate, Variate) else trees.leaves(variate._estimate(run).grad)
    return [part.detach() for part in found]


def costs(variate: ControlVariate | None, run: Unroll) -> list[float]:
    """Return what each control variate costs, in inner gradients for each inner step, to assign work by."""
    units = [v.units(run) if isinstance(v, Variate) else v.units(run.steps, run.meta_size) for v in as_tuple(variate)]
    return [of_all_steps / max(1, run.steps) for of_all_steps in units]
