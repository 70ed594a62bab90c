"""Everything runs on a second device as it does on the CPU, and the host waits for it a fixed number of times."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from other_device import DEVICE, MixedDevicesError, OtherDevice
from torch import Tensor, nn

import bilevel
from bilevel import trees
from bilevel.directions import distributions
from bilevel.unrolling import inner_loop, state_storage

torch.manual_seed(0)
X, Y, WEIGHTS = torch.randn(8, 3), torch.randn(8, 1), torch.linspace(0.5, 1.5, 8)
SGD = bilevel.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = bilevel.optimizer(torch.optim.Adam, lr=0.01, clip_norm=1.0)

ESTIMATORS: dict[str, bilevel.Estimator] = {
    "Reverse": bilevel.Reverse(),
    "Reverse(sqrt)": bilevel.Reverse("sqrt"),
    "Reverse(graph)": bilevel.Reverse("graph"),
    "Reverse(all, cpu)": bilevel.Reverse("all", offload="cpu"),
    "TruncatedReverse": bilevel.TruncatedReverse(2),
    "Forward": bilevel.Forward(chunk_size=4),
    "exact": bilevel.ForwardGradient(2, control_variate=bilevel.TruncatedReverse(1)),
    "gaussian": bilevel.ForwardGradient(2, "gaussian", chunk_size=1),
    "orthogonal": bilevel.ForwardGradient(2, "orthogonal"),
    "coordinate": bilevel.ForwardGradient(2, "coordinate"),
    "reached": bilevel.ForwardGradient(2, support="reached"),
    "shared": bilevel.ForwardGradient(3, tangents="shared", chunk_size=2),
    "difference": bilevel.ForwardGradient(2, tangents="difference"),
    "streaming": bilevel.StreamingForwardGradient(2),
    "ZerothOrder": bilevel.ZerothOrder(2),
    "PersistentES": bilevel.PersistentES(2),
    "Implicit": bilevel.Implicit(bilevel.Neumann(3)),
    "conjugate gradients": bilevel.Implicit(bilevel.ConjugateGradient(2, tolerance=1e-12, damping=100.0)),
    "Nystrom": bilevel.Implicit(bilevel.Nystrom(3)),
    "EmpiricalFisher": bilevel.Implicit(bilevel.EmpiricalFisher()),
    "HessianFree": bilevel.HessianFree(),
    "SAMA": bilevel.HessianFree(preconditioner="optimizer", mixed="difference", lookahead=True),
    "Penalty": bilevel.Penalty(),
    "SingleLoop": bilevel.SingleLoop(0.1),
}
ON_DISK = bilevel.Reverse("all", offload="disk")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))


def inner_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return (meta[:, None] * (model(x) - y).square()).mean()


def outer_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return (model(-x) - y).square().mean() + 1e-3 * meta.square().sum()


def case(
    put: Callable[[Any], Any], steps: int = 3, optimizer: Any = ADAM, loss: Any = inner_loss
) -> tuple[bilevel.GradientDescent, Tensor, list[Any], Any]:
    """A problem, φ and batches, put onto a device."""
    data, meta = put((X, Y)), put(WEIGHTS)
    return bilevel.GradientDescent(loss, outer_loss, put(network()), optimizer), meta, [data] * steps, data


class At:
    """Runs at once what a thread would run, in which the modes of this thread are not on."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        return type("Done", (), {"result": lambda _: result})()

    def shutdown(self, **_: Any) -> None: ...


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_storage, "ThreadPoolExecutor", At)


@pytest.fixture
def other() -> Iterator[OtherDevice]:
    with OtherDevice() as device, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Implicit|ZerothOrder|PersistentES")
        yield device


def assert_there(tree: Any) -> None:
    assert {leaf.device for leaf in trees.leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim} == {DEVICE}


