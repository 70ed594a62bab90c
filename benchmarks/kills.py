"""Workers killed at random moments of a short run: does it end with the very numbers of an undisturbed one?

    python benchmarks/kills.py --kills 100

In each run one worker of two gets SIGKILL at a random moment within the time that an undisturbed run takes; a run that
was over by then is no kill. The group is then treated as torchrun's agent treats it (SIGTERM to the others, SIGKILL
after ten seconds, all started again with the restart count one higher), but its processes are forked, so that a run
takes a second instead of ten. With `--torchrun`, the real agent does it. Writes `benchmarks/results/kills.md`
(`kills-torchrun.md`).

Checked after each run: the final checkpoint holds the same numbers to the last bit, `metrics.jsonl` has one line for
each outer step with the same numbers, and no other file is left. Only seconds differ.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.report.files import write_text
from bilevel.report.progress import bar
from bilevel.training import checkpoint_files, metrics
from bilevel.training.run_record import CHECKPOINT, PREVIOUS

RESULTS = Path(__file__).parent / "results"
WORKERS, STEPS, EVERY = 2, 15, 4
FILES = {CHECKPOINT, PREVIOUS, metrics.FILE}


def train(folder: Path, seconds_between: float = 0.0) -> None:
    """A short run with everything in it that has a state: phases, directions, black-box differences, a running mean."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator)
    y = (x[:, 0] > 0).long()

    def inner_loss(model: Any, meta: Any, batch: Any) -> torch.Tensor:
        return (meta.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean()

    torch.manual_seed(0)
    problem = bilevel.GradientDescent(
        inner_loss,
        lambda model, meta, batch: cross_entropy(model(x[batch]), y[batch]),
        torch.nn.Linear(5, 2),
        bilevel.optimizer(torch.optim.Adam, lr=0.05),
    )
    mean = bilevel.RunningMean()
    forward = bilevel.ForwardGradient(4, chunk_size=2, exchange="slopes", control_variate=mean)
    bilevel.fit(
        problem,
        torch.zeros(24),
        bilevel.no_batches(3),
        lambda draw: torch.randperm(24, generator=torch.Generator().manual_seed(draw))[:12],
        phases=[
            bilevel.Phase(forward, STEPS // 3),
            bilevel.Phase(bilevel.ZerothOrder(2, step_size=1e-4, exchange="slopes"), STEPS // 3),
            bilevel.Phase(bilevel.Reverse(), STEPS // 3),
        ],
        callbacks=[lambda step: time.sleep(seconds_between)],
        out=bilevel.RunFolder(folder, checkpoint_every=EVERY),
        progress=False,
    )


def fork_group(size: int, function: Callable[[], Any], restarts: int = 0, output: Path | None = None) -> list[int]:
    """Process ids of forked workers with the environment that torchrun gives; 0 is the exit code where nothing raises.

    What worker i prints goes to `output`.i.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "TORCHELASTIC_RESTART_COUNT": restarts}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            os.environ.update({name: str(number) for name, number in numbers.items()})
            if output is not None:
                shown = os.open(f"{output}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(shown, 1)
                os.dup2(shown, 2)
            function()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def wait_for_group(pids: list[int], patience: float = 120.0) -> list[int]:
    """Return the exit codes, negative for signals.

    When a process fails, the others are stopped as torchrun stops them: by SIGTERM, and `patience` seconds later by
    SIGKILL. There is no other time limit, because a machine may be busy.
    """
    codes: dict[int, int] = {}
    deadline = math.inf
    stopping = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        left = [pid for pid in pids if pid not in codes]
        if any(codes.values()) and not stopping:
            stopping, deadline = True, time.monotonic() + patience
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def killed_run(folder: Path, rank: int, after: float) -> int:
    """A run of forked workers, one of which is killed after so many seconds; how often the group was started again."""
    restarts = 0
    pids = fork_group(WORKERS, lambda: train(folder), output=folder.with_suffix(".log"))
    time.sleep(after)
    os.kill(pids[rank], signal.SIGKILL)  # a zombie takes it as well: then the run was over already
    while any(wait_for_group(pids)):
        restarts += 1
        if restarts > 5:
            raise RuntimeError(f"the run does not come to an end: {folder.with_suffix('.log.0').read_text()}")
        pids = fork_group(WORKERS, lambda: train(folder), restarts, folder.with_suffix(".log"))
    return restarts


def torchrun_run(folder: Path, rank: int, after: float) -> int:
    """The same by torchrun; `after` counts from the first outer step, since importing takes longer than running."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import kills, pathlib, os; "
    program += "open(os.environ['PIDS'] + os.environ['RANK'], 'w').write(str(os.getpid())); "
    program += f"kills.train(pathlib.Path({str(folder)!r}), seconds_between=0.1)"
    script = folder.with_suffix(".py")
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS), "--max-restarts", "3"]
    agent = subprocess.Popen(
        [*command, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)],
        env={**os.environ, "PIDS": f"{folder}.pid."},
        stderr=subprocess.PIPE,
        text=True,
    )
    while agent.poll() is None and not metrics.exist(folder):
        time.sleep(0.01)
    time.sleep(after)
    killed = Path(f"{folder}.pid.{rank}").read_text()
    with suppress(ProcessLookupError):  # it was over already
        os.kill(int(killed), signal.SIGKILL)
    shown = agent.communicate()[1]
    if agent.returncode:
        raise RuntimeError(f"torchrun ended with {agent.returncode}:\n{shown}")
    return int(Path(f"{folder}.pid.{rank}").read_text() != killed)


def numbers_of(folder: Path) -> tuple[Any, Any]:
    """What must be the same: the checkpoint and the metrics, without seconds."""
    checkpoint = checkpoint_files.load(folder / CHECKPOINT)
    del checkpoint["counters"]["seconds"], checkpoint["metrics"]  # the hash of rows with seconds
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in metrics.read(folder / metrics.FILE)]
    return _plain(checkpoint), rows


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="with torchrun's agent in place of forks")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        report = measured(Path(temporary), options.kills, options.seed, options.torchrun)
    print(report)
    if options.write:
        write_text(RESULTS / ("kills-torchrun.md" if options.torchrun else "kills.md"), report)


