"""Condensation: its hypergradient against plain PyTorch, its batches and images, its networks, and how it is judged."""

from __future__ import annotations

import copy
import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import randomness
from bilevel.tasks.condensation import condensed, evaluation, models, training
from bilevel.tasks.condensation import problem as condensation
from bilevel.tasks.condensation import task as task_module
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.condensation.task import CondensationTask
from bilevel.tasks.images.labelled import LabelledImages
from bilevel.training import checkpoint_files
from bilevel.training.outer_loop import OuterStep

SHAPE, CLASSES, PER_CLASS = (1, 6, 6), 3, 8
TINY = Condensation(
    ipc=2, width=4, blocks=1, inner_steps=4, inner_lr=0.1, weight_decay=0.01, outer_batch=9, evaluation_runs=3
)


def some_data(per_class: int = PER_CLASS, tests: int = 12) -> LabelledImages:
    """Images that are all different, in a random order, of as many of every class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(per_class)
    shuffled = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.rand(len(labels), *SHAPE, generator=generator)
    return LabelledImages(
        images, shuffled, torch.rand(tests, *SHAPE, generator=generator), torch.arange(tests) % CLASSES
    )


def separable(flip_tests: bool, tests: int = 12) -> LabelledImages:
    """Images that their brightest row classifies without error; with other labels on the test images if wanted."""

    def images(labels: Tensor) -> Tensor:
        made = 0.1 * torch.rand(len(labels), *SHAPE, generator=torch.Generator().manual_seed(1))
        for image, label in zip(made, labels, strict=True):
            image[0, 2 * int(label)] += 0.9
        return made

    train, test = torch.arange(CLASSES).repeat(60), torch.arange(tests) % CLASSES
    return LabelledImages(images(train), train, images(test), (test + 1) % CLASSES if flip_tests else test)


@pytest.fixture
def double() -> Iterator[None]:
    """Networks are made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# -- the bilevel problem -----------------------------------------------------------------------------------------------


def train_plainly(network: nn.Module, config: Condensation, images: Tensor, batches: Sequence[Any]) -> None:
    """As anybody would write it: torch's own SGD, torch's own schedule, a loop; `None` for a batch of everything."""
    labels = torch.arange(CLASSES).repeat_interleave(config.ipc)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=config.inner_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
    for batch in batches:
        chosen = slice(None) if batch is None else batch
        optimizer.zero_grad()
        cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("inner_batch", [0, 4])
@pytest.mark.parametrize(("model", "inner_lr"), [("convnet", 0.1), ("mlp", 0.5)])
def test_the_hypergradient_is_the_derivative_of_the_plain_loop(
    model: models.ModelName, inner_lr: float, inner_batch: int
) -> None:
    data, seed = some_data(), 3
    config = replace(
        TINY, model=model, width=8, inner_batch=inner_batch, inner_lr=inner_lr, momentum=0.5, inner_steps=5
    )
    setup = condensation.setup(config, data, outer_steps=1, seed=seed)
    images = setup.meta["images"].double()
    inner, outer = setup.inner_batches_of(draw=2), setup.outer_batch_of(draw=2)
    estimate = bilevel.Reverse()(setup.problem, {"images": images}, inner, outer, seed)

    def value(moved: Tensor) -> float:
        with randomness.torch_seeded(seed, randomness.INIT):
            network = models.build(model, SHAPE, CLASSES, config.width, config.blocks)
        train_plainly(network, config, moved, inner)
        with torch.no_grad():
            return float(cross_entropy(network(data.train_images[outer]), data.train_labels[outer]))

    assert float(estimate.value) == pytest.approx(value(images), rel=1e-13)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    slope = float((estimate.grad["images"] * direction).sum())
    # Central differences err by O(ε²), by rounding, 1e-16·h/ε, and where a ReLU's kink lies within ε; so ε is small.
    step = 1e-7
    difference = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    assert abs(slope) > 1e-3
    assert slope == pytest.approx(difference, abs=1e-8)


def test_every_outer_step_has_a_network_of_its_own() -> None:
    setup = condensation.setup(TINY, some_data(), outer_steps=1, seed=0)
    inner, outer = setup.inner_batches_of(draw=0), setup.outer_batch_of(draw=0)
    values = [float(bilevel.Reverse()(setup.problem, setup.meta, inner, outer, seed).value) for seed in (1, 2, 1)]
    assert values[0] == values[2] != values[1]


