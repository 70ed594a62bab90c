"""Tangents by forward mode, or by another route if an operation has no forward-mode derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from bilevel.autodiff.double_reverse import push_by_double_reverse
from bilevel.autodiff.forward_mode import Pushed, push_forward
from bilevel.autodiff.missing import FORWARD_MODE
from bilevel.autodiff.substitution import Memory
from bilevel.errors import MissingDerivativeError
from bilevel.trees import Tree

_BY_VMAP = (IndexError, TypeError, ValueError)
"""Errors that `torch.vmap` raises where an operation meets a batch as an axis that it did not expect."""
_NOTED: ContextVar[dict[str, float] | None] = ContextVar("noted routes", default=None)


@contextmanager
def noted_routes() -> Iterator[dict[str, float]]:
    """Context manager that yields a dict in which each use of a route other than forward mode is counted."""
    routes: dict[str, float] = {}
    token = _NOTED.set(routes)
    try:
        yield routes
    finally:
        _NOTED.reset(token)


def note_route(name: str, units: float) -> None:
    """Count one use of a route, and its cost in inner gradients."""
    routes = _NOTED.get()
    if routes is not None:
        routes[name] = routes.get(name, 0.0) + 1
        routes[f"{name}_units"] = routes.get(f"{name}_units", 0.0) + units


def push_forward_or_refuse(
    function: Callable[..., Tree],
    arguments: Sequence[Tree],
    tangents: Sequence[Sequence[Tensor]],
    memory: Memory,
) -> Pushed:
    """Compute the result of `push_forward` for a function that is known to work without function transforms.

    Raises:
        MissingDerivativeError: forward mode fails for this function, for any reason.
    """
    try:
        return push_forward(function, arguments, tangents, memory)
    except (MissingDerivativeError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [repr(error)])[0]
        raise MissingDerivativeError(
            f"forward mode does not support this loss ({first_line}), {FORWARD_MODE}, or Reverse()"
        ) from error


def push(
    function: Callable[..., Tree],
    arguments: Sequence[Tree],
    tangents: Sequence[Sequence[Tensor]],
    memory: Memory,
    part: str,
    instead: Callable[[], Pushed] | None = None,
) -> Pushed:
    """Compute the result of `push_forward`, by another route if an operation has no forward-mode derivative.

    Args:
        function: a function from trees to a tree.
        arguments: the trees at which it is evaluated.
        tangents: a list for every argument, with one `[k, *leaf.shape]` tensor for each differentiable leaf.
        memory: the known properties of the operations of the problem. It records the first failure of forward mode.
        part: the name of the function in the memory.
        instead: the other route; by default `push_by_double_reverse`.

    Raises:
        MissingDerivativeError: an operation has no derivative by the other route either.
    """

    def double_reverse() -> Pushed:
        count = len(tangents[0][0])
        found = push_by_double_reverse(function, arguments, tangents, memory)
        note_route("double_reverse_passes", 3.0 + 3.0 * count)
        return found

    other = instead or double_reverse
    if part in memory.without_forward_mode:
        return other()
    try:
        return push_forward(function, arguments, tangents, memory)
    except torch.OutOfMemoryError:
        raise
    except (MissingDerivativeError, RuntimeError, *_BY_VMAP) as error:
        found = other()  # an error of the user's code, or an operation without any derivative, raises here again
        memory.without_forward_mode[part] = str(error)
        return found
