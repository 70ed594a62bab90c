"""Batches by random access: the batch of step t is the same however and whenever it is reached."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy
import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.batches import require_batches


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sequence_like_any_other(steps: int) -> None:
    computed = bilevel.batches(lambda t: t * t, steps)
    expected = [t * t for t in range(steps)]
    assert len(computed) == steps
    assert list(computed) == expected
    assert list(reversed(computed)) == expected[::-1]
    assert [computed[-t] for t in range(1, steps + 1)] == expected[::-1]
    for piece in (slice(None), slice(1, None), slice(None, None, -1), slice(0, 100, 2), slice(-2, None)):
        assert computed[piece] == expected[piece]


@pytest.mark.parametrize("index", [3, -4, 100])
def test_there_is_nothing_beyond_the_ends(index: int) -> None:
    with pytest.raises(IndexError, match=f"batch {index} of 3"):
        bilevel.batches(lambda t: t, 3)[index]


def test_nothing_is_computed_before_it_is_asked_for_nor_kept() -> None:
    asked: list[int] = []

    def get(t: int) -> Any:
        asked.append(t)
        return t

    computed = bilevel.batches(get, 1000)
    assert asked == []
    assert (computed[3], computed[3], computed[-1]) == (3, 3, 999)
    assert asked == [3, 3, 999]


def test_no_batches() -> None:
    assert list(bilevel.no_batches(3)) == [None] * 3


@pytest.mark.parametrize("steps", [1, 3, numpy.int64(3)])
def test_a_whole_number_means_so_many_steps_without_data(steps: int) -> None:
    made = require_batches(steps)
    assert [made[t] for t in range(len(made))] == [None] * int(steps)


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_number_of_steps_is_at_least_one(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"inner_batches={wrong}: a whole number of at least 1"):
        require_batches(wrong)


@pytest.mark.parametrize("wrong", [True, 2.0, torch.tensor(3)])
def test_other_numbers_are_no_batches(wrong: Any) -> None:
    with pytest.raises(TypeError, match="the whole number T for T steps without data"):
        require_batches(wrong)


def test_every_verb_takes_a_whole_number_for_a_problem_without_data() -> None:
    problem = bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: 0.5 * (theta - phi).square().sum(),
        outer_loss=lambda theta, phi, batch: theta.square().sum(),
        params=torch.zeros(3, dtype=torch.float64),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    phi = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(bilevel.Reverse()(problem, phi, 4).grad, 2 * (1 - 0.5**4) ** 2 * phi)
    coarser = bilevel.ForwardGradient(2, control_variate=bilevel.CoarserProblem(steps=2))
    assert torch.equal(coarser(problem, phi, 4).grad, coarser(problem, phi, [None] * 4).grad)
    assert bilevel.plan(problem, phi, 4, memory="1GB").steps == 4
    (row,) = bilevel.compare(problem, phi, 4, estimators=[bilevel.Auto("1GB")])
    assert row.relative_error < 1e-12


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
Y = torch.linspace(1, 2, 8, dtype=torch.float64).cos()
WEIGHTS = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
T, RATE = 5, 0.2


def weighted(theta: Tensor, meta: Tensor, x: Tensor) -> Tensor:
    return (meta * (x @ theta - Y) ** 2).mean()


def clean(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
    return ((X @ theta - Y) ** 2).mean()


def regression(inner_loss: Any = weighted) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(
        inner_loss, clean, torch.zeros(3, dtype=torch.float64), bilevel.optimizer(torch.optim.SGD, lr=RATE)
    )


EXACT = {
    "reverse": bilevel.Reverse(),
    "reverse-sqrt": bilevel.Reverse("sqrt"),
    "graph": bilevel.Reverse("graph"),
    "truncated": bilevel.TruncatedReverse(T),
    "forward": bilevel.Forward(),
    "forward-chunked": bilevel.Forward(chunk_size=3),
    "basis": bilevel.ForwardGradient(8, "coordinate", chunk_size=3),
    "basis-shared": bilevel.ForwardGradient(8, "coordinate", tangents="shared", chunk_size=3),
    "basis-difference": bilevel.ForwardGradient(8, "coordinate", tangents="difference"),
    "zeroth-order": bilevel.ZerothOrder(8, 1e-4, distribution="coordinate"),
}


class Augmented(torch.utils.data.Dataset[Tensor]):
    """Noise on the inputs, from torch's, NumPy's and Python's global generators."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return T

    def __getitem__(self, t: int) -> Tensor:
        self.reads.append(t)
        noise = torch.randn_like(X) + torch.from_numpy(np.random.standard_normal(X.shape))
        return X * random.uniform(0.5, 1.5) + 0.3 * noise


