"""Control variates: cheap biased gradients that reduce the variance of random estimates without adding a bias.

With variates c_1 … c_m `[m, N]` that do not depend on the directions, slopes w_i = ∇h · v_i and p_i = c v_i `[m]`,

    ∇h ≈ (1/b) Σ_i [ (w_i − s_i · p_i) v_i + s_i · c ]

is unbiased as long as the scales s_i `[m]` are a function of the other directions alone ("leave one out"). The scales
are fitted to the other directions by least squares, with a further direction of slope 0 and weight 1/b:

    s_i = (Σ_{j≠i} p_j p_jᵀ + c cᵀ/b)⁺ Σ_{j≠i} w_j p_j.

The variance is then that of the estimate of ∇h − s·c. The further direction keeps the fit bounded where there are few
directions (docs/theory.md derives the weight 1/b). A fit that includes direction i itself would be biased.

Directions drawn without replacement from an orthogonal basis are not independent, and leaving one out is not enough,
because the other directions restrict where v_i can lie. Given the other directions,
E[v_i v_iᵀ] = (N I − Σ_{j≠i} v_j v_jᵀ)/(N − b + 1). Solving for ∇h gives the same formula, with the scales
(b/N) s̄ + (1 − b/N) s_i in the first place and their mean s̄ in the second. It is exact at b = N. Directions that lie
in a single leaf have E[v_i v_iᵀ] = L on that leaf, so s_i · c is added there L times.

Reference: the leave-one-out idea is due to Kool et al., 2019 (REINFORCE with a baseline from the other samples).
docs/theory.md derives the forms for regression on several variates and for bases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import trees
from bilevel.directions.distributions import Directions
from bilevel.distributed import communication
from bilevel.distributed.communication import Exchange
from bilevel.distributed.workers import Workers

_ALONE = Workers()
DRAWN_AT_ONCE = 64
"""The default for the largest number of directions that are drawn and added up at a time."""


@trees.without_autocast()
def scaled(
    found: Sequence[Sequence[Tensor]], like: Sequence[Tensor], support: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Scale the gradients of m control variates to length 1.

    Args:
        found: the gradient of each variate, with one tensor for each leaf of φ.
        like: the leaves of φ.
        support: a boolean mask for each leaf; the result is 0 outside of the mask. `None` for no masks.

    Returns:
        A tensor `[m, *leaf.shape]` for each leaf of φ.
    """
    result: list[Tensor] = []
    for number, leaf in enumerate(like):
        stack = torch.stack([c[number] for c in found]) if found else leaf.new_zeros(0, *leaf.shape)
        result.append(stack if support is None else stack * support[number])
    lengths = torch.stack([_rows(c).square().sum(1) for c in result]).sum(0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1)
    return [c / lengths.to(c).reshape(-1, *[1] * (c.ndim - 1)) for c in result]


class Combined(NamedTuple):
    """A gradient made from slopes, directions and control variates."""

    grad: list[Tensor]
    """One tensor for each leaf of φ; `[m, *leaf.shape]` for m outer losses."""
    standard_error: float | Tensor
    """For m outer losses `[m]`, in float64."""
    variance_left: float | None
    """The expected squared error divided by that without control variates, both summed over the m outer losses; `None`
    if there are none."""


