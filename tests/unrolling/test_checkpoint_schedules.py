"""Kept states: as few computations as possible, never more states than allowed, and wherever they lie."""

from __future__ import annotations

import errno
import functools
import os
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.unrolling import checkpoint_schedules, state_storage
from bilevel.unrolling.checkpoint_schedules import Trail


class CountingLoop:
    """An inner loop whose state is the number of its steps, which counts the steps made."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.made = 0

    def start(self) -> Tensor:
        return torch.tensor(0)

    def descend(self, state: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.steps if stop is None else stop
        assert int(state) == start
        self.made += stop - start
        return torch.tensor(stop)


@functools.cache
def fewest_repeated(length: int, count: int) -> int:
    """The fewest steps computed to go back through a stretch with `count` kept states, by trying every place for the
    next one.
    """
    if length == 1:
        return 0
    if count == 1:
        return length * (length - 1) // 2
    return min(
        there + fewest_repeated(length - there, count - 1) + fewest_repeated(there, count) for there in range(1, length)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12, 40])
def test_every_state_comes_once_from_the_last_to_the_first_with_the_fewest_steps(count: int) -> None:
    for steps in range(count, 50):
        loop: Any = CountingLoop(steps)
        with Trail(loop, count) as trail:
            assert int(trail.descend()) == steps
            most, found = len(trail._kept), []
            for t, state in trail.backwards():
                assert int(state) == t
                found.append(t)
                most = max(most, len(trail._kept))
        assert found == list(reversed(range(steps)))
        assert most <= count
        assert loop.made == fewest_repeated(steps, count) + 1 == checkpoint_schedules.steps_computed(steps, count)


@pytest.mark.parametrize(("checkpoints", "most"), [("all", 1), ("sqrt", 2), ("log", 5)])
def test_what_the_words_promise(checkpoints: Any, most: int) -> None:
    for steps in (1, 2, 3, 10, 200, 1000, 2000):
        count = checkpoint_schedules.slots(checkpoints, steps)
        assert checkpoint_schedules.repetitions(steps, count) <= most
        assert checkpoint_schedules.steps_computed(steps, count) <= most * steps
    if checkpoints == "sqrt":
        assert checkpoint_schedules.slots("sqrt", 2000) <= (2 * 2000) ** 0.5 + 1
        assert checkpoint_schedules.repetitions(2000, checkpoint_schedules.slots("sqrt", 2000) - 1) == 3
    if checkpoints == "log":
        assert checkpoint_schedules.slots("log", 2000) == 11


def a_state(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {
        "weights": torch.randn(3, 4, generator=generator).T,
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "order": torch.randperm(6, generator=generator),
        "nothing": torch.zeros(0, 2),
        "scale": torch.tensor(float(number), dtype=torch.float64),
        "steps": number,
    }


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
def test_a_store_gives_back_what_it_was_given(offload: state_storage.Offload) -> None:
    def same(found: dict[str, Any], number: int) -> None:
        for name, expected in a_state(number).items():
            if isinstance(expected, Tensor):
                assert found[name].dtype == expected.dtype
                torch.testing.assert_close(found[name], expected, rtol=0, atol=0)
            else:
                assert found[name] == expected

    with state_storage.state_store(offload) as store:
        for number in range(3):
            store.push(a_state(number))
            same(store.top(), number)
        store.pop()
        same(store.top(), 1)
        store.push(a_state(7))
        same(store.top(), 7)
        same(store.top(), 7)
        for number in (7, 1, 0):
            same(store.top(), number)
            store.pop()


def test_little_is_remembered_of_a_state_on_disk() -> None:
    """There may be thousands, whose bookkeeping must not take the memory that the disk was to save."""
    states = [[torch.zeros(3), float(number), torch.zeros(2, 2)] * 10 for number in range(300)]
    with state_storage.state_store("disk") as store:
        store.push(states[0])
        tracemalloc.start()
        try:
            for state in states[1:]:
                store.push(state)
            remembered, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert remembered / len(states) < 600  # ten numbers of 8 bytes, and a few objects


def problem() -> tuple[bilevel.GradientDescent, Tensor, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    net.to(torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return (
        bilevel.GradientDescent(
            inner_loss=lambda model, meta, i: (
                (model(x[i]).squeeze(-1) - x[i, 0] * x[i, 1]) ** 2 * meta[i].exp()
            ).mean(),
            outer_loss=lambda model, meta, batch: ((model(x).squeeze(-1) - x[:, 2]) ** 2).mean(),
            params=net,
            optimizer=bilevel.optimizer(torch.optim.Adam, lr=0.05),
        ),
        torch.zeros(20, dtype=torch.float64),
        bilevel.batches(lambda t: torch.arange(5) + 5 * (t % 4), 23),
    )


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
@pytest.mark.parametrize("checkpoints", ["all", "sqrt", "log", 1, 2, 5, 100])
def test_every_schedule_gives_the_same_gradient(checkpoints: Any, offload: Any) -> None:
    """To the last bit: what is computed again is computed alike, dropout included."""
    expected = bilevel.Reverse("all")(*problem()).grad
    found = bilevel.Reverse(checkpoints, offload)(*problem()).grad
    assert torch.equal(found, expected)
    torch.testing.assert_close(bilevel.Reverse("graph")(*problem()).grad, expected, rtol=1e-10, atol=1e-12)


def test_a_full_disk_is_named_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(state_storage.tempfile, "tempdir", str(tmp_path))
    real = state_storage.tempfile.TemporaryFile

    class Full:
        """A file on a disk with 1000 bytes left."""

        def __init__(self, **settings: Any) -> None:
            self._file = real(**settings)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, content: memoryview) -> int:
            left = 1000 - self._file.tell()
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content[:left])

    monkeypatch.setattr(state_storage.tempfile, "TemporaryFile", Full)
    with pytest.raises(OSError, match=r"no space left in .* set the environment variable TMPDIR") as caught:
        bilevel.Reverse("all", offload="disk")(*problem())
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoints": "some"}, "a number of states >= 1"),
        ({"checkpoints": 0}, "a number of states >= 1"),
        ({"checkpoints": True}, "a number of states >= 1"),
        ({"offload": "tape"}, "there are 'cpu', 'disk'"),
        ({"checkpoints": "graph", "offload": "disk"}, "keeps none"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bilevel.Reverse(**settings)
