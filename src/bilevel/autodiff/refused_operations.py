"""Operations whose first derivative is wrong in PyTorch, so that the plain inner loop is wrong already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional

from bilevel.errors import MissingDerivativeError

Check = Callable[[str, tuple[Any, ...], dict[str, Any]], None]
"""From the name and the arguments of a call to nothing, or to a MissingDerivativeError."""


def as_strided_scatter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse any call."""
    raise MissingDerivativeError(
        f"the first derivative of {name!r} is wrong in torch {torch.__version__} (torch.autograd.gradcheck finds it), "
        "so the inner loop itself would be wrong; write x.flatten().scatter(0, index, y.flatten()).view_as(x) with "
        "index = torch.arange(x.numel()).as_strided(size, stride, storage_offset).flatten()"
    )


def max_unpool(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an unpooling that writes two values to one place."""
    indices = args[1] if len(args) > 1 else kwargs["indices"]
    if is_functorch_wrapped_tensor(indices):  # each example has indices of its own, which cannot be read
        return
    ordered = indices.flatten(-int(name[-2])).sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise MissingDerivativeError(
            f"the indices of {name!r} name a place of the output twice, and only one of the values remains there, but "
            f"the first derivative of torch {torch.__version__} counts both; give indices that differ, such as those "
            "of a max_pool whose windows do not overlap"
        )


CHECKS: Mapping[Any, Check] = {
    torch.as_strided_scatter: as_strided_scatter,
    Tensor.as_strided_scatter: as_strided_scatter,
    functional.max_unpool1d: max_unpool,
    functional.max_unpool2d: max_unpool,
    functional.max_unpool3d: max_unpool,
}
