"""What the command says to somebody who does not know it: help, suggestions, completion."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields

import pytest

from bilevel import cli
from bilevel.cli import completion
from bilevel.tasks.options import RunOptions
from bilevel.tasks.registry import TASKS

Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, "-m", "bilevel"]


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["rnu"], "run"),
        (["run", "condensaton"], "condensation"),
        (["compare", "clening"], "cleaning"),
        (["run", "condensation", "--preset", "digit"], "digits"),
        (["run", "condensation", "--estimator", "revers"], "reverse"),
        (["run", "condensation", "--estimator", "forward-gradient(direction=3)"], "directions"),
    ],
)
def test_a_word_that_is_almost_right_is_recognised(argv: Sequence[str], meant: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_a_word_like_no_other_has_no_suggestion(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["xyz"])
    assert "did you mean" not in capsys.readouterr().err


def test_the_help_of_run_shows_the_options_that_all_tasks_share(capsys: Capture) -> None:
    cli.main(["run", "--help"])
    shown = capsys.readouterr().out.split("Options that all tasks share:")[1]
    flags = re.findall(r"^  (--[a-z-]+)", shown, flags=re.MULTILINE)
    assert flags == ["--preset", *("--" + field.name.replace("_", "-") for field in fields(RunOptions))]
    assert "Seed that determines every random number of the run. (default: 0)" in shown
    assert "Number of outer steps between two checkpoints. (default: 50)" in shown
    assert not re.search(r"^ {6}$", shown, flags=re.MULTILINE)


def test_plan_explains_itself(capsys: Capture) -> None:
    cli.main(["plan"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: bilevel plan TASK")
    assert "recommended" not in shown
    for line in re.findall(r"^  bilevel (plan .*)$", shown, flags=re.MULTILINE)[1:]:  # the second needs no measuring
        cli.main(line.split())
        assert "recommended: " in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--params", "1e6"], ["--memory", "8GB"], ["--params", "1", "--steps", "5"]])
def test_a_plan_from_sizes_invents_none(given: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", *given])
    message = capsys.readouterr().err
    missing = [flag for flag in ("--params", "--meta-params", "--steps") if flag not in given]
    assert f"{', '.join(missing)} missing" in message


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("argv", [["--help"], ["list"], ["run", "condensation", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(argv: list[str]) -> None:
    """As in `bilevel --help | head -1`, with a pipe that is closed before anything is written."""
    with subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (141, 1)  # 1 is what rich, which prints the tables, ends with


def completed(*words: str) -> list[str]:
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    script = f"{completion.bash_script()}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _bilevel"
    done = subprocess.run(
        ["bash", "-c", f'{script}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_completion() -> None:
    assert completed("bilevel", "") == list(completion.COMMANDS)
    assert completed("bilevel", "co") == ["compare", "completion"]
    assert completed("bilevel", "run", "") == list(TASKS)
    assert completed("bilevel", "run", "condensation", "--outer-st") == ["--outer-steps"]
    assert completed("bilevel", "run", "condensation", "--control") == ["--control-variate"]
    assert completed("bilevel", "compare", "cleaning", "--rep") == ["--repeats"]
    assert completed("bilevel", "plan", "--meta") == ["--meta-params"]
    assert completed("bilevel", "plan", "--params", "1e6", "--st") == ["--steps"]
    assert completed("bilevel", "report", "") == []  # file names


def test_completion_is_printed_for_bash_alone(capsys: Capture) -> None:
    cli.main(["completion", "bash"])
    assert capsys.readouterr().out == completion.bash_script() + "\n"
    with pytest.raises(SystemExit):
        cli.main(["completion", "fish"])
    assert "usage: bilevel completion bash" in capsys.readouterr().err


def test_the_script_knows_every_command(capsys: Capture) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out.split("\n\n")[1]
    assert {line.split()[0] for line in shown.splitlines()} == set(completion.COMMANDS)
