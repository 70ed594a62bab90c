"""What the kinds of bilevel problems answer about themselves, and that no other code asks for their class."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.problem import BilevelProblem, as_problem

SOURCE = Path(__file__).parent.parent / "src" / "bilevel"
KINDS = {"BilevelProblem", "BlackBox", "GradientDescent", "Problem", "Unrollable"}


class Shrinking:
    """A problem described by a class of the user's own: θ_t = φ θ_{t−1}, so h = 64 φ^{2T}."""

    def init(self, meta: Tensor) -> Tensor:  # noqa: ARG002
        return torch.tensor(8.0, dtype=torch.float64)

    def step(self, state: Tensor, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        return state * meta

    def outer_loss(self, state: Tensor, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        return state**2


def descent(**settings: Any) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        inner_loss=lambda theta, meta, batch: 0.5 * (theta - meta) ** 2,
        outer_loss=lambda theta, meta, batch: theta,
        params=torch.tensor(0.0),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
        **settings,
    )


def box(**settings: Any) -> bilevel.BlackBox:
    return bilevel.BlackBox(solve=lambda meta: 2 * meta, outer_loss=lambda state, meta, batch: state, **settings)


def steps() -> bilevel.Problem:
    return bilevel.Problem(Shrinking().init, Shrinking().step, Shrinking().outer_loss)


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward(), bilevel.TruncatedReverse(3)])
def test_a_class_of_the_users_own_is_a_problem(estimator: bilevel.Estimator) -> None:
    meta = torch.tensor(0.5, dtype=torch.float64)
    estimate = estimator(Shrinking(), meta, [None] * 3)
    torch.testing.assert_close(estimate.value, 64 * meta**6)
    torch.testing.assert_close(estimate.grad, 64 * 6 * meta**5)


def test_fit_and_compare_take_a_class_of_the_users_own() -> None:
    meta = torch.tensor(0.5, dtype=torch.float64)
    (row,) = bilevel.compare(Shrinking(), meta, [None] * 3, estimators=[bilevel.Forward()])
    assert row.relative_error < 1e-12
    phases = [bilevel.Phase(bilevel.Reverse(), steps=2)]
    assert bilevel.fit(Shrinking(), meta, [None] * 3, phases=phases, progress=False).meta < meta


@pytest.mark.parametrize("wrong", [None, 3, Shrinking, bilevel.Problem, torch.nn.Linear(1, 1), lambda meta: meta])
def test_what_is_no_problem_is_refused_everywhere(wrong: Any) -> None:
    meta = torch.tensor(0.5)
    phases = [bilevel.Phase(bilevel.Reverse(), steps=1)]
    with pytest.raises(TypeError, match=r"problem is .*an instance of bilevel.Problem, GradientDescent or BlackBox"):
        bilevel.Reverse()(wrong, meta, [None])
    with pytest.raises(TypeError, match=r"problem is .*an instance of"):
        bilevel.fit(wrong, meta, [None], phases=phases, progress=False)
    with pytest.raises(TypeError, match=r"problem is .*an instance of"):
        bilevel.plan(wrong, meta, [None], memory="1GB")
    with pytest.raises(TypeError, match=r"problem is .*an instance of"):
        bilevel.compare(wrong, meta, [None], estimators=[bilevel.Reverse()])


def test_a_black_box_has_neither_steps_nor_batches() -> None:
    problem = box()
    assert problem.is_black_box
    assert problem.steps_of(problem.batches_of(None)) == 0
    assert problem.init(torch.tensor(3.0)) == 6.0
    with pytest.raises(ValueError, match="takes no inner_batches"):
        problem.batches_of([None])
    with pytest.raises(TypeError, match="has no inner steps"):
        problem.step(torch.tensor(0.0), torch.tensor(0.0), None)


def test_points_are_solved_at_once_only_where_the_user_said_how() -> None:
    def solve_all(metas: Any) -> list[Tensor]:
        return [2 * meta for meta in metas]

    assert box(solve_all=solve_all).solve_all is solve_all
    assert [problem.solve_all for problem in (box(), steps(), descent())] == [None] * 3


@pytest.mark.parametrize("problem", [steps(), box()])
def test_problems_without_an_inner_loss_say_so(problem: BilevelProblem) -> None:
    assert problem.as_gradient_descent is None
    wanted = f"Somebody needs the inner loss, because; a {type(problem).__name__} has only steps.*or take something"
    with pytest.raises(TypeError, match=wanted):
        problem.require_inner_loss("Somebody", "because", instead="something")


def test_a_descent_has_an_inner_loss_and_may_be_compiled() -> None:
    plain, compiled = descent(), descent(compile="eager")
    assert plain.as_gradient_descent is plain
    assert plain.require_inner_loss("Somebody", "because", instead="something") is plain
    assert (plain.backend, compiled.backend) == (None, "eager")
    assert plain.not_yet_compiled() is plain
    twin = compiled.not_yet_compiled()
    assert twin is not compiled
    assert twin.backend == "eager"
    assert compiled.eager.backend is None


@pytest.mark.parametrize("problem", [steps(), box()])
def test_problems_without_compiled_code_are_their_own_eager_form(problem: BilevelProblem) -> None:
    assert problem.backend is None
    assert problem.eager is problem
    assert problem.not_yet_compiled() is problem
    problem.check_compiled_again()


def test_a_problem_passes_unchanged() -> None:
    for problem in (steps(), box(), descent()):
        assert as_problem(problem) is problem


def test_only_the_module_of_the_problems_tests_for_their_classes() -> None:
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass")):
                continue
            names = {getattr(each, "id", getattr(each, "attr", "")) for each in ast.walk(node.args[1])}
            if names & KINDS and path.name != "problem.py":
                found.append(f"{path}:{node.lineno}")
    assert not found
