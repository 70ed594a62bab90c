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
    """Real images: `digits` ships with scikit-learn; the others are read from --data-dir: the files of `mnist`,
    `fashion-mnist`, `cifar10` and `cifar100`, a `folder` with a folder for each class, or a file `.npz`."""
    ipc: int = 1
    """Condensed images per class."""
    start: Literal["noise", "real", "mean"] = "noise"
    """Start of the condensed images: uniform noise (as in the paper), random real images, or the mean images of the
    clusters that k-means finds in each class (with --ipc 1 the mean image of each class)."""
    unbounded: bool = False
    """Let pixels leave the range from 0 to 1, within which the paper keeps them. Whitened images have no range."""
    whiten: bool = False
    """ZCA-whiten all images with the covariance of the real ones (Nguyen et al., ICLR 2021)."""
    flip: bool = False
    """Mirror half of the images, real and condensed, at random in each step."""
    shift: int = 0
    """Shift images, real and condensed, by up to so many pixels at random in each step."""
    rotate: float = 0.0
    """Rotate images, real and condensed, by up to so many degrees at random in each step."""
    labels: Literal["fixed", "learned"] = "fixed"
    """Labels of the condensed images: `fixed` ones, the classes, or `learned` ones, a distribution over the classes for
    each image (soft labels; Sucholutsky and Schonlau, 2021)."""
    learn_rates: Literal["no", "one", "each"] = "no"
    """Learn the factor of the inner learning rate: `one` for all steps, or one for `each` step (Wang et al., 2018)."""
    inner_loss: Literal["cross-entropy", "squared"] = "cross-entropy"
    """Loss of the trainings on condensed images: the cross-entropy, or half the squared distance between the outputs of
    the network and targets, as in kernel-based condensation (Nguyen et al., NeurIPS 2021)."""
    model: ModelName = "convnet"
    """Network trained on the condensed images."""
    width: int = 32
    """Filters per convolution, or units per hidden layer."""
    blocks: int = 2
    """Convolution blocks; each halves the image."""
    inner_steps: int = 30
    """T: inner steps of one training, and the default for evaluation."""
    least_inner_steps: int = 0
    """If positive, each estimate draws T between this and inner_steps. With the estimator truncated-reverse these are
    the random windows of RaT-BPTT (Feng et al., ICLR 2024)."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Inner optimiser: SGD with momentum, or Adam."""
    inner_lr: float = 0.02
    """Inner learning rate."""
    inner_schedule: Literal["cosine", "constant"] = "cosine"
    """Cosine decay of the inner learning rate to 0, or a constant one."""
    momentum: float = 0.9
    """Inner momentum of SGD, and the first of Adam's two decay rates."""
    weight_decay: float = 1e-4
    """Inner weight decay."""
    inner_batch: int = 0
    """Condensed images per inner step, drawn without replacement; 0 for all."""
    outer_batch: int = 512
    """Real images per outer step, drawn without replacement; all of them if there are fewer."""
    outer_lr: float = 0.05
    """Outer learning rate of Adam, with linear decay to 0."""
    clip_norm: float = 0.0
    """Largest norm of the hypergradient, to which longer ones are clipped; 0 for no limit."""
    watch: int = 2
    """Networks whose test accuracy on at most 2,000 images is recorded at 20 outer steps; 0 for none."""
    evaluation_models: tuple[ModelName, ...] = ()
    """Further kinds of networks that evaluate the condensed images."""
    evaluation_steps: int = 0
    """Steps of each training that evaluates the result; 0 for inner_steps."""
    evaluation_runs: int = 5
    """Newly initialised networks that evaluate the result."""
    whole_set_epochs: int = 20
    """Epochs of each training on the whole real set; 0 leaves this control out."""
    device: str = "auto"
    """Torch device, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        checks.each_field(self, checks.whole_number, "ipc", "width", "blocks", "inner_steps", "outer_batch")
        checks.each_field(self, checks.whole_number, "evaluation_runs")
        checks.each_field(
            self,
            checks.whole_number,
            "inner_batch",
            "least_inner_steps",
            "evaluation_steps",
            "whole_set_epochs",
            "shift",
            "watch",
            at_least=0,
        )
        checks.each_field(self, checks.positive, "inner_lr", "outer_lr")
        checks.each_field(self, checks.not_negative, "weight_decay", "clip_norm", "rotate")
        checks.fraction(self.momentum, "momentum")
        if self.least_inner_steps > self.inner_steps:
            raise ValueError(
                f"least_inner_steps={self.least_inner_steps} is larger than inner_steps={self.inner_steps}, the most "
                "steps of an estimate"
            )
        if self.learn_rates == "each" and self.evaluation_steps not in (0, self.inner_steps):
            raise ValueError(
                f"learn_rates=each learns {self.inner_steps} inner rates, and evaluation_steps={self.evaluation_steps} "
                "would need others; leave evaluation_steps at 0, or take learn_rates=one"
            )

    @property
    def augmented(self) -> bool:
        """Whether images are changed at random in each step."""
        return self.flip or self.shift > 0 or self.rotate > 0

    @property
    def steps_of_evaluation(self) -> int:
        """The number of steps of a training that evaluates the condensed images."""
        return self.evaluation_steps or self.inner_steps
