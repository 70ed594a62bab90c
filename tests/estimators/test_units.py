"""What estimators cost in units of one inner gradient: counted, and as the README says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import bilevel
from bilevel.estimators import names

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import units  # noqa: E402  # pyright: ignore[reportMissingImports]

T = 8
CASES = {names.describe(case.estimator): case for case in units.CASES}
DOCUMENTED = {
    "Reverse()": "reverse",
    'Reverse("sqrt")': "reverse(checkpoints='sqrt')",
    'Reverse("graph")': "reverse(checkpoints='graph')",
    "TruncatedReverse(s)": "truncated-reverse(steps=6)",
    "Forward()": "forward",
    "ForwardGradient(b)": "forward-gradient(directions=4)",
    "ZerothOrder(b, μ)": "zeroth-order(directions=4)",
    "Implicit(solver)": "implicit(solver=neumann(iterations=5))",
    "HessianFree(α)": "hessian-free",
    "PersistentES(b, σ)": "persistent-es(directions=4)",
    "Penalty(λ)": "penalty",
    "SingleLoop(ρ)": "single-loop(solver_steps=5)",
}
"""The methods in the README's table, and a case of each."""


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Implicit")  # a solver that stops early
def test_operations_are_those_of_the_formula(name: str) -> None:
    """They are never more. Less are: one of 18 matrix products, for the first layer's inputs, is not needed; nor is, at
    most once in an estimate, what leads to the weights of layers: in the first step, or in the product with Y.
    """
    case = CASES[name]
    assert case.estimator.units(T, units.META) == case.units(T, units.META)
    found = units.measured(units.problem(width=8, depth=6, examples=32), case, units.counted, T)
    formula = case.units(T, units.META) - case.outer_gradients(T)
    assert formula * 17 / 18 - 1.5 < found < 1.001 * formula


def test_units_of_several_batches_and_of_a_stream_follow_from_those() -> None:
    several, one = (bilevel.Implicit(batches=count).units(T, 5) - T for count in (3, 1))
    assert several == 3 * one
    for chunk_size in (None, 2):
        stream = bilevel.StreamingForwardGradient(4, chunk_size=chunk_size)
        assert stream.units(T, 5) == bilevel.ForwardGradient(4, chunk_size=chunk_size).units(T, 5)


@pytest.mark.parametrize("method", DOCUMENTED)
def test_the_readme_gives_the_formula(method: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{method}`"))
    assert row.split("|")[-2].strip() == CASES[DOCUMENTED[method]].formula


def test_the_results_have_a_row_for_each_case() -> None:
    table = (ROOT / "benchmarks/results/units.md").read_text(encoding="utf-8")
    for name, case in CASES.items():
        assert f"| `{name}` | {case.formula} |" in table
