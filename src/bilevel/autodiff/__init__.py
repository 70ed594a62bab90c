"""Derivatives of functions of trees, in forward and in reverse mode, and rules that PyTorch lacks."""

from bilevel.autodiff.double_reverse import push_by_double_reverse
from bilevel.autodiff.forward_mode import Pushed, push_forward
from bilevel.autodiff.kernels import differentiable_kernels
from bilevel.autodiff.missing import OutsideUpdateError, named_missing_derivatives
from bilevel.autodiff.reverse_mode import (
    Transpose,
    fill_zeros,
    gradient,
    has_graph,
    placed_where_reached,
    pull_back,
    pull_back_many,
    start_graph,
    zeros_where_none,
)
from bilevel.autodiff.routes import note_route, noted_routes, push, push_forward_or_refuse
from bilevel.autodiff.substitution import Memory, memory_of, run_user_code

__all__ = [
    "Memory",
    "OutsideUpdateError",
    "Pushed",
    "Transpose",
    "differentiable_kernels",
    "fill_zeros",
    "gradient",
    "has_graph",
    "memory_of",
    "named_missing_derivatives",
    "note_route",
    "noted_routes",
    "placed_where_reached",
    "pull_back",
    "pull_back_many",
    "push",
    "push_by_double_reverse",
    "push_forward",
    "push_forward_or_refuse",
    "run_user_code",
    "start_graph",
    "zeros_where_none",
]
