"""One outer step after another: the state of an outer loop, what moves it, and what a checkpoint must hold of it."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilevel import distributed, modules, randomness, trees
from bilevel.compiled import compile_seconds
from bilevel.distributed import Workers
from bilevel.errors import NonFiniteError, SolverError
from bilevel.estimators import Estimate, Estimator, control_variates
from bilevel.inner_loop import Carried
from bilevel.metrics import Row
from bilevel.optim import Optimizer
from bilevel.problem import BlackBox, GradientDescent, Unrollable
from bilevel.trees import Tree
from bilevel.unroll import unroll


@dataclass(frozen=True)
class Phase:
    """A stretch of the outer loop with one estimator.

    Args:
        estimator: how the hypergradient is found.
        steps: outer steps at most.
        accumulate: estimates averaged for one outer step. Each has directions and batches of its own. Several workers
            share them, where the estimator has no directions that they could share.
        patience: end the phase early when the outer loss has not improved for so many outer steps.
        min_improvement: what counts as an improvement, as a fraction of the best outer loss so far.

    The paper's two phases, a cheap biased method first and (FG)²U from where it leads:

    >>> from bilevel import ForwardGradient, HessianFree
    >>> phases = [Phase(HessianFree(), steps=100, patience=10), Phase(ForwardGradient(directions=32), steps=900)]

    Reference: Shen et al., NeurIPS 2024, §3.2.
    """

    estimator: Estimator
    steps: int
    accumulate: int = 1
    patience: int | None = None
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator):
            raise TypeError(f"estimator is {self.estimator!r}; write Phase(bilevel.Reverse(), steps=100)")
        for name in ("steps", "accumulate", "patience"):
            count = getattr(self, name)
            if count is None and name == "patience":
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count!r}: a whole number of at least 1 is needed")
        if not 0 <= self.min_improvement < 1:
            raise ValueError(f"min_improvement={self.min_improvement!r}: a fraction in [0, 1) is needed")


@dataclass(frozen=True)
class OuterStep:
    """What a callback sees after each outer step."""

    number: int
    """Outer steps done, this one included."""
    meta: Any
    """The meta parameters after the step, a copy in the form `fit` was given, with callable views for modules."""
    estimate: Estimate
    """The (last) estimate of the step that this worker made, at the meta parameters before it."""
    row: Row
    """The numbers that go into the metrics; a callback may add its own."""


def batches_of(inner_batches: Any, draw: int) -> Any:
    """The inner batches of a draw: `inner_batches` itself, or what that function makes of the draw's number."""
    if callable(inner_batches) and not hasattr(inner_batches, "__getitem__"):
        made: Any = inner_batches(draw)
        return made
    return inner_batches


def batch_of(outer_batch: Any, draw: int) -> Any:
    """The outer batch of a draw: `outer_batch` itself, or what that function makes of the draw's number."""
    return outer_batch(draw) if callable(outer_batch) else outer_batch


class _Estimates(NamedTuple):
    """Of one outer step."""

    sums: list[Tensor]
    """Of the gradients."""
    losses: list[float]
    errors: list[float | None]
    last: Estimate
    """The last one that this worker made."""