def here(tree: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in trees.leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.sampled(every=3)
@pytest.mark.filterwarnings("ignore:Implicit")
@pytest.mark.parametrize("name", [*ESTIMATORS, "disk"])
def test_every_estimator_gives_there_what_it_gives_here(name: str) -> None:
    estimator = ESTIMATORS.get(name, ON_DISK)
    expected = estimator(*case(lambda tree: tree))
    with OtherDevice() as other:
        found = estimator(*case(other.put))
        assert_there((found.grad, found.state))
        gradient = here(found.grad)
    torch.testing.assert_close(gradient, here(expected.grad))


def syncs(name: str, steps: int, optimizer: Any) -> Counter[str]:
    """Copies to the host in one estimate, for a problem that has been estimated before."""
    with OtherDevice() as other:
        arguments = case(other.put, steps, optimizer)
        ESTIMATORS[name](*arguments)
        other.syncs.clear()
        ESTIMATORS[name](*arguments)
        return other.syncs


@pytest.mark.sampled(every=4)
@pytest.mark.filterwarnings("ignore:Implicit")
@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_host_waits_as_often_for_many_steps_as_for_few(name: str, optimizer: Any) -> None:
    few, many = syncs(name, 3, optimizer), syncs(name, 6, optimizer)
    assert few == many
    assert sum(few.values()) <= 20


def test_one_estimate_waits_once_to_see_whether_all_is_finite_and_repeats() -> None:
    waits = syncs("Reverse", 3, ADAM)
    assert sum(waits.values()) == 5, waits  # φ, the last state, repeated steps, dependence on φ, and the result


# -- what is built on estimates ----------------------------------------------------------------------------------------


def test_fit_is_resumed_there(other: OtherDevice, tmp_path: Path) -> None:
    problem, meta, batches, data = case(other.put)
    settings: dict[str, Any] = {"outer_batch": data, "estimator": bilevel.ForwardGradient(2), "progress": False}
    whole = bilevel.fit(problem, meta, batches, steps=4, **settings)
    bilevel.fit(problem, meta, batches, steps=2, out=tmp_path, **settings)
    resumed = bilevel.fit(problem, meta, batches, steps=4, out=bilevel.RunFolder(tmp_path, resume=True), **settings)
    assert_there(resumed.meta)
    torch.testing.assert_close(resumed.meta.cpu(), whole.meta.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "estimator", [bilevel.StreamingForwardGradient(2), bilevel.Reverse(), bilevel.Penalty()], ids=str
)
def test_streams_go_on_there(estimator: bilevel.Estimator, other: OtherDevice, tmp_path: Path) -> None:
    problem, meta, batches, data = case(other.put, optimizer=SGD)
    settings: dict[str, Any] = {"outer_batch": data, "estimator": estimator, "stream": True, "progress": False}
    whole = bilevel.fit(problem, meta, batches, steps=3, **settings)
    bilevel.fit(problem, meta, batches, steps=1, out=tmp_path, **settings)
    resumed = bilevel.fit(problem, meta, batches, steps=3, out=bilevel.RunFolder(tmp_path, resume=True), **settings)
    torch.testing.assert_close(resumed.meta.cpu(), whole.meta.cpu(), rtol=0, atol=0)


def test_accumulation_and_keeping_the_best(other: OtherDevice) -> None:
    problem, meta, batches, data = case(other.put)
    phases = [bilevel.Phase(bilevel.Reverse(), 2, accumulate=2)]
    result = bilevel.fit(problem, meta, batches, outer_batch=data, phases=phases, keep="best", progress=False)
    assert_there(result.meta)


def test_plan_and_auto(other: OtherDevice) -> None:
    problem, meta, batches, data = case(other.put)
    assert bilevel.plan(problem, meta, batches, data, memory="1GB").recommended is not None
    assert_there(bilevel.Auto("1GB")(problem, meta, batches, data).grad)


def test_compare(other: OtherDevice) -> None:
    estimators = [bilevel.TruncatedReverse(2), bilevel.ForwardGradient(2)]
    rows = bilevel.compare(*case(other.put), estimators=estimators, repeats=2, progress=False)
    assert [row.relative_error > 0 for row in rows] == [True, True]


@pytest.mark.slow
def test_check(other: OtherDevice) -> None:
    report = bilevel.check(*case(other.put), progress=False)
    assert report.passed, str(report)


def test_the_short_check(other: OtherDevice) -> None:
    with bilevel.experimental.short_check(True):
        estimate = bilevel.Reverse()(*case(other.put, loss=lambda *arguments: 2 * inner_loss(*arguments)))
    assert "derivatives of step" in estimate.diagnostics["checked"]


def test_solve_and_backward(other: OtherDevice) -> None:
    problem, meta, batches, data = case(other.put)
    meta.requires_grad_()
    bilevel.Reverse()(problem, meta, batches, data).value.backward()
    assert meta.grad is not None
    assert_there((meta.grad, bilevel.solve(problem, meta, batches)))


def test_vector_losses_and_tasks(other: OtherDevice) -> None:
    _, meta, batches, data = case(other.put, optimizer=SGD)
    several = bilevel.GradientDescent(
        inner_loss, lambda model, meta, batch: (model(batch[0]) - batch[1]).square()[:, 0], other.put(network()), SGD
    )
    assert bilevel.Reverse()(several, meta, batches, data).grad.shape == (8, 8)

    def linear(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        return (meta[:, None] * (batch[0] @ theta - batch[1]).square()).mean()

    descent = bilevel.GradientDescent(linear, linear, other.put(torch.zeros(3, 1)), SGD)
    many = other.put((X.expand(4, 8, 3), Y.expand(4, 8, 1)))
    assert_there(bilevel.Reverse()(bilevel.Tasks(descent, 4), meta, [many] * 3, many).grad)


# -- faults, planted on purpose ----------------------------------------------------------------------------------------


def test_a_tensor_that_was_left_on_the_cpu_is_found(other: OtherDevice) -> None:
    problem, meta, batches, data = case(
        other.put, loss=lambda model, meta, batch: inner_loss(model, meta, (X, batch[1]))
    )
    with pytest.raises(MixedDevicesError, match="on the CPU"):
        bilevel.Reverse()(problem, meta, batches, data)


def test_directions_that_stay_on_the_host_are_found(other: OtherDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    own = distributions.Directions.draw
    monkeypatch.setattr(distributions.Directions, "draw", lambda self, indices: [d.cpu() for d in own(self, indices)])
    with pytest.raises(MixedDevicesError):
        bilevel.ForwardGradient(2)(*case(other.put))


def test_numpy_is_refused_there(other: OtherDevice) -> None:
    with pytest.raises(TypeError, match="to numpy"):
        other.put(X).numpy()


def test_a_step_that_reads_a_number_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    own = inner_loop.InnerLoop.step

    def reads(self: Any, t: int, state: Any, meta: Any) -> Any:
        after = own(self, t, state, meta)
        float(trees.leaves(after.params)[0].detach().sum())
        return after

    monkeypatch.setattr(inner_loop.InnerLoop, "step", reads)
    assert syncs("Reverse", 6, SGD) - syncs("Reverse", 3, SGD)


def test_a_factory_without_a_device_is_found(other: OtherDevice) -> None:
    there = other.put(X)
    assert (there + torch.ones(8, 3, device=there.device)).device == DEVICE
    assert torch.zeros_like(there).device == DEVICE
    with pytest.raises(MixedDevicesError):
        torch.add(there, torch.ones(8, 3))
    assert there.cpu().device.type == "cpu"
    assert X.to(there).device == DEVICE
    assert X.to(DEVICE, torch.float64).dtype == torch.float64
    assert (there.requires_grad_().sum() * 2).device == DEVICE
