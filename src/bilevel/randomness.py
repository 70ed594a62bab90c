"""Reproducible randomness: every random number is a function of a seed and of counters.

No random number depends on how many numbers were drawn before, so a step that is computed again draws the same numbers.

Users draw from three global generators: torch's, NumPy's and that of Python's module `random`. `evaluate` calls a
function with all three at the start of a stream. Setting the last two costs more than a small inner step, and few steps
use them. `evaluate` therefore first calls the function without setting them, and then tests whether the function drew
from them. The test takes less than a microsecond: each generator has a twin with the same seed, and as long as no
numbers are drawn elsewhere, the next number of both is the same. If the numbers differ, the function is called once
more with all three generators set. All later functions are then called with all three set until the outermost
`preserved()` ends.

The first counter is the number of a *stream*, which serves one purpose. All numbers of streams are listed here.
"""

from __future__ import annotations

import functools
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from bilevel import checks

PROCESS_WIDE = threading.RLock()
"""A lock that is held while a step is computed under its own seed, or in forward mode. Other threads' estimates wait.

PyTorch has one set of random generators, and of levels of forward mode, for the whole process. The locks of a module's
layers may be acquired while this lock is held, and never in the opposite order.
"""

Result = TypeVar("Result")
_set_bit_generator: Any = np.random.set_bit_generator  # pyright: ignore[reportAttributeAccessIssue]
_get_bit_generator: Any = np.random.get_bit_generator  # pyright: ignore[reportAttributeAccessIssue]

# -- streams of the library. A change of a number changes the results of every seed.

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
BATCH = 5
"""The reading of an inner batch; the next counter is the number of the step."""
INNER_BATCHES, OUTER_BATCH = 6, 7
"""The functions of `fit` that return batches."""
EXAMPLES = 12
"""The reading of the examples of a batch; the next counters are what the batch is for, the number of the estimate, and
the step."""
SUPPORT_PROBE = 10
"""Probes for the meta parameters that the inner loop uses."""
FRESH_DIRECTION = 11
"""Directions that join a stream of tangents in each window."""

TASK = 13
"""The seed of each task of `Tasks`; the next counter is the number of the task."""
SUBSETS, BOOTSTRAP, WEIGHT_DIRECTIONS = 14, 15, 16
"""The validation of scores of examples: subsets for retraining, bootstrap samples, directions in the weights."""

CALIBRATION = 17
"""Further starts of a calibration."""
SOURCE_ORDER, SOURCE_EXAMPLES, TARGET_EXAMPLES, ALIGNMENT = 18, 19, 20, 21
"""A mixture of sources in a training of a user's own: the order of its examples, the examples of each source and of the
target for an update of the proportions, and the random numbers of the gradients for it."""

# -- streams of the tasks. A run is of one task, so two tasks may have the same numbers.

CONDENSATION_START, CONDENSATION_INNER, CONDENSATION_OUTER, CONDENSATION_CONTROL = range(100, 104)
"""The images to start from, inner batches, outer batches, and the real images of a control."""
CONDENSATION_VIEWS, CONDENSATION_STEPS, CONDENSATION_MEANS = range(104, 107)
"""The augmentation of images, the number of inner steps, and the clusters of real images."""
CONDENSATION_NETWORK, CONDENSATION_ORDER, CONDENSATION_WATCH = range(200, 203)
"""The initial network and the order of the images in the evaluation, and the networks of evaluations on the way."""

CLEANING_CHOICE, CLEANING_WRONG, CLEANING_INNER = range(300, 303)
"""The choice of examples, their wrong labels, and inner batches."""
CLEANING_NETWORK, CLEANING_BATCHES = range(400, 402)
"""The initial network and the seed of its batches in the evaluation."""