def test_images_are_brought_back_into_their_range() -> None:
    setup = condensation.setup(replace(TINY, outer_lr=5.0), some_data(), outer_steps=4, seed=0)
    assert setup.update.project is not None
    moved = setup.update.project({"images": torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5]), "labels": torch.tensor([7.0])})
    assert {name: value.tolist() for name, value in moved.items()} == {
        "images": [0.0, 0.0, 0.25, 1.0, 1.0],
        "labels": [7.0],
    }
    seen: list[Tensor] = []
    bilevel.fit(
        setup.problem,
        setup.meta,
        setup.inner_batches,
        setup.outer_batch,
        phases=[bilevel.Phase(bilevel.Reverse(), steps=1)],
        optimizer=setup.optimizer,
        update=setup.update,
        callbacks=[lambda step: seen.append(step.meta["images"])],
        progress=False,
    )
    # Adam's first step moves every entry that has a gradient by the whole learning rate, here five times the range.
    assert seen[0].min() == 0
    assert seen[0].max() == 1
    assert ((seen[0] == 0) | (seen[0] == 1)).float().mean() > 0.9


def test_the_outer_learning_rate_falls_to_zero() -> None:
    setup = condensation.setup(replace(TINY, outer_lr=0.3), some_data(), outer_steps=4, seed=0)
    optimizer, schedule = setup.optimizer.bind([torch.zeros(1, requires_grad=True)])
    assert schedule is not None
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.3, 0.225, 0.15, 0.075, 0.0])


# -- labels, batches, starting images, controls ------------------------------------------------------------------------


def test_labels_are_class_by_class() -> None:
    assert condensed.classes_of(TINY, some_data()).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("inner_batch", [1, 2, 4, 5])
def test_an_epoch_of_inner_batches_takes_every_image_once(inner_batch: int) -> None:
    labels = torch.arange(6)
    config = replace(TINY, inner_batch=inner_batch, inner_steps=14)
    batches = condensation.inner_batches(config, labels, seed=0, draw=0)
    assert len(batches) == 14
    per_epoch = -(-6 // inner_batch)
    epochs = [torch.cat([batches[t] for t in range(e, e + per_epoch)]) for e in range(0, 14 - per_epoch, per_epoch)]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(6))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_inner_batches_are_a_function_of_seed_draw_and_step() -> None:
    config, labels = replace(TINY, inner_batch=4, inner_steps=9), torch.arange(6)

    def steps(seed: int, draw: int, order: Any = range(9)) -> dict[int, list[int]]:
        batches = condensation.inner_batches(config, labels, seed, draw)
        return {t: batches[t].tolist() for t in order}

    assert steps(0, 0) == steps(0, 0, order=reversed(range(9)))
    assert steps(0, 0) != steps(0, 1)
    assert steps(0, 0) != steps(1, 0)


@pytest.mark.parametrize("inner_batch", [0, 6, 100])
def test_a_full_inner_batch_needs_no_indices(inner_batch: int) -> None:
    batches = condensation.inner_batches(replace(TINY, inner_batch=inner_batch), torch.arange(6), seed=0, draw=0)
    assert list(batches) == [None] * TINY.inner_steps


def test_outer_batches_are_a_function_of_seed_and_draw() -> None:
    data = some_data()

    def batch(seed: int, draw: int, **changes: Any) -> list[int]:
        config = replace(TINY, **changes)
        return condensation.setup(config, data, outer_steps=1, seed=seed).outer_batch_of(draw).tolist()

    assert len(set(batch(0, 0))) == len(batch(0, 0)) == TINY.outer_batch
    assert set(batch(0, 0)) <= set(range(CLASSES * PER_CLASS))
    assert batch(0, 0) == batch(0, 0, ipc=1, width=3, model="mlp", inner_batch=1)
    assert batch(0, 0) != batch(0, 1)
    assert batch(0, 0) != batch(1, 0)
    assert sorted(batch(0, 0, outer_batch=10**6)) == list(range(CLASSES * PER_CLASS))


def classes_of(images: Tensor, data: LabelledImages) -> list[int]:
    """The labels of training images, found by comparing pixels."""
    same = (images.flatten(1)[:, None] == data.train_images.flatten(1)).all(-1)
    assert same.sum(1).eq(1).all(), "not all of them are training images"
    return data.train_labels[same.float().argmax(1)].tolist()


