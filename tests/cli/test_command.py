"""The command `bilevel`: what it writes, what it refuses and how, and that an interrupted run loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from estimator_table import ROWS
from idx_files import write as write_idx_files
from pages import Page
from small_runs import SMALL, config_of, numbers_of, results_of, rows_of, run

import bilevel
from bilevel import cli
from bilevel.cli.compare_options import NOT_COMPARED
from bilevel.estimators import names
from bilevel.planning import registry
from bilevel.tasks import running
from bilevel.tasks.condensation import pictures
from bilevel.tasks.condensation.task import CondensationTask
from bilevel.tasks.registry import TASKS
from bilevel.training.outer_loop import OuterStep

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with two phases."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "finished"
    run(folder, "--ipc", "2", "--phases", "hessian-free:2", "forward-gradient(directions=4):2")
    return folder


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their page, whose pictures take a second."""
    monkeypatch.setattr(running, "write_report", lambda task, folder: folder)


def fails(*argv: str, code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == code


def words(text: str) -> str:
    """Without the boxes and line breaks that fit a message into a terminal."""
    return " ".join(re.sub(r"[─│╭╮╰╯━┃┏┓┡┩└┘┴┬├┤]", " ", text).split())


# -- list, help, version -----------------------------------------------------------------------------------------------


def test_list_names_everything_there_is(capsys: Capture) -> None:
    cli.main(["list"])
    shown = words(capsys.readouterr().out)
    for task in TASKS.values():
        assert task.name in shown
        for preset, content in task.presets.items():
            assert preset in shown
            assert content.summary.split(",")[0] in shown
    for name, kind in registry.by_name().items():
        assert name in shown
        for setting in names.settings_of(kind):  # a long list is broken over several lines
            assert setting in shown


@pytest.mark.parametrize(
    "argv",
    [[], ["--help"], ["-h"], ["help"], *([command, "--help"] for command in ("list", "run", "compare", "report"))],
)
def test_usage(argv: list[str], capsys: Capture) -> None:
    cli.main(argv)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: bilevel COMMAND")
    for command in ("list", "run TASK", "compare TASK", "report DIR"):
        assert f"\n  {command} " in shown


def test_version(capsys: Capture) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"bilevel {bilevel.__version__}\n"


@pytest.mark.parametrize("command", ["run", "compare"])
@pytest.mark.parametrize("preset", ["digits", "mnist-1-small"])
def test_help_of_a_task(command: str, preset: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # one column of boxes, so that a sentence can be read line by line
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "condensation", "--preset", preset, "--help"])
    assert caught.value.code == 0
    shown = words(capsys.readouterr().out)
    assert f"(default: {preset})" in shown
    config = CondensationTask.presets[preset].config
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        assert flag in shown
        default = " ".join(value) if isinstance(value, tuple) else value
        assert f"(default: {default})" in shown
    assert "None" not in re.sub(r"`None`", "", shown)
    if command == "run":
        for kind in registry.ESTIMATORS:
            for setting in names.settings_of(kind):
                assert "--" + setting.replace("_", "-") in shown
        assert (
            "--directions INT Of forward-gradient, streaming-forward-gradient, zeroth-order, persistent-es, auto: b"
            in shown
        )
        assert "--phases NAME:STEPS[:PATIENCE] ..." in shown


# -- what a run writes -------------------------------------------------------------------------------------------------


def test_a_run_s_folder(finished: Path) -> None:
    found = {path.name for path in finished.iterdir()}
    assert found == {
        "config.json",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "checkpoint.safetensors",
        "images",
        "condensed.npz",
    }
    assert [path.name for path in sorted((finished / "images").iterdir())] == [
        f"step-{number:06d}.safetensors" for number in range(5)
    ]


