"""The communication of workers for an estimate from b directions of N numbers.

Every worker needs all slopes, one number for each direction: for the standard error, and because a control variate's
scale is fitted to all of them. The gradient (1/b) Σ w_i v_i can then be computed in two ways:

- `"slopes"`: every worker draws all b directions again and adds them up in the same order. Nothing more is sent, and
  the sum is exactly the same for any number of workers.
- `"gradient"`: every worker adds up its own directions, and one all-reduce adds up those N numbers.

The results are the same up to the order of the sum. `"auto"` selects the way that takes less time by the constants
below. The choice depends only on b, N and the number of workers, so it is the same in every run.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from bilevel.distributed.workers import Workers

Exchange: TypeAlias = Literal["auto", "slopes", "gradient"]
EXCHANGES = ("auto", "slopes", "gradient")

SECONDS_PER_ENTRY = 1e-8
"""The time to draw and add up one entry of a direction on one core. It is 2 ns for signs, 12 ns for normal numbers and
23 ns for an orthogonal basis (`python benchmarks/scaling.py --draws`), and several times as long if other processes use
the memory's bandwidth."""
BYTES_PER_SECOND = 1.25e9
"""The bandwidth of a link between two workers, for ten-gigabit Ethernet."""
SECONDS_PER_MESSAGE = 1e-4
"""The time for the smallest message."""


def chosen(exchange: Exchange, directions: int, meta_size: int, workers: int, bytes_per_number: int = 4) -> str:
    """Return the way in which the gradient is computed, `"slopes"` or `"gradient"`.

    Args:
        exchange: the user's choice, which may be "auto".
        directions: b, the number of directions.
        meta_size: N, the number of meta parameters.
        workers: the number of workers.
        bytes_per_number: the size of a number of the gradient.

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
    """Return the bytes that a worker sends in an all-gather of this many float64 numbers around a ring."""
    return 8 * numbers * (workers - 1) / workers


def reduced_bytes(numbers: int, workers: int, bytes_per_number: int) -> float:
    """Return the bytes that a worker sends in an all-reduce of this many numbers around a ring."""
    return 2 * bytes_per_number * numbers * (workers - 1) / workers


def sent_bytes(
    how: str, directions: int, meta_size: int, workers: int, bytes_per_number: int = 4, variates: int = 0
) -> float:
    """Return the bytes that a worker sends for one estimate, as a mean over the workers.

    Each control variate that is assigned to a worker is sent from that worker to all others.

    Args:
        how: "slopes" or "gradient", the result of `chosen`.
        directions: b, the number of directions.
        meta_size: N, the number of meta parameters.
        workers: the number of workers.
        bytes_per_number: the size of a number of the gradient.
        variates: the number of control variates that are assigned to workers.

    >>> sent_bytes("slopes", 16, 640, 2), sent_bytes("gradient", 16, 640, 2)
    (64.0, 2624.0)
    >>> sent_bytes("slopes", 16, 640, 2, variates=2)
    2624.0
    """
    gradient = reduced_bytes(meta_size, workers, bytes_per_number) if how == "gradient" else 0.0
    computed_elsewhere = variates * bytes_per_number * meta_size * (workers - 1) / workers
    return gathered_bytes(directions, workers) + gradient + computed_elsewhere


def partners(exchange: Exchange, directions: int, meta_size: int, bytes_per_number: int, workers: Workers) -> Workers:
    """Return the workers that share the sum over directions: all of them, or only this one."""
    how = chosen(exchange, directions, meta_size, workers.size, bytes_per_number)
    return workers if how == "gradient" else Workers()
