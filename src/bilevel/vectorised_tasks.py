"""Many inner loops at once: one for each task, computed together by `torch.vmap`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel import autodiff, checks, randomness, trees
from bilevel.batches import Batches, batches
from bilevel.optim.torch_step import TEN
from bilevel.problem import BilevelProblem, Descent, GradientDescent, Unrollable, as_problem, require_scalar
from bilevel.trees import Tree


class Tasks(BilevelProblem):
    """K tasks with inner loops of their own and meta parameters in common, as in MAML.

    With h_k the outer loss of task k at the end of its inner loop,

        h(φ) = (1/K) Σ_k h_k(φ).

    All K inner loops are computed together by `torch.vmap`, and so are the backward pass and the tangents. The problem
    and its losses are written for one task. Only the batches change: every tensor in them, of the inner batches and of
    the outer batch, has a leading dimension of length K. Tensors that all tasks share are given as
    `x.expand(K, *x.shape)`. The final inner state also has that leading dimension: `estimate.state.params` of a module
    holds the parameters of all tasks, `[K, *shape]`.

    Args:
        problem: the problem of one task, a `GradientDescent` with an optimiser of `torch.optim` that PyTorch can
            differentiate, or a `Problem`.
        number: K.
        per_task: whether an estimate holds a value and a gradient for each task instead of their means: the value is
            `[K]` and the leaves of the gradient are `[K, *leaf.shape]`.
        chunk_size: how many tasks are computed together; `None` for all. The memory of an estimate is that of so many
            tasks. With 1, each task is computed by itself, without `torch.vmap`.

    Task k starts from the initial state of a single estimate with the seed `derive_seed(seed, k)`. Inner and outer
    losses that draw random numbers (dropout) and tasks that would branch on the values of tensors need `chunk_size=1`.
    Then task k has the numbers of that single estimate, dropout and random directions included. So do modules that
    update buffers, such as BatchNorm with running statistics. With larger chunks,
    the tasks of a chunk share random directions, and each chunk has directions of its own.

    `Reverse`, `TruncatedReverse`, `FirstOrder`, `Forward`, `ForwardGradient` and `ZerothOrder` take tasks. `Implicit`
    and `HessianFree` do not.

    The first time, a step and its derivatives are compared with those of a single task, because PyTorch has operations
    whose derivatives are wrong under `torch.vmap`.

    Cost: the units of the estimator for each task, with the overhead of one. Memory: that of chunk_size tasks.

    Raises:
        TypeError: the problem is a `BlackBox`, or batches hold NumPy arrays.
        ValueError: a tensor of a batch has no leading dimension of length K, the problem is compiled, a loss draws
            random numbers, tasks would branch differently, or `torch.vmap` gives another step or derivative.

    Reference: Finn, Abbeel and Levine, "Model-agnostic meta-learning", ICML 2017.

    >>> import torch, bilevel
    >>> problem = bilevel.GradientDescent(
    ...     inner_loss=lambda theta, phi, target: 0.5 * (theta - target).square().sum(),
    ...     outer_loss=lambda theta, phi, target: (theta - target).square().sum(),
    ...     params=lambda phi: phi,
    ...     optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    ... )
    >>> targets = torch.tensor([[1.0], [2.0], [6.0]])  # of 3 tasks
    >>> bilevel.Reverse()(bilevel.Tasks(problem, 3), torch.zeros(1), [targets], targets).grad
    tensor([-1.5000])
    >>> bilevel.Reverse()(bilevel.Tasks(problem, 3, per_task=True), torch.zeros(1), [targets], targets).grad
    tensor([[-0.5000],
            [-1.0000],
            [-3.0000]])
    """

    def __init__(
        self,
        problem: BilevelProblem | Unrollable,
        number: int,
        per_task: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self._problem = _own(as_problem(problem))
        self.number = checks.whole_number(number, "number")
        self.per_task = per_task
        self.chunk_size = None if chunk_size is None else checks.whole_number(chunk_size, "chunk_size")
        self._first = 0
        self._parts: dict[int, Tasks] = {}
        self.is_verified = self.number == 1
        """Whether a step has been compared with that of a single task, see `unrolling.vectorised_steps`."""
        _require_vectorisable(self._problem)
        if self.number > 1:
            # PyTorch's second derivatives of normalisations are wrong under torch.vmap.
            for each in (self, self._problem):
                autodiff.memory_of(each).composite_normalisations = True

    # -- what the inner loop asks ------------------------------------------------------------------------------

    @property
    def presents_meta(self) -> bool:
        """As the problem of one task does."""
        return self._problem.presents_meta

    @property
    def modules(self) -> list[nn.Module] | None:
        """Those of the problem of one task."""
        return self._problem.modules

    @property
    def is_examined(self) -> bool:
        """Whether the problem of one task has been examined."""
        return self._problem.is_examined

    def examine(self, meta: Tree) -> Callable[[Any], None] | None:
        """Examine the problem of one task; a step is looked at with the batch of the first task."""
        look = self._problem.examine(meta)
        return None if look is None else lambda batch: look(self._sliced(batch, slice(0, 1), single=True))

    def batches_of(self, inner_batches: Any) -> Batches:
        """As for the problem of one task."""
        return self._problem.batches_of(inner_batches)

    def presented(self, state: Tree) -> Tree:
        """As the problem of one task presents it, with a leading dimension for the tasks."""
        return self._problem.presented(state)

    @property
    def of_one(self) -> BilevelProblem:
        """The problem of one task."""
        return self._problem

    def require_inner_loss(self, who: str, because: str, instead: str) -> GradientDescent:  # noqa: ARG002
        """Raise, because the inner losses of many tasks are computed together, and not one by one.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{who} needs the inner loss, {because}; Tasks computes the steps of all tasks together and has no single "
            "inner loss. Take Reverse, Forward, ForwardGradient or FirstOrder, which take tasks, or call the estimator "
            "once for each task with the problem of one task"
        )

    def only(self, tree: Tree) -> Tree:
        """The state or the batch of the first task."""
        return trees.map_leaves(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, tree)

    # -- parts -------------------------------------------------------------------------------------------------

    def parts(self) -> list[Tasks]:
        """The chunks of tasks that are computed together; empty if that is all of them."""
        if self.chunk_size is None or self.chunk_size >= self.number:
            return []
        starts = range(0, self.number, self.chunk_size)
        return [self._part(start, min(start + self.chunk_size, self.number)) for start in starts]

    def _part(self, start: int, stop: int) -> Tasks:
        if start not in self._parts:
            part = Tasks(self._problem, stop - start, self.per_task)
            part._first = self._first + start
            self._parts[start] = part
        return self._parts[start]

    def sliced_batches(self, inner_batches: Batches, part: Tasks) -> Batches:
        """The inner batches of a part of the tasks."""
        place = slice(part._first - self._first, part._first - self._first + part.number)
        return batches(lambda t: self._sliced(inner_batches[t], place), len(inner_batches))

    def sliced(self, tree: Tree, part: Tasks) -> Tree:
        """The entries of a part of the tasks in a batch or a state."""
        return self._sliced(tree, slice(part._first - self._first, part._first - self._first + part.number))

    def seed_of_first(self, seed: int) -> int:
        """The seed of the first of these tasks."""
        return derive_seed(seed, self._first)

    def seed_of_part(self, seed: int) -> int:
        """The seed of an estimate for these tasks: a single task has the seed of its own."""
        return derive_seed(seed, self._first) if self.number == 1 else seed

    def _sliced(self, tree: Tree, place: slice, single: bool = False) -> Tree:
        self._require_leading(tree, "a batch")
        return trees.map_leaves(
            lambda leaf: (leaf[place.start] if single else leaf[place]) if isinstance(leaf, Tensor) else leaf, tree
        )

    # -- the three functions -----------------------------------------------------------------------------------

    def init(self, meta: Tree) -> Tree:
        """The initial states of all tasks, stacked."""
        if self.number == 1:  # its seed is that of the estimate, see `seed_of_part`
            return _stacked([self._problem.init(meta)], "init")
        seed, counters = randomness.current_stream()
        states: list[Tree] = []
        for k in range(self._first, self._first + self.number):
            with randomness.another_stream(derive_seed(seed, k), *counters):
                before = randomness.positions()
                states.append(self._problem.init(meta))
                _require_no_buffers(states[0])
                if randomness.positions() == before and len(states) == 1:  # nothing random: it is that of all tasks
                    return trees.map_leaves(self._expanded, states[0])
        return _stacked(states, "init")

    def step(self, state: Tree, meta: Tree, batch: Any) -> Tree:
        """One step of all tasks."""
        return self._each("a step", lambda state, batch: self._problem.step(state, meta, batch), state, batch)

    def outer_loss(self, state: Tree, meta: Tree, batch: Any) -> Tensor:
        """The mean of the outer losses, or all of them, `[K]`."""

        def one(state: Tree, batch: Any) -> Tensor:
            return require_scalar(self._problem.outer_loss(state, meta, batch), "outer_loss")

        losses: Tensor = self._each("outer_loss", one, state, batch)
        return losses if self.per_task else losses.mean()

    def _expanded(self, leaf: Any) -> Any:
        return leaf.expand(self.number, *leaf.shape) if isinstance(leaf, Tensor) else leaf

    def _each(self, what: str, function: Callable[[Tree, Any], Tree], state: Tree, batch: Any) -> Tree:
        """Compute a function of (state, batch) for all tasks."""
        self._require_leading(batch, "the outer batch" if what == "outer_loss" else "an inner batch")
        if self.number == 1:
            return _stacked([function(self.only(state), self.only(batch))], what)
        parts = [trees.split(tree) for tree in (state, batch)]
        found: list[trees.Split] = []

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            there = [
                part.rebuild([next(given) for _ in part.differentiable], [next(given) for _ in part.other])
                for part in parts
            ]
            found[:] = [trees.split(function(*there))]
            return (*found[0].differentiable, *found[0].other)

        tensors = [t for part in parts for t in (*part.differentiable, *part.other)]
        with _vectorised(what):
            results = torch.vmap(flat, randomness="error")(*tensors)
        count = len(found[0].differentiable)
        return found[0].rebuild(results[:count], results[count:])

    def _require_leading(self, tree: Tree, what: str) -> None:
        for name, leaf in trees.named_leaves(tree, "batch"):
            if isinstance(leaf, np.ndarray):
                raise TypeError(
                    f"{name} of {what} is a NumPy array, which torch.vmap does not cut into tasks; pass "
                    "torch.from_numpy(...)"
                )
            if isinstance(leaf, Tensor) and (not leaf.ndim or len(leaf) != self.number):
                raise ValueError(
                    f"{name} of {what} has the shape {tuple(leaf.shape)}, and every tensor in a batch needs a leading "
                    f"dimension for the {self.number} tasks; stack the tasks' batches, or write "
                    f"x.expand({self.number}, *x.shape) for what all tasks share"
                )


