"""`docs/new_estimator.md` works as it stands: its skeleton is copied, registered and run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import estimator_table
import numpy as np
import pytest
import test_closed_forms
import test_unbiasedness
from closed_forms import ClosedForm
from estimator_table import Row

import bilevel
import bilevel.estimators
from bilevel import cli
from bilevel.cli import arguments
from bilevel.estimators.names import describe
from bilevel.planning import registry

PAGE = (Path(__file__).parents[2] / "docs" / "new_estimator.md").read_text(encoding="utf-8")
SKELETON, ROW = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The skeleton as a module, in a file of its own."""
    path = tmp_path_factory.mktemp("copied") / "evolution_strategies.py"
    path.write_text(SKELETON, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("evolution_strategies", path)
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    sys.modules["evolution_strategies"] = copied
    spec.loader.exec_module(copied)
    yield copied
    del sys.modules["evolution_strategies"]


@pytest.fixture
def kind(module: Any, monkeypatch: pytest.MonkeyPatch) -> type[bilevel.Estimator]:
    """The estimator of the skeleton, registered."""
    monkeypatch.setattr(registry, "ESTIMATORS", (*registry.ESTIMATORS, module.EvolutionStrategies))
    return module.EvolutionStrategies


@pytest.fixture
def row(kind: type[bilevel.Estimator]) -> Row:
    """The row of the page."""
    ((found, made),) = eval(f"{{{ROW}}}", {**vars(estimator_table), "EvolutionStrategies": kind}).items()
    assert found is kind
    return made


def test_it_has_a_name_flags_and_a_line_in_the_list(
    kind: type[bilevel.Estimator], row: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    (estimator,) = row.estimates
    assert type(estimator) is kind
    assert registry.parse(describe(estimator)) == estimator
    assert {"samples", "sigma"} <= set(vars(arguments.estimator_settings()))
    cli.main(["list"])
    assert "evolution-strategies" in capsys.readouterr().out


def test_its_docstring_is_true(module: Any) -> None:
    import doctest

    found = doctest.testmod(module)
    assert found.attempted > 0
    assert not found.failed


def test_its_estimates_have_the_variance_of_theory(row: Row) -> None:
    (stochastic,) = row.stochastic
    case: ClosedForm = stochastic.case
    errors = np.array([case.error(case(stochastic.estimator, seed)) ** 2 for seed in range(200)])
    assert abs(errors.mean() - stochastic.relative_variance) < 4 * test_closed_forms.standard_error_of_mean(errors)


@pytest.mark.slow
def test_it_is_unbiased(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    assert row.unbiased is not None
    (name,) = row.unbiased.distributions
    estimator = row.unbiased.make(name, None)
    outcomes = test_unbiasedness.gaussian(3, 2)
    mean, _, _ = test_unbiasedness.expectation(estimator, test_unbiasedness.CASE, outcomes, monkeypatch, name)
    assert mean == pytest.approx(test_unbiasedness.CASE.gradient, rel=row.unbiased.rounding)


def test_it_trains_and_compares(kind: type[bilevel.Estimator]) -> None:
    case = estimator_table.SMALL
    estimator = kind()
    (compared,) = bilevel.compare(case.problem, case.meta, case.inner_batches, test_closed_forms.tensor(case.outer.a),
                                  estimators=[estimator], repeats=3)  # fmt: skip
    assert compared.repeats == 3
    assert compared.variance is not None
    result = bilevel.fit(
        case.problem, case.meta, case.inner_batches, test_closed_forms.tensor(case.outer.a),
        phases=[bilevel.Phase(estimator, 2)], progress=False,
    )  # fmt: skip
    assert len(result.history) == 2


def test_every_class_that_an_author_needs_is_public() -> None:
    names = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
    documented = {name for cell in names for name in re.findall(r"`(\w+)`", cell)}
    methods = {kind.__name__ for kind in registry.ESTIMATORS}
    assert documented == set(bilevel.estimators.__all__) - methods
