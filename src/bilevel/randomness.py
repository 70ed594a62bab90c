"""Reproducible random numbers: each is a function of a seed and of counters, and of nothing that was drawn before.

The first counter is the number of a *stream*. A stream serves one purpose, so random numbers for different purposes are
independent even if they have the same seed. All numbers of streams are listed here.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bilevel import checks

PROCESS_WIDE = threading.RLock()
"""Held while a step is computed under a seed of its own, or in forward mode: a second thread's estimate waits.

PyTorch keeps its random generators, and the levels of forward mode, once for the whole process. The lock of a module's
layers may be taken while this one is held, and never the other way round.
"""

# -- streams of the library. Changing a number changes the results of every seed.

INIT = 0
"""The initial inner state, and the whole solve of a black box."""
STEP = 1
"""An inner step; the next counter is the number of the step."""
OUTER = 2
"""The outer loss."""
DIRECTION = 3
"""Random directions."""
DRAW = 4
"""The seed of each estimate in `fit`."""
SUPPORT_PROBE = 10
"""Probes for the meta parameters that the inner loop uses."""
FRESH_DIRECTION = 11
"""Directions that join a stream of tangents in each window."""

# -- streams of the tasks. A run is of one task, so two tasks may have the same numbers.

CONDENSATION_START, CONDENSATION_INNER, CONDENSATION_OUTER, CONDENSATION_CONTROL = range(100, 104)
"""The images to start from, inner batches, outer batches, and the real images of a control."""
CONDENSATION_NETWORK, CONDENSATION_ORDER = range(200, 202)
"""In the evaluation: the initial network, and the order of the images."""

CLEANING_CHOICE, CLEANING_WRONG, CLEANING_INNER = range(300, 303)
"""The choice of examples, their wrong labels, and inner batches."""
CLEANING_NETWORK, CLEANING_BATCHES = range(400, 402)
"""In the evaluation: the initial network, and the seed of its batches."""

PDE_NOISE, PDE_START, PDE_NETWORK, PDE_POINTS = range(300, 304)
"""Noise of the observations, start values, the initial network, and the points of a training step."""

(
    GRAMMAR_NAMES,
    GRAMMAR_FACTS,
    GRAMMAR_TUNE,
    GRAMMAR_META,
    GRAMMAR_VALIDATION,
    GRAMMAR_TEST,
    GRAMMAR_LOCALITY,
    GRAMMAR_CHANGES,
) = range(300, 308)
"""Parts of the documents that the task online-lm makes up."""
LM_ORDER = 310
"""The order of documents in a pass over them."""
LM_QUESTIONS, LM_LOCALITY = range(320, 322)
"""The questions and the other text of an outer loss."""
LM_EVALUATION = 330
"""The documents of an evaluation stream, and their order."""
LM_INIT, LM_BATCH = range(340, 342)
"""In the stage that tunes a language model: its initial parameters, and its batches."""
LM_WEIGHT_MODEL, LM_LORA = range(350, 352)
"""Initial parameters of the weight model and of the low-rank matrices."""


def _sequence(seed: int, *counters: int) -> np.random.SeedSequence:
    # As a plain list [seed, *counters], missing counters would count as zeros and seeds beyond 2³² as two numbers.
    return np.random.SeedSequence(seed, spawn_key=counters)


@functools.lru_cache(maxsize=4096)  # the seed of a step is wanted again whenever the step is computed again
def derive(seed: int, *counters: int) -> int:
    """Return a new seed in [0, 2⁶³) that is a function of a seed and counters.

    >>> derive(0, STEP, 3) == derive(0, STEP, 3), derive(0, STEP, 3) == derive(0, STEP, 4)
    (True, False)
    """
    return int(_sequence(seed, *counters).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *counters: int) -> np.random.Generator:
    """Return a counter-based (Philox) generator that is a function of a seed and counters."""
    return np.random.Generator(np.random.Philox(_sequence(seed, *counters)))


@contextmanager
def torch_seeded(seed: int, *counters: int) -> Iterator[None]:
    """Context manager in which torch's global generators start from (seed, counters).

    Afterwards the generators are in the state that they had before. Dropout and random initialisation inside an inner
    step then give the same numbers whenever the step is computed.
    """
    new_seed = derive(seed, *counters)
    with PROCESS_WIDE:
        generators = _generators()
        before = [each.get_state() for each in generators]
        try:
            for each in generators:  # torch.manual_seed does the same, and stores a stack trace at every call
                each.manual_seed(new_seed)
            yield
        finally:
            for each, state in zip(generators, before, strict=True):
                each.set_state(state)


def generator_states() -> list[torch.Tensor]:
    """Return the states of torch's global generators."""
    return [each.get_state() for each in _generators()]


def restore(states: list[torch.Tensor]) -> None:
    """Let torch's global generators go on from these states."""
    for each, state in zip(_generators(), states, strict=False):
        each.set_state(state)


@contextmanager
def replayed(states: list[torch.Tensor]) -> Iterator[None]:
    """Context manager in which torch's global generators continue from these states; their own states are restored."""
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
    """Raise unless the seed is a whole number of at least 0, as NumPy's seed sequences need it."""
    checks.whole_number(seed, "seed", at_least=0)