def derive_seed(seed: int, number: int) -> int:
    """Return the seed of task k of an estimate: a single estimate with it has the numbers of the task."""
    return randomness.derive(seed, randomness.TASK, number)


def _own(problem: BilevelProblem) -> BilevelProblem:
    """Return a `GradientDescent` of its own, so that what is learned about derivatives here is not used elsewhere."""
    if problem.as_gradient_descent is None:
        return problem
    twin = copy.copy(problem)
    twin.__dict__["_eager"] = twin
    return twin


def _require_vectorisable(problem: BilevelProblem) -> None:
    if problem.is_black_box:
        raise TypeError(
            "Tasks computes the inner steps of all tasks together, and a BlackBox has none; call its estimator for "
            "each task, or give it solve_all"
        )
    if problem.backend is not None:
        raise ValueError(f"Tasks takes no compiled problem (compile={problem.backend!r}); build it with compile=False")
    descent = problem.as_gradient_descent
    if descent is not None and descent.optimizer.algorithm not in TEN:
        known = ", ".join(kind.__name__ for kind in TEN)
        raise ValueError(
            f"Tasks does not take {descent.optimizer.algorithm.__name__} as inner optimiser, only those of torch.optim "
            f"that PyTorch can differentiate ({known}); take one of them, or write the step as a bilevel.Problem"
        )


