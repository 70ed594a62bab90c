"""The methods, one in each file, and what the author of another one needs.

Every estimator is called as `estimator(problem, meta, inner_batches, outer_batch, seed) -> Estimate`. To write one,
derive from `Estimator`; its `_estimate` gets the inner loop as an `Unroll` and returns an `Estimate`.
`docs/new_estimator.md` explains the steps.
"""

from bilevel.directions.distributions import Directions, seed_of_draw
from bilevel.estimators.base import Estimate, Estimator, like_meta, require_gradient_descent
from bilevel.estimators.first_order import FirstOrder
from bilevel.estimators.forward import Forward
from bilevel.estimators.forward_gradient import ForwardGradient
from bilevel.estimators.hessian_free import HessianFree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.persistent_es import PersistentES
from bilevel.estimators.reverse import Reverse
from bilevel.estimators.single_loop import SingleLoop
from bilevel.estimators.streaming_forward_gradient import StreamingForwardGradient
from bilevel.estimators.truncated_reverse import TruncatedReverse
from bilevel.estimators.variates import Variate
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.unrolling.inner_loop import WindowEnd
from bilevel.unrolling.tangents import Slopes, push_forward
from bilevel.unrolling.unroll import Unroll

__all__ = [
    "Directions",
    "Estimate",
    "Estimator",
    "FirstOrder",
    "Forward",
    "ForwardGradient",
    "HessianFree",
    "Implicit",
    "Penalty",
    "PersistentES",
    "Reverse",
    "SingleLoop",
    "Slopes",
    "StreamingForwardGradient",
    "TruncatedReverse",
    "Unroll",
    "Variate",
    "WindowEnd",
    "ZerothOrder",
    "like_meta",
    "push_forward",
    "require_gradient_descent",
    "seed_of_draw",
]