(
    MIXTURE_RULES,
    MIXTURE_EXAMPLES,
    MIXTURE_INNER,
    MIXTURE_OUTER,
    MIXTURE_NETWORK,
    MIXTURE_ORDER,
    MIXTURE_SEARCH,
) = range(300, 307)
"""The rules of made-up sources and their examples, inner and outer batches, the initial network and the order of the
examples in the evaluation, and the proportions that a random search tries."""

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
"""Parts of the documents that the task online-lm generates."""
LM_ORDER = 310
"""The order of documents in a pass over them."""
LM_QUESTIONS, LM_LOCALITY = range(320, 322)
"""The questions and the other text of an outer loss."""
LM_EVALUATION = 330
"""The documents of an evaluation stream, and their order."""
LM_INIT, LM_BATCH = range(340, 342)
"""The initial parameters and the batches in the stage that tunes a language model."""
LM_WEIGHT_MODEL, LM_LORA = range(350, 352)
"""Initial parameters of the weight model and of the low-rank matrices."""


def _sequence(seed: int, *counters: int) -> np.random.SeedSequence:
    # As a plain list [seed, *counters], missing counters would count as zeros and seeds beyond 2³² as two numbers.
    return np.random.SeedSequence(seed, spawn_key=counters)


@functools.lru_cache(maxsize=4096)  # the seed of a step is needed again whenever the step is computed again
def derive(seed: int, *counters: int) -> int:
    """Return a new seed in [0, 2⁶³) that is a function of a seed and counters.

    >>> derive(0, STEP, 3) == derive(0, STEP, 3), derive(0, STEP, 3) == derive(0, STEP, 4)
    (True, False)
    """
    return int(_sequence(seed, *counters).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *counters: int) -> np.random.Generator:
    """Return a counter-based (Philox) generator that is a function of a seed and counters."""
    return np.random.Generator(np.random.Philox(_sequence(seed, *counters)))


@functools.lru_cache(maxsize=4)  # asked for at every step of an epoch
def permutation(size: int, seed: int, *counters: int) -> np.ndarray:
    """Return a random order of `size` things that is a function of a seed and counters. It cannot be written to."""
    order = generator(seed, *counters).permutation(size)
    order.flags.writeable = False
    return order


@contextmanager
def torch_seeded(seed: int, *counters: int) -> Iterator[None]:
    """Context manager in which torch's global generators start from (seed, counters).

    At the end, their previous states are restored. NumPy's and Python's generators are not changed. Use `seeded` for
    the user's code.
    """
    new_seed = derive(seed, *counters)
    with PROCESS_WIDE:
        generators = _torch_generators()
        before = [each.get_state() for each in generators]
        try:
            for each in generators:  # torch.manual_seed would also store a stack trace at every call
                each.manual_seed(new_seed)
            yield
        finally:
            for each, state in zip(generators, before, strict=True):
                each.set_state(state)


@contextmanager
def seeded(seed: int, *counters: int) -> Iterator[None]:
    """Context manager in which torch's, NumPy's and Python's global generators start from (seed, counters).

    At the end, their previous states are restored. The context takes about half a millisecond, mostly for NumPy's.

    >>> import random
    >>> def three_draws():
    ...     with seeded(0, BATCH, 3):
    ...         return torch.rand(1).item(), np.random.rand(), random.random()
    >>> three_draws() == three_draws()
    True
    """
    saved = _save()
    try:
        _set_torch(derive(seed, *counters))
        _set_host(derive(seed, *counters))
        yield
    finally:
        _restore(saved)


class _Watch:
    """A watch with which an outermost `preserved()` detects draws from NumPy's and Python's generators."""

    most_draws = 4096
    """After so many numbers, the generators start again."""

    def __init__(self) -> None:
        self.sets_all = False
        """Whether a function has drawn from them. They are then set before every function."""
        self.busy = False
        """Whether a function is currently being called."""
        self.stream: tuple[int, tuple[int, ...]] | None = None
        """The seed and the counters of the function that is being called."""
        _set_host(0)
        self._draws = 0

    def start(self, seed: int) -> None:
        """Set the generators to the start of a stream."""
        _set_torch(seed)
        if self.sets_all:
            _set_host(seed)

    def must_repeat(self) -> bool:
        """Whether the function that was just called drew from generators that had not been set."""
        if self.sets_all:
            return False
        if self._draws == len(_UNDISTURBED):
            _prolong()
        self.sets_all = (random.random(), np.random.random_sample()) != _UNDISTURBED[self._draws]
        self._draws += 1
        if self._draws == self.most_draws:
            _set_host(0)
            self._draws = 0
        return self.sets_all


