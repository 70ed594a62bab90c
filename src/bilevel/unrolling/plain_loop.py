"""The loop that the user would have written: a copy of the module, the real optimiser and scheduler, `backward()`.

Nothing of how this library computes a step is used here: no function transforms, no buckets, no pure update rules.
Shared with it are only the batches and the random numbers of each step, because a comparison needs the same ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bilevel import autodiff, randomness, trees
from bilevel.batches import with_own_containers
from bilevel.models.module_view import modules_in
from bilevel.optim.settings import of_meta_and_step, one_each
from bilevel.optim.torch_step import SPEED_ONLY
from bilevel.problem import GradientDescent, require_losses
from bilevel.trees import Tree
from bilevel.unrolling.double_precision import InDouble
from bilevel.unrolling.inner_loop import InnerLoop
from bilevel.unrolling.plain_copies import NoPlainLoopError, PlainCopy, plain_copy
from bilevel.unrolling.stopped_gradients import Tape


class PlainLoop:
    """One inner loop in plain PyTorch.

    Args:
        run: the library's inner loop, from which the batches, the seed and the number of steps are taken.
        meta: φ as the user passed it.
        draws: where the loop is computed in float64, the dtype in which random numbers are drawn; else `None`.
        hooks: whether the hooks of parameters run.

    Raises:
        NoPlainLoopError: there is no such loop; the message says why.
    """

    def __init__(self, run: InnerLoop, meta: Any, draws: torch.dtype | None = None, hooks: bool = True) -> None:
        problem = run.problem.as_gradient_descent
        if problem is None:
            raise NoPlainLoopError(f"a {type(run.problem).__name__} is given by its own steps, not by an optimiser")
        if run.carried is not None:
            raise NoPlainLoopError("this is a later window of a stream")
        self.run = run
        self.problem: GradientDescent = problem
        self.tape: Tape | None = None
        """Records or replays the stopped gradients of the user's functions, if there is one."""
        self._draws, self._hooks = draws, hooks
        self._dtype = None if draws is None else torch.float64
        self.meta: PlainCopy = plain_copy(meta, trained=False, dtype=self._dtype)
        self.params: PlainCopy | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._timetable: torch.optim.Optimizer | None = None
        self._scheduled = 0

    # -- the loop ------------------------------------------------------------------------------------------------

    def start(self, meta: Sequence[Tensor] | None = None) -> PlainCopy:
        """Make the parameters and the optimiser, at other values of φ if there are any."""
        if meta is not None:
            self.meta.set(meta)
        with self._stream(randomness.INIT), torch.no_grad():
            made = self.problem._make_params(self.meta.value)
        self.params = plain_copy(made, trained=True, dtype=self._dtype, hooks=self._hooks)
        shared = dict(zip(self.meta.originals, self.meta.tensors, strict=True))
        with torch.no_grad():
            for original, tensor in zip(self.params.originals, self.params.tensors, strict=True):
                if original in shared:  # the same parameter in params and meta: the inner loop starts from meta
                    tensor.copy_(shared[original])
        if not self.params.tensors:
            raise NoPlainLoopError("there is no tensor to train")
        self._optimizer = self._scheduler = self._timetable = None
        self._scheduled = 0
        return self.params

    def step(self, t: int) -> None:
        """Take step t: `zero_grad`, the loss, `backward`, clipping, `step` of the optimiser and of the scheduler."""
        params = self._started()
        batch = self.run._fetch(t)
        if self._optimizer is None:
            self._bind()
        optimizer = self._optimizer
        assert optimizer is not None
        with self._stream(randomness.STEP, self.run.first_step + t), torch.enable_grad():
            optimizer.zero_grad()
            with self._modes():
                loss = self._inner_loss(params, batch)
                loss.backward()
            self._clip(params.tensors, t)
            self._set_settings(t)
            optimizer.step()
        self._advance_schedule()

    def skip_to(self, t: int) -> None:
        """Advance the schedule to step t, without steps of the optimiser."""
        if self._optimizer is None:
            self._started()
            self._bind()
        while self._scheduled < t and self._scheduler is not None:
            self._advance_schedule()

    def _advance_schedule(self) -> None:
        self._scheduled += 1
        if self._scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                self._scheduler.step()

    def outer_value(self) -> Tensor:
        """Return the outer loss at the current parameters."""
        params = self._started()
        with self._stream(randomness.OUTER), torch.enable_grad(), self._modes(), self._taped():
            value = self.problem._outer_loss(params.value, self.meta.value, with_own_containers(self.run.outer_batch))
        return require_losses(value, "outer_loss").detach()

    def solve(self, meta: Sequence[Tensor] | None = None) -> Tensor:
        """Run the whole loop at φ, and return the outer loss."""
        self.start(meta)
        for t in range(self.run.steps):
            self.step(t)
        return self.outer_value()

    # -- parts of it, at given values ------------------------------------------------------------------------------

    def gradient(
        self, t: int, params: Sequence[Tensor], buffers: Mapping[str, Tensor], meta: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Return the gradient of the inner loss of step t, before hooks and clipping, and the buffers after it."""
        copied = self._at(params, buffers, meta)
        batch = self.run._fetch(t)
        with self._stream(randomness.STEP, self.run.first_step + t), torch.enable_grad(), self._modes():
            loss = self._inner_loss(copied, batch)
            if not loss.requires_grad:
                raise NoPlainLoopError("the inner loss does not depend on the parameters")
            found = torch.autograd.grad(loss, copied.tensors, allow_unused=True)
        after = {name: copied.read(name) for name in buffers}
        copied.reset_modes()
        return [None if g is None else g.detach() for g in found], after

    def outer_at(self, params: Sequence[Tensor], buffers: Mapping[str, Tensor], meta: Sequence[Tensor]) -> Tensor:
        """Return the outer loss at given values."""
        copied = self._at(params, buffers, meta)
        value = self.outer_value()
        copied.reset_modes()
        return value

    def _at(self, params: Sequence[Tensor], buffers: Mapping[str, Tensor], meta: Sequence[Tensor]) -> PlainCopy:
        copied = self._started()
        self.meta.set(meta)
        copied.set(params)
        for name, value in buffers.items():
            copied.write(name, value)
        return copied

    # -- the user's functions ------------------------------------------------------------------------------------

    def _inner_loss(self, params: PlainCopy, batch: Any) -> Tensor:
        with self._taped():
            return self.problem.inner_loss(params.value, self.meta.value, with_own_containers(batch))

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with ExitStack() as stack:
            modules = [leaf for leaf in trees.leaves(self._started().value) if isinstance(leaf, nn.Module)]
            stack.enter_context(autodiff.differentiable_kernels([*modules, *modules_in(self.run.meta)]))
            if any(type(layer).__name__ == "OptimizedModule" for module in modules for layer in module.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._draws is not None:
                stack.enter_context(InDouble(self._draws))
            yield

    @contextmanager
    def _taped(self) -> Iterator[None]:
        if self.tape is None:
            yield
            return
        with self.tape.running():
            yield

    @contextmanager
    def _stream(self, *counters: int) -> Iterator[None]:
        with randomness.PROCESS_WIDE, randomness.seeded(self.run.seed, *counters):
            yield

    def _started(self) -> PlainCopy:
        if self.params is None:
            self.start()
        assert self.params is not None
        return self.params

    # -- the optimiser -------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Make the optimiser and the scheduler that the user named, over the copied parameters."""
        ours, params = self.problem.optimizer, self._started()
        common, each = self._settings_at(0)
        special = ours.meta_settings.keys()
        settings = {n: v for n, v in ours.settings.items() if n not in SPEED_ONLY and n not in special}
        settings.update(common, **{name: values[0] for name, values in each.items()})
        groups: Any = params.tensors
        if each:
            groups = [
                {"params": [tensor], **{name: values[i] for name, values in each.items()}}
                for i, tensor in enumerate(params.tensors)
            ]
        make: Callable[..., torch.optim.Optimizer] = ours.algorithm
        self._optimizer = scheduled = make(groups, **settings)
        if ours.schedule is not None and "lr" in each:
            # Both φ and the schedule decide on the rate. The library multiplies φ's by the schedule of a rate of one.
            constants = {name: value for name, value in ours._constants().items() if name not in SPEED_ONLY}
            self._timetable = scheduled = make([torch.zeros(1)], **constants)
        self._scheduler = None if ours.schedule is None else ours.schedule(scheduled)

    def _settings_at(self, t: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Return the settings of step t that are functions: those of all parameters, and those of each."""
        params, common, each = self._started(), dict[str, Any](), dict[str, list[float]]()
        for name, function in self.problem.optimizer.meta_settings.items():
            value = function(self.meta.value, t)
            if name in ("lr", "weight_decay"):
                each[name] = [_number(v, name) for v in self._one_each(value, params, name)]
            else:
                common[name] = trees.map_leaves(lambda v, name=name: _number(v, name), value)
        return common, each

    def _set_settings(self, t: int) -> None:
        """Set the settings of step t that are functions, multiplied by the schedule if there is one."""
        if self._optimizer is None or not self.problem.optimizer.meta_settings:
            return
        common, each = self._settings_at(t)
        scheduled = {} if self._timetable is None else self._timetable.param_groups[0]
        factor = scheduled.get("lr", 1.0)
        others = {name: value for name, value in scheduled.items() if name in ("momentum", "betas")}
        for i, group in enumerate(self._optimizer.param_groups):
            group.update(others, **common)
            for name, values in each.items():
                group[name] = values[i] * (factor if name == "lr" else 1.0)

    def _one_each(self, value: Any, params: PlainCopy, name: str) -> list[Any]:
        if isinstance(value, Mapping) and set(value) == set(params.names):
            return [value[each] for each in params.names]
        with_leaves: Tree = params.value
        if any(isinstance(leaf, nn.Module) for leaf in trees.leaves(with_leaves)):
            with_leaves = list(params.tensors)
        try:
            return one_each(value, params.tensors, with_leaves, name)
        except ValueError as error:
            raise NoPlainLoopError(str(error)) from error

    def _clip(self, tensors: Sequence[Tensor], t: int) -> None:
        clipping = self.problem.optimizer.clipping
        value, norm = (
            of_meta_and_step(bound)(self.meta.value, t) if callable(bound) else bound
            for bound in (clipping.value, clipping.norm)
        )
        if value is not None:
            nn.utils.clip_grad_value_(tensors, float(value))
        if norm is not None:
            nn.utils.clip_grad_norm_(tensors, float(norm), clipping.norm_type)


def _number(value: Any, name: str) -> float:
    if isinstance(value, Tensor):
        if value.ndim:
            raise NoPlainLoopError(f"{name} has a value for each entry of a parameter, which torch.optim does not take")
        return float(value.detach())
    return value
