"""The meta parameters that a run of the outer loop returns: the last ones, or the best ones so far."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Keep: TypeAlias = "Literal['last', 'best'] | Callable[[Any], float]"
"""Which meta parameters are returned; a function gives the number that is to be small, from an `OuterStep`."""


def check_keep(keep: Any) -> None:
    """Raise unless it says which meta parameters are returned."""
    if keep not in ("last", "best") and not callable(keep):
        raise ValueError(
            f"keep={keep!r}: there are 'last', 'best' (by the outer loss), or a function of the OuterStep that returns "
            "a number, the smaller the better: keep=lambda step: -accuracy(step.meta)"
        )


@dataclass
class Kept:
    """The best meta parameters so far."""

    keep: Keep = "last"
    value: float | None = None
    """The outer loss, or what the user's function returned."""
    tensors: list[Tensor] | None = None

    @property
    def by_loss(self) -> bool:
        """Whether the outer loss decides."""
        return self.keep == "best"

    def offer(self, value: float, tensors: Sequence[Tensor]) -> None:
        """Keep copies of the tensors if the value is less than every one before."""
        if not math.isnan(value) and (self.value is None or value < self.value):
            self.value, self.tensors = value, [t.detach().clone() for t in tensors]

    def measure(self, step: Any) -> float | None:
        """Return what the user's function gives for a step; `None` if there is no such function.

        Raises:
            TypeError: it gives no number.
        """
        if isinstance(self.keep, str):
            return None
        value: Any = self.keep(step)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(
                f"the function keep returned {value!r} ({type(value).__name__}); a number is needed, the smaller the "
                "better"
            )
        return float(value)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {"value": self.value, "tensors": self.tensors}

    def restore(self, stored: dict[str, Any], like: Sequence[Tensor]) -> None:
        """Undo `state`, on the devices of the parameters."""
        tensors = stored["tensors"]
        self.value = stored["value"]
        self.tensors = None if tensors is None else [t.to(p.device) for t, p in zip(tensors, like, strict=True)]


@torch.no_grad()
def chosen(kept: Kept, current: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors to hand out: the best ones, or the current ones."""
    return list(current if kept.tensors is None else kept.tensors)
