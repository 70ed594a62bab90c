"""The settings of an optimiser at each step, as PyTorch's own schedulers make them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


class Timetable:
    """The settings in force at each step. PyTorch's scheduler runs ahead on an optimiser that updates nothing."""

    def __init__(
        self,
        algorithm: type[torch.optim.Optimizer],
        constants: Mapping[str, Any],
        schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None,
    ) -> None:
        vector, matrix = (
            functools.partial(algorithm, [torch.zeros(shape, device="cpu")], **constants) for shape in ((1,), (1, 1))
        )
        self.blank: Callable[[], torch.optim.Optimizer] = vector
        """A function that makes an optimiser with these settings. The caller fills in its parameters and state."""
        try:
            self._optimizer = self.blank()
        except ValueError:  # Muon updates matrices only; other errors are raised again
            self.blank = matrix
            self._optimizer = self.blank()
        self.defaults = {name: value for name, value in self._optimizer.param_groups[0].items() if name != "params"}
        self._scheduler = None if schedule is None else schedule(self._optimizer)
        if schedule is not None and not isinstance(self._scheduler, LRScheduler):
            raise TypeError(
                f"schedule={schedule!r} made {self._scheduler!r}; a function from an optimiser to a scheduler of "
                "torch.optim.lr_scheduler is needed, such as functools.partial(CosineAnnealingLR, T_max=100)"
            )
        if isinstance(self._scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau goes by the loss; a schedule that goes by the number of steps alone is needed, such "
                "as functools.partial(CosineAnnealingLR, T_max=100)"
            )
        self._known = [self._settings_now()]

    def __call__(self, step: int) -> dict[str, Any]:
        """Return all settings in force at a step, counted from 0."""
        if self._scheduler is None:
            return dict(self.defaults)
        while len(self._known) <= step:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PyTorch warns that the optimiser makes no steps
                self._scheduler.step()
            self._known.append(self._settings_now())
        return dict(self._known[step])

    def _settings_now(self) -> dict[str, Any]:
        group = self._optimizer.param_groups[0]
        return {name: group[name] for name in self.defaults}
