"""Every loss of `torch.nn.functional` gives the hypergradient of a plain PyTorch loop, whatever the estimator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loss_cases
import pytest
import torch
from loss_cases import META, STEPS, LossCase
from torch.nn import functional

import bilevel

DOCS = Path(__file__).parents[2] / "docs"
ALL = list(loss_cases.cases())


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_loss(case: LossCase) -> None:
    assert case.expected().norm() > 1e-4
    assert set(loss_cases.verdicts(case).values()) == {"right"}


def test_every_loss_is_there() -> None:
    ours = {name for name, _ in [*loss_cases.FIXED, *loss_cases.MOVING]}
    functions = {name for name in dir(functional) if "loss" in name and not name.startswith("_")}
    functions |= {"cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"}
    assert functions - ours <= {"linear_cross_entropy"}, "a linear layer and cross_entropy in one"


@pytest.mark.slow
def test_the_page_of_losses_is_up_to_date() -> None:
    assert (DOCS / "losses.md").read_text(encoding="utf-8") == loss_cases.page()


@pytest.mark.slow
def test_plan_auto_and_compare_take_a_loss_that_pytorch_does_not_take_in_forward_mode() -> None:
    (case,) = (c for c in ALL if str(c) == "mse_loss , fixed target, mean")
    arguments: Any = (case.problem(), META, bilevel.no_batches(STEPS))
    plan = bilevel.plan(*arguments, memory="100MB")
    assert {type(row.estimator) for row in plan.rows} >= {bilevel.Forward, bilevel.ForwardGradient, bilevel.Reverse}
    exact = bilevel.Reverse()(*arguments).grad
    torch.testing.assert_close(bilevel.Auto()(*arguments).grad, exact, rtol=1e-10, atol=1e-12)
    found = bilevel.compare(*arguments, estimators=[bilevel.Forward(), bilevel.Reverse()])
    assert len(found) == 2