def test_config_json_holds_every_setting(finished: Path) -> None:
    config = config_of(finished)
    assert config["task"] == "condensation"
    assert config["phases"] == ["hessian-free:2", "forward-gradient(directions=4):2"]
    assert (config["outer_steps"], config["accumulate"], config["seed"]) == (4, 1, 0)
    given = {"model": "mlp", "width": 16, "inner_steps": 3, "outer_batch": 64, "evaluation_runs": 2, "ipc": 2}
    assert {**config, **given} == config
    assert set(vars(CondensationTask.presets["digits"].config)) <= set(config)


def test_metrics_have_a_line_for_each_outer_step(finished: Path) -> None:
    rows = rows_of(finished)
    assert [row["outer_step"] for row in rows] == [0, 1, 2, 3]
    assert [row["phase"] for row in rows] == [0, 0, 1, 1]
    assert [row["standard_error"] is None for row in rows] == [True, True, False, False]
    assert all(row["grad_norm"] > 0 and np.isfinite(row["outer_loss"]) for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_results_json(finished: Path) -> None:
    results = results_of(finished)
    assert results["task"] == "condensation"
    assert set(results["versions"]) == {"bilevel", "torch", "python"}
    assert results["seconds"] >= results["outer_loop_seconds"] > 0
    assert results["peak_memory_bytes"] > 10 * 2**20
    assert set(results["accuracy"]) == {"condensed", "random_real", "class_means", "centroids", "whole_set"}
    for found in results["accuracy"].values():
        assert set(found) == {"mean", "std", "runs"}
        assert len(found["runs"]) == 2
        assert all(0 <= run <= 1 and run * 500 == pytest.approx(round(run * 500)) for run in found["runs"])


def test_the_report_holds_everything_itself(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert len(text) < 400_000
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.addresses) == 5  # accuracies at the end and on the way, images, images over the steps, curves
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.texts["h2"] == [
        "Test accuracy",
        "Test accuracy over the outer steps",
        "Condensed images",
        "Condensed images over the outer steps",
        "Outer loop",
        "Settings",
    ]
    accuracy = results_of(finished)["accuracy"]
    for name, found in accuracy.items():
        shown = f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"
        assert f"{shown} %" in page.texts["b"]
        cells = page.texts["td"]
        assert cells[cells.index(pictures.names_of([name])[name]) + 1] == shown
    assert any(text.endswith(" MiB") for text in page.texts["b"])
    assert "4 outer steps, seed 0" in page.texts["p"][0]


def test_the_report_again(finished: Path, capsys: Capture) -> None:
    path = finished / "report.html"
    before = path.read_bytes()
    path.unlink()
    cli.main(["report", str(finished)])
    assert capsys.readouterr().out == f"report: {path}\n"
    assert path.read_bytes() == before


def test_what_a_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["run", "condensation", *SMALL, "--outer-steps", "1"])
    said = capsys.readouterr()
    accuracy = results_of(Path("runs/condensation"))["accuracy"]
    for name, found in accuracy.items():
        line = (
            f"test accuracy, {pictures.names_of([name])[name]} {100 * found['mean']:.1f} ± {100 * found['std']:.1f} %"
        )
        assert line in words(said.out)
    assert said.out.endswith("report: runs/condensation/report.html\n")
    assert "outer loss" in said.err  # the progress bar


def test_one_evaluation_run_has_no_spread() -> None:
    found = {"mean": 0.5, "std": 0.0, "runs": [0.5]}
    results = {"accuracy": dict.fromkeys(["condensed", "random_real"], found)}
    assert {value for _, value in CondensationTask().headline(results)} == {"50.0 %"}


@pytest.mark.usefixtures("no_report")
def test_tensorboard(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that tensorboard imports
        run(tmp_path / "out", "--outer-steps", "1", "--tensorboard")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_images_of_a_phase_that_ended_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(pictures, "over_time", lambda snapshots, ipc, names: shown.extend(snapshots) or "data:,")
    run(tmp_path / "out", "--phases", "hessian-free:80:2")
    rows, config = rows_of(tmp_path / "out"), config_of(tmp_path / "out")
    assert config["phases"] == ["hessian-free:80:2"]
    assert len(rows) < 80
    assert not (tmp_path / "out" / "images" / f"step-{len(rows):06d}.safetensors").exists()
    losses = [row["outer_loss"] for row in rows]
    assert min(losses[-2:]) >= min(losses[:-2])
    assert shown[-1][0] == len(rows)
    subtitle = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).texts["p"][0]
    assert f" {len(rows)} outer steps" in subtitle


