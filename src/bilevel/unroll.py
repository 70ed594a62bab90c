"""The inner loop of one problem at one φ: run plainly, with tangents, or backwards with cotangents.

Notation, here and in the estimators: A_t = ∂θ_t/∂θ_{t−1} and B_t = ∂θ_t/∂φ of one step, Z_t = dθ_t/dφ,
d = ∂outer/∂θ_T, c = ∂outer/∂φ; so ∇h = d Z_T + c.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import autodiff, randomness, trees
from bilevel.batches import Batches, no_batches, require_batches
from bilevel.errors import NoDependenceError, NonFiniteError
from bilevel.modules import as_tree, modules_in, refuse_running_statistics
from bilevel.problem import BlackBox, GradientDescent, Unrollable, require_scalar
from bilevel.trees import Tree


class Slopes(NamedTuple):
    """What pushing k directions through the inner loop gives."""

    value: Tensor
    state: Tree
    slopes: Tensor
    """∇h · v for every direction, `[k]`."""
    moved: bool
    """Whether any direction moves the final state at all."""


@dataclass(frozen=True)
class Unroll:
    """One inner loop: a problem, a point φ, the batches and the seed. Every method may be called again, and again
    gives the same numbers. Made by `unroll`, which checks what the user passed.
    """

    problem: Unrollable | BlackBox
    meta: Tree
    inner_batches: Batches
    outer_batch: Any
    seed: int

    @property
    def steps(self) -> int:
        """T, the number of inner steps; 0 for a black box."""
        return 0 if isinstance(self.problem, BlackBox) else len(self.inner_batches)

    @property
    def meta_size(self) -> int:
        """N, the number of meta parameters."""
        return trees.size(self.meta)

    # -- the three functions of the problem, seeded ------------------------------------------------------------

    def init(self, meta: Tree) -> Tree:
        """θ_0, or the whole solve of a black box."""
        start = self.problem.solve if isinstance(self.problem, BlackBox) else self.problem.init
        with randomness.torch_seeded(self.seed, randomness.INIT):
            return start(meta)

    def step(self, t: int, state: Tree, meta: Tree) -> Tree:
        """θ_{t+1} from θ_t, for t from 0 to T − 1."""
        assert not isinstance(self.problem, BlackBox)
        batch = self.inner_batches[t]
        if t == 0:
            _require_one_device(meta=meta, inner_state=state, inner_batch=batch)
        with self.seeded_step(t):
            after = self.problem.step(state, meta, batch)
        if t == 0:
            _require_same_structure(state, after)
        return after

    def seeded_step(self, t: int) -> AbstractContextManager[None]:
        """Inside, torch draws the random numbers of inner step t."""
        return randomness.torch_seeded(self.seed, randomness.STEP, t)

    def outer_loss(self, state: Tree, meta: Tree) -> Tensor:
        """The outer loss at a state."""
        with randomness.torch_seeded(self.seed, randomness.OUTER):
            return require_scalar(self.problem.outer_loss(state, meta, self.outer_batch), "outer_loss")

    # -- plain -------------------------------------------------------------------------------------------------
    # Nothing here requires gradients, so no graph is kept. Gradients stay enabled all the same: a user's step or
    # solver may take gradients of its own with torch.autograd.

    @torch.enable_grad()
    def start(self) -> Tree:
        """θ_0 at φ, without a graph."""
        state = self.init(self.meta)
        for module in modules_in(state):
            refuse_running_statistics(module, "params")
        if not isinstance(self.problem, BlackBox) and not trees.split(state).differentiable:
            raise TypeError(
                f"init returned {state!r} ({type(state).__name__}); the inner state must hold a floating-point tensor, "
                "such as torch.tensor(0.0) for one number"
            )
        return trees.detach(state)

    @torch.enable_grad()
    def descend(self, state: Tree, start: int = 0, stop: int | None = None) -> Tree:
        """θ_stop from θ_start, without a graph; one unit per step."""
        for t in range(start, self.steps if stop is None else stop):
            state = trees.detach(self.step(t, state, self.meta))
        return state

    @torch.enable_grad()
    def value(self) -> tuple[Tensor, Tree]:
        """The outer loss h and the final state."""
        state = self.descend(self.start())
        return self.outer_loss(state, self.meta).detach(), state

    def at(self, meta: Tree) -> Unroll:
        """The same inner loop at another φ."""
        return replace(self, meta=meta)

    # -- forward: tangents -------------------------------------------------------------------------------------

    def push_forward(self, directions: list[Tensor]) -> Slopes:
        """The outer loss h and its slopes along k directions v, `[k, *leaf.shape]` for each leaf of φ, in one pass.

        y_0 = B_0 v, y_t = A_t y_{t−1} + B_t v, slope = d y_T + c v. Memory: one state and k tangents of it, whatever T.
        """
        with torch.no_grad():
            pushed = self._push_init(directions)
            for t in range(self.steps):
                pushed = autodiff.push_forward(
                    lambda state, meta, t=t: self.step(t, state, meta),
                    [pushed.value, self.meta],
                    [pushed.tangents, directions],
                )
            moved = any(bool(tangent.any()) for tangent in pushed.tangents)
            outer = autodiff.push_forward(self.outer_loss, [pushed.value, self.meta], [pushed.tangents, directions])
        return Slopes(outer.value, pushed.value, outer.tangents[0], moved)

    def _push_init(self, directions: list[Tensor]) -> autodiff.Pushed:
        """θ_0 and its tangents B_0 v.

        An initial state without φ, such as a freshly built network, is made outside of forward mode, inside which
        modules can't be moved or cast.
        """
        plain = autodiff.Transpose(self.init, [self.meta])
        if plain.connected:
            return autodiff.push_forward(self.init, [self.meta], [directions])
        count = len(directions[0])
        tangents = [t.new_zeros(count, *t.shape) for t in trees.split(plain.value).differentiable]
        return autodiff.Pushed(plain.value, tangents)

    # -- backward: cotangents ----------------------------------------------------------------------------------

    def outer_cotangents(self, state: Tree) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The outer loss h at a final state, d = ∂outer/∂θ_T and c = ∂outer/∂φ."""
        value, (d, c) = autodiff.pull_back(self.outer_loss, [state, self.meta])
        if all(part is None for part in d):
            raise NoDependenceError(
                "outer_loss does not depend on the inner state, so no inner step has an effect on it; compute it from "
                "the parameters or state it is given (for a module: call the model passed to outer_loss, not one from "
                "outside), and keep .detach(), .item() and torch.no_grad() out of it"
            )
        derivatives = autodiff.fill_zeros(d, state), autodiff.fill_zeros(c, self.meta)
        self.require_finite(value, state, derivatives)
        return value, *derivatives

    def pull_back(self, trail: Iterable[tuple[int, Tree]], d: list[Tensor]) -> list[Tensor]:
        """Σ_t d_t B_t over a trail of (t, θ_t) that runs backwards; `d` is changed in place.

        From the last step down: sum ← sum + d B_t, d ← d A_t, each a vector-Jacobian product of one step. `d` ends as
        the cotangent of the trail's first state. Memory: the graph of one step.
        """
        total = [torch.zeros_like(leaf) for leaf in trees.leaves(self.meta)]
        for t, state in trail:
            _, (down, across) = autodiff.pull_back(
                lambda state, meta, t=t: self.step(t, state, meta), [state, self.meta], d
            )
            d[:] = autodiff.fill_zeros(down, state)
            _accumulate(total, across)
        return total

    def pull_back_init(self, d: list[Tensor], total: list[Tensor]) -> None:
        """Add d B_0 to the total: what the initial state's dependence on φ contributes."""
        _, (across,) = autodiff.pull_back(self.init, [self.meta], d)
        _accumulate(total, across)

    def add_explicit(self, through: list[Tensor], c: list[Tensor], from_start: bool = True) -> list[Tensor]:
        """∇h = d Z_T + c from both parts; an error if nothing can come through the inner loop."""
        if not any(bool(part.any()) for part in through):
            self.require_dependence(from_start)
        return [inner + outer for inner, outer in zip(through, c, strict=True)]

    # -- connections -------------------------------------------------------------------------------------------

    def require_connections(self, moved: bool, slopes: Tensor, state: Tree) -> None:
        """Raise where tangents or slopes are zero because something is not connected."""
        if not moved:
            self.require_dependence()
        if not bool(slopes.any()):
            self.outer_cotangents(state)

    def require_dependence(self, from_start: bool = True) -> None:
        """Raise unless the final state is connected to φ; with `from_start=False`, by other ways than through θ_0.

        Followed leaf by leaf: a leaf of θ_{t+1} is connected if the step computes it from φ or from a connected leaf
        of θ_t. A derivative that happens to be zero is a connection too. T units; so this is asked only where nothing
        but zeros came through.
        """
        meta = autodiff.start_graph(self.meta)
        latest = None
        with torch.enable_grad():
            state = self.init(meta) if from_start else self.start()
            if autodiff.has_graph(state):
                latest = "the initial one does"
            for t in range(self.steps):
                state = self.step(t, trees.map_leaves(_restart_graph, state), meta)
                if autodiff.has_graph(state):
                    latest = f"the one after inner step {t} does"
        if autodiff.has_graph(state):
            return
        if latest is not None:
            fault = (
                f"the final inner state does not depend on the meta parameters: {latest}, and a later step cuts it off"
            )
        elif from_start:
            fault = (
                "the inner loop does not depend on the meta parameters: neither its initial state nor any of its "
                f"{self.steps} steps uses them"
            )
        else:
            fault = (
                f"none of the {self.steps} inner steps uses the meta parameters, and going back through the last steps "
                "alone does not reach the initial state; if they are used there, take Reverse()"
            )
        raise NoDependenceError(
            f"{fault}; use meta in inner_loss (in a term that has params in it as well) or in step, in a setting of "
            "the optimiser, or in the initial parameters, without .detach(), .item() or torch.no_grad() on the way"
        )

    # -- diagnosis ---------------------------------------------------------------------------------------------

    def require_finite(self, value: Tensor, state: Tree, derivatives: Tree = ()) -> None:
        """Raise unless the outer loss, the final state and derivatives of either are finite.

        The state of a black box is its own affair.
        """
        if not bool(torch.isfinite(value)):
            raise self.non_finite("the outer loss", value, state)
        if not isinstance(self.problem, BlackBox) and not trees.all_finite(state):
            raise self.non_finite("the final inner state", value, state)
        if not trees.all_finite(derivatives):
            raise self.non_finite("the hypergradient", value, state)

    @torch.enable_grad()
    def non_finite(self, what: str, value: Tensor, state: Tree) -> NonFiniteError:
        """The error for a result that is not finite: the inner loop is run again to find the step where it began."""
        what, final = f"{what} is not finite", state
        if isinstance(self.problem, BlackBox):
            place = _first_not_finite("state", state)
            found = f"{place} holds NaN or infinity already" if place else "the state is finite"
            return NonFiniteError(f"{what}: outer_loss is {value.item()} for the state that solve returned; {found}")
        state = self.start()
        place = _first_not_finite("state", state)
        if place:
            return NonFiniteError(
                f"{what}: {place} holds NaN or infinity before the first inner step; check the initial parameters"
            )
        for t in range(self.steps):
            after = trees.detach(self.step(t, state, self.meta))
            place = _first_not_finite("state", after)
            if place:
                message = f"{what}: inner step {t} of {self.steps} (counted from 0) made {place} NaN or infinite"
                return NonFiniteError(f"{message}; {self._inner_fault(t, state)}", t, state)
            state = after
        if not bool(torch.isfinite(value)):
            message = f"{what}: outer_loss is {value.item()}, though all {self.steps} inner states are finite"
            return NonFiniteError(f"{message}; check outer_loss and outer_batch", None, final)
        return NonFiniteError(
            f"{what}, though outer_loss = {value.item():.6g} and all {self.steps} inner states are: a derivative "
            "overflows or is undefined somewhere (√ or log at 0, or an inner loop so unstable that its derivative "
            "explodes: a smaller inner learning rate or fewer steps help)",
            None,
            final,
        )

    def _inner_fault(self, t: int, state: Tree) -> str:
        """What may have gone wrong in an inner step from a finite state."""
        if not isinstance(self.problem, GradientDescent):
            return "the state before it is kept in last_finite_state"
        with self.seeded_step(t):
            loss = self.problem.inner_loss(state.params, self.meta, self.inner_batches[t])
        if bool(torch.isfinite(loss)):
            return f"inner_loss was {loss.item():.6g} there: a smaller inner learning rate is the usual cure"
        return f"inner_loss was {loss.item()} there: check the batch, or lower the inner learning rate"


