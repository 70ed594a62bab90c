"""`ExampleWeights`: its weights against a plain training loop, and the manners that scikit-learn expects."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.metrics import roc_auc_score
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from torch.nn.functional import cross_entropy

from bilevel.integrations.example_weights import ExampleWeights

_made: Any = make_classification(
    90, 6, n_informative=5, n_redundant=0, n_clusters_per_class=1, class_sep=2.0, random_state=0
)
X: np.ndarray
RIGHT: np.ndarray
X, RIGHT = _made
Y = RIGHT.copy()
WRONG = np.arange(0, 60, 5)
Y[WRONG] = 1 - Y[WRONG]
TRAIN, CLEAN = slice(0, 60), slice(60, 90)
SMALL: dict[str, Any] = {"outer_steps": 3, "inner_steps": 5, "random_state": 0}


def fitted(**settings: Any) -> ExampleWeights:
    return ExampleWeights(**{**SMALL, **settings}).fit(X[TRAIN], Y[TRAIN], X_clean=X[CLEAN], y_clean=RIGHT[CLEAN])


def test_updates_are_those_of_a_plain_loop_through_the_training() -> None:
    """Adam's first step hides the size of a hypergradient, so there are three."""
    torch.manual_seed(0)
    net = nn.Linear(6, 2)
    found = fitted(model=net, standardize=False)
    inputs, targets = torch.tensor(X, dtype=torch.float32), torch.tensor(Y)
    phi = torch.zeros(60, requires_grad=True)
    outer = torch.optim.Adam([phi], lr=0.1)
    for _ in range(SMALL["outer_steps"]):
        params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        speed = {name: torch.zeros_like(p) for name, p in params.items()}
        for _ in range(SMALL["inner_steps"]):
            weights = phi.sigmoid()
            logits = torch.func.functional_call(net, params, (inputs[TRAIN],))
            loss = (weights * cross_entropy(logits, targets[TRAIN], reduction="none")).sum() / weights.sum()
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            speed = {name: 0.9 * speed[name] + g for name, g in zip(params, gradients, strict=True)}
            params = {name: p - 0.05 * speed[name] for name, p in params.items()}
        trusted = cross_entropy(torch.func.functional_call(net, params, (inputs[CLEAN],)), torch.tensor(RIGHT[CLEAN]))
        (phi.grad,) = torch.autograd.grad(trusted, [phi])
        outer.step()
    np.testing.assert_allclose(found.weights_, phi.detach().sigmoid().numpy(), rtol=1e-3)


def test_the_final_network_is_trained_with_the_weights() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 2)
    before = copy.deepcopy(net.state_dict())
    found = fitted(model=net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    inputs = (X - X[TRAIN].mean(0)) / X[TRAIN].std(0)
    x, y, w = torch.tensor(inputs[TRAIN], dtype=torch.float32), torch.tensor(Y[TRAIN]), torch.tensor(found.weights_)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(SMALL["inner_steps"]):
        optimizer.zero_grad()
        ((w * cross_entropy(net(x), y, reduction="none")).sum() / w.sum()).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found.model_.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_wrong_labels_get_small_weights() -> None:
    """By chance the area of 12 among 60 examples has mean 0.5 and standard deviation 0.09."""
    found = fitted(outer_steps=40, inner_steps=30)
    assert roc_auc_score(np.isin(np.arange(60), WRONG), -found.weights_) > 0.75
    assert sorted(found.ranking_) == list(range(60))
    assert (np.diff(found.weights_[found.ranking_]) >= 0).all()
    assert found.score(X[CLEAN], RIGHT[CLEAN]) > 0.85


def test_examples_that_are_held_out_get_their_weights_from_a_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Any, Any]] = []

    def weights(self: ExampleWeights, inputs: Any, targets: Any, clean: Any, seed: int) -> torch.Tensor:
        runs.append((inputs[:, 0].long().tolist(), clean[0][:, 0].long().tolist()))
        return inputs[:, 0] / 100 + 0.001 * len(runs)

    monkeypatch.setattr(ExampleWeights, "_weights", weights)
    numbered = np.column_stack([np.arange(60), X[TRAIN]])
    found = ExampleWeights(standardize=False, **SMALL).fit(numbered, Y[TRAIN])
    assert len(runs) == 2
    assert not set(runs[0][1]) & set(runs[1][1])
    for kept, out in runs:
        assert sorted(kept + out) == list(range(60))
        assert len(out) == 12
    added = [0.001 if i in runs[1][1] else 0.002 if i in runs[0][1] else 0.0015 for i in range(60)]
    np.testing.assert_allclose(found.weights_, np.arange(60) / 100 + added, rtol=1e-4)


def test_tensors_and_words_as_labels_give_the_same_weights() -> None:
    words = np.array(["no", "yes"])
    found = ExampleWeights(**SMALL).fit(
        torch.tensor(X[TRAIN]), words[Y[TRAIN]], X_clean=torch.tensor(X[CLEAN]), y_clean=words[RIGHT[CLEAN]]
    )
    np.testing.assert_array_equal(found.weights_, fitted().weights_)
    assert set(found.predict(X)) <= {"no", "yes"}
    copied: Any = clone(found)
    assert copied.get_params() == found.get_params()


def test_images_mini_batches_and_batch_norm() -> None:
    def convnet(features: int, classes: int) -> nn.Module:
        convolution = [nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*convolution, nn.Linear(6, classes))

    images = X.reshape(-1, 1, 2, 3)
    found = ExampleWeights(convnet, batch_size=16, **SMALL)
    found.fit(images[TRAIN], Y[TRAIN], X_clean=images[CLEAN], y_clean=RIGHT[CLEAN])
    assert not found.model_.training
    probabilities = found.predict_proba(images[:1])  # in eval mode, one image is enough
    np.testing.assert_allclose(probabilities, found.predict_proba(images)[:1], rtol=1e-5)
    assert len(found.plot().axes) == 1


@pytest.mark.slow
def test_scikit_learn_finds_nothing_wrong() -> None:
    """Two checks are skipped by scikit-learn itself: array API needs an environment variable, and frames pandas."""
    results = check_estimator(ExampleWeights(outer_steps=2, inner_steps=20, random_state=0), on_fail=None, on_skip=None)
    failed = {result["check_name"] for result in results if result["status"] not in ("passed", "skipped")}
    assert failed == set()
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert skipped <= {"check_array_api_input", "check_classifier_data_not_an_array"}


@pytest.mark.parametrize(
    ("settings", "clean", "message"),
    [
        ({"outer_steps": 0}, {}, "outer_steps=0"),
        ({"validation_fraction": 1.5}, {}, r"validation_fraction=1\.5"),
        ({"validation_fraction": 0.6}, {}, "at most 30"),
        ({"validation_fraction": 0.001}, {}, "holds out 0"),
        ({}, {"X_clean": X[CLEAN]}, "belong together"),
        ({}, {"X_clean": X[CLEAN], "y_clean": RIGHT[CLEAN] + 5}, r"labels \[.*5.*6.*\], which do not occur"),
        ({}, {"X_clean": X[CLEAN, :3], "y_clean": RIGHT[CLEAN]}, "3 features"),
        ({}, {"X_clean": np.full((30, 6), np.nan), "y_clean": RIGHT[CLEAN]}, "NaN"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], clean: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleWeights(**{**SMALL, **settings}).fit(X[TRAIN], Y[TRAIN], **clean)
