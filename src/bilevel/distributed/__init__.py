"""Several processes that compute one estimate: the workers, the assignment of work, and their communication."""

from bilevel.distributed.workers import (
    TIMEOUT,
    Workers,
    current,
    from_environment,
    join_workers,
    joined,
    known_to_all,
    rank_in_environment,
    restarted,
)

__all__ = [
    "TIMEOUT",
    "Workers",
    "current",
    "from_environment",
    "join_workers",
    "joined",
    "known_to_all",
    "rank_in_environment",
    "restarted",
]
