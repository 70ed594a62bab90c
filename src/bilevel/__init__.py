"""Hypergradients at any scale, for PyTorch.

Describe a training loop once (`GradientDescent`, `Problem` or `BlackBox`), then take its hypergradient by any method:
`Reverse`, `TruncatedReverse`, `Forward`, `ForwardGradient`, `ZerothOrder`, `Implicit`, `HessianFree`.
"""

from bilevel.batches import batches, no_batches
from bilevel.comparison.compare import Compared, compare
from bilevel.distributed.workers import Workers, join_workers
from bilevel.errors import (
    BilevelError,
    CheckpointError,
    CompileError,
    DataError,
    MemoryBudgetError,
    MissingDerivativeError,
    NoDependenceError,
    NonFiniteError,
    SolverError,
    Terminated,
    WorkerError,
)
from bilevel.estimators import (
    Estimate,
    Estimator,
    Forward,
    ForwardGradient,
    HessianFree,
    Implicit,
    Reverse,
    TruncatedReverse,
    ZerothOrder,
)
from bilevel.estimators.control_variates import CoarserProblem, Constant, RunningMean
from bilevel.integrations.outside_program import FailedAttempt, OutsideProgram
from bilevel.models.module_view import ModuleView
from bilevel.models.recomputed import Recomputed
from bilevel.optim.update_rule import Optimizer, optimizer
from bilevel.planning.auto import Auto
from bilevel.planning.planner import Plan, Planned, on_paper, plan
from bilevel.problem import BlackBox, Descent, GradientDescent, Problem
from bilevel.solvers import ConjugateGradient, Neumann, Nystrom
from bilevel.training.fit import FitResult, fit
from bilevel.training.outer_loop import OuterStep
from bilevel.training.phases import Phase
from bilevel.unrolling.freed_memory import keep_freed_memory
from bilevel.unrolling.inner_loop import Carried

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "BilevelError",
    "BlackBox",
    "Carried",
    "CheckpointError",
    "CoarserProblem",
    "Compared",
    "CompileError",
    "ConjugateGradient",
    "Constant",
    "DataError",
    "Descent",
    "Estimate",
    "Estimator",
    "FailedAttempt",
    "FitResult",
    "Forward",
    "ForwardGradient",
    "GradientDescent",
    "HessianFree",
    "Implicit",
    "MemoryBudgetError",
    "MissingDerivativeError",
    "ModuleView",
    "Neumann",
    "NoDependenceError",
    "NonFiniteError",
    "Nystrom",
    "Optimizer",
    "OuterStep",
    "OutsideProgram",
    "Phase",
    "Plan",
    "Planned",
    "Problem",
    "Recomputed",
    "Reverse",
    "RunningMean",
    "SolverError",
    "Terminated",
    "TruncatedReverse",
    "WorkerError",
    "Workers",
    "ZerothOrder",
    "batches",
    "compare",
    "fit",
    "join_workers",
    "keep_freed_memory",
    "no_batches",
    "on_paper",
    "optimizer",
    "plan",
]
