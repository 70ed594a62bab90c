"""Several processes at one estimate: the workers, who does which part of the work, and what they send each other."""

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
