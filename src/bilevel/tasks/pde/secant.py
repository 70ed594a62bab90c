"""An outer optimiser for one unknown number. It needs few steps, from distant starts and for gradients of any size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Secant(torch.optim.Optimizer):
    """The secant method: each entry of φ moves to the zero of the line through its last two derivatives.

        φ ← φ − g / c,   c = (g − g_before) / (φ − φ_before)

    If c is not positive, the step is `growth` times the last step, against the derivative's sign. (Far from the minimum
    the derivative may even become smaller with the distance.) No step is longer than `longest`. Near a minimum each
    error is about the product of the two errors before it (order 1.6). Entries are treated separately, so the method is
    suitable for one unknown, or for several that hardly interact.

    Args:
        params: the tensors to update.
        lr: the length of the first step.
        longest: the largest length of a step.
        growth: the factor between steps while c is not positive.

    Raises:
        ValueError: the settings do not satisfy 0 < lr ≤ longest and growth ≥ 1.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.5, longest: float = 2.0, growth: float = 2.0) -> None:
        if not 0 < lr <= longest or growth < 1:
            raise ValueError(
                f"lr={lr}, longest={longest}, growth={growth}: 0 < lr <= longest and growth >= 1 is needed"
            )
        super().__init__(params, {"lr": lr, "longest": longest, "growth": growth})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make one step from the current gradients. Call `closure`, if given, and return its result."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return None if closure is None else closure()

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        memory = self.state[parameter]
        if not memory:
            step = -group["lr"] * gradient.sign()
        else:
            moved = parameter - memory["before"]
            curvature = (gradient - memory["gradient"]) / torch.where(moved == 0, torch.ones_like(moved), moved)
            onward = -gradient.sign() * group["growth"] * moved.abs()
            step = torch.where((curvature > 0) & (moved != 0), -gradient / curvature, onward)
        memory["before"], memory["gradient"] = parameter.clone(), gradient.clone()
        parameter.add_(step.clamp(-group["longest"], group["longest"]))
