"""States that go to the host while the device computes: no copy reads or writes memory that is used for something else.

There is no GPU here. `Late` stands in for its second stream, in the worst case that the order of events allows: a copy
takes place at the moment when the computation has to wait for it, and not before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_device import DEVICE, OtherDevice
from torch import Tensor, nn

import bilevel
from bilevel.unrolling import state_storage

X, PHI = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(-1.0, 1.0, 8)


def inner_loss(model: Any, meta: Tensor, x: Tensor) -> Tensor:
    return (meta.exp() * model(x)[:, 0].square()).mean()


def outer_loss(model: Any, meta: Tensor, x: Tensor) -> Tensor:
    return (model(-x) - 1).square().mean()


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def case(put: Any) -> tuple[bilevel.GradientDescent, Tensor, list[Tensor], Tensor]:
    sgd = bilevel.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    x = put(X)
    return bilevel.GradientDescent(inner_loss, outer_loss, put(network()), sgd), put(PHI), [x] * 9, x


class Late:
    """Copies when they are waited for. A tensor that is gone by then would have been used for something else."""

    log: list[str]

    def __init__(self, device: torch.device) -> None:
        assert device == DEVICE
        self._waiting: list[list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]]] = []
        self._done = 0
        self.log = []
        made.append(self)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
        self._waiting.append([(weakref.ref(a), weakref.ref(b)) for a, b in pairs])
        self.log.append(f"copy {len(self._waiting)}")
        return len(self._waiting)

    def wait(self, copied: int) -> None:
        self.log.append(f"wait {copied}")
        for pairs in self._waiting[self._done : copied]:  # a stream keeps the order of its copies
            for destination, source in pairs:
                to, from_ = destination(), source()
                assert to is not None, "the memory that is written to has been given up"
                assert from_ is not None, "the memory that is read has been given up"
                to.copy_(from_)
        self._done = max(self._done, copied)


made: list[Late] = []


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    made.clear()
    monkeypatch.setattr(state_storage, "_copies_for", Late)
    return made


def a_state(other: OtherDevice, number: int) -> dict[str, Any]:
    return other.put({"w": torch.full((3, 2), float(number)), "steps": number})


def test_the_computation_never_waits_for_the_copy_just_begun(late: list[Late]) -> None:
    with OtherDevice() as other, state_storage.state_store("cpu") as store:
        for number in range(5):
            store.push(a_state(other, number))
        assert late[0].log == ["copy 1", "copy 2", "copy 3", "wait 1", "copy 4", "wait 2", "copy 5", "wait 3"]
        assert len(store._states) == 5
        assert [kept.originals is None for kept in store._states] == [True] * 3 + [False] * 2


def test_the_next_state_comes_while_the_top_one_is_used(late: list[Late]) -> None:
    with OtherDevice() as other, state_storage.state_store("cpu") as store:
        for number in range(5):
            store.push(a_state(other, number))
        late[0].log.clear()
        for number in range(4, -1, -1):
            state = store.top()
            store.pop()
            late[0].log.append("use")
            assert state["w"].device == DEVICE
            assert state["steps"] == number
            assert state["w"].cpu().tolist() == [[number] * 2] * 3
            del state
    used = [entry for entry in late[0].log if not entry.startswith("wait")]
    assert used == ["use", "copy 6", "use", "copy 7", "use", "copy 8", "use", "use"]
    assert late[0].log.index("wait 6") > late[0].log.index("use", late[0].log.index("copy 6"))


def test_a_state_that_was_fetched_in_vain_is_waited_for(late: list[Late]) -> None:
    with OtherDevice() as other, state_storage.state_store("cpu") as store:
        for number in range(4):
            store.push(a_state(other, number))
        for _ in range(2):
            store.pop()  # fetches state 1
        store.push(a_state(other, 7))
        assert "wait 5" in late[0].log
        assert store.top()["steps"] == 7
        store.pop()
        assert store.top()["w"].cpu().tolist() == [[1.0] * 2] * 3


def test_at_the_end_nothing_is_being_copied(late: list[Late]) -> None:
    with OtherDevice() as other, state_storage.state_store("cpu") as store:
        for number in range(4):
            store.push(a_state(other, number))
        for _ in range(2):
            store.pop()  # fetches state 1
        assert late[0]._done < len(late[0]._waiting) == 5
    assert late[0]._done == 5


@pytest.mark.parametrize("checkpoints", ["all", "sqrt", "log", 1, 3])
def test_every_schedule_gives_the_same_gradient_and_the_host_waits_for_no_copy(
    checkpoints: Any, late: list[Late]
) -> None:
    expected = bilevel.Reverse(checkpoints)(*case(lambda tree: tree)).grad
    waits = []
    for offload in (None, "cpu"):
        with OtherDevice() as other:
            arguments = case(other.put)
            bilevel.Reverse(checkpoints, offload)(*arguments)
            other.syncs.clear()
            found = bilevel.Reverse(checkpoints, offload)(*arguments).grad
            waits.append(sum(other.syncs.values()))
            torch.testing.assert_close(found.cpu(), expected)
    assert late
    assert waits[0] == waits[1]


def test_the_stream_beside_waits_for_what_was_computed_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of `torch.cuda`, in their order."""
    log: list[Any] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.name = "main" if device is None else "beside"

        def wait_stream(self, other: Stream) -> None:
            log.append((self.name, "waits for", other.name))

        def record_event(self) -> str:
            log.append((self.name, "records"))
            return "event"

        def wait_event(self, event: str) -> None:
            log.append((self.name, "waits for", event))

    @contextmanager
    def entered(stream: Stream) -> Any:
        log.append(f"in {stream.name}")
        yield
        log.append(f"out of {stream.name}")

    cuda = SimpleNamespace(Stream=Stream, current_stream=lambda device: Stream(), stream=entered)
    monkeypatch.setattr(torch, "cuda", cuda)
    destination = SimpleNamespace(copy_=lambda source, non_blocking: log.append((source, non_blocking)))
    beside = state_storage._Beside(torch.device("cpu"))
    beside.wait(beside.copy([(destination, "source")]))  # type: ignore[list-item]
    assert log == [
        ("beside", "waits for", "main"),
        "in beside",
        ("source", True),
        "out of beside",
        ("beside", "records"),
        ("main", "waits for", "event"),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoints", ["all", "log"])
def test_on_a_gpu_states_in_the_hosts_memory_give_the_same_gradient(checkpoints: Any) -> None:
    sgd = bilevel.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    x, meta = torch.randn(64, 2048, device="cuda"), torch.zeros(64, device="cuda")
    problem = bilevel.GradientDescent(inner_loss, outer_loss, network(2048).cuda(), sgd)
    kept, offloaded = (bilevel.Reverse(checkpoints, offload)(problem, meta, [x] * 20, x) for offload in (None, "cpu"))
    torch.testing.assert_close(offloaded.grad, kept.grad)