def unroll(problem: Any, meta: Any, inner_batches: Any, outer_batch: Any, seed: int) -> Unroll:
    """Check what was passed to an estimator and gather it."""
    randomness.check_seed(seed)
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "called inside torch.inference_mode(), where nothing has a derivative; call estimators outside of it "
            "(torch.no_grad() does no harm)"
        )
    if isinstance(problem, BlackBox):
        if inner_batches is not None:
            raise ValueError("a BlackBox takes no inner_batches: its solve(meta) is the whole inner loop; pass None")
        inner_batches = no_batches(1)
    elif isinstance(problem, type) or not isinstance(problem, Unrollable):
        what = f"the class {problem.__name__}" if isinstance(problem, type) else f"a {type(problem).__name__}"
        raise TypeError(
            f"problem is {what}; an instance of bilevel.Problem, GradientDescent or BlackBox is needed: estimators are "
            "called as estimator(problem, meta, inner_batches, outer_batch)"
        )
    meta = as_tree(meta)
    for module in modules_in(meta):
        refuse_running_statistics(module, "meta")
    named = trees.named_leaves(meta, "meta")
    for name, leaf in named:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} is {leaf!r} ({type(leaf).__name__}); meta parameters are floating-point tensors: write "
                "torch.tensor(...) around numbers, and leave everything else out of meta"
            )
        if not leaf.is_floating_point():
            instead = "pass torch.view_as_real(...)" if leaf.is_complex() else "write .float()"
            raise TypeError(f"{name} has dtype {leaf.dtype}; meta parameters must be real floating point: {instead}")
    if not trees.size(meta):
        raise ValueError(
            f"meta is {meta!r}, without a single number to differentiate with respect to; pass a floating-point "
            "tensor, a tree of them, or an nn.Module some of whose parameters have requires_grad=True"
        )
    _require_one_device(meta=meta, outer_batch=outer_batch)
    for name, leaf in named:
        if not bool(torch.isfinite(leaf).all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinity before the first inner step; if it did not at the start, an earlier "
                "outer step broke it: lower the outer learning rate or clip the hypergradient"
            )
    return Unroll(problem, trees.detach(meta), require_batches(inner_batches), outer_batch, seed)


