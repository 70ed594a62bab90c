"""PyTorch has the faults that are listed, the library does not, and the page says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytorch_faults import FAULTS, PRODUCTS, REFUSED, Fault, page

from bilevel.autodiff import composites, refused_operations
from bilevel.autodiff.missing import named_missing_derivatives
from bilevel.autodiff.substitution import Memory, ReverseNeeded, run_user_code
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
        with named_missing_derivatives():
            run_user_code(fault.show, Memory(composite_normalisations=True), forward_mode=forward_mode)

    if fault.here == PRODUCTS:
        with pytest.raises(ReverseNeeded):
            differentiated()
    elif fault.here == REFUSED:
        with pytest.raises(MissingDerivativeError):
            differentiated()
    else:
        differentiated()


def test_every_replaced_operation_is_on_the_table() -> None:
    listed = " ".join(fault.operation for fault in FAULTS)
    replaced = {**composites.SECOND_DERIVATIVE, **composites.FORWARD_MODE, **composites.THIRD_DERIVATIVE}
    names = {str(getattr(operation, "__name__", operation)).strip("_") for operation in replaced}
    names |= {str(getattr(operation, "__name__", operation)) for operation in refused_operations.CHECKS}
    other = {"dropout", "max_unpool2d", "max_unpool3d"}  # not a derivative; listed under one name
    assert [name for name in sorted(names - other) if name not in listed] == []


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
