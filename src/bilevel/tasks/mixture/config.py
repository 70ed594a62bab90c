"""The settings of a mixture run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bilevel import checks


@dataclass(frozen=True)
class Mixture:
    """Learn in which proportions a model should be trained on several sources, to do best on a target."""

    data: Literal["rules", "text"] = "rules"
    """Sources: `rules` are generated and have a known answer, `text` reads .txt and .jsonl files from --data-dir."""
    act_as: Literal["weights", "sampling"] = "weights"
    """How proportions act: as `weights` of the sources' losses, or as the rates of `sampling` from the sources."""
    target: str = "target"
    """With data=text, the name of the file (without its ending) that holds the target."""
    tokens: int = 16
    """With data=rules, the number of different tokens."""
    examples: int = 8000
    """With data=rules, the number of training examples of each source."""
    target_examples: int = 4000
    """Examples of the target on which the outer loss is computed; as many others are kept for the test."""
    other_sources: int = 1
    """With data=rules, the number of sources that follow rules of their own, besides the target's and noise."""
    length: int = 64
    """With data=text, the number of bytes of an example."""
    width: int = 32
    """With data=text, the width of the transformer."""
    layers: int = 1
    """With data=text, the number of layers of the transformer."""
    inner_steps: int = 100
    """T: inner steps of one estimate."""
    stream: bool = False
    """Treat the inner loop as one long training, of which each estimate takes the next T steps."""
    batch: int = 512
    """Examples of one inner step: of each source with `weights`, of all together with `sampling`."""
    outer_batch: int = 0
    """Target examples of one outer loss; 0 for all."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Inner optimiser: SGD with momentum 0.9, or Adam with an epsilon of 1e-4."""
    inner_lr: float = 20.0
    """Inner learning rate."""
    outer_lr: float = 0.2
    """Outer learning rate of Adam; it falls to a tenth of this value over the run."""
    evaluation_steps: int = 200
    """Steps of each training that evaluates proportions."""
    evaluation_runs: int = 3
    """Newly initialised models that evaluate each choice of proportions."""
    trial_trainings: int = 0
    """Trainings of `evaluation_steps` that random search and regression may each spend; 0 leaves them out."""
    device: str = "auto"
    """Torch device, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        names = ("examples", "target_examples", "other_sources", "width", "layers", "inner_steps", "batch")
        checks.each_field(self, checks.whole_number, *names, "evaluation_steps", "evaluation_runs")
        checks.each_field(self, checks.whole_number, "tokens", "length", at_least=2)
        checks.each_field(self, checks.whole_number, "outer_batch", "trial_trainings", at_least=0)
        checks.each_field(self, checks.positive, "inner_lr", "outer_lr")
        if self.outer_batch > self.target_examples:
            raise ValueError(
                f"outer_batch={self.outer_batch}: there are target_examples={self.target_examples}; take at most that "
                "many, or 0 for all"
            )
        if 0 < self.trial_trainings < 4:
            raise ValueError(
                f"trial_trainings={self.trial_trainings}: the regression needs at least 4 trainings; 0 leaves it out"
            )
