"""Checks of the arguments of an inner loop. The error messages say what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import distributed, trees
from bilevel.batches import address
from bilevel.errors import NonFiniteError, ReplayError
from bilevel.trees import Tree


def outside_of_inference_mode() -> None:
    """Raise a RuntimeError inside `torch.inference_mode`, where derivatives are impossible."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "called inside torch.inference_mode(), where nothing has a derivative; call estimators outside of it "
            "(torch.no_grad() has no effect on them)"
        )


def meta_parameters(meta: Tree) -> None:
    """Raise unless all leaves are tensors of real floating-point numbers, and there is at least one number."""
    for name, leaf in trees.named_leaves(meta, "meta"):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} is {leaf!r} ({type(leaf).__name__}); meta parameters are floating-point tensors, arrays or "
                "numbers: write 1.0 instead of 1, .astype(float) after an array of whole numbers, and leave everything "
                "else out of meta"
            )
        if trees.is_spread(leaf):
            raise TypeError(f"{name} is a DTensor; meta parameters must be whole in every process: .full_tensor()")
        if not leaf.is_floating_point():
            instead = "pass torch.view_as_real(...)" if leaf.is_complex() else "write .float()"
            raise TypeError(f"{name} has dtype {leaf.dtype}; meta parameters must be real floating point: {instead}")
    if not trees.size(meta):
        raise ValueError(
            f"meta is {meta!r}, without a single number to differentiate with respect to; pass a floating-point "
            "tensor, a tree of them, or an nn.Module some of whose parameters have requires_grad=True"
        )


def one_outer_loss(value: Tensor, who: str, instead: str) -> None:
    """Raise if `outer_loss` returned a vector of losses, for what takes a single one.

    Args:
        value: the outer loss.
        who: the subject of the error's sentence, with its verb.
        instead: what to write for a vector.
    """
    if value.ndim:
        raise ValueError(
            f"{who} one outer loss, and outer_loss returned a vector of {len(value)}; write .mean() or .sum() for "
            f"their mean or sum (for Tasks: per_task=False){instead}"
        )


def finite(meta: Tree) -> None:
    """Raise if a meta parameter is NaN or infinite."""
    if not any(leaf.is_meta for leaf in trees.leaves(meta)) and trees.all_finite(meta):
        return
    for name, leaf in trees.named_leaves(meta, "meta"):
        if leaf.is_meta:
            raise ValueError(f"{name} is on the meta device, where tensors have no values; make it on cpu or a GPU")
    if trees.all_finite(meta):
        return
    for name, leaf in trees.named_leaves(meta, "meta"):
        if not bool(torch.isfinite(leaf).all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinity, so no hypergradient can be computed there; if it did not at the start, "
                "an earlier outer step broke it: lower the outer learning rate or clip the hypergradient"
            )


def whole_at_each_worker(state: Tree) -> None:
    """Raise a ValueError if processes that hold one sharded state also share the work of one estimate.

    Such processes must make each estimate together.
    """
    workers = distributed.current()
    if workers.size == 1:
        return
    sharing = set(workers.processes)
    for name, leaf in trees.named_leaves(state, "state"):
        holders = sharing.intersection(trees.holders(leaf))
        if len(holders) > 1:
            raise ValueError(
                f"{name} is spread over processes {sorted(holders)}, which must make every estimate together, and they "
                "share the estimator's work with each other; for fit, pass workers=Workers.of(sharers=Workers()) with "
                "bilevel.experimental.Workers, or with a mesh of two dimensions "
                "sharers=Workers.of(mesh.get_group(...)) for the one along which the model is repeated"
            )


