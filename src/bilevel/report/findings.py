"""What a check found: one verdict for each thing that was tested, and the table that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


class Verdict(Enum):
    """The outcome of one test."""

    RIGHT = "right"
    """It was compared, and it agrees."""
    WRONG = "wrong"
    """It was compared, and it disagrees by more than rounding and finite differences explain."""
    UNJUDGED = "could not be judged"
    """It was tried, and the comparison says nothing: a kink, rounding, a stopped gradient, no double precision."""
    NOT_CHECKED = "not checked"
    """It was not tried. This is never the same as right."""


@dataclass(frozen=True)
class Finding:
    """One row of the table of a check."""

    part: str
    """The part of the check, such as "the loop"."""
    tested: str
    """What was tested."""
    verdict: Verdict
    found: str
    """What came out, with the numbers."""
    advice: str = ""
    """What to do; empty where there is nothing to do."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The numbers behind the verdict, by name."""

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON takes them."""
        numbers = {name: value if abs(value) < float("inf") else str(value) for name, value in self.numbers.items()}
        return {
            "part": self.part,
            "tested": self.tested,
            "verdict": self.verdict.value,
            "found": self.found,
            "advice": self.advice,
            "numbers": numbers,
        }


def with_verdict(findings: Iterable[Finding], verdict: Verdict) -> list[Finding]:
    """Return the findings that have a verdict.

    >>> row = Finding("the loop", "outer value", Verdict.RIGHT, "equal")
    >>> with_verdict([row], Verdict.WRONG)
    []
    """
    return [finding for finding in findings if finding.verdict is verdict]


def as_text(findings: Sequence[Finding], width: int = 120) -> str:
    """Return the findings as a table in plain text."""
    table = Table("part", "what was tested", "verdict", "what came out", "what to do", box=SIMPLE_HEAD)
    for finding in findings:
        table.add_row(finding.part, finding.tested, finding.verdict.value, finding.found, finding.advice)
    console = Console(width=width, color_system=None, force_terminal=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())
