"""What the arguments of an inner loop must be, and what to write instead where they are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel import distributed, trees
from bilevel.errors import NonFiniteError
from bilevel.models.module_view import modules_in, refuse_running_statistics
from bilevel.problem import BlackBox, Unrollable
from bilevel.trees import Tree


def outside_of_inference_mode() -> None:
    """Derivatives are possible here."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "called inside torch.inference_mode(), where nothing has a derivative; call estimators outside of it "
            "(torch.no_grad() does no harm)"
        )


def problem(problem: Any) -> None:
    """The problem is one."""
    if isinstance(problem, type) or not isinstance(problem, Unrollable | BlackBox):
        what = f"the class {problem.__name__}" if isinstance(problem, type) else f"a {type(problem).__name__}"
        raise TypeError(
            f"problem is {what}; an instance of bilevel.Problem, GradientDescent or BlackBox is needed: estimators are "
            "called as estimator(problem, meta, inner_batches, outer_batch)"
        )


def meta_parameters(meta: Tree) -> None:
    """All leaves are tensors of real floating point, and there is at least one number."""
    for module in modules_in(meta):
        refuse_running_statistics(module, "meta")
    for name, leaf in trees.named_leaves(meta, "meta"):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} is {leaf!r} ({type(leaf).__name__}); meta parameters are floating-point tensors: write "
                "torch.tensor(...) around numbers, and leave everything else out of meta"
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


def finite(meta: Tree) -> None:
    """No meta parameter is NaN or infinite."""
    for name, leaf in trees.named_leaves(meta, "meta"):
        if leaf.is_meta:
            raise ValueError(f"{name} is on the meta device, where tensors have no values; make it on cpu or a GPU")
        if not bool(torch.isfinite(leaf).all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinity before the first inner step; if it did not at the start, an earlier "
                "outer step broke it: lower the outer learning rate or clip the hypergradient"
            )


def whole_at_each_worker(state: Tree) -> None:
    """Nobody shares work with a process without which he can compute nothing."""
    workers = distributed.current()
    if workers.size == 1:
        return
    sharing = set(workers.processes)
    for name, leaf in trees.named_leaves(state, "state"):
        holders = sharing.intersection(trees.holders(leaf))
        if len(holders) > 1:
            raise ValueError(
                f"{name} is spread over processes {sorted(holders)}, which must make every estimate together, and they "
                "share the estimator's work with each other; for fit, pass "
                "workers=bilevel.Workers.of(sharers=bilevel.Workers()), or with a mesh of two dimensions "
                "sharers=bilevel.Workers.of(mesh.get_group(...)) for the one along which the model is repeated"
            )


def one_device(**places: Any) -> None:
    """Tensors with a shape all lie on one device; numbers may lie anywhere."""
    seen: dict[torch.device, str] = {}
    for place, tree in places.items():
        for name, leaf in trees.named_leaves(tree, place):
            if isinstance(leaf, Tensor) and leaf.ndim:
                seen.setdefault(leaf.device, name)
    if len(seen) > 1:
        where = ", ".join(f"{name} is on {device}" for device, name in seen.items())
        raise ValueError(f"tensors on {len(seen)} devices: {where}; move them to one device with .to(...)")


def same_structure(before: Tree, after: Tree) -> None:
    """A step keeps the structure of the state, its shapes and its dtypes."""
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


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}"
    return "a number" if isinstance(leaf, int | float) else f"a {type(leaf).__name__}"
