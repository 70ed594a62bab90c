"""Operations of PyTorch in composite form, with the same values up to rounding and with all derivatives.

The tables at the end list the operations that are replaced, and say when. `bilevel.autodiff.substitution` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn import functional

from bilevel.autodiff.distances import cdist, conv_transpose, embedding_bag, hardsigmoid, pdist
from bilevel.autodiff.normalisations import (
    batch_norm,
    instance_norm,
    layer_norm,
    native_batch_norm,
    native_layer_norm,
    torch_batch_norm,
    torch_instance_norm,
)

Operation = Callable[..., Any]
_IMPOSSIBLE = -1e30
"""The logarithm of the probability of an impossible alignment in `ctc_loss`. Minus infinity has no derivative."""


def _reduced(losses: Tensor, reduction: str, size_average: bool | None, reduce: bool | None) -> Tensor:
    """Reduce losses as PyTorch's arguments specify, including the deprecated arguments."""
    if size_average is not None or reduce is not None:
        average, summed = size_average in (None, True), reduce in (None, True)
        reduction = ("mean" if average else "sum") if summed else "none"
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction == "none":
        return losses
    raise ValueError(f"{reduction!r} is not a valid value for reduction; there are 'none', 'mean' and 'sum'")


# -- random numbers ----------------------------------------------------------------------------------------------------


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each entry with probability p, and divide the others by 1 − p.

    On a CPU, PyTorch draws the mask in the order in which the entries of the input lie in memory, but not so under
    function transforms. The mask of a transposed input would then be another one in forward mode than in a plain step.
    """
    value = input
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    transposed = not value.is_contiguous() and value.shape == input.shape and value.device.type == "cpu"
    if not (transposed and training and 0 < p < 1 and value is not input):
        return functional.dropout(input, p, training, inplace)
    kept = torch.empty_like(value).bernoulli_(1 - p).div_(1 - p)
    return input.mul_(kept) if inplace else input * kept


# -- losses whose backward pass has no forward-mode derivative ---------------------------------------------------------


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Compute (x − y)², reduced. With a weight, PyTorch's own function is already a composite."""
    if weight is not None:
        weighted: Any = functional.mse_loss
        return weighted(input, target, size_average, reduce, reduction, weight)
    return _reduced((input - target).square(), reduction, size_average, reduce)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Compute ½ d² for |d| ≤ δ and δ (|d| − ½ δ) for larger |d|, reduced, with d = x − y."""
    difference = input - target
    size = difference.abs()
    losses = torch.where(size <= delta, 0.5 * difference.square(), delta * (size - 0.5 * delta))
    if weight is None:
        return _reduced(losses, reduction, None, None)
    losses = losses * weight
    return losses.sum() / weight.sum() if reduction == "mean" else _reduced(losses, reduction, None, None)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute log(1 + exp(−y x)), reduced."""
    return _reduced(-functional.logsigmoid(target * input), reduction, size_average, reduce)


