"""One call of a loss as a function of tensors, and the conditions under which compiled code can be used for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import trees
from bilevel.errors import CompileError
from bilevel.models.conversion import as_plain_tree, modules_in_use
from bilevel.models.module_view import ModuleView, views_in
from bilevel.models.places import Constant
from bilevel.models.recomputed import Recomputed
from bilevel.trees import Tree

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class LossCall:
    """One call of a loss, separated into tensors and the structures that contain them."""

    def __init__(self, params: Tree, meta: Tree, batch: Any) -> None:
        self._trees = (params, meta, batch)
        self._parts = tuple(trees.split(tree) for tree in self._trees)
        theta, phi, rest = self._parts
        self.theta, self.phi, self.count = theta.differentiable, phi.differentiable, len(theta.differentiable)
        self._views = views_in([params, meta])
        self._constants = [_constants_of(view) for view in self._views]
        constants = [each.tensor.detach() for group in self._constants for each in group]
        self.rest = [*theta.other, *phi.other, *rest.differentiable, *rest.other, *constants]

    @property
    def inputs(self) -> list[Tensor]:
        """Return the leaves of θ, those of φ, and all other tensors."""
        return [t.detach() for t in (*self.theta, *self.phi, *self.rest)]

    @property
    def key(self) -> Hashable:
        """Return a key. A compiled function can be used for all calls with the same key."""
        numbers = tuple(part.rest for part in self._parts)
        if not all(isinstance(each, _PLAIN) for rest in numbers for each in rest):
            self._refuse_opaque()
        tensors = [(t.shape, t.stride(), t.dtype, t.device) for t in (*self.theta, *self.phi, *self.rest)]
        outlines = [trees.flatten(as_plain_tree(tree))[1] for tree in self._trees]
        types = tuple(type(each) for rest in numbers for each in rest)  # True == 1 == 1.0
        modules = [
            (tuple((type(each.layer), each.key) for each in group), _outline(view.module))
            for view, group in zip(self._views, self._constants, strict=True)
        ]
        return (*tensors, *outlines, numbers, types, *modules, *_switches())

    def _refuse_opaque(self) -> None:
        for name, tree in zip(("params", "meta", "batch"), self._trees, strict=True):
            for place, leaf in trees.named_leaves(tree, name):
                if not isinstance(leaf, (Tensor, *_PLAIN)):
                    raise CompileError(
                        f"{place} is a {type(leaf).__name__}, whose contents would be fixed by compiling; pass tensors "
                        "in dicts, lists and tuples (dict(batch) for what a tokenizer returns), or leave compile=False"
                    )

    @contextmanager
    def with_inputs(self, inputs: Sequence[Tensor]) -> Iterator[tuple[Tree, Tree, Any]]:
        """Context that yields the three trees with other tensors in them and in their modules.

        The modules are unchanged afterwards.
        """
        rest = iter(inputs)

        def following(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [next(rest) for _ in tensors]

        theta, phi, batch = self._parts
        differentiable = following(theta.differentiable), following(phi.differentiable)
        params = theta.rebuild(differentiable[0], following(theta.other))
        meta = phi.rebuild(differentiable[1], following(phi.other))
        rebuilt = params, meta, batch.rebuild(following(batch.differentiable), following(batch.other))
        with ExitStack() as stack:
            stack.enter_context(modules_in_use(params, meta))
            for view, group in zip(self._views, self._constants, strict=True):
                constants = [each._replace(tensor=next(rest), version=None) for each in group]
                stack.enter_context(_with_constants(view, constants))
            yield rebuilt


def _constants_of(view: ModuleView) -> list[Constant]:
    """Return the buffers and frozen parameters of a module.

    They are inputs of the compiled function, because a module may be built again for every solve, with other tensors.
    """
    return [*view._layout.constants, *view._layout.frozen]


@contextmanager
def _with_constants(view: ModuleView, constants: Sequence[Constant]) -> Iterator[None]:
    """Context in which a module computes with other constants."""
    layout = view._layout
    before = layout.constants
    layout.constants = list(constants)
    layout.forget_layers()
    try:
        yield
    finally:
        layout.constants = before
        layout.forget_layers()


def _outline(module: nn.Module) -> Hashable:
    """Return a description of what a module computes, as far as its layers reveal it."""
    found = []
    for layer in module.modules():
        if isinstance(layer, Recomputed):
            raise CompileError(
                "a Recomputed layer has no effect in a compiled gradient, because the compiler decides what to keep; "
                "use the layer without it, or leave compile=False"
            )
        found.append((type(layer), layer.training, layer.extra_repr()))
    return tuple(found)


def _switches() -> tuple[Hashable, ...]:
    """Return the global settings that determine which kernels a trace contains."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.get_default_dtype(),
        cuda.matmul.fp32_precision,  # TF32 is fixed in compiled products
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )
