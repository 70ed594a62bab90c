"""All figures that need a GPU, by one command of at most ten minutes on an H100:

    python benchmarks/gpu.py --data-dir FOLDER           # with the four files of MNIST; scikit-learn's digits without
    python benchmarks/gpu.py --again convnet             # one part once more; what has been measured is kept
    python benchmarks/gpu.py --device cpu --small        # the same from end to end at toy size, without a GPU

The parts are run one after another, each in a process of its own: tests, ConvNet, language models, other libraries,
compiled code, the planner, and a condensation, which takes the time that is left. Each part writes its table as JSON
after every row, and the page of all tables is written anew. A call that is stopped, or whose time is up, goes on where
it was when it is repeated. A method that needs more memory than there is gets a row that says so. Writes
`benchmarks/results/gpu/PART.json` and `benchmarks/results/gpu.md`; the toy run writes `gpu_toy/` and `gpu_toy.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import torch
from gpu_parts import PARTS, Row
from gpu_subjects import Setting

import bilevel
from bilevel.report.files import write_json, write_text
from bilevel.report.tf32 import gpu_and_tf32

RESULTS = Path(__file__).parent / "results"
TOY = (
    "**A toy run without a GPU.** Sizes are tiny, whatever the names of models and the texts say, which are those of a "
    "run on a GPU. Times are of one core of a CPU. The page shows that the script runs from end to end, and says "
    "nothing about a GPU. Figures of a GPU are missing: nobody has run the script on "
    "one yet."
)


def main() -> None:
    options = parsed()
    where = Where(options)
    if options.part:
        run_part(options.part, where, options.seconds)
        return
    began, failed = time.perf_counter(), False
    for name in options.parts:
        if name in options.again:
            where.path(name).unlink(missing_ok=True)
        left = 60 * options.minutes - (time.perf_counter() - began)
        if where.is_done(name):
            print(f"{name}: done before", flush=True)
            continue
        if left < (5 if options.small else PARTS[name].least):
            print(f"{name}: the time is up; the same command goes on here", flush=True)
            break
        failed = not in_child(name, options, min(left, PARTS[name].seconds)) or failed
        write_text(where.page, page(where))
    print(f"{where.page}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="toy sizes; needed on a CPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to run")
    parser.add_argument(
        "--again", nargs="*", choices=list(PARTS), help="measure these parts once more; all without names"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="the time for all parts together")
    parser.add_argument("--data-dir", type=Path, help="a folder with the files of MNIST")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.again = list(PARTS) if options.again == [] else options.again or []
    if options.device == "cpu" and not options.small:
        parser.error("without a GPU, add --small: the full sizes would take days on a CPU")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --device cpu --small runs a toy version of everything")
    return options


class Where:
    """Where the tables lie, and on which machine they are made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.small, self.data_dir = torch.device(options.device), options.small, options.data_dir
        self._out, self._name = options.out, "gpu_toy" if options.small else "gpu"
        self.page = options.out / f"{self._name}.md"
        arguments = ["--device cpu --small"] if options.small else []
        self.command = " ".join(["python benchmarks/gpu.py", *arguments])
        versions = {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()}
        machine = {"machine": platform.machine()} if self.device.type == "cpu" else gpu_and_tf32()
        self.versions: dict[str, str] = {**versions, **machine}

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self._out / self._name / f"{part}.json"

    def read(self, part: str) -> dict[str, Any]:
        """What has been measured of a part: on another machine or with other versions, nothing."""
        if self.path(part).exists():
            found = json.loads(self.path(part).read_text(encoding="utf-8"))
            if found["versions"] == self.versions:
                return found
        return {"command": self.command, "versions": self.versions, "complete": False, "jobs": {}}

    def is_done(self, part: str) -> bool:
        """Whether all jobs of a part are done."""
        return self.read(part)["complete"]


def in_child(name: str, options: argparse.Namespace, seconds: float) -> bool:
    """Run a part in a process of its own, and say whether nothing failed in it."""
    command = [sys.executable, __file__, "--part", name, "--seconds", str(seconds), "--device", options.device]
    command += ["--small"] * options.small + ["--out", str(options.out)]
    command += [] if options.data_dir is None else ["--data-dir", str(options.data_dir)]
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    # A call that hangs is ended. A job that was begun in time may take longer than its part, but not twice as long.
    try:
        done = subprocess.run(command, check=False, timeout=2 * seconds + 60, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped, after twice the time it may take: {shlex.join(command)}", flush=True)
        return False
    return done.returncode == 0


def run_part(name: str, where: Where, seconds: float) -> None:
    """Run the jobs of a part that are not done yet, as long as there is time."""
    part, content = PARTS[name], where.read(name)
    stop, failed = time.perf_counter() + seconds, False
    setting = Setting(where.device, where.small, where.data_dir, min(seconds, 8.0 if where.small else part.seconds))
    where.path(name).parent.mkdir(parents=True, exist_ok=True)
    jobs = part.jobs(setting)
    for job, run in jobs.items():
        if job in content["jobs"]:
            continue
        if time.perf_counter() > stop:
            print(f"{name}: the time is up before {job}", flush=True)
            break
        try:
            rows = run()
        except torch.OutOfMemoryError:
            rows = [{first_column(name): job, "remark": "does not fit into the memory of the GPU"}]
            torch.cuda.empty_cache()
        except Exception as error:  # whatever a job meets, the others still run
            print(f"{name}, {job}: {type(error).__name__}: {error}", flush=True)
            failed = True
            continue
        content["jobs"][job] = rows
        content["complete"] = len(content["jobs"]) == len(jobs)
        write_json(where.path(name), content)
        print(f"{name}, {job}: {rows[0].get('s', rows[0].get('remark', ''))}", flush=True)
    if failed:
        raise SystemExit(1)


def first_column(part: str) -> str:
    """The column that names a row."""
    return "method" if "method" in PARTS[part].columns else PARTS[part].columns[0]


def page(where: Where) -> str:
    """All tables, with what is missing."""
    title = "# A toy run of the benchmark for GPUs" if where.small else f"# On {where.versions.get('gpu', 'a GPU')}"
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    memory = (
        "`more` is the peak of live tensors in a call above what was there before."
        if where.device.type == "cpu"
        else "`GiB` is the peak of what PyTorch allocated, model and data included; `more` is the part above what was "
        "there before the call."
    )
    lines = [title, "", *([TOY, ""] if where.small else []), f"`{where.command}`: {versions}. {memory}", ""]
    for name, part in PARTS.items():
        content = where.read(name)
        rows = [row for each in content["jobs"].values() for row in each]
        lines += [f"## {part.title}", "", part.says, "", *(table(part.columns, rows) if rows else []), ""]
        if not content["complete"]:
            lines += ["Not all of it has been measured: repeat the command." if rows else "Not measured yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(columns: tuple[str, ...], rows: list[Row]) -> list[str]:
    """A table of the columns that some row has."""
    shown = [column for column in columns if any(column in row for row in rows)]
    quoted = [
        [f"`{row[c]}`" if c in ("method", "test") and c in row else str(row.get(c, "")) for c in shown] for row in rows
    ]
    return [f"| {' | '.join(shown)} |", "| --- " * len(shown) + "|", *(f"| {' | '.join(cells)} |" for cells in quoted)]


if __name__ == "__main__":
    main()
