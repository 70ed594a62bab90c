"""The arguments of `fit` that are grouped, and its two ways to name an estimator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from bilevel import OuterUpdate, Phase, Reverse, RunFolder, TruncatedReverse
from bilevel.training import metrics
from bilevel.training.run_record import CHECKPOINT

START = torch.tensor(1.0, dtype=torch.float64)


def fit(**settings: Any) -> bilevel.FitResult:
    problem = bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi) ** 2,
        outer_loss=lambda theta, phi, batch: 0.5 * (theta - 3.0) ** 2,
        params=torch.zeros((), dtype=torch.float64),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    given = {"inner_batches": 3, "optimizer": bilevel.optimizer(torch.optim.SGD, lr=0.5), "progress": False, **settings}
    return bilevel.fit(problem, START, **given)


def test_an_estimator_and_a_number_of_steps_are_one_phase() -> None:
    one = fit(estimator=TruncatedReverse(2), steps=4)
    assert torch.equal(one.meta, fit(phases=[Phase(TruncatedReverse(2), 4)]).meta)
    assert len(one.history) == 4
    assert not torch.equal(one.meta, fit(estimator=Reverse(), steps=4).meta)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, r"estimator=None, steps=None: write estimator=bilevel\.Reverse\(\), steps=100"),
    "no steps": ({"estimator": Reverse()}, r"steps=None: write estimator=bilevel\.Reverse\(\), steps=100"),
    "no estimator": ({"steps": 3}, r"estimator=None, steps=3: write estimator="),
    "both": ({"estimator": Reverse(), "steps": 3, "phases": [Phase(Reverse(), 3)]}, "pass either phases, or estimator"),
    "steps twice": ({"steps": 3, "phases": [Phase(Reverse(), 3)]}, "pass either phases, or estimator"),
    "no whole number": ({"estimator": Reverse(), "steps": 2.5}, r"steps=2\.5: a whole number of at least 1"),
    "one phase": ({"phases": Phase(Reverse(), 3)}, r"write phases=\[bilevel\.Phase"),
    "no phase": ({"phases": []}, r"write phases=\[bilevel\.Phase"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_an_estimator_with_steps_is_refused(name: str) -> None:
    settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        fit(**settings)


def test_a_folder_is_a_path_or_has_settings(tmp_path: Path) -> None:
    for out in (str(tmp_path / "text"), tmp_path / "path", RunFolder(tmp_path / "settings")):
        fit(estimator=Reverse(), steps=2, out=out)
    for name in ("text", "path", "settings"):
        assert len(metrics.read(tmp_path / name / metrics.FILE)) == 2
        assert (tmp_path / name / CHECKPOINT).exists()


def test_a_folder_is_resumed_only_if_its_settings_say_so(tmp_path: Path) -> None:
    first = fit(estimator=Reverse(), steps=2, out=tmp_path)
    with pytest.raises(FileExistsError, match=r"RunFolder\(path, resume=True\)"):
        fit(estimator=Reverse(), steps=2, out=tmp_path)
    again = fit(estimator=Reverse(), steps=2, out=RunFolder(tmp_path, resume=True))
    assert torch.equal(again.meta, first.meta)


@pytest.mark.parametrize("wrong", [3, True, ["runs"], Reverse()])
def test_what_is_no_folder_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"out is .*the path of a folder is needed"):
        fit(estimator=Reverse(), steps=1, out=wrong)
    with pytest.raises(TypeError, match=r"path is .*the path of a folder is needed"):
        RunFolder(wrong)


@pytest.mark.parametrize("wrong", [{"clip_norm": 1.0}, 3, lambda meta: meta])
def test_what_is_no_update_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"update is .*bilevel\.OuterUpdate"):
        fit(estimator=Reverse(), steps=1, update=wrong)


def test_a_projection_is_a_function() -> None:
    with pytest.raises(TypeError, match=r"called as project\(meta\)"):
        OuterUpdate(project=3)  # type: ignore[arg-type]


def test_a_number_of_inner_steps_may_depend_on_the_estimate() -> None:
    steps = {0: 3, 1: 1}
    found = fit(estimator=Reverse(), steps=2, inner_batches=lambda number: steps[number])
    expected = fit(estimator=Reverse(), steps=2, inner_batches=lambda number: [None] * steps[number])
    assert torch.equal(found.meta, expected.meta)
    assert not torch.equal(found.meta, fit(estimator=Reverse(), steps=2).meta)
