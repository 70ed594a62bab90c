"""Random directions: E[v vᵀ] = I for each distribution, and direction i a function of (seed, i) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bilevel.directions.distributions import DISTRIBUTIONS, Directions

N = 13
"""Not a multiple of 8, since Rademacher signs come from whole bytes."""

every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
of_the_whole_vector = pytest.mark.parametrize("name", [n for n in DISTRIBUTIONS if n not in ("low-rank", "block")])
independent = pytest.mark.parametrize("name", ["rademacher", "gaussian"])


def drawn(name: str, seed: int, indices: list[int] | range, size: int = N) -> np.ndarray:
    (vectors,) = Directions(name, seed, 1, [torch.zeros(size, dtype=torch.float64)]).draw(indices)
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


@of_the_whole_vector
def test_a_direction_is_the_same_on_any_split_of_the_vector(name: str) -> None:
    flat = drawn(name, 5, range(4))
    leaves = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(0), torch.zeros(6, dtype=torch.float64)]
    parts = Directions(name, 5, 4, leaves).draw(range(4))
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


VARIANCES = [
    ("rademacher", 9 / 4),
    ("gaussian", 11 / 4),
    ("coordinate", 6 / 4),
    ("orthogonal", 6 / 4),
    ("low-rank", 9 / 4),
]


@pytest.mark.parametrize(("name", "variance"), VARIANCES)
def test_the_standard_error_follows_from_the_slopes(name: str, variance: float) -> None:
    slopes = torch.tensor([1.0, -3.0, 2.0, 0.0], dtype=torch.float64)
    found = Directions(name, 0, 4, [torch.zeros(10)]).variance(slopes)
    assert found == pytest.approx((1 + 9 + 4) / 4 * variance, rel=1e-12)


LEAVES = [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]


def joined(directions: Directions) -> np.ndarray:
    return torch.cat([v.flatten(1) for v in directions.draw(range(directions.count))], dim=1).numpy()


@pytest.mark.parametrize("name", ["low-rank", "block"])
def test_second_moments_over_several_leaves(name: str) -> None:
    v = np.stack([joined(Directions(name, seed, 2, LEAVES))[1] for seed in range(3000)])
    require_mean(v[:, :, None] * v[:, None, :], np.eye(9))


def test_low_rank_directions_have_rank_one() -> None:
    for matrix in Directions("low-rank", 0, 5, LEAVES).draw(range(5))[0]:
        assert torch.linalg.matrix_rank(matrix) == 1
        assert bool((matrix.abs() == 1).all())


def test_blocks_take_turns_and_their_variance_is_the_formulas() -> None:
    gradient = np.random.default_rng(0).standard_normal(9)
    errors, claimed = [], []
    for seed in range(4000):
        directions = Directions("block", seed, 4, LEAVES)
        v = joined(directions)
        assert [int((row[6:] != 0).any()) for row in v] in ([0, 1, 0, 1], [1, 0, 1, 0])
        slopes = v @ gradient
        errors.append(float(np.sum((slopes @ v / 4 - gradient) ** 2)))
        claimed.append(directions.variance(torch.from_numpy(slopes)))
    theory = 2 / 4 * (5 * np.sum(gradient[:6] ** 2) + 2 * np.sum(gradient[6:] ** 2))
    require_mean(np.array(errors), np.array(theory))
    require_mean(np.array(claimed), np.array(theory))


def test_orthogonal_directions_are_orthogonal_and_spread_out() -> None:
    for size in (1, 2, N):
        v = drawn("orthogonal", 3, range(size), size)
        assert v @ v.T == pytest.approx(size * np.eye(size), abs=1e-10)
        assert np.abs(v).max() <= np.sqrt(2) + 1e-12


@every_distribution
def test_a_support_is_where_directions_differ_from_zero(name: str) -> None:
    masks = [torch.tensor([[True, False, True], [False, True, True]]), torch.tensor([True, False, True])]
    directions = Directions(name, 0, 6, LEAVES, masks)
    assert directions.size == 6
    v, inside = joined(directions), torch.cat([mask.reshape(-1) for mask in masks]).numpy()
    assert (v[:, ~inside] == 0).all()
    assert np.linalg.matrix_rank(v) > 1
    moments = np.stack([joined(Directions(name, seed, 2, LEAVES, masks))[1] for seed in range(2000)])
    require_mean(moments[:, :, None] * moments[:, None, :], np.diag(inside.astype(float)))


@every_distribution
def test_under_a_support_directions_are_those_of_as_many_meta_parameters(name: str) -> None:
    """Their sizes and the standard error's go by the entries that the masks leave, leaf by leaf."""
    masks = [torch.tensor([[True, False, True], [False, True, True]]), torch.tensor([True, False, True])]
    smaller = [torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    under, alone = Directions(name, 3, 4, LEAVES, masks), Directions(name, 3, 4, smaller)
    for v, mask, expected in zip(under.draw(range(4)), masks, alone.draw(range(4)), strict=True):
        assert torch.equal(v[:, mask], expected)
        assert not bool(v[:, ~mask].any())
    slopes = torch.tensor([1.0, -3.0, 2.0, 0.5], dtype=torch.float64)
    assert under.variance(slopes) == pytest.approx(alone.variance(slopes), rel=1e-12)
    assert under.variance(slopes) != pytest.approx(Directions(name, 3, 4, LEAVES).variance(slopes), rel=1e-2)


def test_blocks_come_in_whole_rounds() -> None:
    with pytest.raises(ValueError, match=r"directions=3.*multiple of 2"):
        Directions("block", 0, 3, LEAVES).require_count("Forward()")


def test_an_unknown_distribution_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"distribution='rademaher'.*'rademacher', 'gaussian', 'coordinate'"):
        drawn("rademaher", 0, [0])


def test_no_smooth_gradient_hides_from_most_orthogonal_directions() -> None:
    # Without the random signs, a constant gradient would have a slope along one vector of the basis alone.
    size = 64
    (vectors,) = Directions("orthogonal", 0, size, [torch.zeros(size, dtype=torch.float64)]).draw(range(size))
    slopes = vectors.sum(1).abs()
    assert (slopes > 0.1).sum() > size / 2
    assert slopes.square().sum().item() == pytest.approx(size * size)