def recorded(seed: int) -> list[Tensor]:
    """The batches that an inner loop of that seed sees."""
    seen: list[Tensor] = []

    def inner_loss(theta: Tensor, meta: Tensor, x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return weighted(theta, meta, x)

    bilevel.Reverse("graph")(regression(inner_loss), WEIGHTS, Augmented(), seed=seed)
    return seen


def test_a_dataset_that_draws_gives_one_trajectory_in_every_method() -> None:
    """The batches are written down once; a plain loop over them, differentiated by PyTorch, is the truth."""
    batches = recorded(seed=4)
    assert len(batches) == T
    assert not torch.equal(batches[0], batches[1])
    meta = WEIGHTS.clone().requires_grad_()
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for x in batches:
        (gradient,) = torch.autograd.grad(weighted(theta, meta, x), theta, create_graph=True)
        theta = theta - RATE * gradient
    value = clean(theta, meta, None)
    (truth,) = torch.autograd.grad(value, meta)
    for name, estimator in EXACT.items():
        estimate = estimator(regression(), WEIGHTS, Augmented(), seed=4)
        assert abs(estimate.value.item() - value.item()) < 1e-12, name
        error = (estimate.grad - truth).norm() / truth.norm()
        assert error < (1e-6 if name in ("zeroth-order", "basis-difference") else 1e-12), name
    assert not torch.equal(recorded(seed=5)[0], batches[0])


def test_noise_in_a_loss_is_one_trajectory_in_every_method() -> None:
    def noisy(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        return (
            weighted(theta, meta, X + np.random.rand() * 0.3) * random.uniform(0.5, 1.5) + torch.rand(()) * theta.sum()
        )

    truth = EXACT["graph"](regression(noisy), WEIGHTS, [None] * T, seed=2)
    for name, estimator in EXACT.items():
        estimate = estimator(regression(noisy), WEIGHTS, [None] * T, seed=2)
        assert abs(float(estimate.value - truth.value)) < 1e-12, name
        error = float((estimate.grad - truth.grad).norm() / truth.grad.norm())
        assert error < (1e-6 if name in ("zeroth-order", "basis-difference") else 1e-12), name


def test_a_batch_is_read_once_for_each_evaluation_of_a_step() -> None:
    for estimator, reads in ((bilevel.Reverse(), 2 * T), (bilevel.Reverse("graph"), T), (bilevel.Forward(), T)):
        data = Augmented()
        estimator(regression(), WEIGHTS, data)
        assert len(data.reads) == reads + 1  # one more, where the first draw from NumPy's generator is noticed


@pytest.mark.parametrize("name", EXACT)
def test_a_loss_may_take_a_batch_apart(name: str) -> None:
    """`pop` and `append` change containers of the loss's own, and the user's stay as they were."""
    batch = {"x": X, "labels": [Y, "kept"]}

    def popping(theta: Tensor, meta: Tensor, batch: dict[str, Any]) -> Tensor:
        labels = batch.pop("labels")
        labels.append("more")
        return (meta * (batch.pop("x") @ theta - labels[0]) ** 2).mean()

    estimate = EXACT[name](regression(popping), WEIGHTS, [batch] * T)
    assert list(batch) == ["x", "labels"]
    assert len(batch["labels"]) == 2
    expected = EXACT[name](regression(), WEIGHTS, [X] * T)
    assert torch.equal(estimate.grad, expected.grad)


def scaling_in_place(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
    return weighted(theta, meta, batch["x"].mul_(1.1))


@pytest.mark.parametrize("name", EXACT)
def test_data_changed_in_place_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape("batch['x'] in place")):
        EXACT[name](regression(scaling_in_place), WEIGHTS, [{"x": X.clone()}] * T)


@pytest.mark.parametrize("name", EXACT)
def test_data_made_afresh_may_be_changed_in_place(name: str) -> None:
    fresh = bilevel.batches(lambda t: {"x": X.clone()}, T)
    estimate = EXACT[name](regression(scaling_in_place), WEIGHTS, fresh)
    expected = EXACT[name](regression(), WEIGHTS, [X * 1.1] * T)
    assert torch.allclose(estimate.grad, expected.grad, rtol=1e-9, atol=0)


def test_an_array_changed_in_place_is_refused() -> None:
    def loss(theta: Tensor, meta: Tensor, batch: np.ndarray) -> Tensor:
        batch *= 1.1
        return weighted(theta, meta, torch.from_numpy(batch.copy()))

    with pytest.raises(ValueError, match="changed batch in place"):
        bilevel.Reverse()(regression(loss), WEIGHTS, [X.numpy().copy()] * T)


def test_an_outer_batch_changed_in_place_is_refused() -> None:
    problem = bilevel.GradientDescent(
        weighted,
        lambda theta, meta, batch: (batch["x"].mul_(2.0) @ theta).square().mean(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=RATE),
    )
    with pytest.raises(ValueError, match=re.escape("outer_batch['x'] in place")):
        bilevel.Reverse()(problem, WEIGHTS, [X] * T, {"x": X.clone()})


def test_fits_functions_are_called_under_a_seed_that_resuming_repeats(tmp_path: Path) -> None:
    """A shuffling DataLoader inside of `inner_batches`, and an augmented outer batch, go on where the run stopped."""
    data = torch.utils.data.TensorDataset(X, Y)

    def inner_batches(estimate: int) -> list[Any]:
        return list(torch.utils.data.DataLoader(data, batch_size=2, shuffle=True))

    def outer_batch(estimate: int) -> Tensor:
        return X + 0.1 * torch.randn_like(X) + np.random.rand() + random.random()

    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: ((batch[0] @ theta - batch[1]) ** 2).mean() + meta * theta.square().sum(),
        lambda theta, meta, x: ((x @ theta - Y) ** 2).mean(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=RATE),
    )

    def fit(steps: int, out: Path, resume: bool = False) -> list[float]:
        torch.manual_seed(len(str(out)) + steps)  # where the user's own generators are is no matter
        np.random.seed(steps)
        result = bilevel.fit(
            problem,
            torch.tensor(0.1, dtype=torch.float64),
            inner_batches,
            outer_batch,
            phases=[bilevel.Phase(bilevel.Reverse(), steps=4)],
            callbacks=[] if steps == 4 else [lambda step: interrupt(step, steps)],
            out=bilevel.RunFolder(out, resume=resume),
            progress=False,
        )
        return [row["outer_loss"] for row in result.history]

    def interrupt(step: Any, after: int) -> None:
        if step.number == after:
            raise KeyboardInterrupt

    whole = fit(4, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(2, tmp_path / "parts")
    assert fit(4, tmp_path / "parts", resume=True) == whole
    assert len(set(whole)) == 4
