"""Derivatives of functions of trees: tangents pushed forward, cotangents pulled back, and kernels that allow both."""

from bilevel.autodiff.custom_functions import RefuseOnceDifferentiable
from bilevel.autodiff.forward_mode import Pushed, push_forward
from bilevel.autodiff.kernels import differentiable_kernels
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.autodiff.reverse_mode import (
    Transpose,
    fill_zeros,
    gradient,
    has_graph,
    pull_back,
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