def _require_no_buffers(state: Tree) -> None:
    if isinstance(state, Descent) and state.buffers:
        raise ValueError(
            f"Tasks: the inner loss updates {next(iter(state.buffers))!r} (running statistics or another buffer of a "
            "module), which torch.vmap does not follow; take Tasks(..., chunk_size=1), which computes one task after "
            "the other, or build the layer with track_running_stats=False"
        )


def _stacked(states: Sequence[Tree], what: str) -> Tree:
    """Stack the states of several tasks, which must be equal in everything but the values of their tensors."""
    parts = [trees.split(state) for state in states]
    first = parts[0]
    for number, part in enumerate(parts[1:], 1):
        if trees.flatten(states[0])[1] != trees.flatten(states[number])[1] or part.rest != first.rest:
            raise _branching(what, f"task {number} and task 0 end in states of different structure")
    return first.rebuild(
        [torch.stack(ts) for ts in zip(*(part.differentiable for part in parts), strict=True)],
        [torch.stack(ts) for ts in zip(*(part.other for part in parts), strict=True)],
    )


def joined(states: Sequence[Tree]) -> Tree:
    """Join the states of several parts of the tasks, `[k, ...]` each."""
    parts = [trees.split(state) for state in states]
    for number, part in enumerate(parts[1:], 1):
        if trees.flatten(states[0])[1] != trees.flatten(states[number])[1] or part.rest != parts[0].rest:
            raise _branching("an inner loop", f"chunk {number} and chunk 0 end in states of different structure")
    return parts[0].rebuild(
        [torch.cat(ts) for ts in zip(*(part.differentiable for part in parts), strict=True)],
        [torch.cat(ts) for ts in zip(*(part.other for part in parts), strict=True)],
    )


