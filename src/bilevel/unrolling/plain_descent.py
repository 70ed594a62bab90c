"""An inner loop without derivatives, in which an optimiser updates leaf tensors as in a training loop by hand.

`InnerLoop.descend` computes each step as a pure function, since estimators compute steps again from states that they
kept. Here each step is computed once, so the parameters are leaf tensors that the optimiser updates in place. Batches,
random numbers and the treatment of modules are those of `InnerLoop.step`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.errors import MissingDerivativeError
from bilevel.models import parameter_hooks
from bilevel.models.buffers import values_of
from bilevel.models.conversion import modules_in_use, with_buffers
from bilevel.models.module_view import ModuleView, views_in
from bilevel.models.sharing import presented
from bilevel.optim.in_place import InPlaceOptimizer, can_update_in_place
from bilevel.problem import Descent, GradientDescent, nothing_to_descend_on, require_scalar
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.inner_loop import InnerLoop


@torch.enable_grad()
def plain_final_state(run: InnerLoop) -> Tree:
    """Return θ_T, computed in T units, without a graph."""
    state, problem = run.start(), run.problem.as_gradient_descent
    if problem is not None and problem.backend is None:
        parameters = trees.split(state.params).differentiable
        if can_update_in_place(problem.optimizer, parameters, run.meta, state.params):
            return _descended_in_place(run, problem, state)
    return run.descend(state)


def _descended_in_place(run: InnerLoop, problem: GradientDescent, state: Descent) -> Descent:
    parts = trees.split(state.params)
    leaves = [t.detach().clone().requires_grad_() for t in parts.differentiable]
    params = parts.rebuild(leaves)
    given, cells = with_buffers(params, state.buffers)
    meta, hooked = presented(run.meta), parameter_hooks.are_registered(params)
    optimizer = InPlaceOptimizer(problem.optimizer, leaves, params)
    watched = [("state", leaf) for leaf in leaves]
    watched += [("meta", leaf) for leaf in trees.leaves(run.meta) if not leaf.is_inference()]

    in_use, views, views_of_meta = modules_in_use(params, run.meta), views_in(given), views_in(meta)

    def gradients_at(t: int, batch: Any) -> Any:
        value = require_scalar(problem.inner_loss(given, meta, batch), "inner_loss")
        if not value.requires_grad:
            raise nothing_to_descend_on()
        if t == 0:
            _refuse_reentrant_checkpoints(value)
        # Activation checkpointing computes layers again in the backward pass, and may update throwaway buffers there.
        throwaway = views_in(with_buffers(params, values_of(cells))[0]) if cells else views
        with _standing([*throwaway, *views_of_meta]):
            return torch.autograd.grad(value, leaves, allow_unused=True)

    def step(t: int, batch: Any) -> None:
        run.require_one_device(t, state, run.meta, batch)
        versions = [leaf._version for _, leaf in watched]
        with run.watched_step(t, params, run.meta), in_use:
            gradients = gradients_at(t, batch)
        for (place, leaf), version in zip(watched, versions, strict=True):
            if leaf._version != version:
                raise ValueError(argument_checks.changed_in_place(place))
        if all(gradient is None for gradient in gradients):
            raise nothing_to_descend_on()
        for cell in cells.values():
            cell.value = cell.value.detach()
        if hooked:
            gradients = parameter_hooks.applied(params, leaves, gradients)
        optimizer.step(gradients, run.meta)

    with autodiff.named_missing_derivatives():
        for t in range(run.steps):
            run.at_step(t, lambda batch, t=t: step(t, batch))
    moved = [leaf.detach() for leaf in leaves]
    return Descent(parts.rebuild(moved), optimizer.state(), run.steps, values_of(cells) if cells else state.buffers)


def _standing(views: list[ModuleView]) -> AbstractContextManager[Any]:
    if len(views) == 1:
        return views[0].standing_in()
    stack = ExitStack()
    for view in views:
        stack.enter_context(view.standing_in())
    return stack


def _refuse_reentrant_checkpoints(value: Tensor) -> None:
    """Raise where a layer's gradient would be lost: `torch.autograd.grad` does not enter these checkpoints."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise MissingDerivativeError(
                "inner_loss uses torch.utils.checkpoint with use_reentrant=True, whose gradients reach .grad alone, so "
                "the layers inside would not be trained; write use_reentrant=False "
                "(gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))"
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
