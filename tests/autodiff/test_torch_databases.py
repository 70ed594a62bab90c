"""The entries of PyTorch's own test databases come out right or are refused by name, as inner models of all estimators.

`python benchmarks/torch_databases.py` writes what comes out to benchmarks/results/torch_databases.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

pytest.importorskip("expecttest", reason="PyTorch's databases need expecttest; it is in the extra dev")

from database_cases import Case, modules, operations, optimizers
from database_verdicts import Row, judge, judge_all, with_penalty

Database = Callable[[int, slice], Iterator[Case]]


def assert_right_or_refused(rows: Iterable[Row], at_least: int) -> None:
    found = list(rows)
    assert [row for row in found if row.verdict in ("WRONG", "obscure")] == []
    assert sum(row.verdict == "right" for row in found) >= at_least


@pytest.mark.parametrize(
    ("database", "part", "at_least"),
    [(operations, slice(5, None, 18), 50), (modules, slice(3, None, 12), 12), (optimizers, slice(0, None, 5), 6)],
)
def test_a_sample(database: Database, part: slice, at_least: int) -> None:
    estimators = ("Reverse", "Forward(chunk_size=1)")
    assert_right_or_refused((row for case in database(1, part) for row in judge(case, estimators)), at_least)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_all_operations(number: int) -> None:
    assert_right_or_refused(judge_all(operations(2, slice(number, None, 8))), 500)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_all_modules(number: int) -> None:
    assert_right_or_refused(judge_all(modules(3, slice(number, None, 3))), 500)


@pytest.mark.slow
def test_all_optimizers() -> None:
    assert_right_or_refused(judge_all(optimizers()), 400)


@pytest.mark.slow
@pytest.mark.parametrize(("database", "at_least"), [(operations, 300), (modules, 200)])
def test_all_with_a_gradient_penalty(database: Database, at_least: int) -> None:
    """Third derivatives."""
    assert_right_or_refused(judge_all(with_penalty(database(1, slice(None)))), at_least)
