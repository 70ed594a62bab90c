"""Black boxes and zeroth-order estimates: what they refuse, and what they survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bad_input_cases import (
    BLACK_BOX,
    DERIVATIVES,
    ESTIMATORS,
    EVERY,
    IMPLICIT,
    NAN,
    ZEROTH_ORDER,
    call,
    descent,
    problem,
    quadratic,
    refused,
    total,
)
from torch import Tensor

import bilevel
from bilevel.directions import distributions
from bilevel.errors import NonFiniteError


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("batches", [None, [1, 2]])
def test_a_black_box_is_refused_by_name(name: str, batches: Any) -> None:
    box = bilevel.BlackBox(lambda phi: phi, total)
    fragments = [type(ESTIMATORS[name]).__name__, "a BlackBox has no derivatives", "ZerothOrder(", "bilevel.Problem"]
    refused(TypeError, *fragments, by=lambda: call(name, box, inner_batches=batches))


@pytest.mark.parametrize("name", IMPLICIT)
def test_steps_without_a_loss_are_refused_by_name(name: str) -> None:
    fragments = [type(ESTIMATORS[name]).__name__, "needs the inner loss", "a Problem has only steps", "GradientDescent"]
    refused(TypeError, *fragments, by=lambda: call(name, problem()))


@pytest.mark.parametrize("name", BLACK_BOX)
class TestBlackBox:
    def test_inner_batches_of_a_black_box(self, name: str) -> None:
        box = bilevel.BlackBox(lambda phi: phi, total)
        fragments = ["a BlackBox takes no inner_batches", "pass None"]
        refused(ValueError, *fragments, by=lambda: call(name, box, inner_batches=[1, 2]))

    def test_an_exception_of_the_solver_arrives_unchanged(self, name: str) -> None:
        class SolverCrashedError(Exception):
            pass

        crash = SolverCrashedError("mesh 17 is inverted")

        def solve(phi: Any) -> Any:
            raise crash

        error = refused(SolverCrashedError, by=lambda: call(name, bilevel.BlackBox(solve, total), inner_batches=None))
        assert error is crash
        assert error.__cause__ is None

    def test_a_number_for_a_loss(self, name: str) -> None:
        number: Any = lambda state, phi, batch: 0.5  # noqa: E731
        box = bilevel.BlackBox(lambda phi: phi, number)
        refused(TypeError, "outer_loss returned 0.5 (float)", by=lambda: call(name, box, inner_batches=None))

    def test_a_black_box_that_is_not_finite(self, name: str) -> None:
        solves = []

        def solve(phi: Tensor) -> dict[str, Tensor]:
            solves.append(phi)
            return {"u": phi / 0}

        box = bilevel.BlackBox(solve, lambda state, phi, batch: state["u"].sum())
        fragments = ["outer_loss is nan for the state that solve returned", "state['u'] holds NaN"]
        refused(NonFiniteError, *fragments, by=lambda: call(name, box, inner_batches=None))
        assert len(solves) == 1 or name not in ZEROTH_ORDER  # one may take an hour


@pytest.mark.parametrize("name", ZEROTH_ORDER)
class TestZerothOrder:
    def test_a_black_box_may_keep_what_it_likes_in_its_state(self, name: str) -> None:
        box = bilevel.BlackBox(lambda phi: {"u": phi, "mask": NAN * phi}, lambda state, phi, batch: state["u"].sum())
        assert call(name, box, torch.tensor(2.0), None).grad.item() == pytest.approx(1.0, abs=1e-9)

    def test_a_shifted_point_that_is_not_finite(self, name: str) -> None:
        # √0 is fine, and so is one of the two points beside it. Forward differences go to +v alone, so v must be −1.
        seed = next(s for s in range(64) if direction_of(s) < 0)
        box = bilevel.BlackBox(torch.sqrt, lambda state, phi, batch: state)
        fragments = ["0.0001·direction", "finite at meta itself", "smaller step_size", "outer_loss is nan"]
        refused(NonFiniteError, *fragments, by=lambda: call(name, box, torch.tensor(0.0), None, seed=seed))

    def test_a_shifted_point_whose_inner_step_is_not_finite(self, name: str) -> None:
        seed = next(s for s in range(64) if direction_of(s) < 0)
        subject = problem(
            lambda phi: torch.ones(()), lambda state, phi, batch: state + phi.sqrt() if batch else 2 * state
        )
        fragments = ["0.0001·direction", "finite at meta itself", "inner step 1 of 3 (counted from 0) made state NaN"]
        error = refused(
            NonFiniteError,
            *fragments,
            by=lambda: call(name, subject, torch.tensor(0.0), [0, 1, 0], seed=seed),
        )
        assert error.inner_step == 1
        assert error.last_finite_state.item() == 2.0


def direction_of(seed: int) -> float:
    """The first direction of a seed, for one meta parameter."""
    return distributions.Directions("rademacher", seed, 1, [torch.zeros(())]).draw([0])[0].item()


@pytest.mark.parametrize("name", EVERY)
def test_an_exception_of_the_users_own_arrives_unchanged_and_leaves_nothing_behind(name: str) -> None:
    mine = NotImplementedError("forward this to me")

    def loss(theta: Any, phi: Any, batch: Any) -> Tensor:
        if batch == 1:
            raise mine
        return quadratic(theta, phi, batch) + torch.rand(())

    torch.manual_seed(3)
    before = torch.get_rng_state()
    error = refused(NotImplementedError, by=lambda: call(name, descent(loss), inner_batches=[0, 1, 2]))
    assert error is mine
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
