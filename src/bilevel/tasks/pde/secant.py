"""An outer optimiser for fits of one number: few steps, from far away, whatever the size of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Secant(torch.optim.Optimizer):
    """Each entry of φ moves to where the line through its last two derivatives is zero.

        φ ← φ − g / c,   c = (g − g_before) / (φ − φ_before)

    Where c is not positive (far from the minimum, the derivative may even grow smaller), the step is `growth` times
    the last one, against the derivative's sign; no step is longer than `longest`. Near a minimum the error of three
    steps on is about the product of those of two steps (order 1.6). Entries are treated apart, so this is for one
    unknown, or for several that hardly interact.

    Args:
        lr: the first step.
        longest: of all steps.
        growth: of steps where the secant has no minimum.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.5, longest: float = 2.0, growth: float = 2.0) -> None:
        if not 0 < lr <= longest or growth < 1:
            raise ValueError(
                f"lr={lr}, longest={longest}, growth={growth}: 0 < lr <= longest and growth >= 1 is needed"
            )
        super().__init__(params, {"lr": lr, "longest": longest, "growth": growth})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step from the gradients that are there."""
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
