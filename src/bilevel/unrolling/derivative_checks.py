"""Claimed derivatives beside central differences, with a verdict.

For outputs f `[leaves]`, a claimed derivative c along a direction v, and d(ε) = (f(x + εv) − f(x − εv)) / 2ε, four
values of ε are tried, from the largest down:

- right: ‖c − d(ε)‖ ≤ 1e-5 ‖d(ε)‖ for one ε, and each leaf agrees within 1e-4 of itself or 1e-7 of the whole, besides
  rounding, which is at most 100 · (machine epsilon) · ‖f‖ / ε. Where that fails, rounding is measured for each leaf: at
  the smallest ε, where f(x + εv) − 2 f(x) + f(x − εv) holds little else, since its smooth part is O(ε²);
- wrong: c stays away from d(ε) while d(ε) itself has come to rest: two values of ε differ by less than a tenth of what
  separates c from them;
- could not be judged: everything else, such as a kink at the point itself, where the difference ahead and the one
  behind are not the same.

Among thousands of ReLUs some have a kink within ε of the point. Their share falls with ε, so a claim is also right if
its error more than halves from each ε to the next and ends below 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.report.findings import Verdict
from bilevel.unrolling.stopped_gradients import AnotherPathError

EPSILONS = (1e-4, 1e-5, 1e-6, 1e-7)
"""Relative to the size of the point, since directions have the size of the point."""
_NEAR_KINKS = 1e-3
"""The relative error that kinks within ε of the point may leave, if it more than halves from each ε to the next."""


@dataclass(frozen=True)
class Judgement:
    """The outcome of one comparison."""

    verdict: Verdict
    error: float
    """‖c − d‖ / ‖d‖ at the best ε."""
    size: float
    """‖d‖ there."""
    worst: str = ""
    """The leaf that is furthest off, if the verdict is not right."""
    why: str = ""
    """Why nothing could be judged."""


def directions_like(tensors: Sequence[Tensor], seed: int, entrywise: bool = False) -> list[Tensor]:
    """Return a random direction: normal numbers, times the root mean square of each tensor, or of all if that is 0.

    With `entrywise`, times the size of each entry, which keeps positive numbers positive.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0 for t in tensors]
    general = max(sizes, default=0.0) or 1.0
    found = []
    for tensor, size in zip(tensors, sizes, strict=True):
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)
        found.append(drawn * tensor.detach().abs() if entrywise else drawn * (size or general))
    return found


def moved(tensors: Sequence[Tensor], along: Sequence[Tensor], by: float) -> list[Tensor]:
    """Return x + by · v."""
    return [t + by * a for t, a in zip(tensors, along, strict=True)]


def judged(
    claimed: Sequence[Tensor],
    at: Callable[[float], Sequence[Tensor]],
    names: Sequence[str] = (),
    epsilons: Sequence[float] = EPSILONS,
    magnitudes: Sequence[float] = (),
) -> Judgement:
    """Compare a claimed derivative with differences of `at(ε)`, the outputs at x + εv.

    Args:
        claimed: c, one tensor for each output.
        at: gives the outputs at x + εv.
        names: the names of the outputs.
        epsilons: the values of ε, from the largest down.
        magnitudes: sizes of numbers whose rounding is in the outputs, besides the outputs' own sizes.

    >>> slope = [torch.tensor([3.0], dtype=torch.float64)]
    >>> judged(slope, lambda e: [torch.tensor([(1 + e) ** 3], dtype=torch.float64)]).verdict.value
    'right'
    >>> judged(slope, lambda e: [torch.tensor([(1 + e) ** 2], dtype=torch.float64)]).verdict.value
    'wrong'
    """

    def measured(difference: list[Tensor], floors: list[float]) -> _Measured:
        gaps = [_norm([c - d]) for c, d in zip(claimed, difference, strict=True)]
        sizes = [_norm([d]) for d in difference]
        gap, size, floor = (sum(x * x for x in values) ** 0.5 for values in (gaps, sizes, floors))
        excess = [g - 1e-4 * s - 1e-7 * size - r for g, s, r in zip(gaps, sizes, floors, strict=True)]
        number = max(range(len(gaps)), key=lambda i: gaps[i] if gaps[i] == gaps[i] else float("inf"))
        return _Measured(
            gap, size, floor, gap <= 1e-5 * size + floor and max(excess) <= 0, names[number] if names else ""
        )

    return _at_rest(all(bool(torch.isfinite(c).all()) for c in claimed), at, measured, epsilons, None, magnitudes)


