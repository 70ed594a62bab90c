"""The settings of a condensation run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bilevel.tasks.condensation.models import ModelName
from bilevel.tasks.image_data import DataName


@dataclass(frozen=True)
class Condensation:
    """Learn a few synthetic images per class on which a network trains as well as possible for the real set."""

    data: DataName = "digits"
    """Real images: `digits` ships with scikit-learn, `mnist` is read from --data-dir."""
    ipc: int = 1
    """Condensed images per class."""
    start: Literal["noise", "real"] = "noise"
    """Condensed images start as uniform noise (the paper) or as random real images."""
    model: ModelName = "convnet"
    """Network trained on the condensed images."""
    width: int = 32
    """Filters per convolution, or units per hidden layer."""
    blocks: int = 2
    """Convolution blocks; each halves the image."""
    inner_steps: int = 30
    """T: inner steps of one training, and the default for evaluation."""
    inner_lr: float = 0.02
    """Inner learning rate of SGD with momentum, with cosine decay to 0."""
    momentum: float = 0.9
    """Inner momentum."""
    weight_decay: float = 1e-4
    """Inner weight decay."""
    inner_batch: int = 0
    """Condensed images per inner step, drawn without replacement; 0 for all."""
    outer_batch: int = 512
    """Real images per outer step, drawn without replacement; all of them if there are fewer."""
    outer_lr: float = 0.05
    """Outer learning rate of Adam, with linear decay to 0."""
    evaluation_steps: int = 0
    """Steps of the trainings that judge the result; 0 for inner_steps."""
    evaluation_runs: int = 5
    """Fresh networks that judge the result."""
    whole_set_epochs: int = 20
    """Epochs of the trainings on the whole real set."""
    device: str = "auto"
    """`auto` takes a GPU if there is one; else a torch device."""

    def __post_init__(self) -> None:
        for name in ("ipc", "width", "blocks", "inner_steps", "outer_batch", "evaluation_runs", "whole_set_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a number of at least 1 is needed")
        for name in ("inner_batch", "evaluation_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: a number of at least 0 is needed")
        for name in ("inner_lr", "outer_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is needed")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: a number in [0, 1) is needed")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: a number of at least 0 is needed")
