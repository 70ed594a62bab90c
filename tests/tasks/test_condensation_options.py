"""Options of condensation: augmentation, whitening, learned labels and rates, Adam, random windows, starts, presets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import bilevel
from bilevel import randomness
from bilevel.estimators import names
from bilevel.tasks import image_data
from bilevel.tasks.condensation import augmentation, condensed, evaluation, models
from bilevel.tasks.condensation import problem as condensation
from bilevel.tasks.condensation import task as task_module
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.presets import PRESETS
from bilevel.tasks.condensation.task import CondensationTask
from bilevel.tasks.condensation.whitening import Whitening, whitened
from bilevel.tasks.images.labelled import LabelledImages

SHAPE, CLASSES = (3, 8, 8), 3
TINY = Condensation(
    ipc=2, width=6, blocks=1, inner_steps=5, inner_lr=0.03, momentum=0.5, weight_decay=0.01, outer_batch=9, watch=0
)


def some_data(shape: tuple[int, int, int] = SHAPE, classes: int = CLASSES, per_class: int = 10) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(per_class)
    tests = torch.arange(2 * classes) % classes
    images = torch.rand(len(labels) + len(tests), *shape, generator=generator)
    return LabelledImages(images[: len(labels)], labels, images[len(labels) :], tests)


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# -- the hypergradient of every option ---------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {"labels": "learned"},
    "squared": {"inner_loss": "squared", "inner_lr": 0.005},
    "squared with labels": {"inner_loss": "squared", "inner_lr": 0.005, "labels": "learned"},
    "one rate": {"learn_rates": "one"},
    "a rate for each step": {"learn_rates": "each", "inner_schedule": "constant"},
    "Adam": {"inner_optimizer": "adam", "inner_lr": 0.02},
    "Adam with everything": {
        "inner_optimizer": "adam",
        "inner_lr": 0.02,
        "labels": "learned",
        "learn_rates": "each",
        "inner_batch": 4,
    },
    "augmentation": {"flip": True, "shift": 1, "rotate": 20.0},
    "augmentation of batches": {"flip": True, "shift": 2, "inner_batch": 4, "labels": "learned"},
    "random steps": {"least_inner_steps": 2},
    "resnet": {"model": "resnet", "width": 3},
}


def plain_loss(config: Condensation, data: LabelledImages, meta: dict[str, Tensor], seed: int, draw: int) -> float:
    """The outer loss as anybody would write it: torch's optimiser, a rate for each step, a loop."""
    with randomness.torch_seeded(seed, randomness.INIT):
        network: nn.Module = models.build(config.model, data.shape, data.classes, config.width, config.blocks)
    if config.inner_optimizer == "adam":
        betas = (config.momentum, 0.999)
        optimizer: Any = torch.optim.Adam(network.parameters(), betas=betas, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(network.parameters(), momentum=config.momentum, weight_decay=config.weight_decay)
    classes = torch.arange(CLASSES).repeat_interleave(config.ipc)
    for step, batch in enumerate(condensation.inner_batches(config, classes, seed, draw)):
        chosen, numbers = (batch["chosen"], batch["numbers"]) if isinstance(batch, dict) else (batch, None)
        which = slice(None) if chosen is None else chosen
        images = meta["images"][which]
        if numbers is not None:
            images = by_grid_sample(images, numbers)
        targets = meta["labels"][which].softmax(1) if config.labels == "learned" else classes[which]
        if config.inner_loss == "squared":
            fixed = 5 * torch.eye(CLASSES)[classes] - 5 / CLASSES
            targets = meta["labels"][which] if config.labels == "learned" else fixed[which]
        rate = config.inner_lr
        if config.inner_schedule == "cosine":
            rate *= (1 + math.cos(math.pi * step / config.inner_steps)) / 2
        if config.learn_rates != "no":
            rate *= math.exp(meta["log_rates"][step if config.learn_rates == "each" else 0])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        outputs = network(images)
        if config.inner_loss == "squared":
            (((outputs - targets) ** 2).sum() / 2 / len(outputs)).backward()
        else:
            cross_entropy(outputs, targets).backward()
        optimizer.step()
    outer = condensation.setup(config, data, 1, seed).outer_batch_of(draw)
    chosen, numbers = (outer["chosen"], outer["numbers"]) if isinstance(outer, dict) else (outer, None)
    images = data.train_images[chosen]
    if numbers is not None:
        images = by_grid_sample(images, numbers)
    if config.model == "resnet":  # an outer loss sees the model as the inner steps left it, in training mode
        network.train()
    with torch.no_grad():
        return float(cross_entropy(network(images), data.train_labels[chosen]))


def by_grid_sample(images: Tensor, numbers: Tensor) -> Tensor:
    """The same flips, shifts and rotations by PyTorch's own sampling."""
    height, width = images.shape[2:]
    mirrored, down, right, angle = numbers.to(images).unbind(1)
    sine, cosine, sign = angle.sin(), angle.cos(), 1 - 2 * mirrored
    # From a place in the result to one in the image: undo the shift, turn, mirror. affine_grid has its x axis first and
    # goes from -1 to 1 between the centres of the outermost pixels.
    h, w = (height - 1) / 2, (width - 1) / 2
    theta = torch.stack(
        [
            torch.stack([sign * cosine, sign * sine * h / w, sign * (-cosine * right - sine * down) / w], 1),
            torch.stack([-sine * w / h, cosine, (sine * right - cosine * down) / h], 1),
        ],
        1,
    )
    grid = affine_grid(theta, list(images.shape), align_corners=True)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("option", OPTIONS)
def test_the_hypergradient_is_the_derivative_of_the_plain_loop(option: str) -> None:
    data, seed, draw = some_data(), 3, 1
    data = replace(data, train_images=data.train_images.double())
    config = replace(TINY, **OPTIONS[option])
    setup = condensation.setup(config, data, outer_steps=1, seed=seed)
    meta = {name: value.double() for name, value in setup.meta.items()}
    inner, outer = setup.inner_batches_of(draw), setup.outer_batch_of(draw)
    estimate = bilevel.Reverse()(setup.problem, meta, inner, outer, seed)
    assert float(estimate.value) == pytest.approx(plain_loss(config, data, meta, seed, draw), rel=1e-12)
    for number, name in enumerate(meta):
        direction = torch.randn(meta[name].shape, generator=torch.Generator().manual_seed(number))
        step = 1e-7
        moved = [
            plain_loss(config, data, {**meta, name: meta[name] + sign * step * direction}, seed, draw)
            for sign in (1, -1)
        ]
        slope, difference = float((estimate.grad[name] * direction).sum()), (moved[0] - moved[1]) / (2 * step)
        assert abs(slope) > 1e-4
        # Central differences err by O(step²) and by rounding, 1e-16 / step.
        assert slope == pytest.approx(difference, rel=1e-5, abs=1e-8), name


def test_forward_mode_gives_the_same_with_augmentation() -> None:
    config, data = replace(TINY, flip=True, shift=1, rotate=15.0, learn_rates="one"), some_data()
    setup = condensation.setup(config, data, 1, 0)
    arguments = setup.problem, setup.meta, setup.inner_batches_of(0), setup.outer_batch_of(0)
    exact = bilevel.Reverse()(*arguments).grad
    coordinates = bilevel.Forward()(*arguments).grad
    for name, found in exact.items():
        assert torch.allclose(coordinates[name], found, rtol=1e-3, atol=1e-5)


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_flips_shifts_and_rotations_are_those_of_grid_sample() -> None:
    config = replace(TINY, flip=True, shift=3, rotate=40.0)
    numbers = augmentation.draw(config, 64, np.random.default_rng(0)).double()
    images = torch.rand(64, 2, 9, 7, dtype=torch.float64)
    assert torch.allclose(augmentation.apply(images, numbers), by_grid_sample(images, numbers), atol=1e-12)
    assert set(numbers[:, 0].tolist()) == {0.0, 1.0}
    assert set(numbers[:, 1].tolist()) == set(numbers[:, 2].tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert numbers[:, 3].abs().max() <= math.radians(40)
    assert numbers[:, 3].abs().max() > math.radians(30)


def test_simple_augmentations() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)

    def result(*numbers: float) -> Tensor:
        return augmentation.apply(image, torch.tensor([numbers])).round(decimals=4)

    assert torch.equal(result(0, 0, 0, 0), image)
    assert torch.equal(result(1, 0, 0, 0), image.flip(3))
    assert torch.equal(result(0, 1, 0, 0)[..., 1:, :], image[..., :-1, :])
    assert torch.equal(result(0, 0, -1, 0)[..., :-1], image[..., 1:])
    assert torch.equal(result(0, 0, 0, math.pi / 2), torch.rot90(image, 1, (3, 2)))


def test_augmentation_is_a_function_of_seed_draw_and_step() -> None:
    config, classes = replace(TINY, shift=3), torch.arange(CLASSES).repeat_interleave(2)

    def numbers(seed: int, draw: int) -> list[Any]:
        return [batch["numbers"].tolist() for batch in condensation.inner_batches(config, classes, seed, draw)]

    assert numbers(0, 0) == numbers(0, 0)
    assert numbers(0, 0) != numbers(0, 1)
    assert numbers(0, 0) != numbers(1, 0)
    assert numbers(0, 0)[0] != numbers(0, 0)[1]


# -- whitening ---------------------------------------------------------------------------------------------------------


def test_whitening_is_the_inverse_root_of_the_covariance() -> None:
    images = torch.rand(500, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double().cumsum(3)
    whitening = Whitening.of(images)
    flat = images.flatten(1).numpy()
    covariance = np.cov(flat, rowvar=False, bias=True)
    regular = covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    assert np.allclose(whitening.forward.numpy() @ regular @ whitening.forward.numpy(), np.eye(24), atol=1e-9)
    assert np.allclose(whitening.forward, whitening.forward.T)
    assert torch.allclose(whitening.undo(whitening.apply(images)), images)
    assert torch.allclose(whitening.apply(images).mean(0), torch.zeros(2, 3, 4, dtype=torch.float64), atol=1e-9)


def test_test_images_are_whitened_like_train_images() -> None:
    data = some_data()
    changed, whitening = whitened(data)
    assert torch.allclose(whitening.undo(changed.test_images), data.test_images, atol=1e-4)
    setup = condensation.setup(replace(TINY, whiten=True), changed, 1, 0)
    assert setup.update.project is None
    assert float(setup.meta["images"].std()) == pytest.approx(float(changed.train_images.std()), rel=0.2)


# -- starts ------------------------------------------------------------------------------------------------------------


def test_images_start_as_means() -> None:
    data = some_data()
    means = condensed.start(replace(TINY, ipc=1, start="mean"), data, 0)["images"]
    for label, image in enumerate(means):
        assert torch.allclose(image, data.train_images[data.train_labels == label].mean(0))


def test_images_start_as_centres_of_clusters() -> None:
    labels = torch.arange(2).repeat(50)
    dark = torch.rand(100, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 10
    bright = torch.arange(100) % 4 < 2  # half of each class
    images = dark + 0.5 * bright.view(-1, 1, 1, 1) + 0.3 * labels.view(-1, 1, 1, 1)
    data = LabelledImages(images, labels, images[:2], labels[:2])
    config = replace(TINY, start="mean")
    found = condensed.start(config, data, 0)["images"]
    assert torch.equal(found, condensed.start(config, data, 0)["images"])
    brightness = found.mean((1, 2, 3)).reshape(2, 2).sort(1).values
    assert torch.allclose(brightness, torch.tensor([[0.05, 0.55], [0.35, 0.85]]), atol=0.03)


def test_learned_labels_start_near_the_classes() -> None:
    meta = condensed.start(replace(TINY, labels="learned", learn_rates="each"), some_data(), 0)
    labels = condensed.targets(TINY, meta, torch.arange(CLASSES).repeat_interleave(2))
    assert labels.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    assert labels.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert labels.max() > 0.9
    assert meta["log_rates"].shape == (TINY.inner_steps,)


# -- random windows ----------------------------------------------------------------------------------------------------


def test_the_number_of_steps_is_drawn_for_each_estimate() -> None:
    config, classes = replace(TINY, least_inner_steps=3, inner_steps=6), torch.arange(6)
    counts = [len(condensation.inner_batches(config, classes, 0, draw)) for draw in range(60)]
    assert set(counts) == {3, 4, 5, 6}
    assert counts == [len(condensation.inner_batches(config, classes, 0, draw)) for draw in range(60)]
    assert counts != [len(condensation.inner_batches(config, classes, 1, draw)) for draw in range(60)]


@pytest.mark.parametrize("estimator", [bilevel.TruncatedReverse(3), bilevel.ForwardGradient(2), bilevel.Reverse()])
def test_fit_takes_another_number_of_steps_in_each_estimate(estimator: bilevel.Estimator, tmp_path: Path) -> None:
    config, data = replace(TINY, least_inner_steps=3, inner_steps=6), some_data()
    setup = condensation.setup(config, data, 4, 0)

    def fitted(steps: int, **settings: Any) -> bilevel.FitResult:
        return bilevel.fit(
            setup.problem,
            setup.meta,
            setup.inner_batches,
            setup.outer_batch,
            phases=[bilevel.Phase(estimator, steps, accumulate=2)],
            optimizer=bilevel.optimizer(torch.optim.Adam, lr=0.01),
            progress=False,
            **settings,
        )

    whole = fitted(4)
    fitted(2, out=tmp_path)
    resumed = fitted(4, out=bilevel.RunFolder(tmp_path, resume=True))
    assert not torch.equal(whole.meta["images"], setup.meta["images"])
    assert torch.equal(resumed.meta["images"], whole.meta["images"])


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_other_networks_and_learned_labels_are_evaluated() -> None:
    data = some_data()
    config = replace(
        TINY,
        labels="learned",
        learn_rates="one",
        evaluation_models=("mlp", "resnet"),
        evaluation_runs=2,
        whole_set_epochs=0,
    )
    meta = condensed.start(config, data, 0)
    found = evaluation.accuracies(config, data, meta, 0, progress=False)
    assert list(found) == ["condensed", "condensed_mlp", "condensed_resnet", "random_real", "class_means", "centroids"]
    # Labels that say the opposite, and a rate of zero, both count.
    still = {**meta, "log_rates": torch.full((1,), -50.0)}
    untrained = evaluation.accuracies(config, data, still, 0, progress=False)
    wrong = {**meta, "labels": meta["labels"].roll(1, dims=1)}
    assert evaluation.accuracies(config, data, wrong, 0, progress=False)["condensed"] != found["condensed"]
    assert untrained["condensed"] != found["condensed"]
    assert untrained["random_real"] == found["random_real"]


def test_accuracy_is_watched_over_the_outer_steps() -> None:
    config, data = replace(TINY, watch=2), some_data()
    setup = condensation.setup(config, data, 40, 0)
    result = bilevel.fit(
        setup.problem,
        setup.meta,
        setup.inner_batches,
        setup.outer_batch,
        estimator=bilevel.HessianFree(),
        steps=40,
        optimizer=setup.optimizer,
        callbacks=[task_module._watch(config, data, 40, 0)],
        progress=False,
    )
    watched = [row["outer_step"] for row in result.history if "watched_accuracy" in row]
    assert watched == list(range(1, 40, 2))
    assert result.history[-1]["watched_accuracy"] == evaluation.watched_accuracy(config, data, result.meta, 0)


# -- presets -----------------------------------------------------------------------------------------------------------

# T, accumulated estimates, outer learning rate, evaluation steps, Hessian-free phase first (the paper's Table F.1)
TABLE_F1 = {
    ("mnist", 1): (100, 16, 1e-2, 1000, False),
    ("mnist", 10): (100, 32, 5e-4, 10000, True),
    ("mnist", 50): (100, 32, 5e-4, 10000, True),
    ("cifar10", 1): (100, 32, 1e-2, 1000, False),
    ("cifar10", 10): (100, 32, 5e-4, 10000, True),
    ("cifar10", 50): (100, 32, 5e-4, 10000, True),
    ("cifar100", 1): (100, 64, 1e-2, 1000, False),
    ("cifar100", 10): (100, 64, 5e-4, 10000, True),
    ("cifar100", 50): (200, 64, 5e-4, 10000, True),
}


@pytest.mark.parametrize("cell", TABLE_F1)
def test_presets_have_the_settings_of_the_paper(cell: tuple[str, int]) -> None:
    preset, (steps, accumulate, rate, evaluation_steps, first) = PRESETS[f"{cell[0]}-{cell[1]}"], TABLE_F1[cell]
    config = preset.config
    assert (config.data, config.ipc) == cell
    assert (config.inner_steps, config.outer_lr, config.evaluation_steps) == (steps, rate, evaluation_steps)
    assert (config.width, config.blocks, config.momentum, config.inner_lr) == (128, 3, 0.9, 0.01)
    assert (config.weight_decay, config.outer_batch, config.start) == (1e-4, 512, "noise")
    assert config.inner_batch == (100 if cell == ("cifar100", 50) else 0)
    assert (config.labels, config.augmented, config.whiten) == ("fixed", False, False)
    assert (preset.outer_steps, preset.accumulate) == (10000, accumulate)
    assert names.describe(preset.estimator).startswith("forward-gradient(directions=32")
    assert [names.describe(phase.estimator) for phase in preset.before] == (["hessian-free"] if first else [])


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "digits"])
def test_every_preset_can_be_set_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS[name].config
    shape = (1, 28, 28) if config.data == "mnist" else (3, 32, 32)
    classes = 100 if config.data == "cifar100" else 10
    data = some_data(shape, classes, per_class=60)
    monkeypatch.setattr(image_data, "load", lambda *_: data)
    setup = CondensationTask().setup(config, None, 5, 0)
    assert setup.meta["images"].shape == (classes * config.ipc, *shape)
    assert len(setup.inner_batches_of(0)) == config.inner_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least_inner_steps": 9}, "least_inner_steps=9 is larger than inner_steps=5"),
        ({"learn_rates": "each", "evaluation_steps": 9}, "learn_rates=each learns 5 inner rates"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
