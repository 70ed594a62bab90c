"""Random numbers are functions of a seed and of counters, and leave no trace."""

from __future__ import annotations

import ast
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import randomness

NP_RANDOM: Any = np.random
"""The module, of which type checkers know only a part."""
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


def test_streams_that_serve_one_run_have_different_numbers() -> None:
    streams = {name: value for name, value in vars(randomness).items() if name.isupper() and isinstance(value, int)}
    kinds = ("CONDENSATION", "CLEANING", "MIXTURE", "PDE", "GRAMMAR", "LM")
    tasks: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    library: dict[str, int] = {}
    for name, value in streams.items():
        tasks.get(name.split("_")[0], library)[name] = value
    together = [*(tasks[kind] for kind in kinds[:4]), tasks["GRAMMAR"] | tasks["LM"]]
    assert len(library) == 20
    for own in together:
        assert own
        numbers = [*library.values(), *own.values()]
        assert len(set(numbers)) == len(numbers)


def test_streams_are_numbered_in_one_place() -> None:
    """A call names its stream; a number written elsewhere could be that of another stream."""
    source = Path(randomness.__file__).parent
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("derive", "generator", "torch_seeded"):
                assert not any(isinstance(each, ast.Constant) for each in node.args[1:2]), f"{path}:{node.lineno}"


def three_numbers(_: object = None) -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def states_of_the_user() -> tuple[list[int], str, object]:
    numpy_state = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), str(numpy_state), random.getstate()


def test_all_three_generators_are_functions_of_seed_and_counters() -> None:
    first = randomness.evaluate(three_numbers, 0, randomness.STEP, 3)
    with randomness.preserved():
        inside = [randomness.evaluate(three_numbers, 0, randomness.STEP, t) for t in (1, 3, 4, 3)]
    assert first == inside[1] == inside[3]
    assert len({number for numbers in inside for number in numbers}) == 9  # three steps, three generators
    with randomness.seeded(0, randomness.STEP, 3):
        assert three_numbers() == first


@pytest.mark.parametrize(
    "draw", [np.random.randn, random.random, lambda: np.random.shuffle([1, 2, 3]), random.betavariate]
)
def test_a_draw_is_noticed_whatever_kind_and_at_whatever_call(draw: Any) -> None:
    """A function that starts to draw later than at its first call gives the same as one that always did."""

    def late(number: int) -> Any:
        arguments = (2.0, 3.0) if draw is random.betavariate else ()
        return (draw(*arguments), random.random(), np.random.rand()) if number >= 2 else None

    with randomness.preserved():
        together = [randomness.evaluate(lambda _, n=n: late(n), 0, randomness.STEP, n) for n in range(4)]
    for number in (2, 3):
        assert randomness.evaluate(lambda _, n=number: late(n), 0, randomness.STEP, number) == together[number]
    assert together[2] != together[3]


def test_a_function_that_draws_nothing_is_called_once() -> None:
    calls: list[int] = []
    with randomness.preserved():
        for t in range(3):
            randomness.evaluate(lambda _: (calls.append(1), torch.rand(2)), 0, randomness.STEP, t)
        assert len(calls) == 3
        randomness.evaluate(lambda _: (calls.append(1), random.random()), 0, randomness.STEP, 3)
        assert len(calls) == 5  # twice: the first draw was not known before
        randomness.evaluate(lambda _: (calls.append(1), random.random()), 0, randomness.STEP, 4)
        assert len(calls) == 6


def test_the_users_generators_are_left_where_they_were() -> None:
    np.random.seed(5)
    np.random.randn()  # the second normal number of a pair is kept for later
    random.gauss(0, 1)
    before = states_of_the_user()
    with randomness.preserved():
        for t in range(3):
            randomness.evaluate(three_numbers, 1, randomness.STEP, t)
    assert states_of_the_user() == before
    with pytest.raises(KeyError), randomness.preserved():
        randomness.evaluate(lambda _: {}[three_numbers()], 1, randomness.STEP, 0)
    assert states_of_the_user() == before
    assert randomness._watch is None


def test_a_bit_generator_of_the_users_own_is_kept() -> None:
    own, usual = np.random.PCG64(3), NP_RANDOM.get_bit_generator()
    NP_RANDOM.set_bit_generator(own)
    try:
        first = randomness.evaluate(three_numbers, 0, randomness.STEP, 3)
        assert NP_RANDOM.get_bit_generator() is own
        expected = np.random.RandomState(np.random.PCG64(3)).rand()
        assert np.random.rand() == expected
    finally:
        NP_RANDOM.set_bit_generator(usual)
    assert randomness.evaluate(three_numbers, 0, randomness.STEP, 3) == first


def test_a_problem_solved_inside_of_a_loss_leaves_the_loss_its_stream() -> None:
    def outer(inside: bool) -> tuple[float, ...]:
        first = three_numbers()
        if inside:
            with randomness.preserved():
                randomness.evaluate(three_numbers, 9, randomness.STEP, 0)
        return first + three_numbers()

    with randomness.preserved():
        alone, around = (randomness.evaluate(lambda _, i=i: outer(i), 0, randomness.STEP, 0) for i in (False, True))
    assert alone == around
