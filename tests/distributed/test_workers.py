"""Several workers give what one gives, and an error of one is an error of all. The groups run in `worker_groups.py`."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_groups import CARRIED, ESTIMATORS, HUNG, SHARDED, SIZES

import bilevel
from bilevel.distributed import communication
from bilevel.distributed.workers import Workers
from bilevel.planning import planner
from bilevel.training import checkpoint_files, metrics
from bilevel.training.run_record import CHECKPOINT, PREVIOUS

ROOT = Path(__file__).parents[2]
BIT_EQUAL = {
    "one at a time",
    "chunks",
    "variates",
    "solves",
    "forward solves",
    "solves and variates",
    "black box",
    "exact",
    "auto",
}
BIT_EQUAL |= {"same directions, chunks", "same directions, differences", "fresh directions, chunks"}
BIT_EQUAL |= {"fresh directions, fewer than workers", "an expensive variate, chunks"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which everything has happened."""
    return run_groups(tmp_path_factory.mktemp("groups"))


@pytest.fixture(scope="module")
def fully(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which that of fully sharded modules has happened."""
    return run_groups(tmp_path_factory.mktemp("fully"), "fully-sharded")


def run_groups(folder: Path, *part: str) -> Path:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])}
    command = [sys.executable, str(ROOT / "tests" / "worker_groups.py"), str(folder), *part]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="module")
def happened(base: Path) -> dict[str, Any]:
    """Exit codes and what was printed, by the name of the group."""
    return json.loads((base / "happened.json").read_text())


@pytest.fixture(scope="module")
def fully_happened(fully: Path) -> dict[str, Any]:
    """The same of fully sharded modules."""
    return json.loads((fully / "happened.json").read_text())


def found(base: Path, what: str, size: int, rank: int = 0) -> dict[str, Any]:
    return json.loads((base / f"{what}-{size}-{rank}.json").read_text())


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ESTIMATORS, *CARRIED])
def test_estimates_do_not_depend_on_the_number_of_workers(name: str, base: Path) -> None:
    alone = found(base, "estimates", 1)[name]
    assert all(map(math.isfinite, alone))
    assert any(alone[1:])
    for size in SIZES[1:]:
        for rank in range(size):
            together = found(base, "estimates", size, rank)[name]
            if name in BIT_EQUAL:
                assert together == alone
            assert together == pytest.approx(alone, rel=1e-12, abs=1e-14)
            assert together == found(base, "estimates", size)[name]  # all workers have the same, to the last bit


def test_the_short_check_finds_the_same_on_every_worker(base: Path) -> None:
    checked = found(base, "estimates", 1)["checked"]
    assert checked.startswith("the loop: steps 0, ")
    for size in SIZES[1:]:
        assert all(found(base, "estimates", size, rank)["checked"] == checked for rank in range(size))


def test_both_exchanges_give_the_same(base: Path) -> None:
    for size in SIZES:
        estimates = found(base, "estimates", size)
        for one, other in (("slopes", "gradient"), ("chunks", "chunks, gradient"), ("variates", "variates, gradient")):
            assert estimates[one] == pytest.approx(estimates[other], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    "name", ["directions", "exact", "fewer than workers", "backtracks", "same directions", "fresh directions, chunks"]
)
def test_training_curves_do_not_depend_on_the_number_of_workers(name: str, base: Path) -> None:
    rows, meta = found(base, "curves", 1)[name]
    for size in SIZES[1:]:
        for rank in range(size):
            others, other = found(base, "curves", size, rank)[name]
            assert other == pytest.approx(meta, rel=1e-12, abs=1e-14)
            for row, also in zip(rows, others, strict=True):
                assert also[:2] == pytest.approx(row[:2], rel=1e-11)
                assert also[2] == (None if row[2] is None else pytest.approx(row[2], rel=1e-11))


def test_one_workers_failing_solver_takes_a_step_back_on_all(base: Path) -> None:
    for size in SIZES:
        for rank in range(size):
            rows, _ = found(base, "curves", size, rank)["backtracks"]
            # φ₂ goes nine tenths of the way to 3 and comes back by halves: from 2.72 to 0.83, from 2.78 to 0.95.
            assert [row[2] for row in rows] == [0, 2, 4]


def test_sharded_parameters_give_what_whole_ones_give(base: Path, happened: dict[str, Any]) -> None:
    """Each process holds its half of every parameter, of the optimiser's memory and of the tangents."""
    for rank in range(2):
        sharded = json.loads((base / f"sharded-{rank}.json").read_text())
        for name, _, _ in SHARDED:
            gradient, shapes = sharded[name]
            assert gradient == pytest.approx(happened[f"whole, {name}"], rel=1e-9, abs=1e-12)
            assert shapes == [[3], [3, 4], [1, 6]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _, _ in SHARDED[:2]])