@trees.without_autocast()
def combine(
    directions: Directions,
    slopes: Tensor,
    variates: list[Tensor],
    at_once: int = DRAWN_AT_ONCE,
    workers: Workers = _ALONE,
    exchange: Exchange = "auto",
) -> Combined:
    """Compute the gradient by the formula at the top of this file.

    Args:
        directions: the b directions v_i.
        slopes: w_i = ∇h · v_i `[b]`, all b of them on every worker; for a vector of m outer losses `[b, m]`.
        variates: the gradients of q control variates, `[q, *leaf.shape]` for each leaf of φ. For a vector they are
            `[m, q, *leaf.shape]`, and the scales are fitted for each outer loss by itself.
        at_once: the largest number of directions that may be in memory together.
        workers: the workers, all of which call this function.
        exchange: with "slopes" each worker adds up all directions. With "gradient" each worker adds up its own
            directions, and the sums are then added up over the workers. See `bilevel.distributed.communication`.

    Returns:
        The gradient, its standard error, and the share of the variance that remains.
    """
    if slopes.ndim == 1:
        found = combine(directions, slopes.unsqueeze(1), [c.unsqueeze(0) for c in variates], at_once, workers, exchange)
        assert isinstance(found.standard_error, Tensor)
        return found._replace(grad=[g[0] for g in found.grad], standard_error=float(found.standard_error[0]))
    count, (m, q) = directions.count, variates[0].shape[:2]
    bytes_per_number = max(leaf.element_size() for leaf in directions.like)
    among = communication.partners(exchange, count, directions.size, bytes_per_number, workers)
    chunk = min(at_once, math.ceil(count / among.size))
    w = slopes.double()
    starts = range(0, count, chunk)
    chunks = [range(starts[i], min(starts[i] + chunk, count)) for i in among.share(len(starts))]
    p = w.new_zeros(count, m, q)
    if q:
        for numbers in chunks:
            for v, c in zip(directions.draw(numbers), variates, strict=True):
                p[numbers.start : numbers.stop] += (_rows(v) @ _rows(c.flatten(0, 1)).T).to(p).reshape(-1, m, q)
        (p,) = among.sum("predicted slopes", [p])  # p is 0 for the directions of other workers
    scales = torch.stack([fitted_scales(w[:, j], p[:, j], [c[j] for c in variates]) for j in range(m)], 1)
    mean = scales.mean(0)
    used = scales
    if directions.distribution.from_basis:
        share = count / directions.size
        used = share * mean + (1 - share) * scales
    left = w - (used * p).sum(2)
    grad = [leaf.new_zeros(m, *leaf.shape) for leaf in directions.like]
    for numbers in chunks:
        part = left[numbers.start : numbers.stop] / count
        for g, v in zip(grad, directions.draw(numbers), strict=True):
            g += torch.einsum("km,k...->m...", part.to(v), v)
    grad = among.sum("gradient", grad)
    for number, (g, c) in enumerate(zip(grad, variates, strict=True)):
        back = mean
        if directions.distribution.by_leaf:
            here = [i for i, leaf in enumerate(directions.leaves) if leaf == number]
            back = scales[here].mean(0)
        g += torch.einsum("mq,mq...->m...", back.to(c), c)
    rest = w - (scales * p).sum(2)
    variance, plain = (w.new_tensor([directions.variance(x) for x in column.unbind(1)]) for column in (rest, w))
    ratio = float(variance.sum() / plain.sum()) if q and plain.sum() > 0 else None
    return Combined(grad, variance.sqrt(), ratio)


def fitted_scales(w: Tensor, p: Tensor, variates: list[Tensor]) -> Tensor:
    """Compute the scales s_i `[b, m]`, each fitted without direction i.

    Args:
        w: the slopes `[b]`.
        p: the slopes that the variates predict, `[b, m]`.
        variates: the gradients of the variates, `[m, *leaf.shape]` for each leaf of φ.
    """
    if not p.shape[1]:
        return p
    gram = torch.stack([_rows(c) @ _rows(c).T for c in variates]).sum(0).to(p)
    squares = p.unsqueeze(2) * p.unsqueeze(1)
    products = w.unsqueeze(1) * p
    others = squares.sum(0) - squares + gram / len(w)
    return (torch.linalg.pinv(others, hermitian=True) @ (products.sum(0) - products).unsqueeze(2)).squeeze(2)


def _rows(stack: Tensor) -> Tensor:
    """Reshape `[k, *shape]` to `[k, size]`, in float64."""
    return stack.reshape(len(stack), math.prod(stack.shape[1:])).double()
