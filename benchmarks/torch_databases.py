"""The entries of PyTorch's own test databases as inner models, with every estimator, beside a plain loop.

OMP_NUM_THREADS=1 python benchmarks/torch_databases.py          # all, about five minutes; writes the page of results
OMP_NUM_THREADS=1 python benchmarks/torch_databases.py cdist    # the rows of the entries whose names contain a word

The package `expecttest` is needed (it is in the extra dev). `tests/database_verdicts.py` says what each loop is.
"""

from __future__ import annotations

import platform
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from database_cases import FIRST_INPUT_ONLY, WITHOUT_PENALTY, Case, modules, operations, optimizers
from database_verdicts import Row, judge, judge_all, with_penalty

from bilevel.report.files import write_text
from bilevel.report.progress import bar

PAGE = Path(__file__).parent / "results" / "torch_databases.md"
VERDICTS = ("right", "refused", "obscure", "WRONG")


DATABASES: Mapping[str, Callable[[slice], Iterable[Case]]] = {
    "operations (`op_db`)": lambda part: operations(1, part),
    "modules (`module_db`)": lambda part: modules(2, part),
    "optimisers (`optim_db`)": lambda part: optimizers(100, part),
    "operations, gradient penalty": lambda part: with_penalty(operations(1, part)),
    "modules, gradient penalty": lambda part: with_penalty(modules(1, part)),
}
PARTS, PROCESSES = 15, 2


def rows_of(name: str, number: int) -> tuple[str, list[Row], float]:
    """The rows of a part of a database, and the seconds of CPU that they took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    rows = list(judge_all(DATABASES[name](slice(number, None, PARTS))))
    return name, rows, time.process_time() - start


def reasons(rows: Iterable[Row]) -> list[str]:
    """The reasons, each with the entries that it holds for."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        entry = re.sub(r"^\w+: | \[.*", "", row.case)
        # Numbers in a message differ from case to case.
        found[re.sub(r"\d[\d.e+-]*", "…", row.detail.splitlines()[0])].add(f"`{entry}`")
    return [f"- {reason}: {', '.join(sorted(entries))}" for reason, entries in sorted(found.items())]


def page(found: Mapping[str, Sequence[Row]], seconds: float) -> str:
    """The page of results."""
    lines = ["| database | cases | left out | " + " | ".join(VERDICTS) + " |", "| --- " * (3 + len(VERDICTS)) + "|"]
    for name, rows in found.items():
        count = Counter(row.verdict for row in rows)
        cells = [len({row.case for row in rows}), count["left out"], *(count[verdict] for verdict in VERDICTS)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    rows = [row for group in found.values() for row in group]
    return "\n".join(
        [
            HEADER.format(version=torch.__version__, machine=platform.machine(), seconds=seconds),
            *lines,
            "",
            "## Refused",
            "",
            *reasons(row for row in rows if row.verdict == "refused"),
            "",
            "## Left out",
            "",
            *reasons(row for row in rows if row.verdict == "left out"),
            *(f"- all inputs but the first, because {why}: `{name}`" for name, why in FIRST_INPUT_ONLY.items()),
            *(f"- not with a gradient penalty, because it is {why}: `{name}`" for name, why in WITHOUT_PENALTY.items()),
            "",
        ]
    )


HEADER = """# PyTorch's own test databases as inner models

The first kind of input of each operation, the first two of each module, and every setting of each optimiser; the slow
tests take further kinds. Each case is an inner loop of two steps in float64 whose model is one entry of a database of
`torch.testing._internal`. Each row is one estimator beside five-point differences of a plain PyTorch loop, or, for
`HessianFree` and `Implicit`, beside differences of their own formulas. A row is right (within 3e-6; 1e-4 beside a
formula; 1e-3 for estimators that take differences themselves), refused (an error of this library that says what to do),
obscure (any other error) or WRONG. A case is left out if the plain loop itself raises an error, if its differences do
not converge, or for a reason that is written down beforehand.

Made by `OMP_NUM_THREADS=1 python benchmarks/torch_databases.py`: torch {version}, {machine}, {seconds:.0f} s of CPU.
"""


def main(word: str = "") -> None:
    """Write the page, or print the rows of some entries."""
    found: dict[str, list[Row]] = {name: [] for name in DATABASES}
    if word:
        warnings.simplefilter("ignore")
        for cases in DATABASES.values():
            for row in (row for case in cases(slice(None)) if word in case.entry for row in judge(case)):
                print(f"{row.verdict} | {row.case} | {row.estimator} | {row.detail}")
        return
    seconds, parts = 0.0, [(name, number) for name in DATABASES for number in range(PARTS)]
    with ProcessPoolExecutor(PROCESSES) as pool, bar("parts of databases", len(parts)) as shown:
        for done in as_completed([pool.submit(rows_of, *part) for part in parts]):
            name, rows, cpu = done.result()
            found[name] += rows
            seconds += cpu
            shown.advance()
            for row in (row for row in rows if row.verdict in ("obscure", "WRONG")):
                print(f"{row.verdict} | {row.case} | {row.estimator} | {row.detail}", file=sys.stderr)
    text = page(found, seconds)
    write_text(PAGE, text)
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