def one_device(**places: Any) -> None:
    """Raise a ValueError unless all tensors are on one device. Tensors without dimensions may be on any device."""
    found = {leaf.device for leaf in trees.leaves(places) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(found) <= 1:
        return
    seen: dict[torch.device, str] = {}
    for place, tree in places.items():
        for name, leaf in trees.named_leaves(tree, place):
            if isinstance(leaf, Tensor) and leaf.ndim:
                seen.setdefault(leaf.device, name)
    if len(seen) > 1:
        where = ", ".join(f"{name} is on {device}" for device, name in seen.items())
        raise ValueError(f"tensors on {len(seen)} devices: {where}; move them to one device with .to(...)")


def same_structure(before: Tree, after: Tree) -> None:
    """Raise a ValueError if a step changed the structure of the state, or a shape or dtype in it."""
    (old_leaves, old_spec), (new_leaves, new_spec) = trees.flatten(before), trees.flatten(after)
    if old_spec == new_spec and all(map(_same_kind, old_leaves, new_leaves)):
        return
    named_before = trees.named_leaves(before, "state")
    named_after = trees.named_leaves(after, "state")
    were, are = ([name for name, _ in named] for named in (named_before, named_after))
    if were != are:
        raise ValueError(
            f"step returned a state of another structure than it was given, with {', '.join(are) or 'no leaves'} "
            f"instead of {', '.join(were)}; return a new state built like the old one"
        )
    for (name, old), (_, new) in zip(named_before, named_after, strict=True):
        if _kind(old) != _kind(new):
            raise ValueError(
                f"step turned {name} from {_kind(old)} into {_kind(new)}; a step must keep shapes and dtypes: let init "
                "return what step returns, or convert in step with .to(state.dtype) or .reshape"
            )


class left_as_given:  # noqa: N801  (a context manager, named like a function)
    """Context manager that raises a ValueError if a tensor of these trees is changed in place inside it."""

    __slots__ = ("_before", "_places")

    def __init__(self, **places: Tree) -> None:
        self._places = places

    def __enter__(self) -> None:
        self._before = [
            (place, leaf, leaf._version) for place, tree in self._places.items() for leaf in _versioned(tree)
        ]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            # PyTorch itself raises for a tensor that records its history
            if (
                isinstance(error, RuntimeError)
                and "leaf Variable that requires grad" in str(error)
                and "in-place" in str(error)
            ):
                raise ValueError(changed_in_place(" or ".join(self._places))) from error
            return
        for place, leaf, version in self._before:
            if leaf._version != version:
                names = [name for name, each in trees.named_leaves(self._places[place], place) if each is leaf]
                raise ValueError(changed_in_place(names[0]))


def _versioned(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in trees.leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def changed_in_place(what: str) -> str:
    """Return the message for a loss or step that writes into its arguments."""
    return (
        f"a step or loss changes {what} in place; states are kept and steps are computed more than once, so nothing "
        "that is passed in may change: return a new tensor (state * 0.9 instead of state.mul_(0.9)), or work on a copy "
        "(state.clone())"
    )


class nothing_kept:  # noqa: N801  (a context manager, named like a function)
    """Context manager that explains PyTorch's error about a tensor that was kept from an earlier step.

    Raises:
        ReplayError: a step uses a tensor of an earlier step whose graph was freed.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_AN_EARLIER_STEP):
            raise ReplayError(
                f"inner step {self._number} (counted from 0) uses a tensor that was kept from an earlier call of a "
                "loss or step, in a list, a queue or a closure, and that belongs to a derivative which is finished by "
                "now. Keep such memory in the inner state (bilevel.Problem takes any tree of tensors as state), or "
                'keep numbers and detached tensors alone and take Reverse("graph"), which computes each step once',
                self._number,
            ) from error


_OF_AN_EARLIER_STEP = ("level <= current_level", "backward through the graph a second time")


def batch_left_as_given(changed: Mapping[str, Tensor | np.ndarray], given_again: set[int], where: str) -> None:
    """Raise a ValueError if a loss changed the user's data in place.

    Data that are created at each reading of the batch may be changed.

    Args:
        changed: the tensors and arrays that the loss changed, by name.
        given_again: the addresses of the data that a second reading of the batch returns.
        where: the name of the batch in the message.
    """
    for name, data in changed.items():
        if address(data) in given_again:
            raise ValueError(
                f"a loss or step changed {name} in place, in {where}; these are your own data, so a step computed "
                "again would see other numbers, and the data stay changed. Write the result into a tensor of its own: "
                "x = batch['x'] * 2 instead of batch['x'].mul_(2), or take a copy first (batch['x'].clone())"
            )


def _same_kind(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype
    return not isinstance(old, Tensor) and not isinstance(new, Tensor) and _kind(old) == _kind(new)


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}"
    return "a number" if isinstance(leaf, int | float) else f"a {type(leaf).__name__}"
