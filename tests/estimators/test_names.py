"""Estimators by name: every estimator has one, a description reads back as itself, and nonsense is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from estimator_table import ROWS

import bilevel
from bilevel.estimators import names
from bilevel.planning import registry
from bilevel.solvers import ConjugateGradient, LinearSolver, Neumann

SETTINGS = [
    estimator
    for kind, row in ROWS.items()
    for estimator in dict.fromkeys([kind(), *row.estimates, *row.small.values(), *row.named])
]


@pytest.mark.parametrize("estimator", SETTINGS, ids=names.describe)
def test_a_description_reads_back_as_itself(estimator: bilevel.Estimator) -> None:
    assert registry.parse(names.describe(estimator)) == estimator


@pytest.mark.parametrize("estimator", SETTINGS, ids=names.describe)
def test_python_reads_back_as_well(estimator: bilevel.Estimator) -> None:
    assert registry.parse(repr(estimator)) == estimator


def test_every_public_estimator_and_solver_has_a_name() -> None:
    public = {value for value in vars(bilevel).values() if isinstance(value, type)}
    estimators = {kind for kind in public if issubclass(kind, bilevel.Estimator)} - {bilevel.Estimator}
    assert set(registry.ESTIMATORS) == estimators
    assert len(registry.by_name()) == len(registry.ESTIMATORS)
    assert set(names.SOLVERS) == {kind for kind in public if issubclass(kind, LinearSolver)}


def test_every_estimator_has_a_row_in_the_table_of_the_shared_tests() -> None:
    assert list(ROWS) == list(registry.ESTIMATORS)


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        (bilevel.Reverse(), "reverse"),
        (bilevel.ForwardGradient(directions=4), "forward-gradient(directions=4)"),
        (bilevel.ZerothOrder(2, scheme="forward"), "zeroth-order(directions=2, scheme='forward')"),
        (bilevel.Implicit(Neumann(iterations=3)), "implicit(solver=neumann(iterations=3))"),
        (bilevel.Implicit(ConjugateGradient()), "implicit"),
    ],
)
def test_a_description_leaves_defaults_out(estimator: bilevel.Estimator, text: str) -> None:
    assert names.describe(estimator) == text


def test_a_description_needs_no_defaults() -> None:
    @dataclass(frozen=True)
    class OfMyOwn(bilevel.Estimator):
        depth: int
        width: int = 2
        is_random = False

        def units(self, steps: int, meta_size: int, losses: int = 1) -> float:
            raise NotImplementedError

        def _estimate(self, run: Any) -> bilevel.Estimate:
            raise NotImplementedError

    assert names.describe(OfMyOwn(3)) == "of-my-own(depth=3)"


@pytest.mark.parametrize(
    ("text", "estimator"),
    [
        ("  reverse ", bilevel.Reverse()),
        ("reverse()", bilevel.Reverse()),
        ("reverse(checkpoints=sqrt)", bilevel.Reverse("sqrt")),
        ('reverse(checkpoints="sqrt")', bilevel.Reverse("sqrt")),
        ("forward_gradient(directions = 4)", bilevel.ForwardGradient(4)),
        ("forward-gradient(chunk-size=2, directions=4)", bilevel.ForwardGradient(4, chunk_size=2)),
        ("forward(chunk_size=None)", bilevel.Forward()),
        ("zeroth-order(step_size=1e-3)", bilevel.ZerothOrder(step_size=1e-3)),
        ("implicit(solver=neumann)", bilevel.Implicit(Neumann())),
        ("implicit(solver='neumann(step_size=0.5)')", bilevel.Implicit(Neumann(step_size=0.5))),
        ("implicit(solver=conjugate-gradient(damping=1))", bilevel.Implicit(ConjugateGradient(damping=1))),
        ("hessian-free(scale=2)", bilevel.HessianFree(scale=2)),
    ],
)
def test_what_people_write(text: str, estimator: bilevel.Estimator) -> None:
    assert registry.parse(text) == estimator


def test_the_text_wins_over_defaults() -> None:
    found = registry.parse("forward-gradient(directions=2)", directions=9, chunk_size=1)
    assert found == bilevel.ForwardGradient(2, chunk_size=1)


@pytest.mark.parametrize("solver", ["neumann(iterations=3)", Neumann(iterations=3)], ids=["text", "object"])
def test_a_solver_as_a_default(solver: Any) -> None:
    assert registry.parse("implicit", solver=solver) == bilevel.Implicit(Neumann(iterations=3))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("rewerse", ["no estimator 'rewerse'", *registry.by_name()]),
        ("reverse(foo=1)", ["reverse has no setting 'foo'", "checkpoints"]),
        ("reverse(checkpoints=foo)", ["checkpoints='foo'", "sqrt"]),
        ("reverse(checkpoints=0)", ["checkpoints=0"]),
        ("reverse(checkpoints=[1])", ["checkpoints=[1]"]),
        ("forward-gradient(directions=0)", ["directions=0"]),
        ("forward-gradient(directions=many)", ["directions='many'"]),
        ("forward-gradient(distribution=[1])", ["distribution=[1]", "rademacher"]),
        ("zeroth-order(step_size=foo)", ["step_size='foo'"]),
        ("hessian-free(scale=None)", ["scale=None"]),
        ("implicit(solver=4)", ["'4'"]),
        ("implicit(solver=None)", ["'None'"]),
        ("forward-gradient(directions=2, control_variate=newton)", ["no control variate 'newton'", "running-mean"]),
        ("forward-gradient(control_variate=reverse)", ["directions=1", "take two"]),
        ("forward-gradient(directions=2, control_variate=forward-gradient)", ["cannot be a control variate"]),
        ("implicit(solver=newton)", ["no solver 'newton'", *names.by_name(names.SOLVERS)]),
        ("implicit(solver=neumann(damping=1))", ["neumann has no setting 'damping'", "iterations", "step_size"]),
        ("implicit(solver=neumann(step_size=foo))", ["step_size='foo'"]),
        *(
            (text, [repr(text), "name(setting=value, ...)"])
            for text in (
                "",
                "()",
                "reverse(",
                "reverse)",
                "reverse:100",
                "reverse('sqrt')",
                "reverse(**{'checkpoints': 3})",
                "reverse(checkpoints=1, checkpoints=2)",
                "forward-gradient(directions=2**3)",
                "forward-gradient(directions={[]: 1})",
                "a.b(c=1)",
                "reverse; forward",
                "3",
            )
        ),
    ],
)
def test_bad_texts(text: str, fragments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        registry.parse(text)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for value in (f"open('{trap}', 'w')", f"(lambda: open('{trap}', 'w'))()", f"[open('{trap}', 'w')]"):
        with pytest.raises(ValueError):  # noqa: PT011
            registry.parse(f"reverse(checkpoints={value})")
        with pytest.raises(ValueError):  # noqa: PT011
            registry.parse(f"implicit(solver={value})")
    assert not trap.exists()
