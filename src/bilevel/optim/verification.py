"""Comparison of updates with the optimiser's own step, and of their derivatives with finite differences.

The comparison is made once for each optimiser that is not part of PyTorch, at the parameters and gradients of the first
update. It takes three updates in a row, in float64:

    (θ_0, g) ↦ θ_3,   θ_{t+1} = update(θ_t, c_t g),   c = (1, −0.5, 0.8).

The values are compared with the steps of the optimiser itself. The directional derivatives in θ_0 and in g, in reverse
and in forward mode, are compared with five-point differences. The parameters and gradients are first moved at random by
1e-3 of their size, so that they do not lie on the edge of a clamp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from bilevel import trees
from bilevel.autodiff.modes import without_modes

FACTORS = (1.0, -0.5, 0.8)
"""The factors c_t of the gradient in consecutive updates."""
_OFF = 1e-3
_STEP = 1e-4
_TOLERANCE = 1e-5
"""The largest accepted difference, relative to the larger of two derivatives. The error of the five-point formula is
O(step⁴) plus rounding/step, 1e-12."""
_ROUNDING = 1e-9
"""Differences below this multiple of the length of the direction are rounding errors."""

Tensors = list[Tensor]
Update = Callable[[Tensors, Tensors], Tensors]


def plain_copies(tensors: Sequence[Tensor]) -> Tensors | None:
    """Return float64 copies on the CPU without derivatives, also from inside function transforms.

    Returns:
        The copies, or `None` if a tensor has a batch axis of `torch.vmap`.
    """
    found = []
    for tensor in tensors:
        value = tensor
        while is_functorch_wrapped_tensor(value):
            if is_batchedtensor(value):
                return None
            value = get_unwrapped(value)
        with outside_of_transforms():
            primal = torch.autograd.forward_ad.unpack_dual(value.detach()).primal
            found.append(trees.local(primal).to(device="cpu", dtype=torch.float64, copy=True))
    return found


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Context in which operations on plain tensors are computed as if no function transform and no mode were active.

    The modes are those of the inner loop around an update. They replace operations or watch what is read.
    """
    with without_modes():
        if not torch._C._are_functorch_transforms_active():
            yield
            return
        with temporarily_clear_interpreter_stack():
            yield


def moved_off(tensors: Tensors, seed: int) -> Tensors:
    """Return the tensors with each entry moved at random by about 1e-3 of the root mean square of its tensor.

    A tensor of zeros is moved by about 1e-3.
    """
    return [t + _OFF * u for t, u in zip(tensors, _directions(tensors, seed), strict=True)]


def difference_in_values(update: Update, own: Update, theta: Tensors, gradients: Tensors) -> float:
    """Return the difference between two results, relative to the change that the optimiser's own steps make.

    Args:
        update: the updates to be tested.
        own: the optimiser's own steps.
        theta: the parameters.
        gradients: the gradients.
    """
    ours, theirs = update(theta, gradients), own(theta, gradients)
    return _apart(_minus(ours, theta), _minus(theirs, theta), _norm(theta) or 1.0)


def difference_in_derivatives(update: Update, theta: Tensors, gradients: Tensors) -> tuple[float, str]:
    """Compare the derivatives of an update with finite differences, in reverse and in forward mode.

    The derivatives are those of the change θ_3 − θ_0, with respect to θ_0 and with respect to the gradients.

    Returns:
        The largest difference, relative to the larger of derivative and finite difference, and the name of the
        derivative for which it occurs.
    """
    worst = 0.0, ""
    for what, seed in (("parameters", 1), ("gradients", 2)):
        fixed = what == "gradients"

        def change(*moved: Tensor, fixed: bool = fixed) -> tuple[Tensor, ...]:
            start = theta if fixed else list(moved)
            return tuple(_minus(update(start, list(moved) if fixed else gradients), start))

        point = tuple(gradients if fixed else theta)
        along = tuple(_directions(list(point), seed))
        scale = _norm(along)
        expected = _five_points(change, point, along)
        with torch.enable_grad():
            forward = list(torch.func.jvp(change, point, along)[1])
        worst = max(worst, (_apart(forward, expected, scale), f"with respect to the {what}, in forward mode"))
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in point]
            outputs = change(*inputs)
            weights = _directions(expected, seed + 2)
            found = torch.autograd.grad(outputs, inputs, weights, allow_unused=True) if _recorded(outputs) else ()
        product = sum(float((g * a).sum()) for g, a in zip(found, along, strict=False) if g is not None)
        wanted = sum(float((w * e).sum()) for w, e in zip(weights, expected, strict=True))
        gap = abs(product - wanted) / max(abs(wanted), abs(product), 1e-2 * _norm(weights) * _norm(expected), 1e-300)
        if abs(product - wanted) > _ROUNDING * scale * _norm(weights):
            worst = max(worst, (gap, f"with respect to the {what}, in reverse mode"))
    return worst


def is_off(difference: float) -> bool:
    """Whether a relative difference is too large to be a rounding error. NaN counts as too large."""
    return not difference <= _TOLERANCE


def _five_points(
    function: Callable[..., tuple[Tensor, ...]], point: Sequence[Tensor], along: Sequence[Tensor]
) -> Tensors:
    def at(offset: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function(*(p + offset * a for p, a in zip(point, along, strict=True)))

    near, far = (_minus(at(k * _STEP), at(-k * _STEP)) for k in (1, 2))
    return [(8 * a - b) / (12 * _STEP) for a, b in zip(near, far, strict=True)]


def _directions(tensors: Sequence[Tensor], seed: int) -> Tensors:
    """Draw a normal random tensor for each tensor, with the root mean square of its entries."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [float(t.square().mean().sqrt()) if t.numel() else 0.0 for t in tensors]
    return [
        (size or 1.0) * torch.randn(t.shape, generator=draw, dtype=t.dtype)
        for t, size in zip(tensors, sizes, strict=True)
    ]


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor], scale: float) -> float:
    gap = _norm(_minus(found, expected))
    return 0.0 if gap <= _ROUNDING * scale else gap / max(_norm(found), _norm(expected), 1e-300)


def _minus(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    return [a - b for a, b in zip(left, right, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors) ** 0.5


def _recorded(tensors: Sequence[Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)
