"""Folders that hold another run, a damaged one, or other files."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import (
    LONG_RUN,
    START,
    Interruption,
    assert_as_undisturbed,
    clamped,
    contents,
    exact,
    lines_of,
    long_run,
    tensor,
    train,
    train_noisily,
)
from torch.optim import lr_scheduler

import bilevel
from bilevel import (
    Phase,
    TruncatedReverse,
    ZerothOrder,
)
from bilevel.errors import CheckpointError
from bilevel.optim.update_rule import Optimizer
from bilevel.training import (
    checkpoint_files,
    metrics,
    run_record,
)
from bilevel.training.outer_loop import OuterStep


@pytest.mark.parametrize("kept", [{metrics.FILE, run_record.CHECKPOINT}, {metrics.FILE}, {run_record.CHECKPOINT}])
def test_a_folder_that_holds_a_run_is_left_alone(kept: set[str], tmp_path: Path) -> None:
    train(exact(2), out=tmp_path)
    for path in list(tmp_path.iterdir()):
        if path.name not in kept:
            path.unlink()
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run; resume it"):
        train(exact(2), out=tmp_path)
    assert contents(tmp_path) == before


def test_other_files_in_the_folder_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    train(exact(2), out=tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def interrupted(folder: Path, **changes: Any) -> None:
    settings = {"config": {"width": 8, "note": "a"}, "callbacks": [Interruption(KeyboardInterrupt(), 5)]}
    with pytest.raises(KeyboardInterrupt):
        long_run(out=folder, **{**settings, **changes})


# What is changed; and under which names the message reports it, with what words.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "seed": ({"seed": 1}, {"seed": "0 there, 1 here"}),
    "steps": ({"phases": [LONG_RUN[0], Phase(ZerothOrder(2), 6, accumulate=3)]}, {"phases": "accumulate=3"}),
    "estimator": ({"phases": [LONG_RUN[0], Phase(ZerothOrder(3), 4, accumulate=2)]}, {"phases": "directions=3"}),
    "accumulate": ({"phases": [LONG_RUN[0], Phase(ZerothOrder(2), 4)]}, {"phases": "accumulate=1"}),
    "patience": ({"phases": [Phase(TruncatedReverse(2), 9), LONG_RUN[1]]}, {"phases": "patience=None"}),
    "order": ({"phases": LONG_RUN[::-1]}, {"phases": 'there, ["Phase(estimator=ZerothOrder'}),
    "optimizer": ({"name": "SGD"}, {"optimizer": "optimizer(torch.optim.SGD, lr=0.2"}),
    "schedule": ({"name": "one cycle"}, {"optimizer": "OneCycleLR"}),
    "shape": ({"meta": tensor(0.0)}, {"meta": "['meta: (3,) torch.float64'] there, ['meta: (1,) torch.float64'] here"}),
    "dtype": ({"meta": START.float()}, {"meta": "['meta: (3,) torch.float32'] here"}),
    "structure": ({"meta": {"x": START}}, {"meta": "meta['x']: (3,)"}),
    "config": ({"config": {"width": 9, "note": "a"}}, {"width": "8 there, 9 here"}),
    "less config": ({"config": {"width": 8}}, {"note": "'a' there, None here"}),
    "more config": ({"config": {"width": 8, "note": "a", "depth": 3}}, {"depth": "None there, 3 here"}),
    "project": ({"project": lambda phi: phi.clamp(-3, 2)}, {"project": "'clamped (code"}),
    "no project": ({"project": None}, {"project": "there, None here"}),
    "backtracks": ({"max_backtracks": 3}, {"max_backtracks": "None there, 3 here"}),
    "two things": ({"seed": 2, "config": {"width": 9, "note": "a"}}, {"seed": "0 there, 2", "width": "8 there, 9"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_another_configuration_is_refused(name: str, tmp_path: Path) -> None:
    changes, expected = CHANGES[name]
    interrupted(tmp_path)
    before = contents(tmp_path)
    settings = {"phases": LONG_RUN, "name": "cosine", "project": clamped, "config": {"width": 8, "note": "a"}}
    with pytest.raises(CheckpointError, match="belongs to a run of another configuration") as caught:
        train_noisily(**{**settings, **changes}, out=tmp_path, resume=True)
    message = str(caught.value)
    assert set(re.findall(r"(?:configuration \(|; )(\w+): ", message)) == set(expected)
    assert all(word in message for word in expected.values())
    assert contents(tmp_path) == before


def test_a_name_in_config_does_not_hide_a_difference(tmp_path: Path) -> None:
    config = {"seed": 5, "optimizer": "mine"}
    interrupted(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=r"\(seed: 0 there, 1 here\)"):
        long_run(out=tmp_path, resume=True, config=config, seed=1)
    assert_as_undisturbed(long_run(out=tmp_path, resume=True, config=config), tmp_path)


def test_functions_in_settings_are_no_difference(tmp_path: Path) -> None:
    """Their `repr` has an address in it, which changes from process to process."""

    def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k)

    def make() -> Optimizer:
        return bilevel.optimizer(torch.optim.SGD, lr=0.1, schedule=lambda optimizer: schedule(optimizer))

    with pytest.raises(KeyboardInterrupt):
        train(exact(4), optimizer=make(), out=tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 2)])
    result = train(exact(4), optimizer=make(), out=tmp_path, resume=True)
    assert torch.equal(result.meta, train(exact(4), optimizer=make()).meta)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "altered": lambda whole: whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
    "junk": lambda whole: b"\x80\x04}\x94." * 50,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_without_another_is_refused_and_left(name: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    path = tmp_path / run_record.CHECKPOINT
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    for previous in (None, path.read_bytes()):
        (tmp_path / run_record.PREVIOUS).unlink(missing_ok=True)
        if previous is not None:
            (tmp_path / run_record.PREVIOUS).write_bytes(previous)
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            long_run(out=tmp_path, resume=True)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", DAMAGE)
def test_after_a_damaged_checkpoint_the_run_goes_on_from_the_one_before(name: str, tmp_path: Path) -> None:
    """Also if it is interrupted again before the next one; the good one is never replaced by the damaged one."""
    interrupted(tmp_path, config={})
    path = tmp_path / run_record.CHECKPOINT
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    previous = (tmp_path / run_record.PREVIOUS).read_bytes()
    assert len(lines_of(tmp_path)) == 5
    seen: list[OuterStep] = []
    with (
        pytest.warns(UserWarning, match=r"Going on from the checkpoint before it instead, of outer step 3"),
        suppress(KeyboardInterrupt),
    ):
        long_run(out=tmp_path, resume=True, callbacks=[seen.append, Interruption(KeyboardInterrupt(), 1)])
    assert [step.number for step in seen] == [4, 5]
    assert (tmp_path / run_record.PREVIOUS).read_bytes() == previous
    assert_as_undisturbed(long_run(out=tmp_path, resume=True), tmp_path)


def test_a_run_goes_on_from_the_previous_checkpoint_if_there_is_no_newer_one(tmp_path: Path) -> None:
    """A process killed between the two moves of a new checkpoint leaves it so."""
    interrupted(tmp_path, config={})
    (tmp_path / run_record.CHECKPOINT).unlink()
    with pytest.raises(FileExistsError):
        long_run(out=tmp_path)
    assert_as_undisturbed(long_run(out=tmp_path, resume=True), tmp_path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoint_files.save(tmp_path / run_record.CHECKPOINT, {"step": 3, "images": torch.zeros(2)})
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"not one of bilevel\.fit"):
        long_run(out=tmp_path, resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("lines", [0, 2])
def test_metrics_that_are_shorter_than_both_checkpoints_say_so(lines: int, tmp_path: Path) -> None:
    interrupted(tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 6)])
    path = tmp_path / metrics.FILE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged: it has \d+ bytes, and \d+ when"):
        long_run(out=tmp_path, resume=True, config={"width": 8, "note": "a"})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("lines", [3, 5])
def test_metrics_that_are_shorter_than_the_checkpoint_go_on_from_the_one_before(lines: int, tmp_path: Path) -> None:
    interrupted(tmp_path, callbacks=[Interruption(KeyboardInterrupt(), 6)])
    path = tmp_path / metrics.FILE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    with pytest.warns(UserWarning, match=r"is damaged.*Going on from the checkpoint before it .* step 3"):
        result = long_run(out=tmp_path, resume=True, config={"width": 8, "note": "a"})
    assert_as_undisturbed(result, tmp_path)
