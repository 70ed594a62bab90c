"""Batches in epochs: those of a DataLoader, as a function of the seed and the number of the estimate alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

import bilevel
from bilevel import trees

N = 11
X = torch.arange(3.0 * N, dtype=torch.float64).reshape(N, 3) / N
Y = torch.arange(N)


class Pairs(Dataset[Any]):
    """Map style; `noise` is an augmentation that draws from all three global generators."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(()).item() + np.random.rand() + random.random() if self.noise else 0.0
        return X[i] + drawn, Y[i]


def same(left: Any, right: Any) -> bool:
    pairs = zip(trees.leaves(left), trees.leaves(right), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def as_list(batches: Any) -> list[Any]:
    return [batches[t] for t in range(len(batches))]


def order(batches: Any) -> list[int]:
    return [int(i) for batch in as_list(batches) for i in batch[1]]


SOURCES: dict[str, Any] = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "TensorDataset": TensorDataset(X, Y),
    "map style": Pairs(),
    "Subset": Subset(Pairs(), range(N)),
    "list": [(X[i], Y[i]) for i in range(N)],
    "DataLoader": DataLoader(Pairs(), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_in_order_they_are_the_batches_of_a_loader(source: Any, drop_last: bool) -> None:
    described = bilevel.epochs(source, 4, epochs=2, shuffle=False, drop_last=drop_last)
    assert same(as_list(described.at(0)), 2 * list(DataLoader(Pairs(), batch_size=4, drop_last=drop_last)))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_shuffled_each_epoch_has_every_example_once_in_an_order_of_its_own(source: Any) -> None:
    described = bilevel.epochs(source, 4, epochs=3)
    orders = [order(described.at(seed, number)) for seed, number in ((0, 0), (0, 1), (1, 0))]
    epochs = [tuple(o[k * N : (k + 1) * N]) for o in orders for k in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len(set(epochs)) == 9
    torch.manual_seed(5)  # nothing else matters
    np.random.seed(5)
    again = bilevel.epochs(SOURCES["tensors"], 4, epochs=3)
    assert order(again.at(0, 1)) == orders[1]
    assert [len(batch[0]) for batch in as_list(described.at(0))] == [4, 4, 3] * 3


def test_steps_cut_the_epochs_and_any_step_can_be_read_alone() -> None:
    described = bilevel.epochs((X, Y), 4, steps=5)
    batches = described.at(3, 2)
    assert len(batches) == described.steps == 5
    assert same([batches[t] for t in (4, 0, 3, 1, 2)], [as_list(batches)[t] for t in (4, 0, 3, 1, 2)])
    assert order(batches)[:N] == order(bilevel.epochs((X, Y), 4, epochs=1).at(3, 2))


def test_a_dict_and_a_lone_tensor() -> None:
    batch = bilevel.epochs({"x": X, "y": Y.numpy()}, 4, steps=1, shuffle=False).at(0)[0]
    assert same(batch, {"x": X[:4], "y": Y[:4]})
    assert torch.equal(bilevel.epochs(X, 4, steps=1, shuffle=False).at(0)[0], X[:4])


def test_pandas_frames() -> None:
    pandas = pytest.importorskip("pandas", reason="the package pandas is not installed")
    frame = pandas.DataFrame(
        {"x": X[:, 0].numpy(), "y": Y.numpy(), "word": list("abcdefghijk")}, index=range(50, 50 + N)
    )
    batch = bilevel.epochs(frame, 4, steps=1, shuffle=False).at(0)[0]
    assert same(batch, {"x": X[:4, 0], "y": Y[:4], "word": list("abcd")})
    assert same(bilevel.epochs((frame["x"], Y), 4, steps=1, shuffle=False).at(0)[0], (X[:4, 0], Y[:4]))


def test_a_loader_gives_its_batch_size_its_collate_function_and_its_order() -> None:
    def collate(examples: list[Any]) -> Any:
        return {"n": len(examples), "x": torch.stack([x for x, _ in examples])}

    described = bilevel.epochs(DataLoader(Pairs(), batch_size=5, collate_fn=collate, drop_last=True))
    assert (described.batch_size, described.steps, described.shuffle) == (5, 2, False)
    assert same(described.at(0)[1], {"n": 5, "x": X[5:10]})
    assert bilevel.epochs(DataLoader(Pairs(), batch_size=5, shuffle=True)).shuffle


@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation_is_a_function_of_seed_number_and_step(workers: int) -> None:
    described = bilevel.epochs(Pairs(noise=True), 4, epochs=2, workers=workers)
    wanted = as_list(bilevel.epochs(Pairs(noise=True), 4, epochs=2).at(7, 3))
    batches = described.at(7, 3)
    ways = [*range(6), *reversed(range(6)), 4, 1]
    assert same([batches[t] for t in ways], [wanted[t] for t in ways])
    assert not same(wanted[0][0].sum(), described.at(7, 4)[0][0].sum())


def test_an_error_in_a_reading_process_is_raised_here() -> None:
    class Broken(Pairs):
        def __getitem__(self, i: int) -> Any:
            raise KeyError("no such file")

    with pytest.raises(KeyError, match="no such file"):
        bilevel.epochs(Broken(), 4, workers=1).at(0)[0]


# -- used --------------------------------------------------------------------------------------------------------------


def inner_loss(theta: Tensor, weights: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return (weights[y].sigmoid() * (x @ theta - y / N) ** 2).mean()


def outer_loss(theta: Tensor, weights: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return ((x @ theta - y / N) ** 2).mean()


PROBLEM = bilevel.GradientDescent(
    inner_loss, outer_loss, torch.zeros(3, dtype=torch.float64), bilevel.optimizer(torch.optim.SGD, lr=0.05)
)
PHI = torch.linspace(-1, 1, N, dtype=torch.float64)


@pytest.mark.parametrize("workers", [0, 1])
def test_estimators_solve_and_a_loop_by_hand_see_the_same_batches(workers: int) -> None:
    described: Any = bilevel.epochs(Pairs(), 4, steps=5, workers=workers)
    estimate = bilevel.Reverse("sqrt")(PROBLEM, PHI, described, (X, Y), seed=4)
    phi = PHI.clone().requires_grad_()
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for batch in described.at(4):
        theta = theta - 0.05 * torch.autograd.grad(inner_loss(theta, phi, batch), theta, create_graph=True)[0]
    torch.testing.assert_close(bilevel.solve(PROBLEM, PHI, described, seed=4).params, theta.detach())
    torch.testing.assert_close(estimate.grad, torch.autograd.grad(outer_loss(theta, phi, (X, Y)), phi)[0])
    forward = bilevel.ForwardGradient(N, "coordinate")(PROBLEM, PHI, described, (X, Y), seed=4)
    torch.testing.assert_close(forward.grad, estimate.grad)


def fit(steps: int, out: Any = None, inner: Any = None, outer: Any = None) -> bilevel.FitResult:
    inner = bilevel.epochs(Pairs(noise=True), 4, steps=5) if inner is None else inner
    outer = bilevel.epochs((X, Y), 3) if outer is None else outer
    return bilevel.fit(PROBLEM, PHI, inner, outer, 2, estimator=bilevel.Reverse(), steps=steps, progress=False, out=out)


def test_fit_takes_other_batches_for_each_estimate_and_resumes_exactly(tmp_path: Path) -> None:
    whole = fit(4)
    described, outer = bilevel.epochs(Pairs(noise=True), 4, steps=5), bilevel.epochs((X, Y), 3)
    by_function = fit(4, inner=lambda k: described.at(2, k), outer=lambda k: outer.batch(2, k))
    assert torch.equal(whole.meta, by_function.meta)
    assert sorted(int(i) for k in range(4) for i in outer.batch(2, k)[1]) == list(range(N))  # one epoch: 3 + 3 + 3 + 2

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(step: Any) -> None:
        if step.number == 2:
            raise Stopped

    with pytest.raises(Stopped):
        bilevel.fit(
            PROBLEM, PHI, described, outer, 2, estimator=bilevel.Reverse(), steps=4, progress=False,
            out=bilevel.RunFolder(tmp_path, checkpoint_every=1), callbacks=[stop],
        )  # fmt: skip
    resumed = fit(4, out=bilevel.RunFolder(tmp_path, resume=True))
    assert torch.equal(resumed.meta, whole.meta)


# -- errors ------------------------------------------------------------------------------------------------------------


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


WEIGHTED = WeightedRandomSampler([1.0] * N, N)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": Endless(), "batch_size": 2}, r"can only be read from the beginning.*list\(dataset\)"),
        ({"dataset": 5, "batch_size": 2}, "tensors, arrays, a pandas frame, a DataLoader or a dataset"),
        ({"dataset": (X, Y)}, "batch_size is missing"),
        ({"dataset": (X, Y[:3]), "batch_size": 2}, r"have \[11, 3\] examples"),
        ({"dataset": {"x": X, "y": 1}, "batch_size": 2}, r"dataset\['y'\] is a int"),
        ({"dataset": (X, Y), "batch_size": 0}, "batch_size=0"),
        ({"dataset": (X, Y), "batch_size": 2, "steps": 2, "epochs": 1}, "pass one of them"),
        ({"dataset": (X, Y), "batch_size": 20, "drop_last": True}, "make no batch of 20.*drop_last=False"),
        ({"dataset": [], "batch_size": 20}, "has 0 examples"),
        ({"dataset": (X, Y), "batch_size": 2, "collate_fn": list}, "indexed as a whole; leave it out"),
        ({"dataset": torch.tensor(1.0), "batch_size": 2}, "the first one counts the examples"),
        (
            {"dataset": np.array(["2020-01-01"], dtype="datetime64[D]"), "batch_size": 1},
            "of which there are no tensors",
        ),
        ({"dataset": DataLoader(Pairs(), 2, sampler=WEIGHTED)}, "WeightedRandomSampler.*pass shuffle=True"),
        ({"dataset": (X, Y), "batch_size": 2, "workers": -1}, "workers=-1"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bilevel.epochs(**arguments)


# -- NumPy arrays and plain numbers as meta parameters -----------------------------------------------------------------


def numbers_loss(theta: Tensor, meta: Any, batch: Any) -> Tensor:
    return ((theta - meta["target"]) ** 2).sum() + meta["net"](theta).sum() + meta["decay"] * theta.square().sum()


def numbers_problem() -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        numbers_loss,
        lambda theta, meta, batch: theta.square().sum(),
        torch.ones(2, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=lambda meta: meta["rate"]),
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


def test_arrays_and_numbers_come_back_as_such() -> None:
    meta = {"target": np.array([0.5, -1.0]), "decay": 0.25, "rate": np.float64(0.1), "net": net()}
    as_tensors = {**meta, **{k: torch.tensor(meta[k], dtype=torch.float64) for k in ("target", "decay", "rate")}}
    found = bilevel.Reverse()(numbers_problem(), meta, 3).grad
    wanted = bilevel.Reverse()(numbers_problem(), as_tensors, 3).grad
    assert isinstance(found["target"], np.ndarray)
    assert type(found["decay"]) is float
    assert type(found["rate"]) is np.float64
    for name in ("target", "decay", "rate"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)
    torch.testing.assert_close(found["net"], wanted["net"])
    torch.testing.assert_close(
        bilevel.solve(numbers_problem(), meta, 3).params, bilevel.solve(numbers_problem(), as_tensors, 3).params
    )


def test_fit_returns_numpy_and_hands_it_to_project_and_callbacks() -> None:
    meta = {"target": np.array([0.5, -1.0]), "decay": 0.25, "rate": np.float64(0.1), "net": net()}
    before, seen = meta["target"].copy(), []
    result = bilevel.fit(
        numbers_problem(),
        meta,
        3,
        estimator=bilevel.Reverse(),
        steps=2,
        progress=False,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
        update=bilevel.OuterUpdate(project=lambda m: {**m, "target": np.clip(m["target"], -0.3, 0.3), "decay": 0.5}),
        callbacks=[lambda step: seen.append(step.meta)],
    )
    assert abs(result.meta["target"]).max() <= 0.3
    assert result.meta["decay"] == 0.5
    assert type(result.meta["rate"]) is np.float64
    assert result.meta["net"] is meta["net"]
    assert isinstance(seen[0]["target"], np.ndarray)
    np.testing.assert_array_equal(meta["target"], before)


@pytest.mark.parametrize("wrong", [1, True, np.array([1, 2]), np.array(["a"]), np.array([1j])], ids=repr)
def test_other_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="floating-point"):
        bilevel.Reverse()(PROBLEM, {"a": wrong}, 3)
