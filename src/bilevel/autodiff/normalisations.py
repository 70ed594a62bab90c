"""Normalisations in composite form. Their third derivatives are wrong in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Compute (x − mean) / √(variance + ε) · weight + bias, with the statistics of the last axes."""
    count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    return _affine(_standardised(input, tuple(range(-count, 0)), eps), weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Compute (x − mean) / √(variance + ε) · weight + bias, over each channel of each example of `[N, C, …]`."""
    if use_input_stats:
        _update_running(functional.instance_norm, input, running_mean, running_var, use_input_stats, momentum, eps)
        normalised = _standardised(input, tuple(range(2, input.ndim)), eps)
    else:
        normalised = _by_running(input, running_mean, running_var, eps)
    return _affine(normalised, *(_by_channel(t, input) for t in (weight, bias)))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Compute (x − mean) / √(variance + ε) · weight + bias, over each channel of all examples of `[N, C, …]`."""
    if training:
        _update_running(functional.batch_norm, input, running_mean, running_var, training, momentum, eps)
        normalised = _standardised(input, (0, *range(2, input.ndim)), eps)
    else:
        normalised = _by_running(input, running_mean, running_var, eps)
    return _affine(normalised, *(_by_channel(t, input) for t in (weight, bias)))


def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `layer_norm`, with the mean and 1 / √(variance + ε), which have no derivative in PyTorch."""
    constant = input.detach(), *(None if t is None else t.detach() for t in (weight, bias))
    _, mean, rstd = torch.native_layer_norm(constant[0], normalized_shape, constant[1], constant[2], eps)
    return layer_norm(input, normalized_shape, weight, bias, eps), mean, rstd


def native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `batch_norm`, with the mean and 1 / √(variance + ε), which have no derivative in PyTorch."""
    old_mean, old_var = (None if t is None else t.detach().clone() for t in (running_mean, running_var))
    _, mean, rstd = torch.native_batch_norm(input.detach(), None, None, old_mean, old_var, training, momentum, eps)
    found = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return found, mean, rstd


def torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    """Compute `batch_norm`, with the arguments of `torch.batch_norm`."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    """Compute `instance_norm`, with the arguments of `torch.instance_norm`."""
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _by_running(x: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float) -> Tensor:
    if mean is None or variance is None:
        raise ValueError("Expected running_mean and running_var to be defined when training=False")
    return (x - _by_channel(mean, x)) * (_by_channel(variance, x) + eps).rsqrt()


def _by_channel(t: Tensor | None, like: Tensor) -> Any:
    return None if t is None else t.reshape(1, -1, *[1] * (like.ndim - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _update_running(
    operation: Callable[..., Any],
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    from_input: bool,
    momentum: float,
    eps: float,
) -> None:
    """Update the running statistics by PyTorch's own operation."""
    if mean is not None and variance is not None:
        operation(x.detach(), mean, variance, None, None, from_input, momentum, eps)
