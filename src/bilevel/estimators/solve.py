"""`solve` runs the inner loop alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.estimators.base import Estimator
from bilevel.estimators.differentiable_value import refuse_graph_of_backward
from bilevel.estimators.reverse_pass import ReversePass
from bilevel.models.conversion import original_tensors
from bilevel.models.numpy_forms import as_tensors
from bilevel.problem import BilevelProblem, Unrollable, as_problem
from bilevel.unrolling import diagnosis
from bilevel.unrolling.plain_descent import plain_final_state
from bilevel.unrolling.unroll import Unroll, unroll


def solve(
    problem: BilevelProblem | Unrollable,
    meta: Any,
    inner_batches: Any = None,
    seed: int = 0,
    estimator: Estimator | None = None,
) -> Any:
    """Run the inner loop alone, and return its final state θ_T(φ).

    Args:
        problem: a `Problem`, `GradientDescent` or `BlackBox`; its outer loss is not called.
        meta: φ: a tensor, a tree of tensors, or an `nn.Module`. It is not changed.
        inner_batches: as in the call of an estimator: T batches, or the whole number T.
        seed: determines every random number. The state is that of an estimate with the same seed.
        estimator: makes the state differentiable with respect to `meta`: `Reverse(...)` exactly, in the memory and with
            the offload of its settings; `TruncatedReverse(steps)`, `Implicit(...)` or `HessianFree(...)` with their
            bias. `None` for a state without a graph.

    Returns:
        The state, as in `Estimate.state`. For a `GradientDescent` its `params` are the trained parameters in the form
        in which they were passed. Those of a module can be called as the module, and `params.state_dict()` is what
        `load_state_dict` takes. With an estimator, all floating-point tensors of the state have one graph, to the meta
        tensors that require gradients.

    Cost: T units without an estimator, and 16 to 38 % more time than a training loop by hand on three
    small networks (benchmarks/results/solve.md).
    With one, the backward pass costs what the estimator's way back costs (3T and the steps computed again, for
    `Reverse`). A backward pass uses up the kept states. A later one after `retain_graph=True` runs the inner loop once
    more. `create_graph=True` raises a `MissingDerivativeError`. Kept states and temporary files live until the state's
    graph is freed. Bias: that of the estimator.

    Raises:
        NonFiniteError: the final state, or in the backward pass the gradient, is NaN or infinite.
        NoDependenceError: in the backward pass, the state does not depend on the meta parameters.
        TypeError: the estimator has no reverse pass, or the problem is a `BlackBox` and an estimator is given.

    A validation loss of one's own on the trained model:

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda model, decay, x: (model(x) - 1).square().mean() + decay * model.weight.square().sum(),
    ...     outer_loss=lambda model, decay, batch: model(batch).sum(),
    ...     params=torch.nn.Linear(2, 1, bias=False),
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> decay, x = torch.tensor(0.0, requires_grad=True), torch.eye(2)
    >>> state = bilevel.solve(problem, decay, [x] * 20, estimator=bilevel.Reverse())
    >>> loss = (state.params(2 * x) - 1).square().mean()
    >>> loss.backward()
    >>> round(loss.item(), 3), round(decay.grad.item(), 3)  # dθ/dφ = −2 at θ = 1
    (1.0, -8.0)
    """
    if estimator is not None and not isinstance(estimator, Estimator):
        raise TypeError(f"estimator is {estimator!r} ({type(estimator).__name__}); write estimator=bilevel.Reverse()")
    problem = as_problem(problem)
    if estimator is not None:
        estimator.require_derivatives_of(problem)
    run = unroll(problem, meta, inner_batches, None, seed)
    tensors = original_tensors(as_tensors(meta))
    with randomness.preserved():
        method = None if estimator is None else estimator.resolved(run)
        if method is not None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            with torch.enable_grad(), method.kernels(run):
                way = method.reverse_pass(run)
            state = way.state
            diagnosis.require_finite_solution(run, state)
            found = _State.apply(run, method, way, *tensors)
            state = trees.split(state).rebuild(found)
        else:
            if method is not None and type(method).reverse_pass is Estimator.reverse_pass:
                method.reverse_pass(run)  # raises
            state = plain_final_state(run)
            diagnosis.require_finite_solution(run, state)
    return run.problem.presented(state)


class _State(torch.autograd.Function):
    """The differentiable leaves of the final state as a function of the meta tensors."""

    @staticmethod
    def forward(ctx: Any, run: Unroll, method: Estimator, way: ReversePass, *meta: Tensor) -> Any:  # noqa: ARG004
        parts = trees.split(way.state)
        found = tuple(t.detach() for t in parts.differentiable)
        ctx.run, ctx.method, ctx.way = run, method, way
        ctx.parts = parts.without_differentiable()
        way.state = None
        # PyTorch sees to it that the state is not changed in place, and that it is freed with the graph.
        ctx.save_for_backward(*found)
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        refuse_graph_of_backward("the state of bilevel.solve", "reverse pass")
        last = ctx.parts.rebuild([t.detach() for t in ctx.saved_tensors])
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        run: Unroll = ctx.run
        with torch.enable_grad(), randomness.preserved(), autodiff.noted_routes(), ctx.method.kernels(run):
            through = ctx.way.pull_back(last, [c.detach() for c in cotangents], keep)
        diagnosis.require_finite_solution(run, last, through)
        if not any(bool(part.any()) for part in through) and any(bool(c.any()) for c in cotangents):
            diagnosis.require_dependence(run, ctx.way.from_start)
        if not keep:
            ctx.way.close()
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(g if wanted else None for g, wanted in zip(through, needed, strict=True))
