"""(FG)²U-ZO: hypergradients from differences of whole solves, for inner loops without derivatives."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bilevel import checks, diagnosis, trees
from bilevel import directions as random_directions
from bilevel.estimators.base import Estimate, Estimator, like_meta
from bilevel.unroll import Unroll


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

    Cost: 1 + 2b solves (central) or 1 + b (forward). Memory: one solve, whatever T and N.
    Bias: O(μ²) central, O(μ) forward; apart from it the relative variance is that of `ForwardGradient`, which is what
    `standard_error` estimates.

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
    needs_derivatives: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.whole_number(self.directions, "directions")
        checks.positive(self.step_size, "step_size")
        checks.one_of(self.scheme, "scheme", ("central", "forward"))
        random_directions.distribution(self.distribution)

    def _estimate(self, run: Unroll) -> Estimate:
        size, count = run.meta_size, self.directions
        random_directions.require_count(
            count, size, "ZerothOrder(distribution='coordinate') differences every one of them"
        )
        value, state = run.value()
        diagnosis.require_finite(run, value, state)
        grad = [torch.zeros_like(leaf) for leaf in trees.leaves(run.meta)]
        slopes: list[torch.Tensor] = []
        for number in range(count):
            direction = [v[0] for v in random_directions.draw(self.distribution, run.seed, [number], run.meta)]
            ahead = self._shifted(run, direction, self.step_size)
            if self.scheme == "central":
                slope = (ahead - self._shifted(run, direction, -self.step_size)) / (2 * self.step_size)
            else:
                slope = (ahead - value) / self.step_size
            slopes.append(slope)
            grad = [g + slope.to(v.dtype) * v / count for g, v in zip(grad, direction, strict=True)]
        if not any(bool(slope) for slope in slopes):
            warnings.warn(
                f"ZerothOrder: the outer loss is {value.item():.6g} to the last bit wherever meta moved by "
                f"step_size={self.step_size:g}, so the estimate is zero: meta does not reach the outer loss, or "
                f"step_size is too small for {value.dtype}, or (another seed helps then) all directions are at right "
                "angles to the gradient",
                stacklevel=3,
            )
        error = random_directions.standard_error(torch.stack(slopes), self.distribution, size)
        return Estimate(value, like_meta(run, grad), state, error)

    def _shifted(self, run: Unroll, direction: list[torch.Tensor], offset: float) -> torch.Tensor:
        meta = [leaf + offset * v for leaf, v in zip(trees.leaves(run.meta), direction, strict=True)]
        moved = run.at(like_meta(run, meta))
        value, state = moved.value()
        if not bool(torch.isfinite(value)):
            place = f"meta {'+' if offset > 0 else '-'} {abs(offset):g}·direction"
            raise diagnosis.non_finite(
                moved, f"the outer loss at {place} (finite at meta itself; a smaller step_size may help)", value, state
            )
        return value
