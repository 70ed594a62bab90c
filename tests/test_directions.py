"""Random directions: E[v vᵀ] = I for each distribution, and direction i a function of (seed, i) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bilevel import directions
from bilevel.directions import DISTRIBUTIONS, draw

N = 13
"""Not a multiple of 8, since Rademacher signs come from whole bytes."""
LIKE = torch.zeros(N, dtype=torch.float64)

every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
independent = pytest.mark.parametrize("name", ["rademacher", "gaussian"])


def drawn(name: str, seed: int, indices: list[int] | range, size: int = N) -> np.ndarray:
    (vectors,) = draw(name, seed, indices, torch.zeros(size, dtype=torch.float64))
    return vectors.numpy()


def require_mean(samples: np.ndarray, truth: np.ndarray) -> None:
    """The mean over the first axis is the truth within 5 standard errors, entry by entry: 1 false alarm in 10⁶."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(axis=0) - truth) <= 5 * error + 1e-12).all()


@every_distribution
@pytest.mark.parametrize("index", [0, 7])
def test_second_moments_are_the_identity_over_seeds(name: str, index: int) -> None:
    v = np.concatenate([drawn(name, seed, [index]) for seed in range(2000)])
    require_mean(v[:, :, None] * v[:, None, :], np.eye(N))


@independent
def test_second_moments_are_the_identity_over_the_directions_of_one_seed(name: str) -> None:
    v = drawn(name, 3, range(2000))
    require_mean(v, np.zeros(N))
    require_mean(v[:, :, None] * v[:, None, :], np.eye(N))
    require_mean(v[1:, :, None] * v[:-1, None, :], np.zeros((N, N)))


@independent
def test_directions_of_neighbouring_seeds_are_uncorrelated(name: str) -> None:
    v = np.stack([drawn(name, seed, range(2)) for seed in range(1001)])
    require_mean(v[1:, 0, :, None] * v[:-1, 0, None, :], np.zeros((N, N)))
    require_mean(v[1:, 0, :, None] * v[:-1, 1, None, :], np.zeros((N, N)))  # seed + 1 is not index + 1


def test_rademacher_entries_are_signs() -> None:
    assert set(np.unique(drawn("rademacher", 0, range(20)))) == {-1.0, 1.0}


def test_gaussian_entries_have_the_fourth_moment_of_a_normal_number() -> None:
    v = drawn("gaussian", 0, range(3000))
    require_mean(v**4, np.full(N, 3.0))


def test_coordinates_come_without_replacement() -> None:
    for seed in range(5):
        v = drawn("coordinate", seed, range(N))
        assert v.T @ v / N == pytest.approx(np.eye(N), abs=1e-12)
        assert ((v != 0).sum(axis=1) == 1).all()
    assert not (drawn("coordinate", 0, range(N)) == drawn("coordinate", 1, range(N))).all()


@every_distribution
def test_a_direction_is_the_same_in_any_chunk(name: str) -> None:
    together = drawn(name, 5, range(10))
    assert (np.concatenate([drawn(name, 5, range(4)), drawn(name, 5, range(4, 10))]) == together).all()
    assert (np.concatenate([drawn(name, 5, [i]) for i in range(10)]) == together).all()
    assert (drawn(name, 5, [9, 2, 2]) == together[[9, 2, 2]]).all()


@every_distribution
def test_a_direction_is_the_same_on_any_split_of_the_vector(name: str) -> None:
    flat = drawn(name, 5, range(4))
    tree = {"a": torch.zeros(2, 3), "b": [torch.zeros(()), torch.zeros(0)], "c": torch.zeros(6, dtype=torch.float64)}
    parts = draw(name, 5, range(4), tree)
    assert [tuple(part.shape) for part in parts] == [(4, 2, 3), (4,), (4, 0), (4, 6)]
    assert [part.dtype for part in parts] == [torch.float32] * 3 + [torch.float64]
    joined = torch.cat([part.reshape(4, -1).double() for part in parts], dim=1).numpy()
    assert joined == pytest.approx(flat, rel=1e-6)  # some of it was rounded to float32


@every_distribution
def test_other_seeds_and_numbers_give_other_directions(name: str) -> None:
    size = 64  # at which equal signs by chance have probability 2⁻⁶⁴
    first, second = drawn(name, 0, range(6), size), drawn(name, 1, range(6), size)
    assert (first == drawn(name, 0, range(6), size)).all()
    assert not (first == second).all()
    assert len(np.unique(first, axis=0)) == 6


@every_distribution
def test_drawing_leaves_the_global_generators_alone(name: str) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
    drawn(name, 0, range(3))
    assert torch.equal(torch_before, torch.get_rng_state())
    numpy_after = np.random.get_state(legacy=False)
    assert isinstance(numpy_before, dict)
    assert isinstance(numpy_after, dict)
    assert (numpy_before["state"]["key"] == numpy_after["state"]["key"]).all()
    assert numpy_before["state"]["pos"] == numpy_after["state"]["pos"]


@pytest.mark.parametrize(("name", "variance"), [("rademacher", 9 / 4), ("gaussian", 11 / 4), ("coordinate", 6 / 4)])
def test_the_standard_error_follows_from_the_slopes(name: str, variance: float) -> None:
    slopes = torch.tensor([1.0, -3.0, 2.0, 0.0], dtype=torch.float64)
    error = directions.standard_error(slopes, name, size=10)
    assert error == pytest.approx(np.sqrt((1 + 9 + 4) / 4 * variance), rel=1e-12)


def test_an_unknown_distribution_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"distribution='rademaher'.*'rademacher', 'gaussian', 'coordinate'"):
        draw("rademaher", 0, [0], LIKE)
