"""Shell completion: a script for bash in which the commands, tasks and options are written out.

The script does not start Python, which would take seconds at every key.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from bilevel.cli import arguments
from bilevel.cli.check_options import CheckOptions
from bilevel.cli.compare_options import CompareOptions
from bilevel.cli.plan_command import PlanOptions, SizeOptions

COMMANDS = ("list", "run", "evaluate", "compare", "check", "plan", "report", "completion")
_SCRIPT = """# Completion of the command bilevel in bash: source this file in ~/.bashrc.
_bilevel() {
    local words="" current="${COMP_WORDS[COMP_CWORD]}"
    case "$COMP_CWORD:${COMP_WORDS[1]}" in
        1:*) words="@commands" ;;
        2:run|2:compare|2:check) words="@tasks" ;;
        2:plan) words="@tasks @sizes" ;;
        2:completion) words="bash" ;;
        *) case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
@cases
            plan\\ --*) words="@sizes" ;;
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _bilevel bilevel
"""


def bash_script() -> str:
    """Return a script that completes commands, tasks and options; file names are completed where none of them fits."""
    from bilevel.tasks.options import RunOptions
    from bilevel.tasks.registry import TASKS

    options = {"run": RunOptions(), "compare": CompareOptions(), "check": CheckOptions(), "plan": PlanOptions()}
    cases = []
    for command, shared in options.items():
        for task in TASKS.values():
            config = next(iter(task.presets.values())).config
            parts = [shared, config, *([arguments.estimator_settings(taken=config)] if command == "run" else [])]
            flags = " ".join(dict.fromkeys(["--preset", *(flag for part in parts for flag in _flags(part)), "--help"]))
            cases.append(f'            "{command} {task.name}") words="{flags}" ;;')
    filled = {"commands": " ".join(COMMANDS), "tasks": " ".join(TASKS), "sizes": " ".join(_flags(SizeOptions()))}
    script = _SCRIPT.replace("@cases", "\n".join(cases))
    for name, words in filled.items():
        script = script.replace(f"@{name}", words)
    return script.rstrip()


def _flags(options: Any) -> list[str]:
    return [arguments.flag(field.name) for field in fields(options)]
