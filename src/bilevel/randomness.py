"""Reproducible randomness: every draw is a function of a seed and of counters, never of what was drawn before."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bilevel import checks

# The first counter says what a stream is for, so that streams of one seed never meet.
INIT, STEP, OUTER, DIRECTION, DRAW = range(5)


def _sequence(seed: int, *counters: int) -> np.random.SeedSequence:
    # As a plain list [seed, *counters], missing counters would count as zeros and seeds beyond 2³² as two numbers.
    return np.random.SeedSequence(seed, spawn_key=counters)


@functools.lru_cache(maxsize=4096)  # the seed of a step is wanted again whenever the step is computed again
def derive(seed: int, *counters: int) -> int:
    """A new seed in [0, 2⁶³) from a seed and counters.

    >>> derive(0, STEP, 3) == derive(0, STEP, 3), derive(0, STEP, 3) == derive(0, STEP, 4)
    (True, False)
    """
    return int(_sequence(seed, *counters).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *counters: int) -> np.random.Generator:
    """A counter-based (Philox) generator of its own for this seed and these counters."""
    return np.random.Generator(np.random.Philox(_sequence(seed, *counters)))


@contextmanager
def torch_seeded(seed: int, *counters: int) -> Iterator[None]:
    """Inside, torch's global generators start from (seed, counters); afterwards they are as they were before.

    Dropout and random initialisation inside an inner step then give the same numbers every time the step is computed.
    """
    generators = _generators()
    before = [each.get_state() for each in generators]
    new_seed = derive(seed, *counters)
    try:
        for each in generators:  # torch.manual_seed does the same, and stores a stack trace at every call
            each.manual_seed(new_seed)
        yield
    finally:
        for each, state in zip(generators, before, strict=True):
            each.set_state(state)


def generator_states() -> list[torch.Tensor]:
    """Where torch's global generators are."""
    return [each.get_state() for each in _generators()]


@contextmanager
def replayed(states: list[torch.Tensor]) -> Iterator[None]:
    """Inside, torch's global generators go on from these states; afterwards they are as they were before."""
    before = generator_states()
    try:
        for each, state in zip(_generators(), states, strict=False):
            each.set_state(state)
        yield
    finally:
        for each, state in zip(_generators(), before, strict=False):
            each.set_state(state)


def _generators() -> list[torch.Generator]:
    found = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found += torch.cuda.default_generators
    return found


def check_seed(seed: int) -> None:
    """Seeds are whole numbers from 0; NumPy's seed sequences take no others."""
    checks.whole_number(seed, "seed", at_least=0)
