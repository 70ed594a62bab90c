"""Distances, and a few layers, in composite form. PyTorch's own lack second or third derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    """Compute ‖x1_i − x2_j‖_p for all pairs of rows of `[…, P, M]` and `[…, R, M]`, as `[…, P, R]`.

    The memory is that of all differences, `[…, P, R, M]`, where the first derivative of PyTorch's operation needs
    `[…, P, R]`. Where PyTorch computes Euclidean distances by a matrix product, its own derivatives are right.
    """
    by_products = compute_mode == "use_mm_for_euclid_dist" or (
        compute_mode == "use_mm_for_euclid_dist_if_necessary" and max(x1.shape[-2], x2.shape[-2]) > 25
    )
    if (p == 2 and by_products) or 0 in (x1.shape[-1], x1.shape[-2], x2.shape[-2]):
        return torch.cdist(x1, x2, p, compute_mode)
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """Compute ‖x_i − x_j‖_p for all pairs i < j of rows of `[N, M]`, as `[N (N − 1) / 2]`."""
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _norm(input[first] - input[second], p)


def _norm(x: Tensor, p: float) -> Tensor:
    """Compute the p-norm over the last axis, with a derivative of zero where it is zero."""
    if p == 0:
        return torch.linalg.vector_norm(x, 0, dim=-1) + 0 * x.sum(-1)
    apart = (x != 0).any(-1)
    kept = torch.where(apart.unsqueeze(-1), x, torch.ones_like(x))
    return torch.where(apart, torch.linalg.vector_norm(kept, p, dim=-1), torch.zeros_like(x[..., 0]))


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Compute a transposed convolution, with `padding` and `output_padding` as cuts of the unpadded one.

    PyTorch's own raises an error in the third derivative if there is an `output_padding`.
    """
    axes = weight.ndim - 2
    cut, more = ([n] * axes if isinstance(n, int) else list(n) for n in (padding, output_padding))
    operation: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[axes - 1]
    whole = operation(input, weight, None, stride, 0, 0, groups, dilation)
    found = functional.pad(whole, [n for p, m in zip(cut[::-1], more[::-1], strict=True) for n in (-p, m - p)])
    return found if bias is None else found + bias.reshape(-1, *[1] * axes)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute min(max(x / 6 + 1 / 2, 0), 1)."""
    inside = (input > -3) & (input < 3)
    found = torch.where(inside, input / 6 + 0.5, (input >= 3).to(input.dtype))
    return input.copy_(found) if inplace else found


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Compute the weighted sum of the embeddings of each bag, if there are weights of samples."""
    if per_sample_weights is None or max_norm is not None or scale_grad_by_freq or mode != "sum":
        settings: Any = (max_norm, norm_type, scale_grad_by_freq, mode, sparse)
        last: Any = (per_sample_weights, include_last_offset, padding_idx)
        return functional.embedding_bag(input, weight, offsets, *settings, *last)
    rows = input.reshape(-1).long()
    if input.ndim == 2:
        count = len(input)
        bags = torch.arange(count, device=input.device).repeat_interleave(input.shape[1])
    else:
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")
        starts = offsets[:-1] if include_last_offset else offsets
        count = len(starts)
        bags = torch.searchsorted(starts.contiguous(), torch.arange(len(rows), device=input.device), right=True) - 1
    weights = per_sample_weights.reshape(-1)
    if padding_idx is not None:
        weights = torch.where(rows == padding_idx % len(weight), torch.zeros_like(weights), weights)
    terms = weight[rows] * weights.unsqueeze(1)
    return terms.new_zeros(count, weight.shape[1]).index_add(0, bags, terms)