def measured(base: Path, kills: int, seed: int, torchrun: bool) -> str:
    """Run and compare; what was found, as Markdown."""
    train(base / "alone")  # what torch sets up once, for all forks
    began = time.monotonic()
    assert wait_for_group(fork_group(WORKERS, lambda: train(base / "undisturbed"))) == [0] * WORKERS
    length = time.monotonic() - began
    expected = numbers_of(base / "undisturbed")
    assert expected == numbers_of(base / "alone")
    chance = random.Random(seed)
    resumed_at: list[int] = []
    counts = {"killed before the end": 0, "other numbers": 0, "lines lost or doubled": 0, "files left": 0}
    with bar("kills", kills) as shown:
        while counts["killed before the end"] < kills:
            folder = base / f"run-{len(resumed_at)}"
            rank = chance.randrange(WORKERS)
            after = chance.uniform(0, 0.1 * STEPS if torchrun else length)
            restarts = (torchrun_run if torchrun else killed_run)(folder, rank, after)
            counts["killed before the end"] += restarts > 0
            checkpoint, rows = numbers_of(folder)
            counts["other numbers"] += (checkpoint, rows) != expected
            counts["lines lost or doubled"] += [row["outer_step"] for row in rows] != list(range(STEPS))
            counts["files left"] += {path.name for path in folder.iterdir()} != FILES
            resumed_at.append(restarts)
            shutil.rmtree(folder)
            if restarts:
                shown.advance(f"{counts['other numbers']} with other numbers")
    how = "torchrun's agent" if torchrun else "forked processes under torchrun's rules"
    command = f"python benchmarks/kills.py --kills {kills} --seed {seed}{' --torchrun' * torchrun}"
    lines = [
        f"# {kills} kills",
        "",
        f"`{command} --write`, {how}, {WORKERS} workers, {STEPS} outer steps, a checkpoint every {EVERY}; "
        f"an undisturbed run took {length:.2f} s; torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| | runs |",
        "| --- | --- |",
        f"| in all | {len(resumed_at)} |",
        *(f"| {name} | {count} |" for name, count in counts.items()),
        f"| restarts, at most in one run | {max(resumed_at)} |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