def test_a_fully_sharded_module_gives_what_a_whole_one_gives(
    name: str, fully: Path, fully_happened: dict[str, Any]
) -> None:
    """Estimates and an interrupted training run; each process holds its shards, of the optimiser's memory too."""
    shards = [
        [[4, 4], [4], [3, 7], [3], [1, 5], [1]],
        [[3, 4], [3], [2, 7], [2], [1, 5], [1]],
    ]
    printed(fully_happened, "fully sharded", [0, 0])
    for rank in range(2):
        found = json.loads((fully / f"fully-sharded-{rank}.json").read_text())
        gradient, shapes, untouched = found[name]
        assert gradient == pytest.approx(fully_happened[f"one process, {name}"], rel=1e-9, abs=1e-14)
        memories = {"momentum": 1, "adam": 2}[name]
        kept = [shape for shape in shards[rank] for _ in range(memories)]
        assert shapes == shards[rank] + kept
        assert untouched  # the module's own parameters and their .grad
        losses, meta = found[f"fit, {name}"]
        expected_losses, expected_meta = fully_happened[f"one process, fit, {name}"]
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert meta == pytest.approx(expected_meta, rel=1e-9)
    assert steps_of(fully / f"fully sharded, {name}") == [0, 1, 2]


def test_pairs_that_hold_a_model_together_share_the_directions(base: Path, happened: dict[str, Any]) -> None:
    printed(happened, "mesh", [0, 0, 0, 0])
    expected_losses, expected_meta = happened["one process, fit, momentum"]
    for rank in range(4):
        losses, meta = json.loads((base / f"mesh-{rank}.json").read_text())
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert meta == pytest.approx(expected_meta, rel=1e-9)
    assert steps_of(base / "mesh") == [0, 1, 2]


@pytest.mark.slow
def test_the_example_of_a_sharded_network_learns_which_sources_are_good(fully_happened: dict[str, Any]) -> None:
    first, second = printed(fully_happened, "example", [0, 0])
    good, others = (float(number) for number in re.findall(r"[+-]\d\.\d+", first))
    assert others < 0 < good
    assert second == ""


@pytest.mark.slow
def test_what_a_fully_sharded_module_cannot_do_is_refused(fully: Path, fully_happened: dict[str, Any]) -> None:
    printed(fully_happened, "fully sharded", [0, 0])
    for rank in range(2):
        refused = json.loads((fully / f"fully-sharded-{rank}.json").read_text())["refused"]
        for name in ("Reverse", "Reverse, a rate", "ForwardGradient", "Implicit"):
            assert refused[name].startswith("MissingDerivativeError: FSDPSequential, sharded by fully_shard, has first")
            assert 'ForwardGradient(..., tangents="difference") or ZerothOrder(...)' in refused[name]
        assert "ValueError: state.params['0.weight'] is spread over processes [0, 1]" in refused["sharing"]
        assert "workers=Workers.of(sharers=Workers())" in refused["sharing"]
        assert refused["layers alone"].startswith("ValueError: fully_shard was applied to layers of Sequential and not")
        for name in ("meta", "meta in fit"):
            assert refused[name].startswith(
                "TypeError: meta is a DTensor; meta parameters must be whole in every process"
            )
        assert "state.params['0.weight'] of the stream is spread over processes" in refused["stream"]
        assert "call fit without out=" in refused["stream"]
        assert refused["method"].startswith(
            "ValueError: a method or property of FSDPByLayer calls its layer FSDPLinear"
        )


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def printed(happened: dict[str, Any], name: str, codes: list[int]) -> list[str]:
    assert happened[name]["codes"] == codes, happened[name]
    return happened[name]["printed"]


def steps_of(folder: Path) -> list[int]:
    return [row["outer_step"] for row in metrics.read(folder / metrics.FILE)]


def assert_as_undisturbed(base: Path, name: str) -> None:
    one, other = (checkpoint_files.load(base / each / CHECKPOINT) for each in (name, "undisturbed"))
    assert torch.equal(one["meta"][0], other["meta"][0])
    assert one["counters"]["outer_step"] == 6
    rows = [metrics.read(base / each / metrics.FILE) for each in (name, "undisturbed")]
    assert [{**a, "seconds": 0} for a in rows[0]] == [{**b, "seconds": 0} for b in rows[1]]


