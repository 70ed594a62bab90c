"""The methods, one a file, all called `estimator(problem, meta, inner_batches, outer_batch, seed) -> Estimate`."""

from bilevel.estimators.base import Estimate, Estimator
from bilevel.estimators.forward import Forward
from bilevel.estimators.forward_gradient import ForwardGradient
from bilevel.estimators.hessian_free import HessianFree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.reverse import Reverse
from bilevel.estimators.truncated_reverse import TruncatedReverse
from bilevel.estimators.zeroth_order import ZerothOrder

__all__ = [
    "Estimate",
    "Estimator",
    "Forward",
    "ForwardGradient",
    "HessianFree",
    "Implicit",
    "Reverse",
    "TruncatedReverse",
    "ZerothOrder",
]
