"""Error messages for derivatives that PyTorch does not have, with advice on what to do instead."""

from __future__ import annotations

import inspect
import re
import traceback

import torch

from bilevel.errors import MissingDerivativeError


class OutsideUpdateError(ValueError):
    """A loss or step changed a tensor that is not part of the inner state."""


class named_missing_derivatives:  # noqa: N801  (a context manager, named like a function)
    """Context that turns PyTorch's errors about missing derivatives into errors that say what to do instead.

    Args:
        directions: the number of directions that are carried at once. Two or more are carried by `torch.vmap`, which
            does not support all operations.

    Raises:
        MissingDerivativeError: an operation inside the context lacks a derivative.
        OutsideUpdateError: a loss or step changes a tensor from outside in place.
    """

    __slots__ = ("_directions",)

    def __init__(self, directions: int = 1) -> None:
        self._directions = directions

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, MissingDerivativeError) or not isinstance(error, NotImplementedError | RuntimeError):
            return
        if found := re.search(r"in-place operation \(aten::(\w+).*captured Tensor", str(error)):
            raise OutsideUpdateError(
                f"a loss or step changes a tensor from outside in place ({found[1]}), so a step computed again would "
                "give something else; write the new value into a tensor of its own, or, if it is the buffer of a "
                "layer, put that layer in eval mode"
            ) from error
        advice = _advice(error, self._directions)
        if advice is not None:
            raise MissingDerivativeError(advice) from error


FORWARD_MODE = (
    "which Forward, ForwardGradient and forward-over-reverse products need; take Reverse() or ZerothOrder(...)"
)


def _is_of_checkpoint(error: BaseException) -> bool:
    """Whether the error was raised inside of `torch.utils.checkpoint`."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith("utils/checkpoint.py") for frame, _ in frames)


def _advice(error: Exception, directions: int) -> str | None:
    message, version = str(error), f"torch {torch.__version__}"
    function = _custom_function(error)
    lacks_jvp = function is not None and function.jvp is torch.autograd.Function.jvp
    if "saved tensor hooks" in message and not _is_of_checkpoint(error):
        return (
            "hooks for saved tensors (torch.autograd.graph.save_on_cpu, saved_tensors_hooks) are used inside, and "
            "that can't be differentiated; leave them out and keep less by Reverse('sqrt'), Reverse(offload='cpu') or "
            "ForwardGradient, or take ForwardGradient(..., tangents='difference') or ZerothOrder(...)"
        )
    if "saved tensor hooks" in message:
        return (
            "activation checkpointing (torch.utils.checkpoint, gradient_checkpointing_enable) computes layers again in "
            "the backward pass, and that can't be differentiated; switch it off (Reverse('sqrt') and ForwardGradient "
            "keep only the activations of one inner step), wrap layers in bilevel.experimental.Recomputed(layer) to "
            "keep less, or take ForwardGradient(..., tangents='difference') or ZerothOrder(...)"
        )
    if "nference tensor" in message:
        return (
            "a loss or step uses a tensor that was computed under torch.inference_mode(), which cannot take part in a "
            "derivative even as a constant; write torch.no_grad() in its place"
        )
    if found := re.search(r"forward AD with (\w+)", message):
        return (
            f"the operation {found[1]!r} has no forward-mode derivative in {version}, {FORWARD_MODE}, or write that "
            "operation in terms of others"
        )
    if found := re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", message):
        return (
            f"the operation {found[1]!r} has no derivative in {version}, and hypergradients need that of the inner "
            "gradient too; take ZerothOrder(...), or write the operation in terms of others"
        )
    if function is not None and "setup_context" in message:
        return (
            f"the custom autograd.Function {function.__name__!r} saves tensors for its derivative in forward(ctx, "
            "...), which function transforms do not support; give it a static method setup_context(ctx, inputs, "
            "output), and a forward without ctx"
        )
    if function is not None and lacks_jvp and ("jvp function" in message or "vmap" in message):
        return (
            f"the custom autograd.Function {function.__name__!r} has no forward-mode derivative, {FORWARD_MODE}, or "
            "give it a static method jvp"
        )
    if directions > 1 and ("vmap" in message or "atching rule not implemented" in message):
        return (
            f"{directions} directions are carried at once by torch.vmap, which does not support this model "
            f"({message}); take them one by one with chunk_size=1"
        )
    return None


def _custom_function(error: Exception) -> type[torch.autograd.Function] | None:
    """Return the user's `autograd.Function` in which the error was raised, or `None`."""
    apply = inspect.unwrap(torch.autograd.Function.apply).__code__
    inside = [frame.f_locals["cls"] for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is apply]
    return inside[-1] if inside else None