def judged_product(
    claimed: float,
    weights: Sequence[Tensor],
    at: Callable[[float], Sequence[Tensor]],
    epsilons: Sequence[float] = EPSILONS,
    magnitudes: Sequence[float] = (),
) -> Judgement:
    """Compare w · (J v), claimed as a transposed product (Jᵀ w) · v, with differences of the outputs f, weighted by w.

    The two may differ by 1e-5 of the larger one, or of 1e-2 Σ ‖w_i‖ ‖d_i‖, besides rounding.
    """
    lengths = [_norm([w]) for w in weights]

    def measured(difference: list[Tensor], floors: list[float]) -> _Measured:
        wanted = sum(float((w * d).sum()) for w, d in zip(weights, difference, strict=True))
        base = 1e-2 * sum(length * _norm([d]) for length, d in zip(lengths, difference, strict=True))
        size, gap = max(abs(wanted), abs(claimed), base), abs(claimed - wanted)
        floor = sum(length * f for length, f in zip(lengths, floors, strict=True))
        return _Measured(gap, size, floor, gap <= 1e-5 * size + floor, "")

    return _at_rest(math.isfinite(claimed), at, measured, epsilons, lengths, magnitudes)


class _Measured(NamedTuple):
    """How far a claim and a difference lie apart."""

    gap: float
    size: float
    floor: float
    agrees: bool
    worst: str


def _at_rest(
    finite: bool,
    at: Callable[[float], Sequence[Tensor]],
    measured: Callable[[list[Tensor], list[float]], _Measured],
    epsilons: Sequence[float],
    weights: Sequence[float] | None,
    magnitudes: Sequence[float],
) -> Judgement:
    """Take differences at smaller and smaller ε, until they agree with the claim or have come to rest apart from it."""
    previous: list[Tensor] | None = None
    taken: list[tuple[list[Tensor], list[float], float]] = []
    gaps: list[float] = []
    last_gap, found = math.inf, Judgement(Verdict.UNJUDGED, math.nan, 0.0, why="no difference could be taken")
    for epsilon in epsilons:
        try:
            ahead, behind = at(epsilon), at(-epsilon)
        except AnotherPathError:
            return Judgement(Verdict.UNJUDGED, math.nan, 0.0, why="the code takes another path at a moved point")
        difference = [(a - b) / (2 * epsilon) for a, b in zip(ahead, behind, strict=True)]
        if not all(bool(torch.isfinite(d).all()) for d in difference):
            found = Judgement(Verdict.UNJUDGED, math.nan, 0.0, why="the function is not finite at a moved point")
            continue
        if not finite:
            return Judgement(Verdict.WRONG, math.inf, _norm(difference), why="the derivative is not finite")
        others = [*magnitudes, *[0.0] * len(ahead)][: len(ahead)]
        sizes = [_norm([a]) + other for a, other in zip(ahead, others, strict=True)]
        floors = [100 * torch.finfo(a.dtype).eps * size / epsilon for a, size in zip(ahead, sizes, strict=True)]
        taken.append((difference, floors, epsilon))
        m = measured(difference, floors)
        error = m.gap / m.size if m.size else math.inf
        if m.agrees:
            return Judgement(Verdict.RIGHT, m.gap / (max(m.size, m.floor) or 1.0), m.size)
        found = Judgement(
            Verdict.UNJUDGED, error, m.size, m.worst, "differences do not come to rest (a kink, or rounding)"
        )
        if previous is not None:
            steps = [_norm([d - p]) for d, p in zip(difference, previous, strict=True)]
            change = _weighted(steps, weights)
            if change <= 0.1 * m.gap and not m.gap < 0.3 * last_gap and m.gap > 10 * m.floor:
                bend = [_norm([a - 2 * here + b]) / epsilon for a, here, b in zip(ahead, at(0.0), behind, strict=True)]
                if _weighted(bend, weights) > 0.3 * m.gap:
                    found = Judgement(Verdict.UNJUDGED, error, m.size, m.worst, "there is a kink at this point")
                else:
                    found = Judgement(Verdict.WRONG, error, m.size, m.worst)
        previous, last_gap = difference, m.gap
        gaps.append(error)
    if len(taken) > 1:
        smallest = taken[-1][2]
        triples = zip(at(smallest), at(0.0), at(-smallest), strict=True)
        noise = [_norm([a - 2 * here + b]) for a, here, b in triples]
        for difference, floors, epsilon in taken:
            m = measured(difference, [f + 3 * n / epsilon for f, n in zip(floors, noise, strict=True)])
            if m.agrees and m.gap < 0.1 * m.size:
                return Judgement(Verdict.RIGHT, m.gap / m.size, m.size, why="as far as rounding allows")
    if gaps and gaps[-1] < _NEAR_KINKS and all(b < 0.5 * a for a, b in pairwise(gaps)):
        return Judgement(Verdict.RIGHT, gaps[-1], found.size, why="as far as kinks nearby allow")
    return found


def _weighted(lengths: Sequence[float], weights: Sequence[float] | None) -> float:
    return (
        math.hypot(*lengths) if weights is None else math.hypot(*(w * s for w, s in zip(weights, lengths, strict=True)))
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach())) for t in tensors))
