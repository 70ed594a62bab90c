"""`bilevel check TASK`: the table, the file and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import SMALL

from bilevel import cli
from bilevel.checking import loop
from bilevel.report.findings import Finding, Verdict

CONDENSATION = ("condensation", *SMALL)


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", *argv])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    "argv",
    [
        CONDENSATION,
        ("cleaning", "--examples", "60", "--trusted", "20", "--width", "8", "--inner-steps", "4"),
        ("mixture", "--tokens", "4", "--examples", "200", "--inner-steps", "4", "--batch", "16", "--inner-lr", "2"),
        pytest.param(
            ("pde", "--preset", "coefficients", "--points", "64", "--inner-steps", "20"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda argv: argv[0],
)
def test_tasks_pass(argv: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code(*argv, "--out", str(tmp_path / "report.json"))
    shown = capsys.readouterr()
    assert code == 0, shown.out
    assert "0 wrong, 0 could not be judged" in shown.out
    assert "inner gradients" in shown.err
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["exit_code"] == 0


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.WRONG, 1), (Verdict.UNJUDGED, 3)])
def test_the_exit_code_is_that_of_the_report(verdict: Verdict, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Finding("the loop", "parameters", verdict, "")
    monkeypatch.setattr(loop, "compare_loops", lambda subject: iter([row]))
    assert exit_code(*CONDENSATION) == code


def test_named_estimators_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*CONDENSATION, "--estimators", "reverse", "truncated-reverse(steps=1)") == 0
    assert "biased on purpose" in " ".join(capsys.readouterr().out.split())


def test_a_task_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code() == 1
    assert "a task is needed" in capsys.readouterr().err