def test_a_nan_of_one_worker_ends_all_with_its_message(base: Path, happened: dict[str, Any]) -> None:
    """And when the fault is gone, the restarted group goes on from the step before."""
    first, second = printed(happened, "nan", [1, 1])
    assert first.startswith("NonFiniteError: outer step 3: worker 1 of 2: the outer loss is not finite: inner step 0")
    assert second.startswith("NonFiniteError: outer step 3: the outer loss is not finite: inner step 0")
    printed(happened, "nan, restarted", [0, 0])
    assert_as_undisturbed(base, "nan")


def test_an_error_of_one_worker_ends_all_with_its_message(base: Path, happened: dict[str, Any]) -> None:
    first, second = printed(happened, "error", [1, 1])
    assert first == "WorkerError: worker 1 of 2: the third example is not there (ZeroDivisionError)\n"
    assert second == "ZeroDivisionError: the third example is not there\n"
    assert steps_of(base / "error") == [0, 1, 2]
    assert checkpoint_files.load(base / "error" / CHECKPOINT)["counters"]["outer_step"] == 3
    first, second = printed(happened, "error of the first", [1, 1])
    assert first == "ZeroDivisionError: the third example is not there\n"
    assert second.startswith("WorkerError: worker 0 of 2: the third example")


def test_a_slow_worker_is_waited_for(base: Path, happened: dict[str, Any]) -> None:
    printed(happened, "slow", [0, 0])
    assert_as_undisturbed(base, "slow")


def test_a_worker_that_hangs_is_waited_for_no_longer_than_the_timeout(base: Path, happened: dict[str, Any]) -> None:
    first, second = printed(happened, "hangs", [1, 1])
    assert (
        "WorkerError: worker 0 of 2 waited for another worker until the time limit at 'directions': a slow worker needs"
        in first
    )
    assert (
        "WorkerError: worker 1 of 2 lost the connection to another worker at 'directions': it died or was stopped"
        in second
    )
    assert HUNG <= happened["hangs"]["ended"][0] < happened["hangs"]["ended"][1]  # it slept until the first gave up
    assert checkpoint_files.load(base / "hangs" / CHECKPOINT)["counters"]["outer_step"] == 3


def test_the_others_notice_when_a_worker_dies(base: Path, happened: dict[str, Any]) -> None:
    first, _ = printed(happened, "dies", [1, -9])
    assert first.startswith("WorkerError: worker 0 of 2 lost the connection to another worker at 'directions'")
    assert checkpoint_files.load(base / "dies" / CHECKPOINT)["counters"]["outer_step"] == 3


@pytest.mark.parametrize("name", ["full disk", "full metrics"])
def test_a_full_disk_ends_all_and_leaves_nothing_half_written(name: str, base: Path, happened: dict[str, Any]) -> None:
    """The checkpoint of step 2 does not fit, or with checkpoints further apart a line of the metrics."""
    first, second = printed(happened, name, [1, 1])
    assert re.match(rf"OSError: .*cannot write to .*/{name}; there is no checkpoint yet. Once repaired, resume", first)
    assert second.startswith("WorkerError: worker 0 of 2: [Errno")
    if name == "full disk":  # it was run again, with space
        printed(happened, "full disk, restarted", [0, 0])
        assert_as_undisturbed(base, name)
        assert {path.name for path in (base / name).iterdir()} == {CHECKPOINT, PREVIOUS, metrics.FILE}
    else:
        assert [path.name for path in (base / name).iterdir()] == [metrics.FILE]
        assert (base / name / metrics.FILE).read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("seeds", "the settings of the run"),
        ("starts", "the meta parameters at the start"),
        ("drift", "the numbers of outer step 0"),
    ],
)
def test_workers_that_do_not_agree_are_told_so(name: str, place: str, happened: dict[str, Any]) -> None:
    for text in printed(happened, name, [1, 1]):
        assert text.startswith(f"WorkerError: workers 0 and 1 of 2 disagree at '{place}'")


def test_workers_that_make_different_calls_are_told_so(happened: dict[str, Any]) -> None:
    for text in printed(happened, "lost step", [1, 1]):
        assert "the workers are at different places: worker 0 is at 'apples', worker 1 is at 'pears'" in text


def test_sigterm_saves_and_leaves_with_code_143(base: Path, happened: dict[str, Any]) -> None:
    """The other worker gets it too, or hears of it; a group of three then ends with the numbers of one process."""
    codes = happened["terminated"]["codes"]
    assert codes[0] == 143
    assert codes[1] in (143, 1, -signal.SIGTERM)  # the last if it had left `fit` when it got the signal
    printed(happened, "terminated, restarted", [0, 0, 0])
    one, other = (checkpoint_files.load(base / name / CHECKPOINT) for name in ("terminated", "trained"))
    assert torch.equal(one["meta"][0], other["meta"][0])
    assert steps_of(base / "terminated") == steps_of(base / "trained") == list(range(15))


