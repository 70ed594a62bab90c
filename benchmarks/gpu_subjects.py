"""The problems that `benchmarks/gpu.py` measures: at full size for a GPU, and at toy size for a trial without one.

Memory and time depend on shapes and not on what the numbers say, so images, documents and weights are random. Only the
condensation of digits needs real images.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import torch
from models import Subject
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel
from bilevel.tasks import image_data
from bilevel.tasks.condensation.models import build


@dataclass(frozen=True)
class Setting:
    """Where and at which size the parts are measured."""

    device: torch.device
    small: bool
    data_dir: Path | None = None
    seconds: float = 300.0
    """How long the condensation may take."""


@dataclass(frozen=True)
class Images:
    """A setting of the paper's condensation."""

    shape: tuple[int, int, int]
    per_class: int
    width: int
    blocks: int
    real: int
    """Real images in the outer loss."""


CLASSES = 10
FULL = {"MNIST-1": Images((1, 28, 28), 1, 128, 3, 512), "CIFAR-10-10": Images((3, 32, 32), 10, 128, 3, 512)}
TOY = {"MNIST-1": Images((1, 16, 16), 1, 8, 3, 16), "CIFAR-10-10": Images((3, 16, 16), 2, 8, 3, 16)}


def images(setting: Setting, name: str) -> Images:
    """Return the sizes of one of the paper's settings."""
    return (TOY if setting.small else FULL)[name]


def network(sizes: Images) -> nn.Module:
    """Return the paper's ConvNet for these images, newly initialised."""
    return build("convnet", sizes.shape, CLASSES, sizes.width, sizes.blocks)


def convnet(setting: Setting, name: str, autocast: bool = False) -> Subject:
    """Return the condensation problem of one of the paper's settings, with random images.

    Args:
        setting: the device and the size.
        name: "MNIST-1" or "CIFAR-10-10".
        autocast: whether the losses are computed under bfloat16 autocast.
    """
    sizes, device = images(setting, name), setting.device
    torch.manual_seed(0)
    model = network(sizes).to(device)
    condensed = torch.rand(CLASSES * sizes.per_class, *sizes.shape)
    real, real_labels = torch.rand(sizes.real, *sizes.shape).to(device), torch.arange(sizes.real).to(device) % CLASSES
    labels = torch.arange(CLASSES, device=device).repeat_interleave(sizes.per_class)

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        if not autocast:
            return cross_entropy(model(x), y)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return cross_entropy(model(x).float(), y)

    return Subject(
        model,
        lambda model, meta: loss(model, meta, labels),
        lambda model: loss(model, real, real_labels),
        condensed.to(device),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
    )


@dataclass(frozen=True)
class LanguageModel:
    """One hypergradient of the weight model of online-lm."""

    problem: bilevel.GradientDescent
    weight_model: nn.Module
    documents: list[Tensor]
    outer_batch: Any


def language_model(setting: Setting, name: str, steps: int) -> LanguageModel:
    """Return the problem of the task online-lm with `steps` documents, and random weights.

    Args:
        setting: the device; at toy size, every name stands for a tiny model.
        name: "distilgpt2" or "gpt2", with 82 and 124 million parameters.
        steps: T; one document of 512 tokens is one inner step.
    """
    from online_lm_memory import MODELS, outer_batch
    from transformers import GPT2Config, GPT2LMHeadModel

    from bilevel.tasks.online_lm.config import OnlineLM
    from bilevel.tasks.online_lm.problem import problem
    from bilevel.tasks.online_lm.weight_model import WeightModel

    shape = {**MODELS["tiny" if setting.small else name]}
    if setting.small:
        shape |= {"vocab_size": 100, "n_embd": 16}
    tokens = 16 if setting.small else 512
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    model: Any = GPT2LMHeadModel(GPT2Config(**shape, **rates, **ends)).eval()
    model = model.to(setting.device)
    documents = torch.randint(shape["vocab_size"], (steps, 1, tokens)).to(setting.device)
    with setting.device:  # what is made inside lies there
        outer = outer_batch(model, shape["vocab_size"])
    weight_model = WeightModel.on_top_of(model)
    nn.Module.to(weight_model, setting.device)
    return LanguageModel(problem(OnlineLM(inner_lr=1e-3), model), weight_model, list(documents), outer)


# -- the condensation of real digits -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condensing:
    """The condensation of MNIST with one image per class, or of scikit-learn's digits where MNIST is not at hand."""

    data_name: str
    data: image_data.LabelledImages
    sizes: Images
    steps: int
    """T."""

    @property
    def labels(self) -> Tensor:
        """The labels of the condensed images."""
        return torch.arange(CLASSES, device=self.data.train_labels.device)

    def new_network(self) -> nn.Module:
        """Return a network that has not been trained."""
        return network(self.sizes).to(self.data.train_images.device)

    def problem(self) -> bilevel.GradientDescent:
        """Return the bilevel problem: training on the condensed images, judged on real ones."""
        sgd = bilevel.optimizer(
            torch.optim.SGD,
            lr=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            schedule=functools.partial(CosineAnnealingLR, T_max=self.steps),
        )
        data, labels = self.data, self.labels
        return bilevel.GradientDescent(
            lambda model, meta, batch: cross_entropy(model(meta), labels),
            lambda model, meta, chosen: cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]),
            lambda meta: self.new_network(),
            sgd,
        )

    def real_batch(self, number: int) -> Tensor:
        """Return the indices of the real images of one estimate."""
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(self.data.train_labels), (self.sizes.real,), generator=generator)
        return chosen.to(self.data.train_labels.device)

    def accuracy(self, condensed: Tensor, steps: int, seed: int) -> float:
        """Return the test accuracy of a new network that is trained on the condensed images alone."""
        torch.manual_seed(seed)
        model = self.new_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        schedule = CosineAnnealingLR(optimizer, T_max=steps)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(condensed), self.labels).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = [
                (model(x).argmax(1) == y).sum()
                for x, y in zip(self.data.test_images.split(1000), self.data.test_labels.split(1000), strict=True)
            ]
        return float(torch.stack(right).sum()) / len(self.data.test_labels)


def condensing(setting: Setting) -> Condensing:
    """Return the condensation for a folder with MNIST's files, or of scikit-learn's 8×8 digits without one."""
    name: image_data.DataName = "digits" if setting.data_dir is None else "mnist"
    data = image_data.load(name, setting.data_dir).to(setting.device)
    width, real = (8, 64) if setting.small else (128, 512)
    sizes = Images(data.shape, 1, width, 3 if name == "mnist" else 2, real)
    return Condensing(name, data, sizes, 5 if setting.small else 100)
