"""Results say whether a GPU computes float32 products in TF32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from other_device import DEVICE, OtherDevice

import bilevel
from bilevel.checking.report import versions
from bilevel.report import tf32
from bilevel.tasks import running

MATMUL: Any = torch.backends.cuda.matmul
CONV: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def settings() -> Iterator[None]:
    before = MATMUL.fp32_precision, CONV.fp32_precision
    yield
    MATMUL.fp32_precision, CONV.fp32_precision = before


@pytest.mark.parametrize("matmul", ["tf32", "ieee"])
@pytest.mark.parametrize("conv", ["tf32", "ieee"])
def test_both_settings_are_read(matmul: str, conv: str, settings: None) -> None:
    MATMUL.fp32_precision = matmul
    CONV.fp32_precision = conv
    word = {"tf32": "on", "ieee": "off"}
    assert tf32.tf32_settings() == f"matrix products {word[matmul]}, convolutions {word[conv]}"


def test_pytorchs_defaults() -> None:
    assert tf32.tf32_settings() == "matrix products off, convolutions on"


@pytest.mark.parametrize(("dtype", "stated"), [(torch.float32, True), (torch.float64, False)])
def test_an_estimate_on_a_gpu_states_them(dtype: torch.dtype, stated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = bilevel.Problem(
        init=lambda phi: phi.sin(),
        step=lambda state, phi, batch: state - 0.1 * (state - phi),
        outer_loss=lambda state, phi, batch: state.square().sum(),
    )
    phi = torch.ones(2, dtype=dtype)
    monkeypatch.setattr(tf32, "GPUS", (DEVICE.type,))
    assert "tf32" not in bilevel.Reverse()(problem, phi, 2).diagnostics
    with OtherDevice() as other:
        found = bilevel.Reverse()(problem, other.put(phi), 2).diagnostics
    assert found.get("tf32") == ("matrix products off, convolutions on" if stated else None)


def test_runs_and_reports_of_checks_state_them_with_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gpu" not in running.versions()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for found in (running.versions(), versions()):
        assert found["gpu"] == "a GPU"
        assert found["tf32"] == tf32.tf32_settings()