@pytest.mark.parametrize("ipc", [1, 3, PER_CLASS])
def test_the_control_is_as_many_real_images_of_every_class(ipc: int) -> None:
    config, data = replace(TINY, ipc=ipc), some_data()
    labels = condensed.classes_of(config, data).tolist()
    for seed, number in itertools.product(range(2), range(3)):
        images = condensed.random_real_images(config, data, seed, number)
        assert classes_of(images, data) == labels
        assert len(images.unique(dim=0)) == len(images)
        assert torch.equal(images, condensed.random_real_images(config, data, seed, number))
    drawn = {
        str(condensed.random_real_images(config, data, seed, number).tolist())
        for seed, number in itertools.product(range(2), range(3))
    }
    assert len(drawn) == 6


def test_the_control_is_a_copy() -> None:
    data = some_data()
    condensed.random_real_images(TINY, data, 0, 0).zero_()
    assert data.train_images.min() > 0


def test_images_start_as_noise_or_as_real_ones() -> None:
    data = some_data()

    def start(seed: int, **changes: Any) -> Tensor:
        return condensation.setup(replace(TINY, **changes), data, outer_steps=1, seed=seed).meta["images"]

    noise = start(0)
    assert noise.shape == (CLASSES * 2, *SHAPE)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert noise.std() == pytest.approx(12**-0.5, abs=0.05)  # of the uniform distribution on [0, 1)
    assert torch.equal(noise, start(0))
    assert not torch.equal(noise, start(1))
    assert classes_of(start(0, start="real"), data) == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(start(0, start="real"), condensed.random_real_images(TINY, data, 0, 0))


def test_more_images_than_there_are_real_ones_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=f"ipc={PER_CLASS + 1}, but class 0 has {PER_CLASS} real images"):
        condensation.setup(replace(TINY, ipc=PER_CLASS + 1), some_data(), outer_steps=1, seed=0)


# -- networks ----------------------------------------------------------------------------------------------------------