def _branching(what: str, how: str) -> ValueError:
    return ValueError(
        f"Tasks: {what} does not compute the same operations for all tasks: {how}. Write torch.where in place of a "
        "branch, or make the estimates of these tasks one by one"
    )


@contextmanager
def _vectorised(what: str) -> Iterator[None]:
    """Context manager that says in the library's words what `torch.vmap` refuses."""
    before = randomness.host_positions()
    try:
        yield
    except RuntimeError as error:
        if "random operation" in str(error):
            raise ValueError(
                f"Tasks: {what} draws random numbers (dropout, for instance), which would be the same for all tasks or "
                "those of no single estimate; take Tasks(..., chunk_size=1), with which task k has the random numbers "
                "of a single estimate, or switch the randomness off"
            ) from error
        if any(words in str(error) for words in _DATA_DEPENDENT):
            raise ValueError(
                f"Tasks: {what} branches on the value of a tensor, or takes a number out of one by .item() or float(), "
                "and tasks may branch differently; write torch.where in place of the branch, or take "
                "Tasks(..., chunk_size=1), which computes one task after the other"
            ) from error
        if "Batching rule not implemented" in str(error):
            raise ValueError(
                f"Tasks: torch.vmap does not take an operation of {what} ({str(error).splitlines()[0]}); take "
                "Tasks(..., chunk_size=1), which computes one task after the other"
            ) from error
        raise
    if randomness.host_positions() != before:
        raise ValueError(
            f"Tasks: {what} draws random numbers from NumPy or Python, which would be the same for all tasks; take "
            "Tasks(..., chunk_size=1), with which task k has the random numbers of a single estimate"
        )


_DATA_DEPENDENT = ("data-dependent control flow", "calling .item()", ".item() on a Tensor", "data-dependent")
