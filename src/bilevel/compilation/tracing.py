"""Tracing of functions of tensors to graphs of operations that change nothing in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def trace(
    function: Callable[[Tensors, Tensors], list[Tensor]], primals: Tensors, tangents: Tensors
) -> torch.fx.GraphModule:
    """Return the operations of `function(primals, tangents)`, for inputs of these shapes, dtypes and devices.

    The function runs on tensors without values. An operation that needs a value raises an error, so the trace cannot
    depend on the values. Other tensors that the function reads are constants of the graph, by reference.

    >>> x = torch.ones(2)
    >>> graph = trace(lambda primals, tangents: [primals[0].clone().add_(tangents[0])], [x], [x])
    >>> [node.target for node in graph.graph.nodes if node.op == "call_function"]  # nothing in place
    [<OpOverload(op='aten.clone', overload='default')>, <OpOverload(op='aten.add', overload='Tensor')>]
    """
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    primals, tangents = ([t.detach() for t in tensors] for tensors in (primals, tangents))
    with torch.no_grad(), _said_to_compile():
        first = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(primals, tangents)
        # The graph is traced a second time, because autograd behaves differently inside functionalize.
        pure = functionalize(lambda primals, tangents: first(primals, tangents))
        traced = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(primals, tangents)
    for node in traced.graph.nodes:
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & {*getattr(node.target, "tags", ())}:
            raise ValueError(f"the result of {node.target} depends on values in its shape, or is a number")
    return traced


@contextmanager
def _said_to_compile() -> Iterator[None]:
    """Context in which `torch.compiler.is_compiling()` is true, so that libraries leave out untraceable operations."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def halves(traced: torch.fx.GraphModule, count: int) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Cut a graph in two.

    The kept tensors are a minimal cut, as `torch.compile` makes it between a forward and a backward pass.

    Args:
        traced: the graph.
        count: the number of outputs that the first half computes.

    Returns:
        The first half, from primals to the first `count` outputs and the kept tensors, and the second half, from the
        kept tensors and the tangents to the other outputs.
    """
    from functorch.compile import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(traced, None, num_fwd_outputs=count)
