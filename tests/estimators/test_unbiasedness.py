"""Every combination of estimator, directions and control variate is unbiased: the expectation itself, no sampling.

The directions of two or three small problems take finitely many values. Each combination is estimated for every one of
them and averaged with its probability, which leaves rounding (1e-9; a bias of 1 % is ten million times that).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import ClosedForm, descent, tensor
from estimator_table import ROWS, Unbiased

import bilevel
from bilevel import CoarserProblem, Constant, ForwardGradient, HessianFree, TruncatedReverse
from bilevel.directions import distributions as module
from bilevel.directions.control_variates import combine
from bilevel.directions.distributions import Directions

Outcome = tuple[np.ndarray, float]
"""All directions `[b, N]` and the probability of just these."""


def independent(values: list[tuple[np.ndarray, float]], count: int) -> Iterator[Outcome]:
    for chosen in itertools.product(values, repeat=count):
        yield np.stack([v for v, _ in chosen]), float(np.prod([p for _, p in chosen]))


def signs(size: int) -> list[np.ndarray]:
    return [np.array(s, dtype=float) for s in itertools.product((-1, 1), repeat=size)]


def rademacher(size: int, count: int) -> Iterator[Outcome]:
    return independent([(s, 2.0**-size) for s in signs(size)], count)


def gaussian(size: int, count: int) -> Iterator[Outcome]:
    # Three values with the moments of a normal number up to the fifth stand in for it: unbiasedness asks for two.
    nodes = ((-np.sqrt(3), 1 / 6), (0.0, 2 / 3), (np.sqrt(3), 1 / 6))
    values = [
        (np.array([x for x, _ in each]), float(np.prod([p for _, p in each])))
        for each in itertools.product(nodes, repeat=size)
    ]
    return independent(values, count)


def from_basis(rows: np.ndarray, count: int) -> Iterator[Outcome]:
    orders = list(itertools.permutations(range(len(rows)), count))
    for order in orders:
        yield rows[list(order)], 1 / len(orders)


def coordinate(size: int, count: int) -> Iterator[Outcome]:
    return from_basis(np.sqrt(size) * np.eye(size), count)


def orthogonal(size: int, count: int) -> Iterator[Outcome]:
    angles = 2 * np.pi / size * np.outer(np.arange(size), np.arange(size))
    for sign in signs(size):
        for rows, probability in from_basis((np.cos(angles) + np.sin(angles)) * sign, count):
            yield rows, probability / 2**size


def low_rank(size: int, count: int) -> Iterator[Outcome]:
    assert size == 4  # a 2 by 2 matrix
    values = [(np.outer(a, b).reshape(-1), 1 / 16) for a in signs(2) for b in signs(2)]
    return independent(values, count)


ENUMERATED = {
    "rademacher": rademacher,
    "gaussian": gaussian,
    "coordinate": coordinate,
    "orthogonal": orthogonal,
    "low-rank": low_rank,
}

CASE = descent("small", T=3, M=2, N=3, start_from_meta=True)

VARIATES: dict[str, Any] = {
    "none": None,
    "truncated": TruncatedReverse(1),
    "hessian-free": HessianFree(),
    "neumann": bilevel.Implicit(bilevel.Neumann(2, step_size=0.1)),
    "fewer steps": CoarserProblem(steps=1),
    "smaller batch": CoarserProblem(batch=lambda batch: (batch[0], batch[1] / 2, batch[2])),
    "constant": Constant(tensor([0.3, -2.0, 1.0])),
    "zero": Constant(tensor([0.0, 0.0, 0.0])),
    "exact": bilevel.Reverse(),
    "two": (TruncatedReverse(1), HessianFree()),
    "twice the same": (TruncatedReverse(1), TruncatedReverse(1)),
    "more than directions": (TruncatedReverse(1), HessianFree(), TruncatedReverse(2), CoarserProblem(steps=2)),
}


def always(name: str, rows: np.ndarray) -> module.Distribution:
    """The distribution with this name, of which all draws are these rows `[b, N]`."""

    def sample(seed: int, indices: Any, part: module.Part) -> torch.Tensor:
        return torch.from_numpy(rows[list(indices), part.start : part.stop]).to(part.dtype)

    return replace(module.DISTRIBUTIONS[name], sample=sample)


def expectation(
    estimator: bilevel.Estimator,
    case: ClosedForm,
    outcomes: Iterator[Outcome],
    monkeypatch: pytest.MonkeyPatch,
    name: str | None = None,
) -> tuple[np.ndarray, float, float]:
    """E grad, E‖grad − ∇h‖² and E standard_error²."""
    name = name or estimator.distribution  # type: ignore[attr-defined]
    mean, squared, claimed = np.zeros(case.N), 0.0, 0.0
    for rows, probability in outcomes:
        fixed = always(name, rows)
        monkeypatch.setitem(module.DISTRIBUTIONS, name, fixed)
        estimate = case(estimator)
        grad = case.flat(estimate.grad).numpy()
        mean += probability * grad
        squared += probability * float(np.sum((grad - case.gradient) ** 2))
        assert estimate.standard_error is not None
        claimed += probability * float(estimate.standard_error) ** 2
    return mean, squared, claimed


QUICK = ("none", "two")
"""The variates of the fast tests, under Rademacher directions."""

UNBIASED = [
    pytest.param(
        row.unbiased,
        name,
        variate,
        id=f"{kind.__name__}-{name}-{what}",
        marks=() if name == "rademacher" and what in QUICK else pytest.mark.slow,
    )
    for kind, row in ROWS.items()
    if row.unbiased is not None
    for name in row.unbiased.distributions
    for what, variate in VARIATES.items()
    if row.unbiased.with_variates or variate is None
]


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_every_random_estimator_is_in_the_table(kind: type[bilevel.Estimator]) -> None:
    assert (ROWS[kind].unbiased is not None) == (kind.is_random and kind is not bilevel.Auto)  # which is one of them


@pytest.mark.parametrize(("row", "name", "variate"), UNBIASED)
def test_random_estimators_are_unbiased(
    row: Unbiased, name: str, variate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, squared, claimed = expectation(row.make(name, variate), CASE, ENUMERATED[name](3, 2), monkeypatch, name)
    assert mean == pytest.approx(CASE.gradient, rel=row.rounding)
    if variate is None:
        assert claimed == pytest.approx(squared, rel=row.rounding)


@pytest.mark.parametrize("tangents", ["exact", "difference"])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_ways_to_get_the_slopes(tangents: Any, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = ForwardGradient(2, "coordinate", chunk_size, TruncatedReverse(1), tangents)
    mean, _, _ = expectation(estimator, CASE, coordinate(3, 2), monkeypatch)
    assert mean == pytest.approx(CASE.gradient, rel=1e-7)


VARIATE_COUNTS = (0, 1, 2, 3)
FRAMES = [
    *(("rademacher", 3, 3), ("gaussian", 2, 3), ("low-rank", 4, 2), ("coordinate", 4, 3), ("coordinate", 4, 4)),
    *(("orthogonal", 3, 2), ("orthogonal", 4, 3), ("orthogonal", 3, 3)),
]


@pytest.mark.parametrize("m", VARIATE_COUNTS)
@pytest.mark.parametrize(("name", "size", "count"), FRAMES)
def test_the_formula(name: str, size: int, count: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of `combine` alone, for more directions and distributions; and the standard error without variates."""
    rng = np.random.default_rng([size, count, m])
    truth = rng.standard_normal(size)
    variates = rng.standard_normal((m, size)) + truth
    variates /= np.linalg.norm(variates, axis=1, keepdims=True)
    mean, squared, claimed = np.zeros(size), 0.0, 0.0
    shape = (2, 2) if name == "low-rank" else (size,)
    for rows, probability in ENUMERATED[name](size, count):
        fixed = always(name, rows)
        monkeypatch.setitem(module.DISTRIBUTIONS, name, fixed)
        directions = Directions(name, 0, count, [torch.zeros(shape, dtype=torch.float64)])
        found = combine(directions, tensor(rows @ truth), [tensor(variates).reshape(m, *shape)])
        grad = found.grad[0].reshape(-1).numpy()
        mean += probability * grad
        squared += probability * float(np.sum((grad - truth) ** 2))
        claimed += probability * found.standard_error**2
    assert mean == pytest.approx(truth, rel=1e-9)
    if m == 0 and name != "gaussian":  # of which the fourth moment of the three values is right, but not all mixed ones
        assert claimed == pytest.approx(squared, rel=1e-9, abs=1e-20)
    if name in ("coordinate", "orthogonal") and count == size:
        assert squared < 1e-20  # a whole basis leaves no error, whatever the variate


@pytest.mark.parametrize("m", VARIATE_COUNTS)
def test_blocks(m: int) -> None:
    """Leaves of 2 and 1 entries, in turn, from a random first one; drawn as they are, over all that can be drawn."""
    rng = np.random.default_rng(m)
    like = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    truth, variates = rng.standard_normal(3), rng.standard_normal((m, 3))
    seen: dict[bytes, np.ndarray] = {}
    for seed in range(1500):
        directions = Directions("block", seed, 4, like)
        rows = torch.cat([v.reshape(4, -1) for v in directions.draw(range(4))], dim=1)
        if rows.numpy().tobytes() not in seen:
            parts = [tensor(variates[:, :2]), tensor(variates[:, 2:])]
            found = combine(directions, rows @ tensor(truth), parts)
            seen[rows.numpy().tobytes()] = torch.cat([g.reshape(-1) for g in found.grad]).numpy()
    assert len(seen) == 2 * 4**2 * 2**2
    assert np.mean(list(seen.values()), axis=0) == pytest.approx(truth, rel=1e-9)


def test_a_scale_fitted_to_all_directions_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.directions import control_variates

    def leaky(w: torch.Tensor, p: torch.Tensor, variates: Any) -> torch.Tensor:
        return ((w @ p) / (p.square().sum() + 1)).expand_as(p)

    monkeypatch.setattr(control_variates, "fitted_scales", leaky)
    estimator = ForwardGradient(2, control_variate=TruncatedReverse(1))
    mean, _, _ = expectation(estimator, CASE, rademacher(3, 2), monkeypatch)
    assert np.linalg.norm(mean - CASE.gradient) > 0.01 * np.linalg.norm(CASE.gradient)
