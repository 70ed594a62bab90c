"""One outer step after another: estimate the hypergradient, let the outer optimiser move φ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import trees
from bilevel.compilation.compiled_gradient import compile_seconds
from bilevel.errors import NonFiniteError, SolverError
from bilevel.estimators import Estimate
from bilevel.models import module_view
from bilevel.optim.update_rule import Optimizer
from bilevel.training.accumulation import Draws, Estimates
from bilevel.training.metrics import Row
from bilevel.training.noise_warning import NoiseWatch, pooled
from bilevel.training.phases import Phase, Progress
from bilevel.training.running_mean import PastEstimates
from bilevel.trees import Tree


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


class OuterLoop:
    """The state of an outer loop, and one step of it."""

    def __init__(
        self,
        draws: Draws,
        meta: Any,
        phases: list[Phase],
        optimizer: Optimizer,
        project: Callable[[Any], Any] | None = None,
        retreats: int = 0,
        clip_norm: float | None = None,
    ) -> None:
        """Check the meta parameters, and bind the outer optimiser to copies of them."""
        self.draws, self.optimizer, self.project = draws, optimizer, project
        self.progress, self.noise = Progress(phases), NoiseWatch()
        self.past = PastEstimates.wanted_by([phase.estimator for phase in phases])
        self.seconds = 0.0
        self.retreats = retreats
        """How often one outer step may be taken back by half because the inner loop fails where it led."""
        self.before: list[Tensor] | None = None
        """φ before the last outer step, if steps may be taken back."""
        self.clip_norm = clip_norm
        """The longest hypergradient that the outer optimiser is handed; longer ones are shortened to it."""
        tree = module_view.as_tree(meta)
        self._parts = trees.split(tree)
        for name, leaf in trees.named_leaves(tree, "meta"):
            if trees.is_spread(leaf):
                raise TypeError(f"{name} is a DTensor; meta parameters must be whole in every process: .full_tensor()")
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                what = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else f"{leaf!r} ({type(leaf).__name__})"
                raise TypeError(
                    f"{name} is {what}; meta must be floating-point tensors: a tree of them or an nn.Module"
                )
            if not trees.all_finite(leaf):
                raise NonFiniteError(f"{name} holds NaN or infinity before the first outer step")
        if not self._parts.differentiable:
            raise ValueError(f"meta is {meta!r}, which holds no tensor to train")
        self.parameters = [nn.Parameter(t.detach().clone()) for t in self._parts.differentiable]
        self.torch_optimizer, self.scheduler = self.optimizer.bind(self.parameters)

    def advance(self) -> OuterStep:
        """One outer step."""
        began, compiling = time.perf_counter(), compile_seconds()
        number, phase = self.progress.phase, self.progress.current
        found, taken_back = self._estimates_or_retreat(phase)
        gradients = [total / phase.accumulate for total in found.sums]
        outer_loss = sum(found.losses) / phase.accumulate
        self.past.remember(gradients)
        self.before = [p.clone() for p in self._detached()] if self.retreats else None
        error, squared_norm = pooled(found.errors), trees.squared_norm(gradients)
        squared = float(squared_norm)
        kept = _part_kept(gradients, self.clip_norm)
        self._update(gradients if kept == 1.0 else [kept * g for g in gradients], outer_loss)
        row: Row = {
            "outer_step": self.progress.outer_step,
            "phase": number,
            "outer_loss": outer_loss,
            "grad_norm": float(squared_norm.sqrt()),
            "standard_error": error,
            "signal_to_noise": None if not error else max(squared - error**2, 0.0) ** 0.5 / error,
        }
        if self.retreats:
            row["retreats"] = taken_back
        if self.clip_norm is not None:
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

    def _estimates_or_retreat(self, phase: Phase) -> tuple[Estimates, int]:
        """The estimates of one outer step, and how often half of the last step was taken back because the inner loop
        failed where it had led.
        """
        estimator, times = self.past.given_to(phase.estimator), 0
        while True:
            try:
                found = self.draws.estimates(estimator, phase.accumulate, self.meta_tree(), self.progress.outer_step)
                return found, times
            except (NonFiniteError, SolverError):
                if self.before is None or times == self.retreats:
                    raise
            times += 1
            with torch.no_grad():
                for parameter, before in zip(self.parameters, self.before, strict=True):
                    parameter.lerp_(before, 0.5)

    def _update(self, gradients: Sequence[Tensor], outer_loss: float) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        self.torch_optimizer.step(lambda: outer_loss)  # LBFGS(max_iter=1) asks for it; the gradients are there already
        if self.project is not None:
            self._project(self.project)
        if not trees.all_finite(self._detached()):
            raise NonFiniteError(
                f"outer step {self.progress.outer_step}: the outer optimiser (or project) made the meta parameters NaN "
                "or infinite from a finite hypergradient; a smaller outer learning rate is the usual cure"
            )
        if self.scheduler is not None:
            self.scheduler.step()

    def _project(self, project: Callable[[Any], Any]) -> None:
        allowed = module_view.as_tree(project(self.user_meta()))
        needed, returned = _shapes(self.meta_tree()), _shapes(allowed)
        if returned != needed:
            raise ValueError(
                f"project returned {returned or allowed!r}; it must return meta parameters of the structure and shapes "
                f"that it is given: {needed}"
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, trees.leaves(allowed), strict=True):
                parameter.copy_(value)

    # -- meta parameters in the forms that others see them ---------------------------------------------------------

    def meta_tree(self) -> Tree:
        """φ as a tree, with views in place of modules."""
        return self._parts.rebuild(self._detached())

    def user_meta(self, write_modules: bool = False) -> Any:
        """φ as the user gave it. Modules appear as views, or are themselves written to."""
        tree = trees.map_leaves(torch.clone, self.meta_tree())
        return module_view.written_back(tree) if write_modules else tree

    def _detached(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]


def _shapes(tree: Tree) -> dict[str, Any]:
    """The shape of every leaf; of what is no tensor, the type."""
    return {n: tuple(t.shape) if isinstance(t, Tensor) else type(t) for n, t in trees.named_leaves(tree, "meta")}


def _part_kept(gradients: Sequence[Tensor], clip_norm: float | None) -> float:
    """What gradients are multiplied with so that their norm together is at most `clip_norm`.

    The norm is taken in float64: the square of an exploding float32 gradient is infinite, and the factor would be zero.
    """
    if clip_norm is None:
        return 1.0
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    return 1.0 if norm <= clip_norm else clip_norm / norm
