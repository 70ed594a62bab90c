"""Folders that are damaged at random are resumed with the right numbers, or say what is damaged."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_cases import Interruption, assert_as_undisturbed, long_run, undisturbed, without_seconds

from bilevel.errors import CheckpointError
from bilevel.training import metrics, run_record

Damage = Callable[[bytes, np.random.Generator], bytes]


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    """One bit is another."""
    at = int(rng.integers(len(content)))
    return content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]


def digit(content: bytes, rng: np.random.Generator) -> bytes:
    """One digit is another, so that a line of numbers stays one."""
    places = [i for i, c in enumerate(content) if chr(c).isdigit()]
    at = places[int(rng.integers(len(places)))]
    return content[:at] + str((int(chr(content[at])) + 1 + int(rng.integers(8))) % 10).encode() + content[at + 1 :]


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing."""
    return content[: int(rng.integers(len(content)))]


def hole(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes are zeros, as after a crash."""
    at = int(rng.integers(len(content)))
    size = int(rng.integers(1, 64))
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def lines(content: bytes, rng: np.random.Generator) -> bytes:
    """A line is missing, twice there, or elsewhere."""
    parts = content.splitlines(keepends=True)
    at = int(rng.integers(len(parts)))
    line = parts.pop(at)
    how = int(rng.integers(3))
    if how == 1:
        parts[at:at] = [line, line]
    elif how == 2:
        parts.insert(int(rng.integers(len(parts) + 1)), line)
    return b"".join(parts)


def empty(content: bytes, rng: np.random.Generator) -> bytes:
    return b""


def other_end(content: bytes, rng: np.random.Generator) -> bytes:
    """Something follows."""
    return content + bytes(rng.integers(0, 256, int(rng.integers(1, 100)), dtype=np.uint8))


DAMAGES: list[Damage] = [flip, digit, cut, hole, lines, empty, other_end]
VERDICTS = {"refused", "from the one before", "as if nothing had been"}
FILES = (metrics.FILE, run_record.CHECKPOINT, run_record.PREVIOUS)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its seventh outer step, with two checkpoints."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        long_run(out=folder, callbacks=[Interruption(KeyboardInterrupt(), 7)])
    assert {path.name for path in folder.iterdir()} == set(FILES)
    return folder


def outcome(whole: Path, folder: Path, seed: int) -> str:
    """What becomes of a copy that is damaged in one or several places."""
    rng = np.random.default_rng(seed)
    shutil.copytree(whole, folder)
    names = [FILES[0]] if seed % 2 else list(rng.choice(FILES, size=int(rng.integers(1, 4)), replace=False))
    for name in names:
        path = folder / str(name)
        if rng.random() < 0.05:
            path.unlink()
        elif path.stat().st_size:
            path.write_bytes(DAMAGES[int(rng.integers(len(DAMAGES)))](path.read_bytes(), rng))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = long_run(out=folder, resume=True)
    except CheckpointError as error:
        says = str(folder) in str(error) and ("damaged" in str(error) or "there is no checkpoint" in str(error))
        return "refused" if says else f"obscure: {error}"
    assert torch.equal(result.meta, undisturbed().meta)
    assert without_seconds(result.history) == without_seconds(undisturbed().history)
    assert_as_undisturbed(result, folder)
    return "from the one before" if any("damaged" in str(w.message) for w in warned) else "as if nothing had been"


def outcomes(whole: Path, folder: Path, seeds: range) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in seeds:
        found[outcome(whole, folder / str(seed), seed)] += 1
        shutil.rmtree(folder / str(seed))
    return found


def test_some_damaged_folders(interrupted: Path, tmp_path: Path) -> None:
    found = outcomes(interrupted, tmp_path, range(20))
    assert set(found) == VERDICTS, found


@pytest.mark.slow
def test_five_hundred_damaged_folders(interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = outcomes(interrupted, tmp_path, range(20, 520))
    with capsys.disabled():
        print(f"\n500 damaged folders: {dict(found)}")
    assert set(found) == VERDICTS, found


def test_a_row_that_was_altered_is_noticed(interrupted: Path, tmp_path: Path) -> None:
    """The line is as good as any other, and so the run would go on with it."""
    folder = tmp_path / "altered"
    shutil.copytree(interrupted, folder)
    path = folder / metrics.FILE
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0].replace('"phase": 0', '"phase": 7'), *rows[1:]]) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged: its first \d+ bytes are not those"):
        long_run(out=folder, resume=True)
