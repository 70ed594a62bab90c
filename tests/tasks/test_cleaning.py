"""Cleaning: its hypergradient against plain PyTorch, its labels and batches, how it is judged, and a whole run."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import cli, randomness
from bilevel.tasks.cleaning import evaluation
from bilevel.tasks.cleaning import problem as cleaning
from bilevel.tasks.cleaning.config import Cleaning
from bilevel.tasks.image_data import LabelledImages, digits

CLASSES = 3
TINY = Cleaning(examples=20, trusted=6, wrong=0.4, width=5, inner_steps=6, inner_lr=0.3, evaluation_runs=2)


def some_data() -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 3, 4, generator=generator)
    return LabelledImages(images[:30], torch.arange(30) % CLASSES, images[30:], torch.arange(10) % CLASSES)


@pytest.fixture
def double() -> Iterator[None]:
    """Networks are made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("inner_batch", [0, 6])
def test_the_hypergradient_is_the_derivative_of_the_plain_loop(inner_batch: int) -> None:
    config, seed, plain = replace(TINY, inner_batch=inner_batch), 3, some_data()
    data = replace(plain, train_images=plain.train_images.double(), test_images=plain.test_images.double())
    made = cleaning.setup(config, data, seed)
    noisy = cleaning.noisy_labels(config, data, seed)
    phi = torch.randn(20, generator=torch.Generator().manual_seed(1))
    batches = made.inner_batches_of(draw=2)
    estimate = bilevel.Reverse()(made.problem, phi, batches, None, seed)

    def value(phi: Tensor) -> float:
        """As anybody would write it."""
        with randomness.torch_seeded(seed, randomness.INIT):
            network = cleaning.network(config, data)
        optimizer = torch.optim.SGD(network.parameters(), lr=config.inner_lr, momentum=config.momentum)
        for batch in batches:
            chosen = list(range(20)) if batch is None else batch.tolist()
            weights = 1 / (1 + torch.exp(-phi[chosen]))
            losses = torch.stack([cross_entropy(network(noisy.images[[i]]), noisy.labels[[i]]) for i in chosen])
            optimizer.zero_grad()
            ((weights * losses).sum() / weights.sum()).backward()
            optimizer.step()
        with torch.no_grad():
            return float(cross_entropy(network(noisy.trusted_images), noisy.trusted_labels))

    assert float(estimate.value) == pytest.approx(value(phi), rel=1e-12)
    direction = torch.randn(20, generator=torch.Generator().manual_seed(2))
    slope, step = float((estimate.grad * direction).sum()), 1e-5
    difference = (value(phi + step * direction) - value(phi - step * direction)) / (2 * step)
    assert abs(slope) > 1e-4
    assert slope == pytest.approx(difference, abs=1e-9)


def test_labels_are_wrong_as_often_as_asked_for_and_never_right_by_chance() -> None:
    data = digits()
    noisy = cleaning.noisy_labels(Cleaning(examples=1000, trusted=250, wrong=0.9), data, seed=0)
    assert float(noisy.wrong.float().mean()) == pytest.approx(0.9, abs=4 * np.sqrt(0.9 * 0.1 / 1000))
    shift = (noisy.labels - noisy.true_labels)[noisy.wrong] % 10
    assert np.bincount(shift.numpy(), minlength=10)[1:].min() > 10  # each of the nine others, some 100 times
    assert noisy.labels.min() >= 0
    assert noisy.labels.max() <= 9

    def rows(images: Tensor) -> list[bytes]:
        return [image.numpy().tobytes() for image in images]

    known = dict(zip(rows(data.train_images), data.train_labels.tolist(), strict=True))
    assert [known[r] for r in rows(noisy.images)] == noisy.true_labels.tolist()
    assert [known[r] for r in rows(noisy.trusted_images)] == noisy.trusted_labels.tolist()
    assert not set(rows(noisy.images)) & set(rows(noisy.trusted_images))