# -- losses without a second derivative --------------------------------------------------------------------------------


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute Σ_{j≠y} w_y max(0, m − x_y + x_j)^p / C for scores x `[C]` or `[N, C]` and labels y."""
    if p not in (1, 2):
        raise ValueError("only p == 1 and p == 2 supported")
    scores, labels = (input.reshape(1, -1), target.reshape(1)) if input.ndim < 2 else (input, target)
    classes = torch.arange(scores.shape[-1], device=scores.device)
    right = scores.gather(1, labels.unsqueeze(1))
    losses = (margin - right + scores).clamp_min(0) ** p
    if weight is not None:
        losses = losses * weight[labels].unsqueeze(1)
    losses = torch.where(classes == labels.unsqueeze(1), torch.zeros_like(losses), losses).mean(1)
    return _reduced(losses[0] if input.ndim < 2 else losses, reduction, size_average, reduce)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute Σ_{j in labels, i not in labels} max(0, 1 − x_j + x_i) / C for scores `[C]` or `[N, C]`.

    A row of `target` lists labels up to the first negative number.
    """
    scores, labels = (input.reshape(1, -1), target.reshape(1, -1)) if input.ndim < 2 else (input, target)
    listed = (labels >= 0).long().cumprod(1) > 0
    classes = torch.arange(scores.shape[-1], device=scores.device)
    is_label = ((labels.unsqueeze(2) == classes) & listed.unsqueeze(2)).any(1)
    right = scores.gather(1, labels.clamp_min(0))
    losses = (1 - right.unsqueeze(2) + scores.unsqueeze(1)).clamp_min(0)
    counted = listed.unsqueeze(2) & ~is_label.unsqueeze(1)
    losses = torch.where(counted, losses, torch.zeros_like(losses)).sum((1, 2)) / scores.shape[-1]
    return _reduced(losses[0] if input.ndim < 2 else losses, reduction, size_average, reduce)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Compute −log of the summed probability of all alignments: connectionist temporal classification.

    The forward recursion runs in logarithms over the targets with blanks between them, `[N, 2S + 1]`. PyTorch's
    backward pass assumes normalised `log_probs`. The last term has the value zero. It gives the same first derivative
    as PyTorch for `log_probs` that are not normalised.

    Reference: Graves et al., 2006.
    """
    reduction = reduction if isinstance(reduction, str) else ("none", "mean", "sum")[reduction]
    single = log_probs.ndim == 2
    scores = log_probs.unsqueeze(1) if single else log_probs
    times, count = torch.as_tensor(input_lengths).reshape(-1), scores.shape[1]
    sizes = torch.as_tensor(target_lengths, device=scores.device).reshape(-1).long()
    times = times.to(scores.device)
    labels = _padded(targets, sizes, count, blank)
    extended = torch.full((count, 2 * labels.shape[1] + 1), blank, dtype=torch.long, device=scores.device)
    extended[:, 1::2] = labels
    # An alignment may skip the blank between two different labels.
    skips = torch.zeros_like(extended, dtype=torch.bool)
    skips[:, 2:] = (extended[:, 2:] != blank) & (extended[:, 2:] != extended[:, :-2])
    each = scores.gather(2, extended.expand(scores.shape[0], -1, -1))
    nothing = torch.full_like(each[0], _IMPOSSIBLE)
    places = torch.arange(extended.shape[1], device=scores.device)
    reached = torch.where((places < 2) & (places <= 2 * sizes[:, None]), each[0], nothing)
    for t in range(1, scores.shape[0]):
        by_one = torch.cat([nothing[:, :1], reached[:, :-1]], 1)
        by_two = torch.where(skips, torch.cat([nothing[:, :2], reached[:, :-2]], 1)[:, : reached.shape[1]], nothing)
        following = torch.logsumexp(torch.stack([reached, by_one, by_two]), 0) + each[t]
        reached = torch.where((t < times)[:, None], following, reached)
    last = reached.gather(1, 2 * sizes[:, None])
    before = torch.where((sizes > 0)[:, None], reached.gather(1, (2 * sizes[:, None] - 1).clamp_min(0)), nothing[:, :1])
    losses = -torch.logsumexp(torch.cat([last, before], 1), 1)
    possible = losses < -0.1 * _IMPOSSIBLE
    inside = torch.arange(scores.shape[0], device=scores.device)[:, None] < times
    mass = torch.where(inside & possible, scores.exp().sum(2), torch.zeros_like(scores[..., 0])).sum(0)
    losses = losses + (mass - mass.detach())
    losses = torch.where(possible, losses, torch.full_like(losses, 0.0 if zero_infinity else torch.inf))
    if reduction == "mean":
        return (losses / sizes.clamp_min(1)).mean()
    return _reduced(losses[0] if single else losses, reduction, None, None)


def _padded(targets: Tensor, sizes: Tensor, count: int, blank: int) -> Tensor:
    """Return targets as `[N, S]`, from that form or from one vector with all targets."""
    longest = int(sizes.max()) if len(sizes) else 0
    if targets.ndim == 2:
        padded = targets[:, :longest].long()
    elif count == 1:
        padded = targets[None, :longest].long()
    else:
        rows = torch.split(targets[: int(sizes.sum())].long(), sizes.tolist())
        padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=blank)
    kept = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
    return torch.where(kept, padded, torch.full_like(padded, blank)).to(sizes.device)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Compute the cross-entropy of linear scores at once. In chunks (`options`), only the first derivative is right."""
    settings: Any = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return functional.linear_cross_entropy(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, **settings
    )


# -- operations that stop a gradient in reverse mode only --------------------------------------------------------------


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows of a table. The row `padding_idx` is a constant, to which PyTorch gives no gradient."""
    found = functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        return found
    padded = input == padding_idx % len(weight)
    return torch.where(padded.unsqueeze(-1), found.detach(), found)


# -- operations whose second derivative is wrong in PyTorch ------------------------------------------------------------


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute g v / ‖v‖ with the norm over all axes except `dim`, or over all axes for `dim=-1`."""
    if dim == -1:
        return v * (g / v.norm())
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()
    return v * (g / norm)


# -- tables ------------------------------------------------------------------------------------------------------------

SECOND_DERIVATIVE: Mapping[Operation, Operation] = {
    functional.soft_margin_loss: soft_margin_loss,
    functional.multi_margin_loss: multi_margin_loss,
    functional.multilabel_margin_loss: multilabel_margin_loss,
    functional.ctc_loss: ctc_loss,
    torch.ctc_loss: ctc_loss,
    torch._weight_norm: weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    functional.linear_cross_entropy: linear_cross_entropy,
    functional.hardsigmoid: hardsigmoid,
    functional.embedding_bag: embedding_bag,
    torch.cdist: cdist,
    torch.pdist: pdist,
}
"""Operations whose second derivative is missing in PyTorch (for `soft_margin_loss`, with respect to the target; for
`embedding_bag`, with respect to the weights of samples) or wrong. They are replaced wherever a gradient is
differentiated."""

FORWARD_MODE: Mapping[Operation, Operation] = {
    functional.mse_loss: mse_loss,
    functional.huber_loss: huber_loss,
    functional.dropout: dropout,
    functional.embedding: embedding,
}
"""Operations whose backward pass has no forward-mode derivative, that draw other random numbers there, or that stop a
gradient in reverse mode only: replaced in forward mode."""

THIRD_DERIVATIVE: Mapping[Operation, Operation] = {
    functional.layer_norm: layer_norm,
    functional.instance_norm: instance_norm,
    functional.batch_norm: batch_norm,
    torch.layer_norm: layer_norm,
    torch.native_layer_norm: native_layer_norm,
    torch.batch_norm: torch_batch_norm,
    torch.instance_norm: torch_instance_norm,
    torch.native_batch_norm: native_batch_norm,
    torch._native_batch_norm_legit: native_batch_norm,  # pyright: ignore[reportPrivateImportUsage]
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), conv_transpose),
}
"""Operations whose third derivative is wrong in PyTorch, or raises an error (`conv_transpose`). They are replaced in
losses that take a gradient themselves, which makes third derivatives occur."""
