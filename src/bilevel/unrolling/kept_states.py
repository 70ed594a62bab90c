"""Inner states that an estimator keeps for the next window of a stream, in a form that checkpoints can store."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilevel import trees
from bilevel.optim.optimizer_state import BucketState, same_device
from bilevel.problem import Descent
from bilevel.trees import Tree


def stored(state: Tree) -> dict[str, Any]:
    """Return the content of an inner state as dicts, lists and tuples of tensors and numbers.

    The tree itself is left out, because it may hold views of modules; every state of the problem has the same tree. The
    layout of an optimiser's memory depends on the steps so far, so that is kept as it is.
    """
    optimizer = [tuple(bucket) for bucket in state.optimizer] if isinstance(state, Descent) else None
    return {"leaves": trees.detach(trees.leaves(without_optimizer(state))), "optimizer": optimizer}


def restored(content: dict[str, Any], like: Tree) -> Tree:
    """Return the inner state that `stored` took apart; `like` is any inner state of the same problem."""
    there, spec = trees.flatten(without_optimizer(like))
    leaves = [x.to(y.device) if isinstance(y, Tensor) else x for x, y in zip(content["leaves"], there, strict=True)]
    state = trees.unflatten(spec, leaves)
    if not isinstance(state, Descent):
        return state
    optimizer = [BucketState(*bucket) for bucket in content["optimizer"]]
    return state._replace(optimizer=same_device(optimizer, trees.split(state.params).differentiable))


def without_optimizer(state: Tree) -> Tree:
    """Return the state without the optimiser's memory, whose layout depends on the steps so far."""
    return state._replace(optimizer=[]) if isinstance(state, Descent) else state
