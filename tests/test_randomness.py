"""Random numbers are functions of a seed and of counters, and leave no trace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bilevel import randomness

COUNTERS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 256, 3), (randomness.STEP, 7), (randomness.INIT, 7)]
SEEDS = [0, 1, 2, 2**31, 2**32, 2**63, 2**100]


def test_derived_seeds_are_repeatable_distinct_and_fit_into_torch() -> None:
    derived = {(seed, at): randomness.derive(seed, *at) for seed, at in itertools.product(SEEDS, COUNTERS)}
    assert derived == {(seed, at): randomness.derive(seed, *at) for seed, at in derived}
    assert len(set(derived.values())) == len(derived)
    assert all(0 <= value < 2**63 for value in derived.values())
    for value in derived.values():
        torch.Generator().manual_seed(value)


def test_derived_seeds_look_random() -> None:
    """Of n = 4096 fair coins, the mean deviates by √(1/4n); neighbouring counters share no more bits than chance."""
    values = np.array([randomness.derive(5, randomness.STEP, t) for t in range(4097)], dtype=np.uint64)
    deviation = 5 * np.sqrt(0.25 / 4096)
    for bit in range(63):
        ones = (values >> np.uint64(bit)) & np.uint64(1)
        assert abs(ones[:-1].mean() - 0.5) < deviation
        assert abs((ones[:-1] ^ ones[1:]).mean() - 0.5) < deviation


@pytest.mark.parametrize("seed", SEEDS)
def test_generators_repeat(seed: int) -> None:
    first, again = (randomness.generator(seed, randomness.DIRECTION, 3).random(5) for _ in range(2))
    other = randomness.generator(seed, randomness.DIRECTION, 4).random(5)
    assert (first == again).all()
    assert (first != other).all()


def test_torch_inside_is_a_function_of_seed_and_counters_and_outside_untouched() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    inside = []
    for _ in range(2):
        with randomness.torch_seeded(0, randomness.STEP, 2):
            inside.append(torch.rand(3))
    with randomness.torch_seeded(0, randomness.STEP, 3):
        inside.append(torch.rand(3))
    assert torch.equal(inside[0], inside[1])
    assert not torch.equal(inside[0], inside[2])
    assert torch.equal(torch.rand(4), expected)


def test_torch_is_untouched_after_an_exception_and_by_nesting() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()

    def fail() -> None:
        with randomness.torch_seeded(0, 1):
            raise KeyError(torch.rand(3))

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)
    with randomness.torch_seeded(0, 1):
        alone = torch.rand(2)
    with randomness.torch_seeded(0, 1):
        with randomness.torch_seeded(0, 2):
            torch.rand(5)
        assert torch.equal(torch.rand(2), alone)
