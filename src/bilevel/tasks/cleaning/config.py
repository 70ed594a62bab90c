"""The settings of a cleaning run."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel import checks
from bilevel.tasks.image_data import DataName


@dataclass(frozen=True)
class Cleaning:
    """Learn a weight for every training example such that a network trained on wrong labels classifies well."""

    data: DataName = "digits"
    """Images: `digits` ships with scikit-learn, `mnist` is read from --data-dir."""
    examples: int = 1000
    """N: training examples, each with a weight; some of their labels are replaced by wrong ones."""
    trusted: int = 250
    """Further examples with right labels, on which the outer loss is computed."""
    wrong: float = 0.5
    """The chance that a label is replaced by one of the other classes."""
    width: int = 32
    """Hidden units of the network."""
    inner_steps: int = 100
    """T: inner steps of one training, and the default for evaluation."""
    inner_batch: int = 0
    """Training examples per inner step, drawn without replacement; 0 for all."""
    inner_lr: float = 0.2
    """Inner learning rate of SGD with momentum."""
    momentum: float = 0.9
    """Inner momentum."""
    outer_lr: float = 0.1
    """Outer learning rate of Adam."""
    evaluation_steps: int = 0
    """Steps of each training that evaluates the result; 0 for inner_steps."""
    evaluation_runs: int = 5
    """Newly initialised networks that evaluate the result."""
    device: str = "auto"
    """Torch device, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        checks.each_field(self, checks.whole_number, "examples", "trusted", "width", "inner_steps", "evaluation_runs")
        checks.each_field(self, checks.whole_number, "inner_batch", "evaluation_steps", at_least=0)
        checks.each_field(self, checks.positive, "inner_lr", "outer_lr")
        checks.fraction(self.momentum, "momentum")
        if not 0 < self.wrong < 1:
            raise ValueError(
                f"wrong={self.wrong}: a fraction between 0 and 1 is needed; without wrong labels there is "
                "nothing to find"
            )
