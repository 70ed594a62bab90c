"""Names that may still change between minor versions; `docs/stability.md` says why each of them is here.

- `Workers` and `join_workers`: how several processes share the work. Programs started by torchrun need neither name.
- `OutsideProgram` and `FailedAttempt`: another program as the solver of a `BlackBox`.
- `Recomputed`: layers that keep only their inputs, until PyTorch's own checkpoints support both derivatives.
- `short_check`: switches off the short check before the first estimate of each kind of problem.
- `WindowEnd`: what an estimate passes on to the next window of a stream.
"""

from bilevel.distributed.workers import Workers, join_workers
from bilevel.integrations.outside_program import FailedAttempt, OutsideProgram
from bilevel.models.recomputed import Recomputed
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.short_check import short_check

__all__ = ["FailedAttempt", "OutsideProgram", "Recomputed", "WindowEnd", "Workers", "join_workers", "short_check"]
