"""The outer loop: each step estimates the hypergradient, and the outer optimiser moves φ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import trees
from bilevel.compilation.compiled_gradient import compile_seconds
from bilevel.errors import NonFiniteError, SolverError
from bilevel.estimators import Estimate
from bilevel.models import conversion
from bilevel.models.numpy_forms import as_tensors, in_form_of
from bilevel.optim.update_rule import Optimizer
from bilevel.training.accumulation import Draws, Estimates
from bilevel.training.kept import Keep, Kept, chosen
from bilevel.training.metrics import Row
from bilevel.training.noise_warning import NoiseWatch, pooled
from bilevel.training.phases import Phase, Progress
from bilevel.training.running_mean import PastEstimates
from bilevel.training.settings import OuterUpdate
from bilevel.trees import Tree
from bilevel.unrolling import argument_checks


@dataclass(frozen=True)
class OuterStep:
    """The argument of a callback, after each outer step.

    Attributes:
        number: outer steps done, this one included.
        meta: the meta parameters after the step, copied, in the form that `fit` was given; modules are callable views.
        estimate: the last estimate that this worker made in this step, at the meta parameters before the step.
        row: the numbers of this step in the metrics; a callback may add its own.
    """

    number: int
    meta: Any
    estimate: Estimate
    row: Row
    _stopping: list[bool] = field(default_factory=list, repr=False, compare=False)

    def stop(self) -> None:
        """End the run after this step. A run in a folder can be resumed, and then goes on."""
        self._stopping.append(True)

    @property
    def stops(self) -> bool:
        """Whether `stop` was called."""
        return bool(self._stopping)


class OuterLoop:
    """The state of an outer loop; `advance` takes one outer step."""

    def __init__(
        self,
        draws: Draws,
        meta: Any,
        phases: list[Phase],
        optimizer: Optimizer,
        update: OuterUpdate,
        keep: Keep = "last",
    ) -> None:
        """Check the meta parameters, copy them, and bind the outer optimiser to the copies."""
        self.draws, self.optimizer, self.update = draws, optimizer, update
        self.progress, self.noise = Progress(phases), NoiseWatch()
        self.kept = Kept(keep)
        self.past = PastEstimates.wanted_by([phase.estimator for phase in phases])
        self.seconds = 0.0
        self.before: list[Tensor] | None = None
        """φ before the last outer step, if an outer step may be halved."""
        self._form = meta
        tree = conversion.as_tree(as_tensors(meta))
        self._parts = trees.split(tree)
        argument_checks.meta_parameters(tree)
        argument_checks.finite(tree)
        self.parameters = [nn.Parameter(t.detach().clone()) for t in self._parts.differentiable]
        self.torch_optimizer, self.scheduler = self.optimizer.bind(self.parameters)

    def advance(self) -> OuterStep:
        """Take one outer step."""
        began, compiling = time.perf_counter(), compile_seconds()
        number, phase = self.progress.phase, self.progress.current
        found, backtracks = self._estimates_or_backtrack(phase)
        gradients = [total / phase.accumulate for total in found.sums]
        outer_loss = sum(found.losses) / phase.accumulate
        self.past.remember(gradients)
        if self.kept.by_loss:
            self.kept.offer(outer_loss, self._detached())
        self.before = [p.clone() for p in self._detached()] if self.update.max_backtracks else None
        error, squared_norm = pooled(found.errors), trees.squared_norm(gradients)
        squared = float(squared_norm)
        kept = _part_kept(gradients, self.update.clip_norm)
        self._move(gradients if kept == 1.0 else [kept * g for g in gradients], outer_loss)
        row: Row = {
            "outer_step": self.progress.outer_step,
            "phase": number,
            "outer_loss": outer_loss,
            "grad_norm": float(squared_norm.sqrt()),
            "standard_error": error,
            "signal_to_noise": None if not error else max(squared - error**2, 0.0) ** 0.5 / error,
        }
        if self.update.max_backtracks:
            row["backtracks"] = backtracks
        if self.update.clip_norm is not None:
            row["clipped_to"] = kept
        self.noise.add(squared, error)
        self.draws.draws += phase.accumulate
        self.progress.count(outer_loss)
        compiling = compile_seconds() - compiling
        self.seconds += time.perf_counter() - began - compiling
        if self.draws.backend is not None:
            row["compile_seconds"] = round(compiling, 4)
        row["seconds"] = round(self.seconds, 4)
        return OuterStep(self.progress.outer_step, self.user_meta(), found.last, row)

    def offer_last(self) -> None:
        """Offer the last meta parameters, whose outer loss no step has computed: T units.

        An inner loop that fails there is no better than the ones before. A stream is not run on.
        """
        if not self.kept.by_loss or self.draws.stream:
            return
        draws, accumulate = self.draws, self.progress.phases[-1].accumulate
        try:
            losses = [draws.value(number, self.meta_tree(), self.progress.outer_step) for number in range(accumulate)]
        except (NonFiniteError, SolverError):
            return
        self.kept.offer(sum(losses) / accumulate, self._detached())

    def _estimates_or_backtrack(self, phase: Phase) -> tuple[Estimates, int]:
        """Return the estimates of one outer step, and how often the last step was halved.

        A step is halved if the inner loop fails at the meta parameters that it led to.
        """
        estimator, times = self.past.given_to(phase.estimator), 0
        while True:
            try:
                found = self.draws.estimates(estimator, phase.accumulate, self.meta_tree(), self.progress.outer_step)
                return found, times
            except (NonFiniteError, SolverError):
                if self.before is None or times == self.update.max_backtracks:
                    raise
            times += 1
            with torch.no_grad():
                for parameter, before in zip(self.parameters, self.before, strict=True):
                    parameter.lerp_(before, 0.5)

    def _move(self, gradients: Sequence[Tensor], outer_loss: float) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        self.torch_optimizer.step(lambda: outer_loss)  # LBFGS(max_iter=1) calls the closure; the gradients are known
        if self.update.project is not None:
            self._project(self.update.project)
        if not trees.all_finite(self._detached()):
            raise NonFiniteError(
                f"outer step {self.progress.outer_step}: the outer optimiser (or project) made the meta parameters NaN "
                "or infinite from a finite hypergradient; a smaller outer learning rate is the usual cure"
            )
        if self.scheduler is not None:
            self.scheduler.step()

    def _project(self, project: Callable[[Any], Any]) -> None:
        allowed = conversion.as_tree(as_tensors(project(self.user_meta())))
        needed, returned = _shapes(self.meta_tree()), _shapes(allowed)
        if returned != needed:
            raise ValueError(
                f"project returned {returned or allowed!r}; it must return meta parameters of the structure and shapes "
                f"that it is given: {needed}"
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, trees.leaves(allowed), strict=True):
                parameter.copy_(value)

    # -- the meta parameters in several forms ----------------------------------------------------------------------

    def meta_tree(self) -> Tree:
        """Return φ as a tree, with views in place of modules."""
        return self._parts.rebuild(self._detached())

    def user_meta(self, write_modules: bool = False) -> Any:
        """Return φ in the form that the user passed: with views of modules, or with the modules, updated in place."""
        tensors = chosen(self.kept, self._detached()) if write_modules else self._detached()
        tree = trees.map_leaves(torch.clone, self._parts.rebuild(tensors))
        if write_modules:
            return in_form_of(self._form, conversion.written_back(tree))
        return in_form_of(self._form, conversion.with_buffers(tree, (), outside=True)[0])

    def _detached(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]


def _shapes(tree: Tree) -> dict[str, Any]:
    """Return the shape of every tensor, and the type of every other leaf."""
    return {n: tuple(t.shape) if isinstance(t, Tensor) else type(t) for n, t in trees.named_leaves(tree, "meta")}


def _part_kept(gradients: Sequence[Tensor], clip_norm: float | None) -> float:
    """Return the factor by which the gradients are multiplied, so that their common norm is at most `clip_norm`.

    The norm is computed in float64. In float32 the square of an exploding gradient is infinite, and the factor would be
    zero.
    """
    if clip_norm is None:
        return 1.0
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    return 1.0 if norm <= clip_norm else clip_norm / norm
