"""The result of `bilevel.check`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import optree
import torch

from bilevel.report.files import write_json
from bilevel.report.findings import Finding, Verdict, as_text, with_verdict
from bilevel.report.tf32 import gpu_and_tf32


@dataclass(frozen=True)
class Report:
    """What `bilevel.check` found. Printed, it is a table: what was tested, what came out, what to do."""

    findings: Sequence[Finding]
    """One row for each test, in the order of the parts."""
    units: float
    """What the check was expected to cost, in inner gradients."""
    seconds: float
    """What it took."""
    versions: dict[str, str] = field(default_factory=dict)
    """The versions of the software, for a bug report."""
    left_out: Sequence[str] = ()
    """The parts that did not fit into the budget."""

    @property
    def wrong(self) -> list[Finding]:
        """The rows whose verdict is "wrong"."""
        return with_verdict(self.findings, Verdict.WRONG)

    @property
    def unjudged(self) -> list[Finding]:
        """The rows whose verdict is "could not be judged"."""
        return with_verdict(self.findings, Verdict.UNJUDGED)

    @property
    def not_checked(self) -> list[Finding]:
        """The rows whose verdict is "not checked"."""
        return with_verdict(self.findings, Verdict.NOT_CHECKED)

    @property
    def passed(self) -> bool:
        """Whether something was compared, all of it is right, and no part was left out for the budget."""
        compared = bool(with_verdict(self.findings, Verdict.RIGHT))
        return compared and not (self.wrong or self.unjudged or self.left_out)

    @property
    def exit_code(self) -> int:
        """0 if everything that was compared is right, 1 if something is wrong, 3 if something could not be judged.

        A report in which nothing was compared, or a part was left out for the budget, has 3 as well.
        """
        if self.wrong:
            return 1
        return 0 if self.passed else 3

    def __str__(self) -> str:
        counts = ", ".join(f"{len(with_verdict(self.findings, verdict))} {verdict.value}" for verdict in Verdict)
        return f"{as_text(self.findings)}\n{counts}; {self.seconds:.1f} s, about {self.units:.0f} inner gradients"

    def save(self, path: str | Path) -> None:
        """Write the report with the versions of the software as JSON, for a bug report.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "exit_code": self.exit_code,
            "findings": [finding.as_dict() for finding in self.findings],
            "units": self.units,
            "seconds": self.seconds,
            "left_out": list(self.left_out),
            "versions": self.versions,
        }
        write_json(Path(path), content)


def versions() -> dict[str, str]:
    """Return the versions of the software that a report depends on."""
    return {
        "bilevel": metadata.version("bilevel"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "optree": optree.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **gpu_and_tf32(),
    }
