"""The settings of a condensation run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bilevel import checks
from bilevel.tasks.condensation.models import ModelName
from bilevel.tasks.image_data import DataName


@dataclass(frozen=True)
class Condensation:
    """Learn a few synthetic images per class such that a network trained on them classifies real images well."""

    data: DataName = "digits"
    """Real images: `digits` ships with scikit-learn, `mnist` is read from --data-dir."""
    ipc: int = 1
    """Condensed images per class."""
    start: Literal["noise", "real"] = "noise"
    """Start of the condensed images: uniform noise (as in the paper) or random real images."""
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
    """Steps of each training that evaluates the result; 0 for inner_steps."""
    evaluation_runs: int = 5
    """Newly initialised networks that evaluate the result."""
    whole_set_epochs: int = 20
    """Epochs of each training on the whole real set."""
    device: str = "auto"
    """Torch device, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        checks.each_field(self, checks.whole_number, "ipc", "width", "blocks", "inner_steps", "outer_batch")
        checks.each_field(self, checks.whole_number, "evaluation_runs", "whole_set_epochs")
        checks.each_field(self, checks.whole_number, "inner_batch", "evaluation_steps", at_least=0)
        checks.each_field(self, checks.positive, "inner_lr", "outer_lr")
        checks.fraction(self.momentum, "momentum")
        checks.not_negative(self.weight_decay, "weight_decay")
