"""Diagnosis of results that are not finite or do not depend on φ, by a second run of the inner loop.

A check of every step during the first run would cost a synchronisation for each step on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import NoDependenceError, NonFiniteError
from bilevel.problem import Descent, GradientDescent
from bilevel.trees import Tree
from bilevel.unrolling.inner_loop import InnerLoop


def require_finite(run: InnerLoop, value: Tensor, state: Tree, derivatives: Tree = ()) -> None:
    """Raise a NonFiniteError unless the outer loss, the final state and derivatives of either are finite.

    The state of a black box is not checked. If all is well, a GPU is waited for once.
    """
    if trees.all_finite([value, () if run.problem.is_black_box else state, derivatives]):
        return
    if not bool(torch.isfinite(value).all()):
        raise non_finite(run, "the outer loss", value, state)
    if not run.problem.is_black_box and not trees.all_finite(state):
        raise non_finite(run, "the final inner state", value, state)
    if not trees.all_finite(derivatives):
        raise non_finite(run, "the hypergradient", value, state)


def require_finite_solution(run: InnerLoop, state: Tree, derivatives: Tree = ()) -> None:
    """Raise unless the final state of an inner loop without an outer loss is finite, and derivatives through it."""
    if not run.problem.is_black_box and not trees.all_finite(state):
        raise non_finite(run, "the final inner state", None, state)
    if not trees.all_finite(derivatives):
        raise non_finite(run, "the gradient of the meta parameters", None, state)


@torch.enable_grad()
def non_finite(run: InnerLoop, what: str, value: Tensor | None, state: Tree) -> NonFiniteError:
    """Return the error for a result that is not finite. The inner loop is run again to find the first such step.

    `value` is the outer loss, if there is one.
    """
    what, final = f"{what} is not finite", state
    if run.problem.is_black_box and value is not None:
        place = _first_not_finite("state", state)
        found = f"{place} holds NaN or infinity already" if place else "the state is finite"
        return NonFiniteError(f"{what}: outer_loss is {_shown(value)} for the state that solve returned; {found}")
    state = run.start()
    place = _first_not_finite("state", state)
    if place:
        return NonFiniteError(
            f"{what}: {place} holds NaN or infinity before the first inner step; check the initial parameters"
        )
    for t in range(run.steps):
        after = trees.detach(run.step(t, state, run.meta))
        place = _first_not_finite("state", after)
        if place:
            message = f"{what}: inner step {t} of {run.steps} (counted from 0) made {place} NaN or infinite"
            return NonFiniteError(f"{message}; {_inner_fault(run, t, state)}", t, state)
        state = after
    if value is not None and not bool(torch.isfinite(value).all()):
        message = f"{what}: outer_loss is {_shown(value)}, though all {run.steps} inner states are finite"
        return NonFiniteError(f"{message}; check outer_loss and outer_batch", None, final)
    return NonFiniteError(
        f"{what}, though {'' if value is None else f'outer_loss = {_shown(value)} and '}all {run.steps} inner "
        "states are: a derivative "
        "overflows or is undefined somewhere (√ or log at 0, or an inner loop so unstable that its derivative "
        "explodes: a smaller inner learning rate or fewer steps help)",
        None,
        final,
    )


def _shown(value: Tensor) -> str:
    """The outer loss, or the entry of a vector of them to look at, as text."""
    if not value.ndim:
        return f"{value.item():.6g}"
    broken = (~torch.isfinite(value)).nonzero()
    number = int(broken[0]) if len(broken) else 0
    return f"{value[number].item():.6g} (entry {number} of {len(value)})"


def _inner_fault(run: InnerLoop, t: int, state: Tree) -> str:
    """Return a sentence on the likely cause of a result that is not finite, in an inner step from a finite state."""
    if (problem := run.problem.as_gradient_descent) is None:
        return "the state before it is kept in last_finite_state"
    loss = _inner_loss(run, problem, t, state)
    if bool(torch.isfinite(loss)):
        return f"inner_loss was {loss.item():.6g} there: a smaller inner learning rate is the usual cure"
    return f"inner_loss was {loss.item()} there: check the batch, or lower the inner learning rate"


def _inner_loss(run: InnerLoop, problem: GradientDescent, t: int, state: Descent) -> Tensor:
    """Compute the inner loss of step t at a state."""
    return run.at_step(t, lambda batch: problem.inner_value(state, run.meta, batch))


def require_dependence(run: InnerLoop, from_start: bool = True) -> None:
    """Raise a NoDependenceError unless the final state is connected to φ.

    A leaf of θ_{t+1} is connected if the step computes it from φ or from a connected leaf of θ_t. A connection whose
    derivative happens to be zero counts as well. The cost is T units, so the function is called only if all derivatives
    are zero.

    Args:
        run: the inner loop.
        from_start: whether a connection through θ_0 counts.
    """
    run, meta = run.eager, autodiff.start_graph(run.meta)  # in compiled code, all leaves appear to be connected
    latest = None
    with torch.enable_grad():
        state = run.init(meta) if from_start else run.start()
        if autodiff.has_graph(state):
            latest = "the initial one does"
        for t in range(run.steps):
            state = run.step(t, trees.map_leaves(_restart_graph, state), meta)
            if autodiff.has_graph(state):
                latest = f"the one after inner step {t} does"
    if autodiff.has_graph(state):
        require_finite_losses(run)
        return
    if latest is not None:
        fault = f"the final inner state does not depend on the meta parameters: {latest}, and a later step cuts it off"
    elif from_start:
        fault = (
            "the inner loop does not depend on the meta parameters: neither its initial state nor any of its "
            f"{run.steps} steps uses them"
        )
    else:
        fault = (
            f"none of the {run.steps} inner steps uses the meta parameters, and going back through the last steps "
            "alone does not reach the initial state; if they are used there, take Reverse()"
        )
    raise NoDependenceError(
        f"{fault}; use meta in inner_loss (in a term that has params in it as well) or in step, in a setting of "
        "the optimiser, or in the initial parameters, without .detach(), .item() or torch.no_grad() on the way"
    )


@torch.enable_grad()
def require_finite_losses(run: InnerLoop) -> None:
    """Raise a NonFiniteError if an inner loss is not finite and its gradient is, as for the mean over an empty batch.

    The cost is T units, so the function is called only if all derivatives are zero.
    """
    if (problem := run.problem.as_gradient_descent) is None:
        return
    state = run.start()
    for t in range(run.steps):
        loss = _inner_loss(run, problem, t, state)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"inner_loss was {loss.item()} at inner step {t} of {run.steps} (counted from 0), with a gradient of "
                "zero, so no hypergradient comes through; check the batch: is it empty?",
                t,
                state,
            )
        state = run.descend(state, t, t + 1)


def _first_not_finite(name: str, tree: Tree) -> str | None:
    """Return the expression for the first leaf with NaN or infinity, or `None`."""
    if trees.all_finite(tree):
        return None
    return next(place for place, leaf in trees.named_leaves(tree, name) if not trees.all_finite(leaf))


def _restart_graph(leaf: Any) -> Any:
    """Return the same value without its graph. It starts a new graph if it had one."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