def depends_on_its_input(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    images = torch.rand(16, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = network(images)
    return bool(outputs.std(0).mean() > 1e-2)


SIZES = [(3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (8, 28), (9, 40), (15, 16), (16, 15), (28, 28), (31, 32), (32, 32)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_convnet_has_as_many_blocks_as_its_images_allow(size: tuple[int, int]) -> None:
    shape, blocks = (1, *size), 7
    with pytest.raises(ValueError, match=f"blocks={blocks} on {size[0]}x{size[1]} images") as caught:
        models.convnet(shape, CLASSES, 4, blocks)
    allowed = re.search(r"take blocks <= (\d+)", str(caught.value))
    if allowed is None:
        assert "take model=mlp" in str(caught.value)
        most = 0
        torch.manual_seed(0)
        assert depends_on_its_input(models.build("mlp", shape, CLASSES, 8, 1), shape)
    else:
        most = int(allowed[1])
        assert most >= 1
        torch.manual_seed(0)
        for blocks in range(1, most + 1):
            assert depends_on_its_input(models.convnet(shape, CLASSES, 8, blocks), shape)
    with pytest.raises(ValueError, match=f"blocks={most + 1}"):
        models.convnet(shape, CLASSES, 4, most + 1)


def test_what_too_many_blocks_would_do() -> None:
    # The network of three blocks on 8×8 images, which is refused: its last map is 2×2 normalised numbers, their mean
    # 0, so the classifier sees the normalisation's biases whatever the image.
    layers = list(models.convnet((1, 8, 8), CLASSES, 8, 2))[:-2]
    block = list(models.convnet((8, 4, 4), CLASSES, 8, 1))[:-2]
    too_deep = nn.Sequential(*layers, *block, nn.Flatten(), nn.Linear(8, CLASSES))
    assert not depends_on_its_input(too_deep, (1, 8, 8))


def test_the_paper_s_network() -> None:
    # Three blocks of 128 filters on 28×28 images, which three poolings leave as 3×3.
    network = models.convnet((1, 28, 28), 10, width=128, blocks=3)
    convolutions = (9 * 1 + 1) * 128 + 2 * (9 * 128 + 1) * 128
    assert sum(p.numel() for p in network.parameters()) == convolutions + 3 * 2 * 128 + (9 * 128 + 1) * 10
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == 3 * ["Conv2d", "ReLU", "InstanceNorm2d", "AvgPool2d"] + ["Flatten", "Linear"]
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_other_network() -> None:
    network = models.mlp((3, 4, 5), 10, width=7)
    assert sum(p.numel() for p in network.parameters()) == (60 + 1) * 7 + (7 + 1) * 7 + (7 + 1) * 10
    assert network(torch.rand(2, 3, 4, 5)).shape == (2, 10)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        *(
            ({name: 0}, f"{name}=0")
            for name in ("ipc", "width", "blocks", "inner_steps", "outer_batch", "evaluation_runs")
        ),
        *(
            ({name: -1}, f"{name}=-1")
            for name in (
                "inner_batch",
                "evaluation_steps",
                "weight_decay",
                "whole_set_epochs",
                "shift",
                "watch",
                "rotate",
            )
        ),
        *(({name: value}, f"{name}={value}") for name in ("inner_lr", "outer_lr") for value in (0.0, -1.0)),
        *(
            ({name: value}, f"{name}={value}")
            for name in ("inner_lr", "outer_lr", "weight_decay", "momentum")
            for value in (float("nan"), float("inf"))
        ),
        ({"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(fragment)}: "):
        Condensation(**change)


# -- how it is judged --------------------------------------------------------------------------------------------------


def judged(config: Condensation, data: LabelledImages, images: Tensor, seed: int = 0) -> dict[str, Any]:
    return evaluation.accuracies(config, data, {"images": images}, seed, progress=False)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, nn.Module]]:
    """The networks of the trainings that judge, each as it was made and as it became."""
    made: list[tuple[nn.Module, nn.Module]] = []

    def remember(*args: Any) -> nn.Module:
        network = models.build(*args)
        made.append((copy.deepcopy(network), network))
        return network

    monkeypatch.setattr(training, "build", remember)
    return made


def flat(network: nn.Module) -> list[float]:
    return [number for parameter in network.parameters() for number in parameter.flatten().tolist()]


def test_all_of_them_train_the_same_fresh_networks(networks: list[tuple[nn.Module, nn.Module]]) -> None:
    judged(TINY, some_data(), torch.rand(CLASSES * 2, *SHAPE))
    starts = [flat(start) for start, _ in networks]
    kinds = [starts[number : number + 3] for number in range(0, len(starts), 3)]
    assert len(kinds) == 5  # condensed, random real, means, centroids, whole set
    assert all(kind == kinds[0] for kind in kinds)
    assert len({tuple(start) for start in kinds[0]}) == 3


def test_the_trainings_that_judge_are_plain_trainings(networks: list[tuple[nn.Module, nn.Module]]) -> None:
    config, data = replace(TINY, evaluation_steps=7), some_data()
    images = torch.rand(CLASSES * 2, *SHAPE)
    judged(config, data, images)
    controls = [condensed.random_real_images(config, data, 0, number) for number in range(3)]
    for (start, end), trained_on in zip(networks, [images] * 3 + controls, strict=False):
        train_plainly(start, config, trained_on, [None] * 7)
        assert flat(start) == pytest.approx(flat(end), abs=1e-5)  # of float32


def test_trainings_on_the_whole_set_see_every_epoch_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_data(per_class=60)  # more than a batch of 128
    orders: list[tuple[int, ...]] = []
    shuffle = torch.randperm

    def remember(*args: Any, **settings: Any) -> Tensor:
        orders.append(tuple(shuffle(*args, **settings).tolist()))
        return torch.tensor(orders[-1])

    monkeypatch.setattr(torch, "randperm", remember)
    judged(replace(TINY, whole_set_epochs=4), data, torch.rand(CLASSES * 2, *SHAPE))
    assert len(orders) == len(set(orders)) == 4 * TINY.evaluation_runs
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(len(data.train_labels)))}


def test_the_same_seed_gives_the_same_accuracies() -> None:
    data, images = some_data(tests=200), torch.rand(CLASSES * 2, *SHAPE, generator=torch.Generator().manual_seed(2))
    first = judged(TINY, data, images)
    torch.manual_seed(123)  # torch's own generator must not matter, nor be moved
    before = torch.get_rng_state()
    assert judged(TINY, data, images) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert judged(TINY, data, images, seed=1) != first


@pytest.mark.parametrize("ipc", [1, 2])
def test_condensed_images_that_are_a_control_do_as_well_as_the_control(ipc: int) -> None:
    # Run 0 of both then trains the same network on the same images. A width and a learning rate are taken at which
    # other networks, and other images, would do differently.
    config, data = replace(TINY, ipc=ipc, inner_steps=10, evaluation_runs=4), some_data(tests=500)
    for seed in range(3):
        images = condensed.random_real_images(config, data, seed, 0)
        found = judged(config, data, images, seed)
        assert found["condensed"]["runs"][0] == found["random_real"]["runs"][0]
        assert found["condensed"]["runs"][1:] != found["random_real"]["runs"][1:]


def test_mean_and_standard_deviation_are_those_of_the_runs() -> None:
    found = judged(TINY, some_data(tests=100), torch.rand(CLASSES * 2, *SHAPE))
    assert list(found) == ["condensed", "random_real", "class_means", "centroids", "whole_set"]
    for each in found.values():
        assert len(each["runs"]) == TINY.evaluation_runs
        assert each["mean"] == pytest.approx(sum(each["runs"]) / 3)
        assert each["std"] == pytest.approx(statistics.stdev(each["runs"]))
    assert judged(replace(TINY, evaluation_runs=1), some_data(), torch.rand(6, *SHAPE))["condensed"]["std"] == 0


@pytest.mark.parametrize("flipped", [False, True], ids=["like the training images", "with other labels"])
def test_accuracies_are_those_on_the_test_images(flipped: bool) -> None:
    # Whoever has learnt the training images well is right on all test images, or, with their labels moved on by one,
    # on none. More than 1000 test images, and more than one batch of training images.
    data = separable(flip_tests=flipped, tests=1003)
    config = Condensation(
        ipc=4, model="mlp", width=16, inner_steps=100, inner_lr=0.1, evaluation_runs=1, whole_set_epochs=60
    )
    images = condensed.random_real_images(config, data, 7, 0)
    found = judged(config, data, images)
    assert [found[name]["mean"] for name in found] == [0.0 if flipped else 1.0] * 5


def test_steps_of_the_trainings_that_judge() -> None:
    data, images = some_data(tests=300), torch.rand(CLASSES * 2, *SHAPE, generator=torch.Generator().manual_seed(2))

    def few(**steps: int) -> list[Any]:
        found = judged(replace(TINY, **steps), data, images)
        return [found["condensed"], found["random_real"]]

    assert few(inner_steps=9) == few(inner_steps=2, evaluation_steps=9)
    assert few(inner_steps=9) != few(inner_steps=2)


# -- what is reported --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (0.8, "10.0 points better than as many random real ones, and 5.0 points better than the mean images"),
        (0.72, "2.0 points better than as many random real ones, and 3.0 points worse than the mean images"),
        (0.45, "25.0 points worse"),
        (0.7, "0.0 points worse"),
    ],
)
def test_the_report_says_whether_the_images_were_worth_learning(
    images: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(mean: float) -> dict[str, Any]:
        return {"mean": mean, "std": 0.0, "runs": [mean]}

    monkeypatch.setattr("bilevel.tasks.condensation.task.read_json", lambda path: {"ipc": 1})
    arrays = {"images": np.zeros((3, *SHAPE), np.float32), "class_names": np.array(["a", "b", "c"])}
    monkeypatch.setattr("bilevel.tasks.condensation.task.load_images", lambda folder: arrays)
    names = ("condensed", "random_real", "class_means", "whole_set")
    accuracy = {name: found(mean) for name, mean in zip(names, (images, 0.7, 0.75, 0.9), strict=True)}
    first, *_ = CondensationTask().sections(tmp_path, {"accuracy": accuracy})
    assert words in first.words


# -- what is recorded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer_steps", [1, 3, 8, 100])
def test_images_are_kept_from_the_start_to_the_end(outer_steps: int, tmp_path: Path) -> None:
    start = torch.zeros(3, *SHAPE)
    callback = task_module._snapshots(tmp_path, outer_steps, {"images": start}, None)
    assert list(tmp_path.iterdir()) == []  # a run whose first step fails leaves nothing behind
    for number in range(1, outer_steps + 1):
        callback(OuterStep(number, {"images": start + number}, None, {}))  # type: ignore[arg-type]
    kept = {
        content["step"]: content["images"]
        for content in map(checkpoint_files.load, sorted(tmp_path.rglob("*.safetensors")))
    }
    assert list(kept) == sorted(kept)
    assert min(kept) == 0
    assert max(kept) == outer_steps
    assert len(kept) == min(outer_steps, 8) + 1
    for number, images in kept.items():
        assert torch.equal(images, start + number)
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1
