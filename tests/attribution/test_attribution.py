"""Scores of training examples against plain PyTorch loops, and their validation against its definitions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import bilevel
from bilevel import randomness
from bilevel.attribution import (
    BASELINES,
    Attribution,
    Recipe,
    WeightedTraining,
    attribute,
    gradient_cosine,
    linear_datamodeling_score,
    metasmoothness,
    retrain,
)
from bilevel.attribution.lds import spearman
from bilevel.errors import CheckpointError, NoDependenceError, NonFiniteError, ReplayError

N, QUERIES = 12, 3
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 9, generator=GENERATOR, dtype=torch.float64), torch.arange(N) % 3
ASKED = torch.randn(QUERIES, 9, generator=GENERATOR, dtype=torch.float64), torch.tensor([0, 1, 2])
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 3)).double()
ADAM: dict[str, Any] = {"lr": 0.05, "eps": 1e-3}
RECIPE = Recipe(bilevel.optimizer(torch.optim.Adam, **ADAM), batch_size=5, epochs=2)


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def loss(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def training(**changes: Any) -> WeightedTraining:
    return WeightedTraining.of(**{"model": NET, "dataset": (X, Y), "loss": loss, "recipe": RECIPE, **changes})


def by_hand(weights: Tensor, run: WeightedTraining) -> nn.Module:
    """Train by a plain loop."""
    net = copy.deepcopy(NET)
    optimizer = torch.optim.Adam(net.parameters(), **ADAM)
    for numbers, *_ in run.inner_batches.at(run.seed):
        optimizer.zero_grad()
        (weights[numbers] * loss(net, (X[numbers], Y[numbers]))).sum().div(len(numbers)).backward()
        optimizer.step()
    return net


def test_scores_are_minus_the_differences_of_a_plain_loop() -> None:
    run = training()
    found = bilevel.attribute(run, ASKED)
    step = 1e-5
    for example in range(N):
        weights = [torch.ones(N).index_add(0, torch.tensor([example]), torch.tensor([s])) for s in (-step, step)]
        low, high = (loss(by_hand(w, run), ASKED).detach() for w in weights)
        torch.testing.assert_close(found.scores[:, example], -(high - low) / (2 * step), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.losses, loss(by_hand(torch.ones(N), run), ASKED).detach())
    assert found.scores.shape == (QUERIES, N)


@pytest.mark.parametrize("form", ["tuple", "dict", "examples", "tensor"])
def test_every_form_of_a_dataset_gives_the_same_scores(form: str) -> None:
    def of_dict(model: Any, batch: Any) -> Tensor:
        return loss(model, (batch["x"], batch["y"]))

    def of_tensor(model: Any, batch: Tensor) -> Tensor:
        return loss(model, (batch[:, :9], batch[:, 9].long()))

    forms: dict[str, tuple[Any, Any, Callable[..., Tensor]]] = {
        "tuple": ((X.numpy(), Y.numpy()), ASKED, loss),
        "dict": ({"x": X, "y": Y}, {"x": ASKED[0], "y": ASKED[1]}, of_dict),
        "examples": ([(X[i], Y[i]) for i in range(N)], ASKED, loss),
        "tensor": (torch.cat([X, Y[:, None]], 1), torch.cat([ASKED[0], ASKED[1][:, None]], 1), of_tensor),
    }
    dataset, queries, of = forms[form]
    found = attribute(training(dataset=dataset, loss=of), queries)
    torch.testing.assert_close(found.scores, attribute(training(), ASKED).scores)
    assert gradient_cosine(found.training, queries).shape == (QUERIES, N)


def test_a_retraining_is_a_plain_loop_without_the_other_examples() -> None:
    run = training()
    found = retrain(run, ASKED, subsets=3, fraction=0.75, progress=False)
    assert found.kept.sum(1).tolist() == [9, 9, 9]
    assert len({tuple(row.tolist()) for row in found.kept}) == 3
    for kept, losses in zip(found.kept, found.losses, strict=True):
        torch.testing.assert_close(losses, loss(by_hand(kept.double(), run), ASKED).detach())


def test_an_interrupted_validation_goes_on_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, run = tmp_path / "retrained.safetensors", training()
    whole = retrain(run, ASKED, subsets=5, progress=False)
    retrain(run, ASKED, subsets=3, file=file, progress=False)
    trained: list[Tensor] = []
    original = WeightedTraining.losses

    def counted(self: WeightedTraining, queries: Any, weights: Tensor | None = None) -> Tensor:
        trained.append(torch.ones(N) if weights is None else weights)
        return original(self, queries, weights)

    monkeypatch.setattr(WeightedTraining, "losses", counted)
    resumed = retrain(run, ASKED, subsets=5, file=file, progress=False)
    assert torch.equal(resumed.losses, whole.losses)
    assert len(trained) == 1 + 2  # with all examples, and the two subsets that were missing
    assert list(tmp_path.iterdir()) == [file]
    others: list[dict[str, Any]] = [{"fraction": 0.5}, {"seed": 1}]
    for other in others:
        with pytest.raises(CheckpointError, match="another run"):
            retrain(run, ASKED, subsets=5, file=file, progress=False, **other)
    with pytest.raises(CheckpointError, match="another run"):
        retrain(training(seed=1), ASKED, subsets=5, file=file, progress=False)
    file.write_bytes(b"{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        retrain(run, ASKED, subsets=5, file=file, progress=False)


def test_exact_scores_predict_retrainings_better_than_the_baselines() -> None:
    """Short steps of plain descent are almost linear in the weights, so the order of the losses is predicted."""
    run = training(recipe=Recipe(bilevel.optimizer(torch.optim.SGD, lr=0.05), batch_size=5, epochs=2))
    found = attribute(run, ASKED).lds(subsets=30, fraction=0.75, baselines=BASELINES, progress=False)
    assert set(found) == {"attribute", *BASELINES}
    assert found["attribute"].low > 0.95
    assert all(found[name].mean < found["attribute"].mean for name in BASELINES)


def by_scipy(one: np.ndarray, other: np.ndarray) -> float:
    result: Any = scipy.stats.spearmanr(one, other)
    return float(result.statistic)


def test_the_rank_correlation_is_that_of_scipy() -> None:
    one, other = np.random.default_rng(0).integers(0, 5, (2, 20, 3)).astype(float)
    expected = [by_scipy(a, b) for a, b in zip(one.T, other.T, strict=True)]
    np.testing.assert_allclose(spearman(one, other), expected, rtol=1e-12)
    assert spearman(np.ones((4, 1)), np.arange(4.0)[:, None]) == [0.0]


def test_the_score_of_each_query_is_the_correlation_of_sums_and_losses() -> None:
    retrained = retrain(training(), ASKED, subsets=8, progress=False)
    scores = attribute(training(), ASKED).scores
    found = linear_datamodeling_score(scores, retrained)
    for query in range(QUERIES):
        sums = [float(scores[query, kept].sum()) for kept in retrained.kept]
        expected = by_scipy(np.array(sums), -retrained.losses[:, query].numpy())
        assert found.correlations[query].item() == pytest.approx(expected)
    assert found.low <= found.mean <= found.high
    assert linear_datamodeling_score(-scores, retrained).mean == pytest.approx(-found.mean)


def test_the_cosine_is_that_of_gradients_of_the_trained_model() -> None:
    run = training()
    net = by_hand(torch.ones(N), run)

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(net.parameters()), retain_graph=True)])

    examples, asked = ([gradient(each) for each in loss(net, batch)] for batch in ((X, Y), ASKED))
    expected = torch.tensor([[torch.cosine_similarity(q, e, dim=0).item() for e in examples] for q in asked])
    torch.testing.assert_close(gradient_cosine(run, ASKED), expected)


def test_metasmoothness_is_the_agreement_of_neighbouring_differences() -> None:
    run, h = training(), 0.2
    signs = torch.tensor(randomness.generator(3, randomness.WEIGHT_DIRECTIONS, 0).choice([-1.0, 1.0], N))
    at = [torch.cat([p.detach().reshape(-1) for p in by_hand(1 + k * h * signs, run).parameters()]) for k in range(3)]
    first, second = at[1] - at[0], at[2] - at[1]
    expected = float((first.abs() * first.sign() * second.sign()).sum() / first.abs().sum())
    assert metasmoothness(run, h, directions=1, seed=3) == pytest.approx(expected)


def test_a_problem_of_ones_own_is_attributed() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    problem = bilevel.GradientDescent(
        inner_loss=lambda mean, weights, batch: (weights * (mean - values) ** 2).mean(),
        outer_loss=lambda mean, weights, queries: (mean - queries) ** 2,
        params=torch.tensor(0.0),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    found = attribute(WeightedTraining(problem, 3, inner_batches=60), torch.tensor([4.0, 0.0]))
    # θ = Σ w x / Σ w, so dθ/dw_i = (x_i − 3)/3
    expected = -2 * torch.tensor([[-1.0], [3.0]]) * (values - 3) / 3
    torch.testing.assert_close(found.scores, expected)
    assert found.most_helpful(2).tolist() == [[2, 1], [0, 1]]
    assert found.most_harmful(1).tolist() == [[0], [2]]
    with pytest.raises(TypeError, match=r"WeightedTraining\.of"):
        gradient_cosine(found.training, torch.tensor([4.0]))


def test_a_function_makes_the_model_from_the_seed() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3))

    same = [training(model=network, seed=seed).losses(ASKED) for seed in (0, 0, 1)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_scores_are_saved_whole_for_other_programs(tmp_path: Path) -> None:
    found = attribute(training(), ASKED)
    found.save(tmp_path / "scores")
    stored = safetensors.torch.load_file(tmp_path / "scores" / "scores.safetensors")
    assert torch.equal(stored["scores"], found.scores)
    assert torch.equal(stored["losses"], found.losses)
    np.testing.assert_array_equal(np.load(tmp_path / "scores" / "scores.npy"), found.scores.numpy())


def test_the_page_shows_pictures_of_images_and_numbers_of_other_examples(tmp_path: Path) -> None:
    found = attribute(training(), ASKED)
    with pytest.raises(TypeError, match="no images"):
        found.plot()
    found.page(tmp_path / "numbers.html", count=2)
    text = (tmp_path / "numbers.html").read_text(encoding="utf-8")
    assert "data:image/png" not in text
    assert all(str(i) in text for i in found.most_helpful(2)[0].tolist())

    def flat(model: Any, batch: Any) -> Tensor:
        return loss(model, (batch[0].flatten(1), batch[1]))

    images, asked = X.reshape(N, 1, 3, 3), (ASKED[0].reshape(-1, 1, 3, 3), ASKED[1])
    drawn = attribute(training(dataset=(images, Y), loss=flat), asked)
    drawn.page(tmp_path / "pictures.html", count=2)
    assert "data:image/png" in (tmp_path / "pictures.html").read_text(encoding="utf-8")
    assert len(drawn.plot(queries=2, count=3).axes) == 2 * 7


# -- bad input ---------------------------------------------------------------------------------------------------------


class Redrawn(Dataset[Any]):
    """Examples that are drawn anew, from a generator of the dataset's own."""

    generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return X[index] + self.generator.standard_normal(), Y[index]


