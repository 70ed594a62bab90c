"""Clipping of the inner gradient inside a step, as `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` do it.

PyTorch's own functions run under `torch.no_grad()` and write into `.grad`. A derivative through them would be the
derivative of a loop without clipping. The functions of this module compute the same operations out of place, on the
gradients that an update receives.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import trees
from bilevel.optim.settings import of_meta_and_step
from bilevel.trees import Tree

_EPSILON = 1e-6
"""The number added to the norm before dividing by it, as in `torch.nn.utils.clip_grads_with_norm_`."""

Bound = float | Callable[..., Any] | None


@dataclass(frozen=True)
class Clipping:
    """Bounds on the gradient of a step. The bound on each entry is applied first, then that on the norm.

        g ← clamp(g, −value, value),   g ← g · min(1, norm / (‖g‖_p + 1e-6))

    ‖g‖_p is the p-norm over all entries of all parameters that the loss reaches at this step.

    Args:
        norm: the bound on ‖g‖_p, a number or a function of the meta parameters; `None` for no bound.
        value: the bound on each entry, a number or a function of the meta parameters; `None` for no bound.
        norm_type: p, at least 1; `math.inf` for the largest absolute value.

    Raises:
        ValueError: a bound is neither a number of at least 0 nor a function, p is less than 1, or p is given without
            a bound on the norm.

    >>> Clipping(norm=1.0)([torch.tensor([3.0, 4.0]), None], meta=None)  # the norm is 5
    [tensor([0.6000, 0.8000]), None]
    """

    norm: Bound = None
    value: Bound = None
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        for name, bound in (("clip_norm", self.norm), ("clip_value", self.value)):
            if bound is not None and not callable(bound) and not _is_number(bound, at_least=0.0):
                raise ValueError(
                    f"{name}={bound!r}: a number of at least 0 is needed, or a function of the meta parameters such as "
                    f"{name}=lambda meta: meta['{name}']"
                )
        if not _is_number(self.norm_type, at_least=1.0):
            raise ValueError(f"clip_norm_type={self.norm_type!r}: a number of at least 1 is needed, or math.inf")
        if self.norm_type != 2 and self.norm is None:
            raise ValueError(f"clip_norm_type={self.norm_type!r} has no effect without clip_norm")

    @property
    def is_on(self) -> bool:
        """Whether there is any bound."""
        return self.norm is not None or self.value is not None

    def __call__(self, gradients: Sequence[Tensor | None], meta: Tree, step: int = 0) -> list[Tensor | None]:
        """Return the clipped gradients. The arguments are not changed.

        Args:
            gradients: the gradient of each parameter; `None`, for a parameter without a gradient, stays `None`.
            meta: the meta parameters, for bounds that are functions of them.
            step: the number of the step, for bounds that are functions of it too.

        Raises:
            ValueError: a function gives a tensor that is not a scalar, or no number of at least 0.
        """
        found = list(gradients)
        if self.value is not None:
            bound = _evaluated(self.value, meta, step, "clip_value")
            found = [None if g is None else _clamped(g, bound) for g in found]
        reached = [g for g in found if g is not None]
        if self.norm is None or not reached:
            return found
        bound, first = _evaluated(self.norm, meta, step, "clip_norm"), reached[0]
        norms = [torch.linalg.vector_norm(g, float(self.norm_type)).to(first.device) for g in reached]
        total = torch.linalg.vector_norm(torch.stack(norms), float(self.norm_type))
        factor = torch.clamp(bound / (total + _EPSILON), max=1.0)
        return [None if g is None else g * factor.to(device=g.device, dtype=g.dtype) for g in found]

    def __repr__(self) -> str:
        """Return the arguments of `bilevel.optimizer` that differ from the defaults, as code."""
        named = {"clip_norm": self.norm, "clip_value": self.value}
        shown = [f"{name}={bound!r}" for name, bound in named.items() if bound is not None]
        return ", ".join(shown + [f"clip_norm_type={self.norm_type!r}"] * (self.norm_type != 2))


def require_whole(clipping: Clipping, parameters: Sequence[Tensor]) -> None:
    """Raise if the norm over all parameters would be computed over one process's part of them.

    Raises:
        ValueError: `clipping` bounds the norm, and parameters are spread over processes by `fully_shard`.
    """
    if clipping.norm is not None and any(trees.is_spread(p) for p in parameters):
        raise ValueError(
            "clip_norm with parameters that are spread over processes by fully_shard: each process updates its own "
            "part, and the norm is that of all parts; take clip_value, which goes entry by entry, or parameters that "
            "every process holds whole"
        )


def _evaluated(bound: Any, meta: Tree, step: int, name: str) -> Any:
    value: Any = of_meta_and_step(bound)(meta, step) if callable(bound) else bound
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} gave a tensor of shape {tuple(value.shape)}; a scalar is needed")
        return value
    if not _is_number(value, at_least=0.0):
        raise ValueError(f"{name} gave {value!r} ({type(value).__name__}); a scalar tensor or a number is needed")
    return float(value)


def _clamped(gradient: Tensor, bound: Any) -> Tensor:
    if isinstance(bound, Tensor):
        bound = bound.to(device=gradient.device, dtype=gradient.dtype)
        return torch.minimum(torch.maximum(gradient, -bound), bound)
    return gradient.clamp(-bound, bound)


def _is_number(value: Any, at_least: float) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and not math.isnan(float(value)) and float(value) >= at_least