_UNDISTURBED: list[tuple[float, float]] = []
"""The numbers that Python's and NumPy's generators give from seed 0 on, if nobody else draws from them."""
_twins: list[Any] = []


def _prolong() -> None:
    """Make the list of undisturbed numbers longer."""
    if not _twins:
        _twins[:] = random.Random(0), np.random.RandomState(_words(0))
    python, numpy = _twins
    _UNDISTURBED.extend((python.random(), numpy.random_sample()) for _ in range(64))


_watch: _Watch | None = None


@contextmanager
def preserved() -> Iterator[None]:
    """Context manager in which `evaluate` is cheap. At the end, the previous states of all generators are restored.

    The context takes about half a millisecond. A nested context does nothing, with one exception: inside a function
    that `evaluate` is calling (a loss that itself solves a bilevel problem), it protects the stream of that function.
    """
    global _watch
    with PROCESS_WIDE:
        nested = _watch is not None and not _watch.busy
        outside, saved = _watch, None if nested else _save()
        if not nested:
            _watch = _Watch()
    try:
        yield
    finally:
        if saved is not None:
            with PROCESS_WIDE:
                _watch = outside
                _restore(saved)


def _nothing() -> None:
    return None


def evaluate(
    function: Callable[[Any], Result], seed: int, *counters: int, given: Callable[[], Any] = _nothing
) -> Result:
    """Return `function(given())`, computed with all global generators started from (seed, counters).

    Within `preserved()`, the first function that draws from NumPy's or Python's generator is called twice.

    Args:
        function: a function of one argument.
        seed: the seed.
        counters: the counters, of which the first is the number of the stream.
        given: a function that returns the argument. It is called before the stream starts and may call `evaluate`.

    >>> def draw(_):
    ...     return torch.rand(1).item() + np.random.rand() + random.random()
    >>> len({evaluate(draw, 0, STEP, t) for t in (3, 4, 3, 3)})
    2
    """
    with PROCESS_WIDE:
        if _watch is not None and not _watch.busy:
            return _evaluated(_watch, function, (seed, counters), given)
        with preserved():
            assert _watch is not None
            return _evaluated(_watch, function, (seed, counters), given)


def _evaluated(
    watch: _Watch, function: Callable[[Any], Result], stream: tuple[int, tuple[int, ...]], given: Callable[[], Any]
) -> Result:
    seed, counters = stream
    start = derive(seed, *counters)
    while True:
        argument = given()
        watch.start(start)
        watch.busy, watch.stream = True, stream
        try:
            result = function(argument)
        finally:
            watch.busy = False
        if not watch.must_repeat():
            return result


def current_stream() -> tuple[int, tuple[int, ...]]:
    """Return the seed and the counters with which `evaluate` calls the function that is being computed.

    >>> evaluate(lambda _: current_stream(), 7, STEP, 3)
    (7, (1, 3))
    """
    assert _watch is not None
    assert _watch.stream is not None
    return _watch.stream


def positions() -> list[Any]:
    """Return where torch's global generators are, as something that can be compared, and also Python's and NumPy's if
    functions that `evaluate` calls draw from them.

    A function that draws from Python's or NumPy's generator for the first time is called again, and then they count.
    """
    found: list[Any] = [each.get_state().numpy().tobytes() for each in _torch_generators()]
    return [*found, *host_positions()]


def host_positions() -> list[Any]:
    """Return where Python's and NumPy's generators are, if functions that `evaluate` calls draw from them."""
    if _watch is None or not _watch.sets_all:
        return []
    return [random.getstate(), pickle.dumps(np.random.get_state(legacy=False))]


