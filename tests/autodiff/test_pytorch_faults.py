"""PyTorch has the faults that are listed, the library does not, and the page says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_faults import FAULTS, PRODUCTS, REFUSED, Fault, page
from torch import Tensor

from bilevel.autodiff import composites, refused_operations
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.autodiff.reverse_mode import gradient
from bilevel.autodiff.substitution import Memory, ReverseNeeded, own_gradient, run_user_code
from bilevel.errors import MissingDerivativeError

PAGE = Path(__file__).parents[2] / "docs" / "pytorch_faults.md"


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_pytorch_still_has_this_fault(fault: Fault) -> None:
    """If this fails, PyTorch has repaired the operation: take it off the table for the new release."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        fault.show()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_the_library_does_not(fault: Fault) -> None:
    def differentiated() -> None:
        forward_mode = fault.derivative == "forward mode"
        with named_missing_derivatives(), own_gradient():
            run_user_code(fault.show, Memory(composite_normalisations=True), forward_mode=forward_mode)

    if fault.here == PRODUCTS:
        with pytest.raises(ReverseNeeded):
            differentiated()
    elif fault.here == REFUSED:
        with pytest.raises(MissingDerivativeError):
            differentiated()
    else:
        differentiated()


def test_a_gradient_penalty_over_a_wrong_second_derivative_is_refused() -> None:
    """The plain loop is wrong there, so no hypergradient of it would be what the user wants."""

    def penalty(v: Tensor) -> Tensor:
        normed = torch._weight_norm(v, torch.ones(2, 1))  # pyright: ignore[reportPrivateImportUsage]
        (slope,) = torch.autograd.grad(normed.square().sum(), v, create_graph=True)
        return slope.square().sum()

    with pytest.raises(MissingDerivativeError, match="'_weight_norm', whose second derivative is wrong"):
        gradient(lambda tensors: penalty(tensors[0]), [torch.ones(2, 3)], differentiable=True)
    run_user_code(
        lambda: penalty(torch.ones(2, 3, requires_grad=True))
    )  # a step of one's own may take the gradient of such a loss


def test_every_replaced_operation_is_on_the_table() -> None:
    listed = " ".join(fault.operation for fault in FAULTS)
    replaced = {**composites.SECOND_DERIVATIVE, **composites.FORWARD_MODE, **composites.THIRD_DERIVATIVE}
    names = {str(getattr(operation, "__name__", operation)).strip("_") for operation in replaced}
    names |= {str(getattr(operation, "__name__", operation)) for operation in refused_operations.CHECKS}
    other = {"dropout", "native_batch_norm_legit"}  # not a derivative; a second name
    other |= {"embedding"}  # stops a gradient in reverse mode only
    other |= {"max_unpool2d", "max_unpool3d", "conv_transpose2d", "conv_transpose3d"}
    assert [name for name in sorted(names - other) if name not in listed] == []


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
