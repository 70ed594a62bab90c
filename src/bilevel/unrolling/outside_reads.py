"""A warning about losses that read a meta parameter, or a tensor with a graph, from outside of their arguments.

A tensor that a loss reads from a closure or a global is a constant in every derivative of this library. This is correct
for data, for a teacher's outputs, or for a starting point to which a loss pulls the parameters. A loss that uses the
meta parameters themselves, instead of its argument, loses their derivative, and nothing else would reveal it. Therefore
the first call of a problem's `init`, `step` and `outer_loss` is watched operation by operation. Arguments, and tensors
that are computed from them, are known. Any other tensor that lies in the memory of a meta parameter, or that requires
gradients, is from outside.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from bilevel import trees
from bilevel.trees import Tree

INIT, STEP, OUTER = "init or params", "the inner loss or step", "outer_loss"
_WATCHED: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()
"""The functions of each problem that have been watched."""


def watched_once(problem: object, what: str, meta: Tree, arguments: Sequence[Tree]) -> AbstractContextManager[None]:
    """Context manager for a call of one of a problem's functions, which is watched if it is the first call.

    Args:
        problem: the problem.
        what: the name of the function, for the warning.
        meta: the meta parameters as the user passed them.
        arguments: the trees of tensors that are passed to the function.
    """
    try:
        done = _WATCHED.setdefault(problem, set())
    except TypeError:  # the problem has no hash, or no weak references
        return nullcontext()
    if what in done:
        return nullcontext()
    done.add(what)
    return _watched(what, meta, arguments)


@contextmanager
def _watched(what: str, meta: Tree, arguments: Sequence[Tree]) -> Iterator[None]:
    mode = _Watch(meta, arguments, graphs=what != INIT)
    with mode:
        yield
    if mode.found:
        more = f" (and {len(mode.found) - 1} more)" if len(mode.found) > 1 else ""
        warnings.warn(
            f"{what} reads {mode.found[0]}{more} from outside of its arguments. There it is a constant, so its "
            "derivative is not part of the hypergradient. Read it from the argument meta (or make it one of the meta "
            "parameters). If a constant is meant, write .detach() after it or read it under torch.no_grad(), which "
            "also removes this warning",
            stacklevel=8,
        )


class _Kept:
    """A set of tensors by identity, which are kept alive until the end of the call."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._tensors

    def __setitem__(self, tensor: Tensor, known: bool) -> None:
        self._tensors[id(tensor)] = tensor


class _Watch(TorchFunctionMode):
    """A mode that records tensors from outside whose derivative will be lost."""

    def __init__(self, meta: Tree, arguments: Sequence[Tree], graphs: bool = True) -> None:
        """Set up the watch.

        Args:
            meta: the meta parameters.
            arguments: the arguments of the function.
            graphs: whether tensors that require gradients count as well. A function that itself makes parameters needs
                `False`.
        """
        super().__init__()
        self._graphs = graphs
        self._read: dict[str, Tensor] = {}
        # With weak references to parameters, `module.to(...)` in an `init` could not replace them.
        self._known: Any = WeakIdKeyDictionary() if graphs else _Kept()
        self._meta = [(name, *extent) for name, leaf in trees.named_leaves(meta, "meta") if (extent := _extent(leaf))]
        for tree in arguments:
            self._know(trees.leaves(tree))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = list(_tensors_in([result]))
        if func in _STARTS_GRAPH and self._meta_at(args[0]) is None:
            self._know(args[:1])  # data that a module makes require gradients, as some do for their checkpointing
        if results:  # otherwise the result is a size or a number
            given = list(_tensors_in([*args, *(kwargs or {}).values()]))
            if func is torch.autograd.grad:  # a loss that takes a gradient makes its inputs require gradients
                self._forget(_tensors_in([kwargs["inputs"] if "inputs" in (kwargs or {}) else args[1]]))
            if func in _CONSTANT or not torch.is_grad_enabled():
                self._know(results)
            elif not self._only_views(given, results):  # views are examined where they are used
                for tensor in given:
                    if tensor not in self._known:
                        self._known[tensor] = True
                        self._look_at(tensor)
                self._know(results)
        return result

    def _only_views(self, given: list[Tensor], results: list[Tensor]) -> bool:
        """Whether the results are parts of tensors that are not known."""
        if any(tensor in self._known for tensor in given):
            return False
        extents = [_extent(tensor) for tensor in given]
        return all((part := _extent(r)) and any(e and e[0] == part[0] for e in extents) for r in results)

    def _know(self, values: Any) -> None:
        for tensor in _tensors_in(values):
            self._known[tensor] = True

    def _look_at(self, tensor: Tensor) -> None:
        if is_functorch_wrapped_tensor(tensor):
            return  # function transforms wrap only arguments
        extent = _extent(tensor)
        for name, storage, begin, end in self._meta:
            if extent is not None and extent[0] == storage and begin < extent[2] and extent[1] < end:
                self._note(f"the meta parameter {name}", tensor)
                return
        if self._graphs and tensor.requires_grad and not self._comes_from_known(tensor):
            self._note(f"a tensor of shape {tuple(tensor.shape)} that requires gradients", tensor)

    def _meta_at(self, tensor: Tensor) -> str | None:
        """The meta parameter in whose memory a tensor lies, if there is one."""
        extent = None if is_functorch_wrapped_tensor(tensor) else _extent(tensor)
        for name, storage, begin, end in self._meta:
            if extent is not None and extent[0] == storage and begin < extent[2] and extent[1] < end:
                return name
        return None

    def _comes_from_known(self, tensor: Tensor) -> bool:
        """Whether a tensor with a graph, from operations that the mode did not see, depends only on known tensors."""
        if tensor.grad_fn is None:
            return False
        waiting, seen = [tensor.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and leaf not in self._known:
                return False
            waiting += [following for following, _ in node.next_functions if following is not None]
        return True

    def _note(self, what: str, tensor: Tensor) -> None:
        self._read.setdefault(what, tensor)

    def _forget(self, inputs: Iterator[Tensor]) -> None:
        meant = {id(tensor) for tensor in inputs}
        self._read = {what: tensor for what, tensor in self._read.items() if id(tensor) not in meant}

    @property
    def found(self) -> list[str]:
        """Return descriptions of the tensors that were read from outside."""
        return list(self._read)


_CONSTANT = {Tensor.detach, *(vars(torch._C.TensorBase)[name].__get__ for name in ("data", "grad"))}
"""Operations with which a user deliberately makes a constant from a tensor."""


_STARTS_GRAPH = {Tensor.requires_grad_, vars(torch._C.TensorBase)["requires_grad"].__set__}
"""What makes a leaf of a tensor, inside of a loss."""


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors_in(value)


def _extent(leaf: Any) -> tuple[int, int, int] | None:
    """Return the storage of a tensor, and the first and last byte of it that the tensor covers."""
    if not isinstance(leaf, Tensor) or not leaf.numel():
        return None
    try:
        storage = leaf.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # the tensor is a wrapper around other tensors
        return None
    first = int(leaf.storage_offset()) * leaf.itemsize
    last = (
        sum(int(size - 1) * int(stride) for size, stride in zip(leaf.shape, leaf.stride(), strict=True)) * leaf.itemsize
    )
    return storage, first, first + last + leaf.itemsize