NAN = X.clone()
NAN[4, 2] = math.nan


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recipe": Recipe(batch_size=13)}, ValueError, "12 examples, and batch_size=13"),
        ({"dataset": (X, Y[:5])}, ValueError, r"\[5, 12\] examples"),
        ({"dataset": (NAN, Y)}, NonFiniteError, "1 examples, the first of which is 4"),
        ({"dataset": Redrawn()}, ReplayError, "another example when the same one was read again"),
        ({"dataset": 3}, TypeError, "dataset is a int"),
        ({"recipe": 3}, TypeError, "recipe is 3"),
        ({"model": 3}, TypeError, "model is 3"),
    ],
)
def test_a_training_that_cannot_be_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        training(**changes)


def test_a_loss_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match='reduction="none"'):
        attribute(training(loss=lambda model, batch: loss(model, batch).mean()), ASKED)
    run = training(query_loss=lambda model, batch: loss(model, batch).mean())
    with pytest.raises(ValueError, match="the loss of queries returned a tensor of shape"):
        attribute(run, ASKED)


def test_a_query_without_gradient_is_named() -> None:
    def cut_off(model: Any, batch: Any) -> Tensor:
        return loss(model, batch) * torch.tensor([1.0, 0.0, 1.0])

    with pytest.raises(NoDependenceError, match=r"queries \[1\]"):
        attribute(training(query_loss=cut_off), ASKED)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(N), "all weights are 0"),
        (torch.ones(N - 1), r"\(11,\)"),
        (torch.full((N,), math.nan), "NaN"),
        (torch.ones(N, dtype=torch.int64), "floating-point"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(training(), ASKED, weights=weights)


def test_settings_of_the_validation_are_checked() -> None:
    found = attribute(training(), ASKED)
    for settings, message in (
        ({"subsets": 1}, "at least 2"),
        ({"fraction": 0.01}, "keeps 0"),
        ({"fraction": 1.5}, r"\[0, 1\)"),
        ({"baselines": ["trak"]}, "gradient cosine"),
        ({"baselines": {"mine": torch.zeros(2, 2)}, "subsets": 2}, r"scores has shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            found.lds(progress=False, **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="count=13"):
        found.most_helpful(13)
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        metasmoothness(found.training, step=0.7)
    with pytest.raises(TypeError, match=r"WeightedTraining\.of"):
        attribute(NET, ASKED)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="estimator is 3"):
        attribute(found.training, ASKED, estimator=3)  # pyright: ignore[reportArgumentType]
    assert isinstance(found, Attribution)
