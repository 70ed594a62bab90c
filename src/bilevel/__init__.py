"""Hypergradients at any scale, for PyTorch.

Describe a training loop once (`GradientDescent`, `Problem` or `BlackBox`). Then take its hypergradient by any method:
`Reverse`, `TruncatedReverse`, `Forward`, `ForwardGradient`, `StreamingForwardGradient`, `ZerothOrder`, `Implicit`,
`HessianFree`, `Penalty`, `SingleLoop`, `PersistentES`, `FirstOrder`.

Errors are in `bilevel.errors`. Names in `bilevel.experimental` may still change between minor versions.
"""

from bilevel import errors, experimental
from bilevel.attribution.attribute import attribute
from bilevel.batches import batches, no_batches
from bilevel.checking.check import check
from bilevel.comparison.compare import compare
from bilevel.epochs import epochs
from bilevel.estimators import (
    Estimate,
    Estimator,
    FirstOrder,
    Forward,
    ForwardGradient,
    HessianFree,
    Implicit,
    Penalty,
    PersistentES,
    Reverse,
    SingleLoop,
    StreamingForwardGradient,
    TruncatedReverse,
    ZerothOrder,
)
from bilevel.estimators.solve import solve
from bilevel.estimators.variates import CoarserProblem, Constant, RunningMean
from bilevel.integrations.calibration import calibrate
from bilevel.optim.update_rule import optimizer
from bilevel.planning.auto import Auto
from bilevel.planning.planner import Plan, plan, plan_from_sizes
from bilevel.problem import BlackBox, GradientDescent, Problem
from bilevel.solvers import ConjugateGradient, EmpiricalFisher, Neumann, Nystrom
from bilevel.training.fit import FitResult, fit
from bilevel.training.phases import Phase
from bilevel.training.settings import OuterUpdate, RunFolder
from bilevel.unrolling.freed_memory import keep_freed_memory
from bilevel.vectorised_tasks import Tasks

__version__ = "0.1.0a1"

__all__ = [
    "Auto",
    "BlackBox",
    "CoarserProblem",
    "ConjugateGradient",
    "Constant",
    "EmpiricalFisher",
    "Estimate",
    "Estimator",
    "FirstOrder",
    "FitResult",
    "Forward",
    "ForwardGradient",
    "GradientDescent",
    "HessianFree",
    "Implicit",
    "Neumann",
    "Nystrom",
    "OuterUpdate",
    "Penalty",
    "PersistentES",
    "Phase",
    "Plan",
    "Problem",
    "Reverse",
    "RunFolder",
    "RunningMean",
    "SingleLoop",
    "StreamingForwardGradient",
    "Tasks",
    "TruncatedReverse",
    "ZerothOrder",
    "attribute",
    "batches",
    "calibrate",
    "check",
    "compare",
    "epochs",
    "errors",
    "experimental",
    "fit",
    "keep_freed_memory",
    "no_batches",
    "optimizer",
    "plan",
    "plan_from_sizes",
    "solve",
]