def test_labels_are_a_function_of_the_seed() -> None:
    data = some_data()
    first, again, other = (cleaning.noisy_labels(TINY, data, seed).labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_epoch_takes_every_example_once() -> None:
    labels, config = torch.zeros(20), replace(TINY, inner_batch=5, inner_steps=8)
    batches = [b.tolist() for b in cleaning.inner_batches(config, labels, seed=0, draw=1)]
    assert sorted(torch.tensor(batches[:4]).flatten().tolist()) == list(range(20))
    assert sorted(torch.tensor(batches[4:]).flatten().tolist()) == list(range(20))
    assert batches[:4] != batches[4:]
    assert batches != [b.tolist() for b in cleaning.inner_batches(config, labels, seed=0, draw=2)]
    assert list(cleaning.inner_batches(replace(config, inner_batch=20), labels, 0, 0)) == [None] * 8


# -- how it is judged --------------------------------------------------------------------------------------------------


def judged(phi: Tensor, config: Cleaning = TINY) -> dict[str, Any]:
    data = some_data()
    return evaluation.evaluate(config, data, cleaning.noisy_labels(config, data, 0), phi, 0, progress=False)


def test_who_knows_all_wrong_labels_has_all_of_the_area() -> None:
    wrong = cleaning.noisy_labels(TINY, some_data(), 0).wrong
    found = judged(torch.where(wrong, -40.0, 40.0))
    assert found["auc"] == 1
    assert found["found_among_as_many"] == 1
    # Weights of 0 and 1 train on the clean part, whatever else is there.
    assert found["test_accuracy"]["cleaned"]["runs"] == found["test_accuracy"]["clean_part"]["runs"]
    assert {len(found["weights"][name]) for name in ("wrong", "right")} == {int(wrong.sum()), int((~wrong).sum())}
    assert set(found["weights"]["wrong"]) == {0.0}
    opposite = judged(torch.where(wrong, 40.0, -40.0))
    assert opposite["auc"] == 0
    assert opposite["found_among_as_many"] < 0.6


def test_equal_weights_know_nothing() -> None:
    found = judged(torch.zeros(20))
    assert found["auc"] == 0.5
    accuracy = found["test_accuracy"]
    assert accuracy["cleaned"]["runs"] == accuracy["everything"]["runs"]
    for each in accuracy.values():
        assert each["mean"] == pytest.approx(np.mean(each["runs"]))
        assert each["std"] == pytest.approx(np.std(each["runs"], ddof=1))


def test_the_area_is_the_chance_that_a_wrong_label_weighs_less() -> None:
    phi = torch.randn(20, generator=torch.Generator().manual_seed(4))
    wrong = cleaning.noisy_labels(TINY, some_data(), 0).wrong
    pairs = phi[wrong][:, None] < phi[~wrong][None]
    assert judged(phi)["auc"] == pytest.approx(float(pairs.float().mean()))


def test_suspects_are_the_examples_with_the_smallest_weights() -> None:
    noisy = cleaning.noisy_labels(TINY, some_data(), 0)
    suspects = judged(torch.arange(20.0).flip(0))["suspects"]
    assert [each["example"] for each in suspects] == list(range(19, -1, -1))
    for each in suspects:
        number = each["example"]
        assert (each["label"], each["true_label"]) == (int(noisy.labels[number]), int(noisy.true_labels[number]))
        pixels = np.frombuffer(base64.b64decode(each["pixels"]), np.uint8).reshape(each["shape"])
        assert pixels[..., 0] / 255 == pytest.approx(noisy.images[number, 0].numpy(), abs=1 / 500)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_finds_wrong_labels_and_reports_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--examples 300 --trusted 150 --inner-steps 30 --outer-lr 0.4 --outer-steps 20 --evaluation-runs 2"
    cli.main(["run", "cleaning", *flags.split(), "--out", str(tmp_path / "run")])
    assert "area under the ROC curve" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["auc"] > 0.85
    accuracy = results["test_accuracy"]
    assert list(accuracy) == ["cleaned", "everything", "clean_part", "trusted_alone"]
    assert accuracy["cleaned"]["mean"] > accuracy["everything"]["mean"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 5
    for title in ("Weights of wrong and right labels", "Wrong labels found", "most suspicious examples"):
        assert title in page
    cli.main(["report", str(tmp_path / "run")])
    assert page.count("<h2>") == (tmp_path / "run" / "report.html").read_text().count("<h2>")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        *(({name: 0}, f"{name}=0") for name in ("examples", "trusted", "width", "inner_steps", "evaluation_runs")),
        *(({name: -1}, f"{name}=-1") for name in ("inner_batch", "evaluation_steps")),
        *(({name: value}, f"{name}={value}") for name in ("inner_lr", "outer_lr") for value in (0.0, float("nan"))),
        *(({"wrong": value}, f"wrong={value}") for value in (0.0, 1.0, float("nan"))),
        ({"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(fragment)}: "):
        Cleaning(**change)


def test_more_examples_than_there_are() -> None:
    with pytest.raises(ValueError, match="examples=28 and trusted=6: the training set holds 30"):
        cleaning.noisy_labels(replace(TINY, examples=28), some_data(), 0)
    with pytest.raises(ValueError, match="take more examples"):
        cleaning.noisy_labels(replace(TINY, examples=1), some_data(), 0)
