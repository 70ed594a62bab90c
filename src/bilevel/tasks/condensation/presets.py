"""The presets of condensation: the nine cells of the paper's Table 1, and a small form of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from bilevel.estimators import ForwardGradient, HessianFree, Reverse
from bilevel.tasks.condensation.config import Condensation
from bilevel.tasks.image_data import DataName
from bilevel.tasks.task import Preset
from bilevel.training.phases import Phase

_Dataset = Literal["mnist", "cifar10", "cifar100"]
_NAMES: Mapping[_Dataset, str] = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
IMAGES_PER_CLASS = (1, 10, 50)


RECIPE = Condensation(
    start="mean",
    labels="learned",
    blocks=3,
    inner_steps=30,
    inner_lr=0.03,
    inner_schedule="constant",
    momentum=0.8,
    outer_lr=0.02,
    clip_norm=1.0,
    evaluation_runs=3,
    whole_set_epochs=1,
)
"""The settings that did best in little time. Data, images per class and the width of the network are to be chosen."""


def _paper(data: _Dataset, ipc: int) -> Preset[Condensation]:
    """Return the settings of the paper for one cell (Tables 1 and F.1, and defaults of the released code)."""
    estimator = ForwardGradient(directions=32, chunk_size=4)
    config = Condensation(
        data=data,
        ipc=ipc,
        width=128,
        blocks=3,
        inner_steps=200 if (data, ipc) == ("cifar100", 50) else 100,
        inner_lr=0.01,
        inner_batch=100 if (data, ipc) == ("cifar100", 50) else 0,
        outer_lr=1e-2 if ipc == 1 else 5e-4,
        evaluation_steps=1000 if ipc == 1 else 10000,
        whole_set_epochs=50,
    )
    return Preset(
        config,
        estimator=estimator,
        outer_steps=10_000,
        accumulate=64 if data == "cifar100" else 16 if (data, ipc) == ("mnist", 1) else 32,
        before=() if ipc == 1 else (Phase(HessianFree(), steps=2000, patience=200),),
        summary=f"the paper's settings for {_NAMES[data]}, {ipc} per class: (FG)²U, width 128; for a GPU",
    )


def _small(data: _Dataset, ipc: int) -> Preset[Condensation]:
    """Return settings that show a result of the same cell on two cores in minutes, with exact hypergradients."""
    config = dataclasses.replace(
        RECIPE,
        data=data,
        ipc=ipc,
        inner_batch=0 if data != "cifar100" or ipc == 1 else 100,
        width=32 if data == "mnist" else 16,
    )
    if ipc > 1:
        config = dataclasses.replace(config, inner_steps=20, labels="fixed")
    return Preset(
        config,
        estimator=Reverse("graph" if ipc == 1 else "all"),
        outer_steps=200 if ipc == 1 else 60,
        summary=f"{_NAMES[data]}, {ipc} per class, exact hypergradients, a narrow network; minutes on two cores",
    )


_DIGITS: DataName = "digits"
PRESETS: Mapping[str, Preset[Condensation]] = {
    "digits": Preset(
        Condensation(data=_DIGITS),
        estimator=Reverse(),
        outer_steps=200,
        summary="scikit-learn's 8x8 handwritten digits, one image per class; needs no files",
    ),
    "digits-learned": Preset(
        Condensation(
            start="mean",
            labels="learned",
            unbounded=True,
            model="mlp",
            width=128,
            inner_steps=50,
            inner_lr=0.2,
            outer_lr=0.03,
            clip_norm=1.0,
        ),
        estimator=Reverse(),
        outer_steps=600,
        summary="the same with a wide MLP, learned labels and a start from class means: above 90 % in a minute or two",
    ),
    **{
        f"{data}-{ipc}{ending}": make(data, ipc)
        for data in _NAMES
        for ipc in IMAGES_PER_CLASS
        for ending, make in (("", _paper), ("-small", _small))
    },
}
"""The presets by name. Those without `-small` take days on a CPU."""
