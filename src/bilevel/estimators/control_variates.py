"""Control variates: cheap biased gradients that take variance out of random estimates and leave no bias behind.

With variates c_1 … c_m `[m, N]` that do not depend on the directions, slopes w_i = ∇h · v_i and p_i = c v_i `[m]`,

    ∇h ≈ (1/b) Σ_i [ (w_i − s_i · p_i) v_i + s_i · c ]

is unbiased as long as the scales s_i `[m]` are a function of the other directions alone ("leave one out"). They are
fitted to those by least squares, with a further direction of slope 0 that weighs 1/b:

    s_i = (Σ_{j≠i} p_j p_jᵀ + c cᵀ/b)⁺ Σ_{j≠i} w_j p_j.

The variance is then that of the estimate of ∇h − s·c. The further direction keeps the fit bounded where few directions
are there to fit to (docs/theory.md says why 1/b). A fit that includes direction i itself would be biased.

Directions drawn without replacement from an orthogonal basis are not independent, and leaving one out is not enough:
the others say where v_i is not. Given them, E[v_i v_iᵀ] = (N I − Σ_{j≠i} v_j v_jᵀ)/(N − b + 1). Solving for ∇h gives
the same formula, with the scales (b/N) s̄ + (1 − b/N) s_i in the first place and their mean s̄ in the second; it is
exact at b = N. Directions in one leaf alone have E[v_i v_iᵀ] = L on that leaf, so s_i · c is added there L-fold.

Reference: the leave-one-out idea is that of Kool et al., 2019 (REINFORCE with a baseline from the other samples); its
forms for regression on several variates and for bases are derived in docs/theory.md.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bilevel import autodiff, checks, trees
from bilevel.batches import batches
from bilevel.directions.distributions import Directions
from bilevel.distributed.workers import Workers
from bilevel.estimators.base import Estimator
from bilevel.estimators.reverse import Reverse
from bilevel.models.module_view import modules_in
from bilevel.trees import Tree
from bilevel.unrolling.unroll import Unroll

_ALONE = Workers()
AnyEstimator = TypeVar("AnyEstimator", bound=Estimator)


class Variate(ABC):
    """A control variate that is no estimator of its own."""

    @abstractmethod
    def gradient(self, run: Unroll) -> list[Tensor]:
        """A gradient for the leaves of φ, not a function of the directions."""

    def units(self, run: Unroll) -> float:  # noqa: ARG002
        """About how many inner gradients that takes."""
        return 0.0


@dataclass(frozen=True)
class CoarserProblem(Variate):
    """The gradient of a cheaper problem as a control variate: fewer inner steps, or smaller batches.

    Args:
        steps: the first so many inner steps; `None` for all.
        batch: makes a smaller inner batch out of each: `lambda batch: batch[:8]`.
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
        if self.batch is not None and (size := trees.size(whole := run.inner_batches[0])):
            part = trees.size(self.batch(whole)) / size
        return part * self.estimator.units(self.steps or run.steps)


@dataclass(frozen=True)
class RunningMean(Variate):
    """The exponential mean of past estimates as a control variate. `fit` keeps it, over phases and in the checkpoint.

    Past estimates have no part in the directions of this one, so it stays unbiased given the past. At the first outer
    step there is no past and no variate.

    Args:
        decay: what an estimate weighs one outer step later; 0 for the last estimate alone.

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
    """A gradient that is already known as a control variate: of an earlier step, or of a similar problem.

    Args:
        value: a tree with the leaves of `meta`. It must not depend on the seed of the estimate.
    """

    value: Tree

    def gradient(self, run: Unroll) -> list[Tensor]:
        found, wanted = trees.leaves(self.value), trees.leaves(run.meta)
        shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"Constant holds tensors of shapes {shapes[0]}; meta has {shapes[1]}")
        return [a.to(device=b.device, dtype=b.dtype) for a, b in zip(found, wanted, strict=True)]


ControlVariate = Estimator | Variate | tuple[Estimator | Variate, ...]
"""One, or several at once."""


def as_tuple(variate: ControlVariate | None) -> tuple[Estimator | Variate, ...]:
    """However many there are; checked."""
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


def draws_directions(estimator: Estimator) -> bool:
    """Whether an estimator has random directions."""
    return any(field.name == "directions" for field in dataclasses.fields(estimator))


def require_deterministic(estimator: Any) -> None:
    """Raise for an estimator that draws directions: those of the estimate, since the seed is the same."""
    if not isinstance(estimator, Estimator) or draws_directions(estimator):
        raise ValueError(
            f"{estimator!r} cannot be a control variate: it must not depend on random directions; take "
            "TruncatedReverse, HessianFree, Implicit, or CoarserProblem"
        )


def with_past(estimator: AnyEstimator, past: Sequence[Tensor] | None) -> AnyEstimator:
    """The estimator with the past in the place of `RunningMean`; without it if there is none yet."""
    if running_mean_of(estimator) is None:
        return estimator
    several = [v for v in as_tuple(getattr(estimator, "control_variate")) if not isinstance(v, RunningMean)]  # noqa: B009
    if past is not None:
        several.append(Constant(list(past)))
    return dataclasses.replace(estimator, control_variate=tuple(several) or None)  # pyright: ignore[reportCallIssue]


def running_mean_of(estimator: Estimator) -> RunningMean | None:
    """The running mean among an estimator's control variates, if it has one."""
    several = as_tuple(getattr(estimator, "control_variate", None))
    return next((v for v in several if isinstance(v, RunningMean)), None)


