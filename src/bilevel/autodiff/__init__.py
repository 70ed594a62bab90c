"""Derivatives of functions of trees: tangents pushed forward, cotangents pulled back, and kernels that allow both."""

from bilevel.autodiff.derivatives import (
    Pushed,
    RefuseOnceDifferentiable,
    Transpose,
    differentiable_kernels,
    fill_zeros,
    gradient,
    has_graph,
    named_missing_derivatives,
    pull_back,
    push_forward,
    start_graph,
)

__all__ = [
    "Pushed",
    "RefuseOnceDifferentiable",
    "Transpose",
    "differentiable_kernels",
    "fill_zeros",
    "gradient",
    "has_graph",
    "named_missing_derivatives",
    "pull_back",
    "push_forward",
    "start_graph",
]
