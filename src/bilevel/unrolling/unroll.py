"""One inner loop with derivatives, computed forwards with tangents or backwards with cotangents.

The notation, also in the estimators, is: A_t = ∂θ_t/∂θ_{t−1} and B_t = ∂θ_t/∂φ for one step, Z_t = dθ_t/dφ,
d = ∂outer/∂θ_T, c = ∂outer/∂φ. Then ∇h = d Z_T + c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.epochs import Epochs
from bilevel.errors import NoDependenceError
from bilevel.models.conversion import as_tree
from bilevel.models.numpy_forms import as_tensors
from bilevel.problem import as_problem
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks
from bilevel.unrolling.diagnosis import require_dependence, require_finite
from bilevel.unrolling.inner_loop import InnerLoop, WindowEnd
from bilevel.unrolling.replay import GoingBack, compare_values
from bilevel.unrolling.step_products import Pulled


class Losses(NamedTuple):
    """How many outer losses there are, and how many of them are pulled back at once."""

    number: int | None = None
    """m for a vector `[m]` of outer losses, `None` for a scalar."""
    at_once: int | None = None
    """How many cotangents share a backward pass through the graph of a step; `None` for all."""

    @classmethod
    def of(cls, value: Tensor, at_once: int | None = None) -> Losses:
        """Return the number of losses that an outer loss holds."""
        return cls(len(value) if value.ndim else None, at_once)


ONE_LOSS = Losses()


@dataclass(frozen=True)
class Unroll(InnerLoop):
    """An inner loop, and the propagation of derivatives through it. `unroll` makes it after checking the arguments."""

    _values: list[tuple[str, Tensor]] = field(init=False, repr=False, compare=False, default_factory=list)
    """The kind and the outer loss of the first run of the inner loop. Later runs must give the same outer loss."""

    def same_value(self, kind: str, value: Tensor) -> None:
        """Raise a ReplayError if this inner loop gave another outer loss when it was run again.

        Args:
            kind: the way in which it was run.
            value: the outer loss.
        """
        compare_values(self, self._values, kind, value)

    # -- forward: the start of tangents (their propagation through the steps: bilevel.unrolling.tangents) ------------

    def push_outer(self, pushed: autodiff.Pushed, directions: list[Tensor]) -> autodiff.Pushed:
        """Compute the outer loss and its slopes d y_T + c v, `[k]`; `[k, m]` for m outer losses."""

        def by_reverse() -> autodiff.Pushed:
            value, d, c = self.outer_cotangents(pushed.value)
            return autodiff.Pushed(value, [slopes_along(value, [*d, *c], [*pushed.tangents, *directions])])

        arguments, tangents = [pushed.value, self.meta], [pushed.tangents, directions]
        return autodiff.push(self.outer_loss, arguments, tangents, self.memory, "outer loss", by_reverse)

    def push_init(self, directions: list[Tensor]) -> autodiff.Pushed:
        """Compute θ_0 and its tangents B_0 v.

        An initial state that does not depend on φ, such as a newly built network, is made outside of forward mode,
        because modules can't be moved or cast inside it.
        """
        plain = autodiff.Transpose(self.init, [self.meta])
        if plain.connected:
            return autodiff.push(self.init, [self.meta], [directions], self.memory, "init")
        count = len(directions[0])
        tangents = [t.new_zeros(count, *t.shape) for t in trees.split(plain.value).differentiable]
        return autodiff.Pushed(plain.value, tangents)

    # -- backward: cotangents ----------------------------------------------------------------------------------

    def outer_cotangents(self, state: Tree, final: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the outer loss h at a state, d = ∂outer/∂θ and c = ∂outer/∂φ.

        `final` says that the state is θ_T, where every run of this inner loop must give the same outer loss. For a
        vector of m outer losses, the leaves of d and c are `[m, *leaf.shape]`.
        """
        outer = autodiff.Transpose(self.outer_loss, [state, self.meta], self.memory)
        value: Tensor = outer.value
        count = len(value) if value.ndim else None
        if count is None:
            d, c = outer([torch.ones_like(value)], keep=False)
        else:
            d, c = outer.many_or_none([torch.eye(count).to(value)])
        if all(part is None for part in d):
            raise NoDependenceError(
                "outer_loss does not depend on the inner state, so no inner step has an effect on it; compute it from "
                "the parameters or state it is given (for a module: call the model passed to outer_loss, not one from "
                "outside), and keep .detach(), .item() and torch.no_grad() out of it"
            )
        derivatives = autodiff.fill_zeros(d, state, count), autodiff.fill_zeros(c, self.meta, count)
        require_finite(self, value, state, derivatives)
        if final:
            self.same_value("plain", value)
        return value, *derivatives

    def pull_back_step(self, t: int, state: Tree, d: list[Tensor], losses: Losses = ONE_LOSS) -> Pulled:
        """Compute θ_{t+1}, d A_t and d B_t for the step from θ_t, by one evaluation of the step and its graph."""

        def step(state: Tree, meta: Tree) -> Tree:
            return self.step(t, state, meta)

        after, (down, across) = self._pulled_back(step, [state, self.meta], d, losses)
        return Pulled(after, down, across)

    def pull_back(
        self, trail: Iterable[tuple[int, Tree]], last: Tree, d: list[Tensor], losses: Losses = ONE_LOSS
    ) -> list[Tensor]:
        """Compute Σ_t d_t B_t over the steps in backward order.

        From the last step to the first: sum ← sum + d B_t, d ← d A_t, each a vector-Jacobian product of one step. The
        memory is that of the graph of one step, and of θ_{t+1}, with which the step from θ_t is compared.

        Args:
            trail: the pairs (t, θ_t) in backward order.
            last: θ_T.
            d: ∂outer/∂θ_T. It is changed in place to the cotangent of the trail's first state.
            losses: for m outer losses, m. The leaves of d and of the sum are then `[m, *leaf.shape]`, and each step is
                computed once for all of them.

        Raises:
            ReplayError: a step gave another state when it was computed again.
        """

        def again(t: int, state: Tree) -> Tree:
            return autodiff.Transpose(lambda state, meta: self.step(t, state, meta), [state, self.meta]).value

        check = GoingBack(self, again)
        total = [torch.zeros_like(leaf) for leaf in trees.leaves(self.meta)]
        if losses.number is not None:
            total = [zeros.expand(losses.number, *zeros.shape) for zeros in total]
        for t, state in trail:
            pulled = self.pull_back_step(t, state, d, losses)
            check.compare(t, state, last, pulled.after)
            d[:] = autodiff.fill_zeros(pulled.down, state, losses.number)
            _accumulate(total, pulled.across)
            last = state
        check.finish()
        return total

    def pull_back_init(self, d: list[Tensor], total: list[Tensor], losses: Losses = ONE_LOSS) -> None:
        """Add d B_0 to the total, which is the contribution of the initial state's dependence on φ."""
        _, (across,) = self._pulled_back(self.init, [self.meta], d, losses)
        _accumulate(total, across)

    def _pulled_back(
        self, function: Callable[..., Tree], arguments: list[Tree], d: list[Tensor], losses: Losses
    ) -> tuple[Tree, list[list[Tensor | None]]]:
        if losses.number is None:
            return autodiff.pull_back(function, arguments, d)
        return autodiff.pull_back_many(function, arguments, d, self.memory, losses.at_once)

    def add_explicit(self, through: list[Tensor], c: list[Tensor], from_start: bool = True) -> list[Tensor]:
        """Compute ∇h = d Z_T + c from both parts.

        Args:
            through: d Z_T.
            c: ∂outer/∂φ.
            from_start: whether d Z_T includes the dependence of θ_0 on φ.

        Raises:
            NoDependenceError: d Z_T is zero because the inner loop does not depend on φ.
        """
        if not any(bool(part.any()) for part in through):
            require_dependence(self, from_start)
        return [inner + outer for inner, outer in zip(through, c, strict=True)]

    # -- connections -------------------------------------------------------------------------------------------

    def require_connections(self, moved: bool, slopes: Tensor, state: Tree) -> None:
        """Raise a NoDependenceError if tangents or slopes are zero because something is not connected."""
        if not moved:
            require_dependence(self)
        if not bool(slopes.any()):
            self.outer_cotangents(state)