def gradient_of(variate: Estimator | Variate, run: Unroll) -> list[Tensor]:
    """The gradient of one variate, for the leaves of φ."""
    with autodiff.differentiable_kernels(modules_in([run.meta, run.start()])):
        found = variate.gradient(run) if isinstance(variate, Variate) else trees.leaves(variate._estimate(run).grad)
    return [part.detach() for part in found]


def costs(variate: ControlVariate | None, run: Unroll) -> list[float]:
    """What each takes, in inner gradients for each inner step of the loop, to deal out work by."""
    units = [v.units(run) if isinstance(v, Variate) else v.units(run.steps) for v in as_tuple(variate)]
    return [of_all_steps / max(1, run.steps) for of_all_steps in units]


def scaled(found: Sequence[Sequence[Tensor]], run: Unroll, support: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Variates' gradients at length 1, `[m, *leaf.shape]` for each leaf of φ; outside of the support 0."""
    result: list[Tensor] = []
    for number, leaf in enumerate(trees.leaves(run.meta)):
        stack = torch.stack([c[number] for c in found]) if found else leaf.new_zeros(0, *leaf.shape)
        result.append(stack if support is None else stack * support[number])
    lengths = torch.stack([_rows(c).square().sum(1) for c in result]).sum(0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1)
    return [c / lengths.to(c).reshape(-1, *[1] * (c.ndim - 1)) for c in result]


class Combined(NamedTuple):
    """An estimate from slopes, directions and variates."""

    grad: list[Tensor]
    standard_error: float
    variance_left: float | None
    """The expected squared error over that without variates; `None` if there are none."""


def combine(
    directions: Directions, slopes: Tensor, variates: list[Tensor], chunk: int = 64, among: Workers = _ALONE
) -> Combined:
    """The estimate (module docstring) from the slopes w_i `[b]` and variates `[m, *leaf.shape]` for each leaf.

    Every worker has all slopes; those `among` whom the directions are shared add up only their own before they add up
    their sums.
    """
    count, m = directions.count, len(variates[0])
    w = slopes.double()
    starts = range(0, count, chunk)
    chunks = [range(starts[i], min(starts[i] + chunk, count)) for i in among.share(len(starts))]
    p = w.new_zeros(count, m)
    if m:
        for numbers in chunks:
            for v, c in zip(directions.draw(numbers), variates, strict=True):
                p[numbers.start : numbers.stop] += (_rows(v) @ _rows(c).T).to(p)
        (p,) = among.sum("predicted slopes", [p])  # zeros where they are another's
    scales = fitted_scales(w, p, variates)
    mean = scales.mean(0)
    used = scales
    if directions.distribution.from_basis:
        share = count / directions.size
        used = share * mean + (1 - share) * scales
    left = w - (used * p).sum(1)
    grad = [torch.zeros_like(leaf) for leaf in directions.like]
    for numbers in chunks:
        part = left[numbers.start : numbers.stop] / count
        for g, v in zip(grad, directions.draw(numbers), strict=True):
            g += torch.einsum("k,k...->...", part.to(v), v)
    grad = among.sum("gradient", grad)
    for number, (g, c) in enumerate(zip(grad, variates, strict=True)):
        back = mean
        if directions.distribution.by_leaf:
            here = [i for i, leaf in enumerate(directions.leaves) if leaf == number]
            back = scales[here].mean(0)
        g += torch.einsum("m,m...->...", back.to(c), c)
    variance = directions.variance(w - (scales * p).sum(1))
    plain = directions.variance(w)
    return Combined(grad, variance**0.5, variance / plain if m and plain > 0 else None)


def fitted_scales(w: Tensor, p: Tensor, variates: list[Tensor]) -> Tensor:
    """s_i `[b, m]` from slopes w `[b]` and predictions p `[b, m]`, each fitted without its own direction."""
    if not p.shape[1]:
        return p
    gram = torch.stack([_rows(c) @ _rows(c).T for c in variates]).sum(0).to(p)
    squares = p.unsqueeze(2) * p.unsqueeze(1)
    products = w.unsqueeze(1) * p
    others = squares.sum(0) - squares + gram / len(w)
    return (torch.linalg.pinv(others, hermitian=True) @ (products.sum(0) - products).unsqueeze(2)).squeeze(2)


def _rows(stack: Tensor) -> Tensor:
    """`[k, *shape]` as `[k, size]`, in float64."""
    return stack.reshape(len(stack), math.prod(stack.shape[1:])).double()
