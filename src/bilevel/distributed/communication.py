"""What workers send each other for an estimate from b directions of N numbers.

The slopes, one number for each direction, every worker needs in any case: for the standard error, and because a control
variate's scale is fitted to all of them. The gradient (1/b) Σ w_i v_i can then be put together in two ways:

- `"slopes"`: every worker draws all b directions again and adds them up in the same order. Nothing more is sent, and
  the sum is the same to the last bit for any number of workers.
- `"gradient"`: every worker adds up its own directions, and one all-reduce adds up those N numbers.

Both give the same up to the order of the sum. `"auto"` takes the one that takes less time by the constants below; it
depends on b, N and the number of workers alone, so it is the same in every run.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from bilevel.distributed.workers import Workers

Exchange: TypeAlias = Literal["auto", "slopes", "gradient"]
EXCHANGES = ("auto", "slopes", "gradient")

SECONDS_PER_ENTRY = 1e-8
"""Of drawing and adding up one entry of a direction on one core: 2 ns for signs, 12 for normal numbers, 23 for an
orthogonal basis (`python benchmarks/scaling.py --draws`), and several times that where memory is contended for."""
BYTES_PER_SECOND = 1.25e9
"""Of a link between two workers: ten-gigabit Ethernet."""
SECONDS_PER_MESSAGE = 1e-4
"""Of the smallest message."""


def chosen(exchange: Exchange, directions: int, meta_size: int, workers: int, bytes_per_number: int = 4) -> str:
    """`"slopes"` or `"gradient"`, also where "auto" was asked for.

    >>> chosen("auto", directions=16, meta_size=640, workers=2)
    'slopes'
    >>> chosen("auto", directions=256, meta_size=8 * 10**7, workers=64)
    'gradient'
    """
    if exchange != "auto":
        return exchange
    again = (directions - math.ceil(directions / workers)) * meta_size * SECONDS_PER_ENTRY
    rounds = 2 * math.ceil(math.log2(workers)) if workers > 1 else 0
    sent = reduced_bytes(meta_size, workers, bytes_per_number) / BYTES_PER_SECOND + rounds * SECONDS_PER_MESSAGE
    return "slopes" if again <= sent else "gradient"


def gathered_bytes(numbers: int, workers: int) -> float:
    """What a worker sends until everybody has so many numbers, in float64, round a ring."""
    return 8 * numbers * (workers - 1) / workers


def reduced_bytes(numbers: int, workers: int, bytes_per_number: int) -> float:
    """What a worker sends in an all-reduce of so many numbers, round a ring."""
    return 2 * bytes_per_number * numbers * (workers - 1) / workers


def sent_bytes(
    how: str, directions: int, meta_size: int, workers: int, bytes_per_number: int = 4, variates: int = 0
) -> float:
    """What a worker sends for one estimate; see `chosen` for `how`.

    Control variates that were dealt out go from whoever computed them to all the others; the mean over the workers.

    >>> sent_bytes("slopes", 16, 640, 2), sent_bytes("gradient", 16, 640, 2)
    (64.0, 2624.0)
    >>> sent_bytes("slopes", 16, 640, 2, variates=2)
    2624.0
    """
    gradient = reduced_bytes(meta_size, workers, bytes_per_number) if how == "gradient" else 0.0
    computed_elsewhere = variates * bytes_per_number * meta_size * (workers - 1) / workers
    return gathered_bytes(directions, workers) + gradient + computed_elsewhere


def partners(exchange: Exchange, directions: int, meta_size: int, bytes_per_number: int, workers: Workers) -> Workers:
    """Return the workers who share the adding up of directions: all of them, or this one alone."""
    how = chosen(exchange, directions, meta_size, workers.size, bytes_per_number)
    return workers if how == "gradient" else Workers()