@contextmanager
def another_stream(seed: int, *counters: int) -> Iterator[None]:
    """Context manager inside of a function that `evaluate` calls: the global generators start another stream.

    On leaving, they are set back. NumPy's and Python's generators are set only where functions draw from them.
    """
    follows = _watch is not None and _watch.sets_all
    with seeded(seed, *counters) if follows else torch_seeded(seed, *counters):
        yield


class GeneratorStates(NamedTuple):
    """The states of the global generators."""

    torch: list[torch.Tensor]
    host: tuple[Any, ...] | None
    """The states of Python's and NumPy's generators; `None` if nothing has drawn from them within `preserved()`."""


def generator_states() -> GeneratorStates:
    """Return the current states of the global generators, for `replayed`.

    The states of NumPy's and Python's generators are included only if a function that `evaluate` calls draws from them.
    """
    follows = _watch is not None and _watch.sets_all
    return GeneratorStates([each.get_state() for each in _torch_generators()], _save_host() if follows else None)


def restore(states: GeneratorStates) -> None:
    """Set the global generators to these states."""
    for each, state in zip(_torch_generators(), states.torch, strict=False):
        each.set_state(state)
    if states.host is not None:
        _restore_host(states.host)


@contextmanager
def replayed(states: GeneratorStates) -> Iterator[None]:
    """Context manager in which the global generators continue from these states. At the end, they are restored."""
    before = [each.get_state() for each in _torch_generators()]
    host = None if states.host is None else _save_host()
    try:
        for each, state in zip(_torch_generators(), states.torch, strict=False):
            each.set_state(state)
        if states.host is not None:
            _restore_host(states.host)
        yield
    finally:
        for each, state in zip(_torch_generators(), before, strict=False):
            each.set_state(state)
        if host is not None:
            _restore_host(host)


# -- the three generators ------------------------------------------------------------------------------------------


def _torch_generators() -> list[torch.Generator]:
    found = [torch.default_generator]
    if torch.cuda.is_initialized():
        found += torch.cuda.default_generators
    return found


def _set_torch(seed: int) -> None:
    for each in _torch_generators():
        each.manual_seed(seed)


def _words(seed: int) -> list[int]:
    """Return a seed of 63 bits in the form that NumPy's old generators accept.

    NumPy's old generators and Python's generator are both MT19937, with the same seeding. The third word makes their
    numbers different.
    """
    return [seed & 0xFFFFFFFF, seed >> 32, 1]


@functools.lru_cache(maxsize=1)
def _own_bit_generator() -> np.random.MT19937:
    """Return the bit generator of `np.random` inside `preserved()`. The user's own may have another algorithm."""
    return np.random.MT19937(0)


def _set_host(seed: int) -> None:
    """Set NumPy's and Python's generators."""
    random.seed(seed)
    _set_bit_generator(_own_bit_generator())
    np.random.seed(_words(seed))


def _save_host() -> tuple[Any, ...]:
    bit_generator = _get_bit_generator()
    return random.getstate(), bit_generator, np.random.get_state(legacy=False)


def _restore_host(saved: tuple[Any, ...]) -> None:
    python, bit_generator, numpy_state = saved
    random.setstate(python)
    _set_bit_generator(bit_generator)
    np.random.set_state(numpy_state)  # includes the second normal number of a pair, which NumPy keeps for later


def _save() -> tuple[Any, ...]:
    generators = _torch_generators()
    return [(each, each.get_state()) for each in generators], _save_host()


def _restore(saved: tuple[Any, ...]) -> None:
    torch_states, host = saved
    for each, state in torch_states:
        each.set_state(state)
    _restore_host(host)


def check_seed(seed: int) -> None:
    """Raise a ValueError unless the seed is a whole number of at least 0, as NumPy's seed sequences require."""
    checks.whole_number(seed, "seed", at_least=0)
