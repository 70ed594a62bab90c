"""A context without the modes in which the user's functions run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode


@contextmanager
def without_modes() -> Iterator[None]:
    """Context manager that leaves all `TorchFunctionMode` contexts, and enters them again at its end.

    It is for code of this library or of PyTorch that runs in the middle of a user's function. The operations of this
    code are not replaced, and watches do not see them.
    """
    modes = [_pop_mode() for _ in _get_current_function_mode_stack()]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
