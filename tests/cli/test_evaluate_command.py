"""`bilevel evaluate` repeats or changes the evaluation of a run; `bilevel report` shows several runs side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page
from small_runs import run

from bilevel import cli
from bilevel.tasks.condensation.task import load_images

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "learned"
    run(place, "--labels", "learned", "--learn-rates", "each", "--outer-steps", "2", "--ipc", "2")
    return place


def evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_without_settings_it_repeats_the_evaluation_of_the_run(folder: Path, capsys: Capture) -> None:
    before = json.loads((folder / "results.json").read_text())["accuracy"]
    cli.main(["evaluate", str(folder)])
    said = capsys.readouterr().out
    assert evaluation(folder)["accuracy"] == before
    assert said.endswith(f"results: {folder / 'evaluation.json'}\n")
    assert f"{100 * before['condensed']['mean']:.1f}" in said


def test_other_settings_and_seeds(folder: Path) -> None:
    before = json.loads((folder / "results.json").read_text())["accuracy"]
    flags = ["--evaluation-runs", "3", "--evaluation-models", "resnet", "--width", "3", "--whole-set-epochs", "0"]
    cli.main(["evaluate", str(folder), *flags, "--seed", "5"])
    found = evaluation(folder)
    assert (found["width"], found["evaluation_runs"], found["seed"]) == (3, 3, 5)
    assert set(found["accuracy"]) == {*before, "condensed_resnet"} - {"whole_set"}
    assert len(found["accuracy"]["condensed"]["runs"]) == 3


def test_the_result_is_saved_for_other_programs(folder: Path) -> None:
    found = load_images(folder)
    assert found["images"].shape == (20, 1, 8, 8)
    assert np.array_equal(found["images"], found["training_images"])
    assert found["classes"].tolist() == [label for label in range(10) for _ in range(2)]
    assert found["class_names"].tolist() == [str(label) for label in range(10)]
    assert found["labels"].sum(1) == pytest.approx(np.ones(20), abs=1e-5)
    assert found["rates"].shape == (3,)
    assert found["rates"] == pytest.approx(np.full(3, 0.02), rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the folder of a run is needed"),
        (["--width", "3"], "the folder of a run is needed"),
        (["nowhere"], "there is no nowhere/config.json"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", *arguments])
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


def test_settings_of_another_version_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"task": "condensation", "width": -1, "seed": 0}))
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path)])
    assert "has settings that Condensation" in capsys.readouterr().err
    content = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "ipc": 1}))
    (tmp_path / "checkpoint.safetensors").write_bytes((folder / "checkpoint.safetensors").read_bytes())
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path)])
    assert "holds meta parameters of the shapes" in capsys.readouterr().err


def test_runs_side_by_side(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    other = tmp_path / "fixed"
    run(other, "--outer-steps", "3", "--watch", "0")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    cli.main(["report", str(folder), str(other)])
    assert capsys.readouterr().out == "report: comparison.html\n"
    page = Page((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    assert page.texts["h2"] == ["Results", "Settings that differ", "Outer loss", "Accuracy on the way"]
    cells = page.texts["td"]
    for place, column in ((folder, 1), (other, 2)):
        accuracy = json.loads((place / "results.json").read_text())["accuracy"]["condensed"]
        shown = cells[cells.index("test accuracy, condensed images") + column]
        assert shown == f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %"
    assert cells[cells.index("test accuracy, as many centres of clusters") + 2] == "–"  # with one image per class
    differing = {cells[i]: (cells[i + 1], cells[i + 2]) for i in range(len(cells) - 2)}
    assert differing["labels"] == ("learned", "fixed")
    assert differing["outer_steps"] == ("2", "3")
    assert "momentum" not in cells


def test_runs_of_different_tasks_are_not_compared(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"task": "pde"}))
    with pytest.raises(SystemExit):
        cli.main(["report", str(folder), str(tmp_path)])
    assert re.search("runs of one task can be compared, and these are of condensation, pde", capsys.readouterr().err)
