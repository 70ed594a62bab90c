"""The settings of a cleaning run."""

from __future__ import annotations

from dataclasses import dataclass, field

from bilevel import checks


@dataclass(frozen=True)
class Cleaning:
    """Learn a weight for every training example such that a network trained on wrong labels classifies well."""

    data: str = field(default="digits", metadata={"metavar": "digits|mnist|FILE"})
    """Data: `digits` ships with scikit-learn, `mnist` is read from --data-dir, or a .csv, .npz or .parquet file of your
    own, whose labels are taken as they are."""
    label: str = "label"
    """With a file, the column of the labels; columns other than this one and the next are features."""
    trusted_column: str = "trusted"
    """With a file, the column with a 1 in the rows whose label is known to be right, and a 0 in the others."""
    examples: int = 1000
    """N: training examples, each with a weight; some of their labels are replaced by wrong ones. A file gives all."""
    trusted: int = 250
    """Further examples with right labels, on which the outer loss is computed. A file marks its own."""
    wrong: float = 0.5
    """The chance that a label is replaced by one of the other classes. Those of a file are not replaced."""
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
        if self.data not in ("digits", "mnist") and not self.data.lower().endswith((".csv", ".npz", ".parquet")):
            raise ValueError(
                f"data={self.data!r}: there are 'digits', 'mnist', and files that end in .csv, .npz or .parquet"
            )
        if not 0 < self.wrong < 1:
            raise ValueError(
                f"wrong={self.wrong}: a fraction between 0 and 1 is needed; without wrong labels there is "
                "nothing to find"
            )