@pytest.mark.usefixtures("no_report")
def test_mnist_from_idx_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    made = {"train_labels": np.arange(40) % 10, "test_labels": np.arange(20) % 10}
    for split, count in (("train", 40), ("test", 20)):
        made[f"{split}_images"] = generator.integers(0, 256, (count, 28, 28))
    (tmp_path / "data").mkdir()
    write_idx_files(tmp_path / "data", changed=made)
    flags = ["--width", "2", "--inner-steps", "2", "--evaluation-runs", "1", "--outer-steps", "1"]
    run(tmp_path / "out", "--preset", "mnist-1-small", *flags, "--data-dir", str(tmp_path / "data"), small=False)
    config = config_of(tmp_path / "out")
    assert (config["data"], config["model"], config["blocks"]) == ("mnist", "convnet", 3)
    assert config["phases"] == ["reverse(checkpoints='graph'):1"]


# -- estimators --------------------------------------------------------------------------------------------------------

ESTIMATORS = [flags for row in ROWS.values() for flags in row.flags]
"""What is given, and the estimator that comes of it."""


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("kind", [kind for kind, row in ROWS.items() if row.from_start], ids=lambda kind: kind.__name__)
def test_estimators_that_do_not_fit_a_task_say_why(
    kind: type[bilevel.Estimator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--estimator", names.kebab(kind.__name__))
    assert "the initial state does not depend on the meta parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [kind for kind, row in ROWS.items() if not row.from_start], ids=lambda kind: kind.__name__
)
def test_every_estimator_is_called_by_its_plain_name(kind: type[bilevel.Estimator]) -> None:
    assert names.kebab(kind.__name__) in {flags[1] for flags, _ in ROWS[kind].flags if flags}


@pytest.mark.sampled(every=3)
@pytest.mark.filterwarnings("ignore:Implicit")  # untrained networks have negative curvature
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(("flags", "described"), ESTIMATORS, ids=[" ".join(flags) or "-" for flags, _ in ESTIMATORS])
def test_estimators_by_name(flags: list[str], described: str, tmp_path: Path) -> None:
    run(tmp_path, *flags, "--outer-steps", "2")
    rows = rows_of(tmp_path)
    # Auto takes an exact method here, and fresh directions of a stream need two for an error.
    without = ("auto(memory='1GB')", "streaming-forward-gradient")
    claims_error = registry.parse(described).is_random and described not in without
    assert config_of(tmp_path)["phases"] == results_of(tmp_path)["phases"] == [f"{described}:2"]
    assert len(rows) == 2
    for row in rows:
        assert np.isfinite(row["outer_loss"])
        assert row["grad_norm"] > 0
        assert (row["standard_error"] is not None) == claims_error


@pytest.mark.usefixtures("no_report")
def test_settings_go_to_every_phase_that_has_them(tmp_path: Path) -> None:
    phases = ["--phases", "hessian-free:1:1", "forward-gradient(directions=4):1", "forward-gradient:1"]
    run(tmp_path, *phases, "--directions", "2", "--accumulate", "2")
    assert config_of(tmp_path)["phases"] == [
        "hessian-free:1:1",
        "forward-gradient(directions=4):1",
        "forward-gradient(directions=2):1",
    ]
    assert config_of(tmp_path)["accumulate"] == 2


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("no_report")
def test_a_warning_is_a_line(tmp_path: Path, capsys: Capture) -> None:
    before = warnings.showwarning
    run(tmp_path, "--estimator", "implicit", "--outer-steps", "1")
    assert warnings.showwarning is before
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("bilevel: warning: Implicit: conjugate gradients met")]) == 1
    assert not any(".py" in line for line in said)


