"""Batch and instance normalisation whose running statistics can be differentiated.

PyTorch's kernels update running statistics in place and without a derivative. In evaluation mode they do not
differentiate with respect to the statistics. Function transforms do not accept the update. An outer loss in evaluation
mode depends on the statistics, which depend on the parameters and the meta parameters of all inner steps. In training
mode this module therefore computes the layer's output without running statistics, and the statistics separately:

    mean' = (1 − m) mean + m · batch mean,    var' = (1 − m) var + m · batch variance (unbiased)

with the momentum m that the layer passes (1/number of batches for a cumulative average). In evaluation mode the output
is (x − mean)/√(var + ε) · weight + bias, computed by plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Normalized(NamedTuple):
    """The output of a normalisation, and the running statistics after it."""

    output: Tensor
    mean: Tensor
    var: Tensor


def batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Normalized:
    """Compute `torch.nn.functional.batch_norm` out of place.

    With `training=True` the output is normalised by the statistics of the batch, otherwise by the running statistics.
    """
    if not training:
        return Normalized(_by(running_mean, running_var, input, weight, bias, eps), running_mean, running_var)
    output = functional.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    axes = [axis for axis in range(input.ndim) if axis != 1]
    values = input.to(running_mean.dtype)
    return Normalized(
        output,
        _moved(running_mean, values.mean(axes), momentum),
        _moved(running_var, values.var(axes, correction=1), momentum),
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Normalized:
    """Compute `torch.nn.functional.instance_norm` out of place.

    The running statistics take in the mean over the batch of the statistics of its examples.
    """
    if not use_input_stats:
        return Normalized(_by(running_mean, running_var, input, weight, bias, eps), running_mean, running_var)
    output = functional.instance_norm(input, None, None, weight, bias, True, momentum, eps)
    axes = list(range(2, input.ndim))
    values = input.to(running_mean.dtype)
    return Normalized(
        output,
        _moved(running_mean, values.mean(axes).mean(0), momentum),
        _moved(running_var, values.var(axes, correction=1).mean(0), momentum),
    )


def _moved(average: Tensor, value: Tensor, momentum: float) -> Tensor:
    return (1 - momentum) * average + momentum * value


def _by(mean: Tensor, var: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the input by given statistics."""
    shape = [1, -1, *[1] * (input.ndim - 2)]
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    output = (input.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
    if bias is not None:
        output = output + bias.view(shape)
    return output.to(input.dtype)


class Normalization(NamedTuple):
    """One of PyTorch's functions that update running statistics."""

    out_of_place: Callable[..., Normalized]
    """The function of this module with the same result."""
    names: tuple[str, ...]
    """The names of its arguments in the function of this module. Arguments with other names are left out."""

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by their names in `out_of_place`."""
        found = {**dict(zip(self.names, args, strict=False)), **kwargs}
        found.pop("cudnn_enabled", None)
        return found


def _low_level(flag: str) -> tuple[str, ...]:
    return "input", "weight", "bias", "running_mean", "running_var", flag, "momentum", "eps", "cudnn_enabled"


def _functional(flag: str) -> tuple[str, ...]:
    return "input", "running_mean", "running_var", "weight", "bias", flag, "momentum", "eps"


NORMALIZATIONS: dict[Any, Normalization] = {
    functional.batch_norm: Normalization(batch_norm, _functional("training")),
    torch.batch_norm: Normalization(batch_norm, _low_level("training")),
    functional.instance_norm: Normalization(instance_norm, _functional("use_input_stats")),
    torch.instance_norm: Normalization(instance_norm, _low_level("use_input_stats")),
}
