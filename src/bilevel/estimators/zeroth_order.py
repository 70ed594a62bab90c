"""(FG)²U-ZO: hypergradients from differences of whole solves, for inner loops without derivatives."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bilevel import checks, distributed, trees
from bilevel.directions.distributed_slopes import everybodys_numbers, everybodys_variates
from bilevel.directions.distributions import Directions
from bilevel.distributed.communication import Exchange
from bilevel.distributed.work_assignment import assign
from bilevel.estimators import directional, variates
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.estimators.variates import ControlVariate, Variate
from bilevel.trees import Tree
from bilevel.unrolling import diagnosis
from bilevel.unrolling.unroll import Unroll


@dataclass(frozen=True)
class ZerothOrder(Estimator):
    """Hypergradient from random directions and differences of whole inner loops. The paper's (FG)²U-ZO.

    For directions v_1 … v_b `[N]` with E[v vᵀ] = I and a step μ,

        w = (h(φ + μv) − h(φ − μv)) / 2μ   (central)   or   (h(φ + μv) − h(φ)) / μ   (forward),   ∇h ≈ (1/b) Σ w_i v_i.

    The inner loop may be anything: `BlackBox` as well as `Problem` and `GradientDescent`. Both solves of a pair see the
    same batches and the same random numbers.

    Args:
        directions: b, at most the number of meta parameters N.
        step_size: μ, in the units of φ. Every entry of φ moves by μ (Rademacher) at once. The best choice balances
            the bias against rounding: about (ε)^⅓ for central and √ε for forward differences of h computed to relative
            precision ε, times the scale on which φ matters.
        scheme: `"central"` or `"forward"`.
        distribution: as in `ForwardGradient`.
        control_variate: as in `ForwardGradient`; of a `BlackBox` only `Constant` or, in `fit`, `RunningMean`.
        draw: as in `ForwardGradient`.
        exchange: as in `ForwardGradient`; with `"slopes"` the estimate is the same to the last bit on any number of
            workers.

    Cost: 1 + 2b solves (central) or 1 + b (forward), each of T units; at once, if a `BlackBox` has `solve_all`.
    A vector of m outer losses costs no more. Memory: one solve, whatever T and N.
    Bias: O(μ²) central, O(μ) forward; apart from it the relative variance is that of `ForwardGradient`, which is what
    `standard_error` estimates.

    Workers share the directions and the control variates; the solve at φ itself, each makes for itself.

    Reference: Shen et al., NeurIPS 2024, eq. 16, Appendix D; Nesterov and Spokoiny, 2017.

    >>> import torch, bilevel
    >>> box = bilevel.BlackBox(solve=lambda phi: torch.sin(phi), outer_loss=lambda state, phi, batch: state**2)
    >>> bilevel.ZerothOrder(1, step_size=1e-2)(box, torch.tensor(0.5)).grad  # sin(2·0.5) = 0.84147
    tensor(0.8414)
    """

    directions: int = 1
    step_size: float = 1e-3
    scheme: Literal["central", "forward"] = "central"
    distribution: str = "rademacher"
    control_variate: ControlVariate | None = None
    draw: int = 0
    exchange: Exchange = "auto"
    needs_derivatives: ClassVar[bool] = False
    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        directional.check_settings(self)
        checks.positive(self.step_size, "step_size")
        checks.one_of(self.scheme, "scheme", ("central", "forward"))

    def redrawn(self, number: int) -> ZerothOrder:
        return replace(self, draw=self.draw + number)

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:  # noqa: ARG002
        return (1.0 + self._solves_each * self.directions) * steps

    def _estimate(self, run: Unroll) -> Estimate:
        exact_instead = "ZerothOrder(distribution='coordinate') differences every one of them"
        directions = directional.directions_of(self, run, exact_instead)
        workers = distributed.current()
        several = variates.as_tuple(self.control_variate)
        self._require_variates(run, several)
        shares = assign(self.directions, workers.size, 1, variates.costs(several, run), 0.0, self._solves_each)
        value, state, mine, computed = workers.together(
            "slopes",
            lambda: (
                *self._slopes(run, directions, shares.numbers_of(workers.rank)),
                {i: variates.gradient_of(several[i], run) for i in shares.variates_of(workers.rank)},
            ),
        )
        gradients = everybodys_variates(run, shares, computed, workers, value.shape)
        slopes = everybodys_numbers("slopes", shares, mine, workers).to(value)
        still = ~slopes.any(0)
        if bool(still.any()):
            entry = int(still.nonzero()[0]) if value.ndim else None
            warn_of_no_slopes("ZerothOrder", value, self.step_size, stacklevel=5, entry=entry)
        return directional.estimate_from_slopes(self, run, directions, value, state, slopes, gradients)

    def _slopes(self, run: Unroll, directions: Directions, numbers: Sequence[int]) -> tuple[Tensor, Tree, Tensor]:
        """The outer loss and the final state at φ, and ∇h · v for the directions of those numbers, by differences."""
        offsets = (self.step_size, -self.step_size) if self.scheme == "central" else (self.step_size,)
        places = [(number, offset) for number in numbers for offset in offsets]
        solved = run.values(itertools.chain([run.meta], (_moved(run, directions, *place) for place in places)))
        value, state = next(solved)
        diagnosis.require_finite(run, value, state)
        shifted = [self._finite(run, directions, place, *next(solved)) for place in places]  # holds no state but θ_T
        if self.scheme == "forward":
            slopes = [(ahead - value) / self.step_size for ahead in shifted]
        else:
            pairs = zip(shifted[::2], shifted[1::2], strict=True)
            slopes = [(ahead - behind) / (2 * self.step_size) for ahead, behind in pairs]
        return value, state, torch.stack(slopes) if slopes else value.new_zeros(0, *value.shape)

    @property
    def _solves_each(self) -> float:
        return 2.0 if self.scheme == "central" else 1.0

    @staticmethod
    def _require_variates(run: Unroll, several: Sequence[Estimator | Variate]) -> None:
        for each in several if run.problem.is_black_box else ():
            if not isinstance(each, variates.Constant):
                raise TypeError(f"control_variate={each!r} differentiates the inner loop, and a BlackBox cannot be")

    @staticmethod
    def _finite(run: Unroll, directions: Directions, place: tuple[int, float], value: Tensor, state: Tree) -> Tensor:
        if not bool(torch.isfinite(value).all()):
            number, offset = place
            where = f"meta {'+' if offset > 0 else '-'} {abs(offset):g}·direction"
            what = f"the outer loss at {where} (finite at meta itself; a smaller step_size may help)"
            raise diagnosis.non_finite(run.at(_moved(run, directions, number, offset)), what, value, state)
        return value


def warn_of_no_slopes(who: str, value: Tensor, step_size: float, stacklevel: int, entry: int | None = None) -> None:
    """Warn that no difference of outer losses differs from zero; of a vector, the differences of one entry."""
    which, same = ("", value) if entry is None else (f"entry {entry} of ", value[entry])
    warnings.warn(
        f"{who}: {which}the outer loss is {same.item():.6g} to the last bit wherever meta moved by "
        f"step_size={step_size:g}, so the estimate is zero: meta does not reach the outer loss, or step_size is too "
        f"small for {value.dtype}, or (another seed helps then) all directions are at right angles to the gradient",
        stacklevel=stacklevel,
    )


def _moved(run: Unroll, directions: Directions, number: int, offset: float) -> Tree:
    """φ, moved so far along direction `number`."""
    direction = [v[0] for v in directions.draw([number])]
    return like_meta(run, [leaf + offset * v for leaf, v in zip(trees.leaves(run.meta), direction, strict=True)])