def _first_not_finite(name: str, tree: Tree) -> str | None:
    """The expression that reaches the first leaf with a NaN or an infinity."""
    if trees.all_finite(tree):
        return None
    return next(place for place, leaf in trees.named_leaves(tree, name) if not trees.all_finite(leaf))


def _restart_graph(leaf: Any) -> Any:
    """The same value without its history, recording if it had one."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _accumulate(c: list[Tensor], parts: list[Tensor | None]) -> None:
    for i, part in enumerate(parts):
        if part is not None:
            c[i] = c[i] + part


def _require_one_device(**places: Any) -> None:
    seen: dict[torch.device, str] = {}
    for place, tree in places.items():
        for name, leaf in trees.named_leaves(tree, place):
            if isinstance(leaf, Tensor) and leaf.ndim:
                seen.setdefault(leaf.device, name)
    if len(seen) > 1:
        where = ", ".join(f"{name} is on {device}" for device, name in seen.items())
        raise ValueError(f"tensors on {len(seen)} devices: {where}; move them to one device with .to(...)")


def _require_same_structure(before: Tree, after: Tree) -> None:
    named_before = trees.named_leaves(before, "state")
    named_after = trees.named_leaves(after, "state")
    were, are = ([name for name, _ in named] for named in (named_before, named_after))
    if were != are:
        raise ValueError(
            f"step returned a state of another structure than it was given, with {', '.join(are) or 'no leaves'} "
            f"instead of {', '.join(were)}; return a new state built like the old one"
        )
    for (name, old), (_, new) in zip(named_before, named_after, strict=True):
        if _kind(old) != _kind(new):
            raise ValueError(
                f"step turned {name} from {_kind(old)} into {_kind(new)}; a step must keep shapes and dtypes: let init "
                "return what step returns, or convert in step with .to(state.dtype) or .reshape"
            )


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}"
    return "a number" if isinstance(leaf, int | float) else f"a {type(leaf).__name__}"