@dataclass
class OuterLoop:
    """The state of an outer loop, and one step of it."""

    problem: Unrollable | BlackBox
    original_meta: Any
    inner_batches: Any
    outer_batch: Any
    seed: int
    phases: list[Phase]
    optimizer: Optimizer
    project: Callable[[Any], Any] | None
    stream: bool = False
    outer_step: int = 0
    phase: int = 0
    phase_step: int = 0
    draws: int = 0
    best: float | None = None
    stalled: int = 0
    seconds: float = 0.0
    signal_squared: float = 0.0
    noise_squared: float = 0.0
    noisy_steps: int = 0
    past: list[Tensor] | None = None
    """The exponential mean of past estimates, if a phase has `RunningMean` as a control variate."""
    past_weight: float = 0.0
    carried: Carried | None = None
    """In a stream, where its inner loop has got to."""
    retreats: int = 0
    """How often one outer step may be taken back by half because the inner loop fails where it led."""
    before: list[Tensor] | None = None
    """φ before the last outer step, if steps may be taken back."""
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tree = modules.as_tree(self.original_meta)
        self._parts = trees.split(tree)
        for name, leaf in trees.named_leaves(tree, "meta"):
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                what = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else f"{leaf!r} ({type(leaf).__name__})"
                raise TypeError(
                    f"{name} is {what}; meta must be floating-point tensors: a tree of them or an nn.Module"
                )
            if not trees.all_finite(leaf):
                raise NonFiniteError(f"{name} holds NaN or infinity before the first outer step")
        if not self._parts.differentiable:
            raise ValueError(f"meta is {self.original_meta!r}, which holds no tensor to train")
        self.parameters = [nn.Parameter(t.detach().clone()) for t in self._parts.differentiable]
        self.torch_optimizer, self.scheduler = self.optimizer.bind(self.parameters)

    @property
    def total_steps(self) -> int:
        """Outer steps of the whole run, as far as is known: those done, and those that are left at most."""
        return self.outer_step - self.phase_step + sum(phase.steps for phase in self.phases[self.phase :])

    @property
    def _backend(self) -> str | None:
        """What compiles the inner gradient."""
        return self.problem.backend if isinstance(self.problem, GradientDescent) else None

    @property
    def finished(self) -> bool:
        return self.phase == len(self.phases)

    def advance(self) -> OuterStep:
        """One outer step."""
        began, compiling = time.perf_counter(), compile_seconds()
        phase = self.phases[self.phase]
        found, taken_back = self._estimates_or_retreat(phase)
        gradients = [total / phase.accumulate for total in found.sums]
        outer_loss = sum(found.losses) / phase.accumulate
        self._remember(gradients)
        self.before = [p.clone() for p in self._detached()] if self.retreats else None
        self._update(gradients, outer_loss)
        error, squared_norm = _pooled(found.errors), trees.squared_norm(gradients)
        squared = float(squared_norm)
        row: Row = {
            "outer_step": self.outer_step,
            "phase": self.phase,
            "outer_loss": outer_loss,
            "grad_norm": float(squared_norm.sqrt()),
            "standard_error": error,
            "signal_to_noise": None if not error else max(squared - error**2, 0.0) ** 0.5 / error,
        }
        if self.retreats:
            row["retreats"] = taken_back
        self._watch_noise(squared, error)
        self.draws += phase.accumulate
        self.outer_step += 1
        self._count_phase_step(phase, outer_loss)
        compiling = compile_seconds() - compiling
        self.seconds += time.perf_counter() - began - compiling
        if self._backend is not None:
            row["compile_seconds"] = round(compiling, 4)
        row["seconds"] = round(self.seconds, 4)
        return OuterStep(self.outer_step, self.user_meta(), found.last, row)

    def _estimates(self, phase: Phase) -> _Estimates:
        """The estimates of one outer step; of each, no more is kept than is needed.

        Workers share the directions of every estimate, if there are any; else they share the estimates, unless each
        goes on where the one before ended.
        """
        workers = distributed.current()
        alone = workers.size == 1 or phase.accumulate == 1 or self.stream
        if alone or control_variates.draws_directions(phase.estimator):
            return self._these(phase, range(phase.accumulate))
        mine = workers.share(phase.accumulate)

        def share() -> _Estimates:
            with Workers().sharing():
                # One that is left without takes part in nothing, but needs an estimate to show.
                return self._these(phase, mine or range(1))

        found = workers.together("accumulated estimates", share)
        losses = torch.zeros(phase.accumulate, dtype=torch.float64)
        losses[list(mine)] = torch.tensor(found.losses[: len(mine)], dtype=torch.float64)
        sums = found.sums if mine else [torch.zeros_like(total) for total in found.sums]
        (losses,) = workers.sum("accumulated losses", [losses])
        sums = workers.sum("accumulated gradients", sums)
        return _Estimates(sums, losses.tolist(), [None] * phase.accumulate, found.last)

    def _these(self, phase: Phase, numbers: Sequence[int]) -> _Estimates:
        sums = [torch.zeros_like(p) for p in self._detached()]
        losses: list[float] = []
        errors: list[float | None] = []
        estimate: Estimate | None = None
        for number in numbers:
            estimate = self._estimate(phase, number)
            sums = [total + part for total, part in zip(sums, trees.leaves(estimate.grad), strict=True)]
            losses.append(float(estimate.value))
            errors.append(estimate.standard_error)
        assert estimate is not None
        return _Estimates(sums, losses, errors, estimate)

    def _estimate(self, phase: Phase, number: int) -> Estimate:
        draw = self.draws + number
        inner, outer = batches_of(self.inner_batches, draw), batch_of(self.outer_batch, draw)
        place = (0, 0) if self.stream else (self.outer_step, number)  # a stream is one history, with one seed
        seed = randomness.derive(self.seed, randomness.DRAW, *place)
        estimator = self._with_past(phase.estimator)
        try:
            found = estimator(self.problem, self.meta_tree(), inner, outer, seed, self.carried)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"outer step {self.outer_step}: {error}", error.inner_step, error.last_finite_state
            ) from error
        except SolverError as error:
            raise SolverError(f"outer step {self.outer_step}: {error}") from error
        if self.stream:
            self.carried = found.carried
        return found

    def _estimates_or_retreat(self, phase: Phase) -> tuple[_Estimates, int]:
        """The estimates of one outer step, and how often half of the last step was taken back because the inner loop
        failed where it had led.
        """
        times = 0
        while True:
            try:
                return self._estimates(phase), times
            except (NonFiniteError, SolverError):
                if self.before is None or times == self.retreats:
                    raise
            times += 1
            with torch.no_grad():
                for parameter, before in zip(self.parameters, self.before, strict=True):
                    parameter.lerp_(before, 0.5)

    def _with_past(self, estimator: Estimator) -> Estimator:
        past = None if self.past is None else [mean / self.past_weight for mean in self.past]
        return control_variates.with_past(estimator, past)

    def _remember(self, gradients: Sequence[Tensor]) -> None:
        wanted = [control_variates.running_mean_of(phase.estimator) for phase in self.phases]
        decay = next((mean.decay for mean in wanted if mean is not None), None)
        if decay is None:
            return
        old = [torch.zeros_like(g) for g in gradients] if self.past is None else self.past
        self.past = [decay * mean + (1 - decay) * g for mean, g in zip(old, gradients, strict=True)]
        self.past_weight = decay * self.past_weight + 1 - decay

    def _watch_noise(self, squared: float, error: float | None) -> None:
        """Warn, once in a run, when the estimates of ten outer steps together are noise."""
        if error is None or self.noisy_steps == _WATCHED:
            return
        self.noisy_steps += 1
        self.signal_squared += squared - error**2
        self.noise_squared += error**2
        if self.noisy_steps == _WATCHED and self.signal_squared < 0.01 * self.noise_squared:
            ratio = max(self.signal_squared, 0.0) / self.noise_squared
            warnings.warn(
                f"the hypergradient estimates are noise: over the first {_WATCHED} outer steps with random directions, "
                f"the signal is {ratio**0.5:.2g} of the standard error (a cosine of about {ratio**0.5:.2g} to the true "
                "hypergradient); take a control variate (control_variate=bilevel.TruncatedReverse(5)), more directions "
                "or accumulate=, or Reverse(), whose exact gradient costs about as much as two directions",
                stacklevel=4,
            )

    def _update(self, gradients: Sequence[Tensor], outer_loss: float) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        self.torch_optimizer.step(lambda: outer_loss)  # LBFGS(max_iter=1) asks for it; the gradients are there already
        if self.project is not None:
            self._project(self.project)
        if not trees.all_finite(self._detached()):
            raise NonFiniteError(
                f"outer step {self.outer_step}: the outer optimiser (or project) made the meta parameters NaN or "
                "infinite from a finite hypergradient; a smaller outer learning rate is the usual cure"
            )
        if self.scheduler is not None:
            self.scheduler.step()

    def _project(self, project: Callable[[Any], Any]) -> None:
        allowed = modules.as_tree(project(self.user_meta()))
        needed, returned = _shapes(self.meta_tree()), _shapes(allowed)
        if returned != needed:
            raise ValueError(
                f"project returned {returned or allowed!r}; it must return meta parameters of the structure and shapes "
                f"that it is given: {needed}"
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, trees.leaves(allowed), strict=True):
                parameter.copy_(value)

    def _count_phase_step(self, phase: Phase, outer_loss: float) -> None:
        self.phase_step += 1
        if self.best is None or outer_loss < self.best - phase.min_improvement * abs(self.best):
            self.best, self.stalled = outer_loss, 0
        else:
            self.stalled += 1
        if self.phase_step == phase.steps or self.stalled == phase.patience:
            self.phase, self.phase_step, self.best, self.stalled = self.phase + 1, 0, None, 0

    # -- meta parameters in the forms that others see them ---------------------------------------------------------

    def meta_tree(self) -> Tree:
        """φ as a tree, with views in place of modules."""
        return self._parts.rebuild(self._detached())

    def user_meta(self, write_modules: bool = False) -> Any:
        """φ as the user gave it. Modules appear as views, or are themselves written to."""
        tree = trees.map_leaves(torch.clone, self.meta_tree())
        return modules.written_back(tree) if write_modules else tree

    def _detached(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def identity(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common."""
        leaves = trees.named_leaves(self.meta_tree(), "meta")
        return {
            "seed": self.seed,
            "phases": [_without_addresses(phase) for phase in self.phases],
            "optimizer": _without_addresses(self.optimizer),
            "meta": [f"{name}: {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in leaves],
            "config": dict(config),
            **({"stream": True} if self.stream else {}),
            **({} if self._backend is None else {"compile": self._backend}),
        }

    def state(self) -> dict[str, Any]:
        """A copy of everything that the following steps depend on."""
        return copy.deepcopy(
            {
                "meta": self._detached(),
                "optimizer": self.torch_optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "past": self.past,
                "carried": None if self.carried is None else _as_dict(self.carried),
                "before": self.before,
                "counters": {name: getattr(self, name) for name in _COUNTERS},
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back (or forward) to a `state`."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["meta"], strict=True):
                parameter.copy_(value)
        self.torch_optimizer.load_state_dict(state["optimizer"])
        # PyTorch casts what it loads to the parameter's dtype; but NAdam's running product, for one, has its own.
        for index, stored in state["optimizer"]["state"].items():
            memory = self.torch_optimizer.state[self.parameters[index]]
            for name, value in stored.items():
                if isinstance(value, Tensor):
                    memory[name] = value.to(memory[name].device)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.past = state["past"]
        if self.past is not None:
            self.past = [mean.to(p.device) for mean, p in zip(self.past, self.parameters, strict=True)]
        self.carried = None if state["carried"] is None else self._carried_from(state["carried"])
        self.before = state["before"]
        if self.before is not None:
            self.before = [old.to(p.device) for old, p in zip(self.before, self.parameters, strict=True)]
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])

    def _carried_from(self, stored: Mapping[str, Any]) -> Carried:
        """What `_as_dict` made, in the form and on the devices of this problem's inner states."""
        inner, outer = batches_of(self.inner_batches, self.draws), batch_of(self.outer_batch, self.draws)
        like, spec = trees.flatten(unroll(self.problem, self.meta_tree(), inner, outer, self.seed).start())

        def placed(leaves: Sequence[Any], places: Sequence[Any]) -> list[Any]:
            return [x.to(y.device) if isinstance(x, Tensor) else x for x, y in zip(leaves, places, strict=True)]

        state = trees.unflatten(spec, placed(stored["state"], like))
        parts = ("tangents", trees.split(state).differentiable), ("labels", self.parameters)
        kept = {name: None if stored[name] is None else placed(stored[name], places) for name, places in parts}
        return Carried(state, stored["steps"], first_norm=stored["first_norm"], **kept)


_PROGRESS = ("outer_step", "phase", "phase_step", "draws", "best", "stalled", "seconds")
_COUNTERS = (*_PROGRESS, "signal_squared", "noise_squared", "noisy_steps", "past_weight")

_WATCHED = 10
"""Outer steps after which it is known whether the estimates are noise."""


def _pooled(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean of independent estimates, from theirs."""
    known = [error for error in errors if error is not None]
    return sum(error**2 for error in known) ** 0.5 / len(known) if len(known) == len(errors) else None


def _as_dict(carried: Carried) -> dict[str, Any]:
    """For a checkpoint: the leaves of the state instead of its tree, which the problem can make again."""
    return {**{f.name: getattr(carried, f.name) for f in fields(carried)}, "state": trees.leaves(carried.state)}


def _shapes(tree: Tree) -> dict[str, Any]:
    """The shape of every leaf; of what is no tensor, the type."""
    return {n: tuple(t.shape) if isinstance(t, Tensor) else type(t) for n, t in trees.named_leaves(tree, "meta")}


def _without_addresses(value: Any) -> str:
    """Its `repr`, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
