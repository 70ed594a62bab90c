"""Hypergradients at any scale, for PyTorch.

Describe a training loop once (`GradientDescent`, `Problem` or `BlackBox`), then take its hypergradient by any method:
`Reverse`, `TruncatedReverse`, `Forward`, `ForwardGradient`, `ZerothOrder`, `Implicit`, `HessianFree`.
"""

from bilevel.allocator import keep_freed_memory
from bilevel.batches import batches, no_batches
from bilevel.comparison import Compared, compare
from bilevel.distributed import Workers, join_workers
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
    Auto,
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
from bilevel.inner_loop import Carried
from bilevel.linear_solvers import ConjugateGradient, Neumann, Nystrom
from bilevel.modules import ModuleView
from bilevel.optim import Optimizer, optimizer
from bilevel.outer_loop import OuterStep
from bilevel.outside_program import FailedAttempt, OutsideProgram
from bilevel.phases import Phase
from bilevel.planner import Plan, Planned, on_paper, plan
from bilevel.problem import BlackBox, Descent, GradientDescent, Problem
from bilevel.recomputing import Recomputed
from bilevel.training import FitResult, fit

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