# -- the command -------------------------------------------------------------------------------------------------------


def test_only_the_first_worker_writes_and_shows(base: Path, happened: dict[str, Any]) -> None:
    first, second = printed(happened, "command", [0, 0])
    assert first.count("report: ") == 1
    assert "outer loss" in first
    assert second == ""
    assert steps_of(base / "command") == [0, 1, 2]
    first, second = printed(happened, "command again", [1, 1])
    assert "already holds a run" in first
    assert second == ""
    first, second = printed(happened, "wrong flag", [2, 2])
    assert "--directions" in first
    assert second == ""


def test_the_command_says_how_to_go_on_after_sigterm(base: Path, happened: dict[str, Any]) -> None:
    codes, (first, second) = (happened["command terminated"][key] for key in ("codes", "printed"))
    assert (codes[0], second) == (143, "")
    assert f"terminated; {base / 'for ever'} holds a checkpoint: go on with --resume" in first
    assert checkpoint_files.load(base / "for ever" / CHECKPOINT)["counters"]["outer_step"] == len(
        steps_of(base / "for ever")
    )


LEAVING = """
import os, sys
import torch
import bilevel
from bilevel.distributed import workers as workers_module

workers = bilevel.experimental.join_workers()
problem = bilevel.GradientDescent(
    lambda theta, phi, batch: (theta - phi).square().sum(), lambda theta, phi, batch: theta.sum(),
    torch.zeros(3), bilevel.optimizer(torch.optim.SGD, lr=0.1),
)
bilevel.fit(problem, torch.ones(3), bilevel.no_batches(2), phases=[bilevel.Phase(bilevel.ForwardGradient(2), 1)],
            workers=workers, progress=False)

def gloos_threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)

before = gloos_threads()
workers_module._leave()
print(before > 0, gloos_threads())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are told apart by their names in /proc")
def test_whoever_leaves_takes_gloos_threads_along() -> None:
    """Left running, they abort one process in ten when Python ends, and torchrun takes it for a failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-W", "ignore", "-c", LEAVING]
    ended = subprocess.run(command, env={**os.environ, **group}, capture_output=True, text=True)
    assert ended.stdout.split() == ["True", "0"], ended.stderr


# -- who does what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_every_part_is_somebodys(count: int, size: int) -> None:
    shares = [list(Workers(rank, size).share(count)) for rank in range(size)]
    assert sorted(part for share in shares for part in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged() -> None:
    alone = Workers()
    numbers = torch.arange(3.0)
    assert torch.equal(alone.gather("x", numbers), numbers.double().unsqueeze(0))
    assert alone.sum("x", [numbers])[0] is not None
    assert alone.broadcast("x", "y") == "y"
    with pytest.raises(ZeroDivisionError):
        alone.together("x", lambda: 1 / 0)


def test_the_exchange_follows_from_time_and_bytes() -> None:
    assert communication.chosen("slopes", 10**6, 10**9, 64) == "slopes"
    assert communication.chosen("gradient", 1, 1, 2) == "gradient"
    assert communication.chosen("auto", 16, 640, 2) == "slopes"
    assert communication.chosen("auto", 16, 10**8, 2) == "gradient"
    for workers in (2, 8, 64):
        slopes, gradient = (communication.sent_bytes(how, 64, 1000, workers) for how in ("slopes", "gradient"))
        assert slopes == 8 * 64 * (workers - 1) / workers
        assert gradient - slopes == 2 * 4 * 1000 * (workers - 1) / workers


def test_the_planner_shows_what_is_exchanged(capsys: pytest.CaptureFixture[str]) -> None:
    from bilevel.cli import plan_command

    sizes = {"params": 1e9, "meta_params": 1e8, "steps": 10, "memory": "80GB", "directions": 64}
    plan = bilevel.plan_from_sizes(**sizes, workers=64)  # pyright: ignore[reportArgumentType]
    rows = {type(row.estimator).__name__: row for row in plan.rows}
    assert (rows["ForwardGradient"].exchange, rows["Reverse"].exchange) == ("gradient", None)
    assert rows["ForwardGradient"].sent_bytes == communication.sent_bytes("gradient", 64, 10**8, 64)
    plan_command.show(plan, "on paper", in_units=True)
    shown = capsys.readouterr().out
    assert "for each of 64 workers" in shown
    assert planner.size_text(rows["ForwardGradient"].sent_bytes or 0) in shown
    plan_command.show(bilevel.plan_from_sizes(**sizes), "on paper", in_units=True)  # pyright: ignore[reportArgumentType]
    assert "exchange" not in capsys.readouterr().out