def unroll(
    problem: Any, meta: Any, inner_batches: Any, outer_batch: Any, seed: int, carried: WindowEnd | None = None
) -> Unroll:
    """Check the arguments of an estimator, and combine them to an inner loop with derivatives."""
    randomness.check_seed(seed)
    argument_checks.outside_of_inference_mode()
    problem = as_problem(problem)
    inner_batches = problem.batches_of(inner_batches.at(seed) if isinstance(inner_batches, Epochs) else inner_batches)
    if problem.is_black_box and carried is not None:
        raise ValueError("a BlackBox solves from the beginning each time, so nothing can be carried into it")
    problem.check_compiled_again()
    meta = as_tree(as_tensors(meta))
    argument_checks.meta_parameters(meta)
    argument_checks.one_device(meta=meta, outer_batch=outer_batch)
    argument_checks.finite(meta)
    run = Unroll(problem, trees.detach(meta), inner_batches, outer_batch, seed, carried)
    if carried is None and run.steps and not problem.is_examined:
        with torch.enable_grad():
            look = randomness.evaluate(lambda _: problem.examine(run.meta), seed, randomness.INIT)
            if look is not None:
                run.at_step(0, look)
    return run


def follow_later_updates(run: Unroll) -> bool:
    """Look for tensors of modules that later inner steps update and the first does not; return whether there are any.

    They are part of the inner state from then on. The inner loss is computed once for each step, at θ_0.
    """
    problem = run.problem.as_gradient_descent
    if problem is None or run.carried is not None:
        return False
    known = problem._discovered.names
    with torch.enable_grad():
        look = randomness.evaluate(lambda _: problem.examine(run.meta), run.seed, randomness.INIT)
        if look is not None:
            for t in range(run.steps):
                run.at_step(t, look)
    return problem._discovered.names != known


def slopes_along(value: Tensor, derivatives: list[Tensor], directions: list[Tensor]) -> Tensor:
    """Return the slopes of an outer loss along k directions: `[k]`, or `[k, m]` if the value is a vector `[m]`.

    Args:
        value: the outer loss.
        derivatives: its derivative, one tensor for each leaf, with a leading axis of length m if it is a vector.
        directions: `[k, *leaf.shape]` for each leaf.
    """
    if not value.ndim:
        return trees.dots(derivatives, directions)
    return torch.stack([trees.dots([part[j] for part in derivatives], directions) for j in range(len(value))], 1)


def _accumulate(c: list[Tensor], parts: list[Tensor | None]) -> None:
    for i, part in enumerate(parts):
        if part is not None:
            c[i] = c[i] + part