# -- what is refused ---------------------------------------------------------------------------------------------------

ESTIMATOR_NAMES = ", ".join(registry.by_name())
REFUSED: dict[str, tuple[int, list[str], list[str]]] = {
    # Code, arguments (after `run condensation` if they begin with a flag), what the message must say.
    "command": (2, ["dance"], ["no command 'dance'", "usage: bilevel COMMAND"]),
    "no task": (1, ["run"], ["a task is needed", "condensation"]),
    "task": (1, ["run", "dance"], ["no task 'dance'", "condensation"]),
    "list takes nothing": (1, ["list", "tasks"], ["takes no arguments", "tasks"]),
    "report without a folder": (1, ["report"], ["bilevel report DIR"]),
    "report of nothing": (1, ["report", "nowhere"], ["nowhere/config.json", "finished run"]),
    "preset": (1, ["--preset", "dance"], ["no preset 'dance'", "digits, digits-learned, mnist-1"]),
    "preset with =": (1, ["--preset=dance"], ["no preset 'dance'", "digits, digits-learned, mnist-1"]),
    "no preset": (2, ["--preset"], ["--preset"]),
    "mnist without files": (1, ["--preset", "mnist-1"], ["--data-dir FOLDER", "four idx files"]),
    "mnist without a folder": (1, ["--preset", "mnist-1", "--data-dir", "nowhere"], ["nowhere is not a folder"]),
    "flag": (2, ["--dance", "4"], ["--dance"]),
    "flag misspelt": (2, ["--outer-step", "4"], ["--outer-step", "--outer-steps"]),
    "flag twice": (1, ["--phases", "reverse:1", "--phases", "forward:1"], ["--phases is given twice"]),
    "flag twice in two ways": (1, ["--outer-steps=1", "--outer_steps", "2"], ["--outer-steps is given twice"]),
    "no number": (2, ["--ipc", "few"], ["--ipc", "'few'"]),
    "None": (2, ["--outer-steps", "None"], ["--outer-steps", "'None'"]),
    "choice": (2, ["--start", "dance"], ["dance", "noise", "real"]),
    "setting of the task": (2, ["--ipc", "0"], ["ipc=0: a whole number of at least 1 is needed"]),
    "too many blocks": (1, ["--model", "convnet", "--blocks", "3"], ["blocks=3 on 8x8 images", "blocks <= 2"]),
    "too many images": (1, ["--ipc", "400"], ["ipc=400", "class 0 has 128 real images"]),
    "device": (1, ["--device", "abacus"], ["device='abacus' cannot be used", "cpu"]),
    "seed": (2, ["--seed", "-1"], ["seed=-1: a whole number of at least 0"]),
    "no outer steps": (1, ["--outer-steps", "0"], ["steps=0"]),
    "accumulate": (1, ["--accumulate", "0"], ["accumulate=0"]),
    "checkpoint every": (1, ["--checkpoint-every", "0"], ["checkpoint_every=0"]),
    "estimator": (1, ["--estimator", "dance"], ["no estimator 'dance'", ESTIMATOR_NAMES]),
    "setting": (1, ["--estimator", "reverse(foo=1)"], ["reverse has no setting 'foo'", "checkpoints"]),
    "value of a setting": (1, ["--checkpoints", "foo"], ["checkpoints='foo'", '"sqrt"']),
    "solver": (1, ["--estimator", "implicit", "--solver", "newton"], ["no solver 'newton'", "neumann"]),
    "solver that is a number": (1, ["--estimator", "implicit", "--solver", "4"], ["'4'"]),
    "no effect": (
        1,
        ["--directions", "4"],
        ["--directions has no effect", "reverse has no such setting (it has: checkpoints, offload, chunk_size)"],
    ),
    "no effect in any phase": (
        1,
        ["--phases", "reverse:1", "implicit:1", "--step-size", "0.1"],
        [
            "--step-size has no effect",
            "reverse has",
            "implicit has no such setting (it has: solver, batches)",
        ],
    ),
    "said already": (
        1,
        ["--estimator", "forward-gradient(directions=8)", "--directions", "4"],
        ["--directions has no effect: forward-gradient(directions=8) says it already"],
    ),
    "phases and estimator": (1, ["--phases", "reverse:1", "--estimator", "reverse"], ["drop --estimator"]),
    "phases and outer steps": (1, ["--phases", "reverse:1", "--outer-steps", "1"], ["drop --estimator"]),
    "no phases": (1, ["--phases"], ["--phases needs at least one ESTIMATOR:STEPS"]),
    **{
        f"phase {text}": (1, ["--phases", text], [f"--phases {text!r}: write ESTIMATOR:STEPS", "reverse:100:20"])
        for text in ("reverse", "reverse:", "reverse:few", "reverse:1:2:3", "reverse:1:", ":")
    },
    "phase of no steps": (1, ["--phases", "reverse:0"], ["steps=0"]),
    "phase without patience": (1, ["--phases", "reverse:5:0"], ["patience=0"]),
    "estimator of a phase": (1, ["--phases", "dance:1"], ["no estimator 'dance'", ESTIMATOR_NAMES]),
    "no estimator in a phase": (1, ["--phases", ":1"], ["cannot read ''"]),
    # What the first outer step finds out.
    "directions": (1, ["--estimator", "forward-gradient", "--directions", "641"], ["directions=641", "640"]),
    "steps": (1, ["--estimator", "truncated-reverse", "--steps", "4"], ["steps=4", "steps <= 3"]),
    "later phases are reached": (1, ["--phases", "truncated-reverse(steps=4):1"], ["steps <= 3"]),
    # compare
    "compare without a task": (1, ["compare"], ["a task is needed", "bilevel compare condensation"]),
    "compare with a preset": (1, ["compare", "condensation", "--preset", "dance"], ["no preset 'dance'"]),
    "compare nothing": (1, ["compare", "condensation", "--estimators"], ["needs at least one", ESTIMATOR_NAMES]),
    "compare with an estimator": (1, ["compare", "condensation", "--estimators", "dance"], ["no estimator 'dance'"]),
    "compare with a flag of run": (2, ["compare", "condensation", "--outer-steps", "1"], ["--outer-steps"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    code, argv, fragments = REFUSED[what]
    if argv[0].startswith("-"):
        chosen = [flag for flag in argv if flag.startswith("--")]
        small = [x for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in chosen for x in pair]
        argv = ["run", "condensation", *argv, *small]
    monkeypatch.chdir(tmp_path)
    fails(*argv, code=code)
    said = capsys.readouterr()
    for fragment in fragments:
        assert fragment in words(said.err)
    assert "Traceback" not in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_no_gpu_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    fails("run", "condensation", "--device", "cuda", code=1)
    assert "device='cuda' cannot be used" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_message_is_printed_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    # rich, which prints them, would break lines at 80 characters, and reads :100: as an emoji and [b] as a tag.
    folder = tmp_path / ("a[b]" + "c" * 100)
    fails("report", str(folder), code=1)
    assert f"bilevel: there is no {folder}/config.json" in capsys.readouterr().err
    fails("run", "condensation", "--phases", "reverse", code=1)
    assert "as in reverse:100:20\n" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_out_must_be_a_folder(where: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    out = path if where == "a file" else path / "below"
    fails("run", "condensation", *SMALL, "--out", str(out), code=1)
    assert str(out) in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_start_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    fails(
        *("run", "condensation", *SMALL, "--estimator", "truncated-reverse", "--steps", "4", "--out", str(tmp_path)),
        code=1,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_divergence_keeps_the_last_finite_images(tmp_path: Path, capsys: Capture) -> None:
    fails("run", "condensation", *SMALL, "--inner-lr", "1e30", "--out", str(tmp_path), code=1)
    said = capsys.readouterr().err
    assert "outer step 0: " in said
    assert "inner step 1 of 3" in said
    assert (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ('{"task": "dance"}', "a run of task 'dance'; there are condensation"),
        ("{}", "a run of task None"),
        ("[]", "config.json was not written by bilevel"),
        ("{", "config.json is damaged"),
        ("\udcff", "config.json is damaged"),
        ('{"task": "condensation"}', "there is no"),
    ],
)
def test_reports_of_other_folders(content: str, fragment: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    fails("report", str(tmp_path), code=1)
    assert fragment in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# -- packages that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        ("tyro", ["run", "condensation"]),
        ("tyro", ["compare", "condensation"]),
        ("docstring_parser", ["run", "condensation"]),
        ("sklearn", ["run", "condensation"]),
        ("matplotlib", ["run", "condensation"]),
        ("jinja2", ["run", "condensation"]),
        ("tensorboard", ["run", "condensation", "--tensorboard"]),
    ],
)
def test_a_missing_package_is_named_before_the_training(
    package: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    fails(*argv, code=1)
    assert capsys.readouterr().err == f"bilevel: this needs the package {package}: pip install 'bilevel[tasks]'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_module_of_ours_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bilevel.tasks.registry", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["list"])


# -- interruption and resume -------------------------------------------------------------------------------------------

LONG = [
    *("--ipc", "2", "--inner-batch", "6", "--checkpoint-every", "2"),
    *("--phases", "hessian-free:2", "forward-gradient(directions=3):3"),
]
Callbacks = Callable[..., list[Callable[[OuterStep], None]]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, *LONG)
    return numbers_of(folder)


def stop_after(number: int, stop: Callable[[], object]) -> Callbacks:
    """`CondensationTask.callbacks`, with a stop at the end of an outer step, before it is written down."""
    callbacks = CondensationTask.callbacks

    def with_stop(*args: Any) -> list[Callable[[OuterStep], None]]:
        return [*callbacks(*args), lambda step: stop() if step.number == number else None]  # type: ignore[list-item]

    return with_stop


def raise_(error: BaseException) -> Any:
    raise error


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a cosmic ray")], ids=["Ctrl-C", "error"])
@pytest.mark.parametrize("number", [1, 3, 4])
def test_resuming_gives_the_very_same_numbers(
    number: int, error: BaseException, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(CondensationTask, "callbacks", stop_after(number, lambda: raise_(error)))
        with pytest.raises((SystemExit, RuntimeError)):
            run(tmp_path, *LONG)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(running, "write_report", lambda task, folder: folder)
    run(tmp_path, *LONG, "--resume")
    assert numbers_of(tmp_path) == undisturbed


@pytest.mark.slow
def test_resuming_what_was_killed(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib, test_command\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "test_command.CondensationTask.callbacks = test_command.stop_after(3, kill)\n"
        "test_command.run(pathlib.Path(sys.argv[1]), *test_command.LONG)"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=here, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "results.json").exists()
    run(tmp_path, *LONG, "--resume")
    assert numbers_of(tmp_path) == undisturbed


@pytest.mark.usefixtures("no_report")
def test_resuming_what_is_finished_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, "--outer-steps", "2")
    before = numbers_of(tmp_path)
    run(tmp_path, "--outer-steps", "2", "--resume")
    assert numbers_of(tmp_path) == before


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("flags", [("--outer-steps",), ("--phases", "hessian-free:2")], ids=["steps", "phases"])
def test_a_finished_run_can_be_made_longer(flags: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    def of_length(steps: int) -> list[str]:
        return [*flags, str(steps)] if len(flags) == 1 else [*flags, f"reverse:{steps}:50"]

    run(tmp_path / "longer", *of_length(2))
    run(tmp_path / "longer", *of_length(5), "--resume")
    rows, config = rows_of(tmp_path / "longer"), config_of(tmp_path / "longer")
    assert len(rows) == config["outer_steps"] == 5 + 2 * (len(flags) - 1)
    # The outer learning rate falls to 0 over the whole length, so the first steps differ from those of one long run.
    moved = [row["outer_loss"] for row in rows]
    assert len(set(moved)) == len(moved)
    capsys.readouterr()
    before = contents(tmp_path / "longer")
    with pytest.raises(SystemExit):
        run(tmp_path / "longer", *of_length(3), "--resume")
    assert "steps of the last phase are done, and it has 3 now" in capsys.readouterr().err
    assert contents(tmp_path / "longer") == before


@pytest.mark.usefixtures("no_report")
def test_resuming_nothing_is_a_start(tmp_path: Path) -> None:
    run(tmp_path / "fresh", "--outer-steps", "2", "--resume")
    run(tmp_path / "plain", "--outer-steps", "2")
    assert numbers_of(tmp_path / "fresh") == numbers_of(tmp_path / "plain")


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(CondensationTask, "callbacks", stop_after(2, lambda: raise_(KeyboardInterrupt())))
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--outer-steps", "3", "--checkpoint-every", "1")
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith(f"interrupted; {tmp_path} holds a checkpoint: go on with --resume\n")


@pytest.mark.parametrize("command", ["run", "compare"])
def test_an_interruption_before_anything_is_kept(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CondensationTask, "setup", lambda *_: raise_(KeyboardInterrupt()))
    fails(command, "condensation", code=130)
    assert capsys.readouterr().err == "bilevel: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


FINISHED = ["--ipc", "2", "--phases", "hessian-free:2", "forward-gradient(directions=4):2"]


def test_a_folder_with_a_run_is_left_alone(finished: Path, capsys: Capture) -> None:
    before = contents(finished)
    with pytest.raises(SystemExit):
        run(finished, *FINISHED)
    said = capsys.readouterr().err
    assert f"{finished} already holds a run; go on with it (--resume) or take another --out" in said
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("flags", "differences"),
    [
        ([*FINISHED, "--seed", "7"], "seed: 0 there, 7 here"),
        ([*FINISHED, "--accumulate", "2"], "accumulate: 1 there, 2 here"),
        ([*FINISHED, "--outer-lr", "0.5"], "outer_lr: 0.05 there, 0.5 here"),
        (["--ipc", "3", *FINISHED[2:]], "ipc: 2 there, 3 here"),
        (
            [*FINISHED[:2], "--outer-steps", "4"],
            "phases: ['hessian-free:2', 'forward-gradient(directions=4):2'] there, ['reverse:4'] here",
        ),
        ([*FINISHED[2:], "--start", "real"], "ipc: 2 there, 1 here; start: 'noise' there, 'real' here"),
    ],
)
def test_a_run_of_another_configuration_is_left_alone(
    flags: list[str], differences: str, finished: Path, capsys: Capture
) -> None:
    before = contents(finished)
    with pytest.raises(SystemExit) as caught:
        run(finished, *flags, "--resume")
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert f"{finished} holds a run of another configuration ({differences}); take another --out" in said
    assert contents(finished) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_not_ours_is_left_alone(resume: bool, tmp_path: Path, capsys: Capture) -> None:
    import torch

    bilevel.fit(
        bilevel.Problem(lambda phi: phi, lambda theta, phi, batch: theta * phi, lambda theta, phi, batch: theta**2),
        torch.tensor(1.0),
        bilevel.no_batches(1),
        phases=[bilevel.Phase(bilevel.Reverse(), 1)],
        out=tmp_path,
        progress=False,
    )
    before = contents(tmp_path)
    with pytest.raises(SystemExit):
        run(tmp_path, *(["--resume"] if resume else []))
    assert "holds a run without config.json" in capsys.readouterr().err
    assert contents(tmp_path) == before


# -- compare -----------------------------------------------------------------------------------------------------------

COMPARE = ["compare", "condensation", "--model", "mlp", "--width", "4", "--inner-steps", "3"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Implicit")
def test_compare_shows_every_estimator_against_the_exact_one(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "table.json"
    cli.main([*COMPARE, "--out", str(out)])
    shown = capsys.readouterr().out
    lines = {line.split()[1]: line.split()[3::2] for line in shown.splitlines() if line.startswith("│")}
    assert list(lines) == [name for name in registry.by_name() if name not in NOT_COMPARED]
    assert "N = 640 meta parameters, T = 3" in shown
    content = json.loads(out.read_text())
    assert content["task"] == "condensation"
    assert set(content["versions"]) == {"bilevel", "torch", "python"}
    assert [row["estimator"] for row in content["rows"]] == list(lines)
    for row, cells in zip(content["rows"], lines.values(), strict=True):
        assert cells[0] == f"{row['relative_error']:.3g}"
        assert cells[3] == f"{row['cosine']:.4f}"
        error = row["standard_error"]
        assert cells[4] == ("–" if error is None else f"{error:.3g}")
    assert content["rows"][0]["relative_error"] < 1e-5  # reverse, in float32


def test_compare_with_settings(capsys: Capture) -> None:
    estimators = ["forward-gradient(directions=64)", "implicit(solver=neumann(iterations=3))", "reverse(checkpoints=2)"]
    cli.main([*COMPARE, "--preset", "digits", "--seed", "3", "--estimators", *estimators])
    shown = words(capsys.readouterr().out)
    for text in estimators:
        assert text in shown


LONG_NAME = "forward-gradient(directions=4, control_variate=truncated-reverse(steps=2))"


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("columns", [40, 60, 80, 100, 160, 200])
def test_names_stay_whole_in_tables(columns: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal of any width each name stands on one line, fit to be copied into --estimator."""
    monkeypatch.setenv("COLUMNS", str(columns))
    paper = ["plan", "--params", "1.5e9", "--meta-params", "8e7", "--steps", "48", "--memory", "80GB"]
    planned = ["reverse(checkpoints='graph')", "reverse(offload='disk')", "truncated-reverse(steps=10)"]
    planned += ["forward-gradient(directions=64)", "zeroth-order(directions=64)"]
    tables = {
        ("list",): [*registry.by_name(), *TASKS] if columns >= 60 else [],
        tuple(paper): planned,
        (*paper, "--workers", "64"): planned,
        (*COMPARE, "--repeats", "3", "--estimators", LONG_NAME, "reverse"): [LONG_NAME, "reverse"],
    }
    for argv, expected in tables.items():
        cli.main(argv)
        lines = capsys.readouterr().out.splitlines()
        for name in expected:
            assert any(name in line for line in lines), (name, lines)
        for line in lines:
            assert len(line) <= columns or line.split(maxsplit=1)[1] in expected or line in expected
    for name in [*planned, LONG_NAME]:
        assert names.describe(registry.parse(name)) == name


@pytest.mark.parametrize("columns", [80, 100])
def test_compare_numbers_names_that_do_not_fit(columns: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    cli.main([*COMPARE, "--estimators", LONG_NAME, "reverse"])
    lines = capsys.readouterr().out.splitlines()
    for number, text in enumerate([LONG_NAME, "reverse"], 1):
        assert f"{number}  {text}" in lines
        assert sum(line.split()[:1] == [str(number)] for line in lines) == 2  # in the table, and below


def test_the_recommendation_has_a_line_of_its_own(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli.main(["plan", "--params", "1.5e9", "--meta-params", "8e7", "--steps", "48", "--memory", "80GB"])
    shown = capsys.readouterr().out
    assert "recommended: hessian-free" in shown.splitlines()
    assert "because no exact method fits into 80 GB; an estimate by ZerothOrder along 64 of 80,000,000" in words(shown)


def test_compare_writes_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: raise_(OSError("no space left on device")))
    fails(*COMPARE, "--estimators", "reverse", "--out", str(tmp_path / "table.json"), code=1)
    assert "no space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
