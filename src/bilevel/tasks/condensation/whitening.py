"""ZCA whitening: images without correlations between their pixels, as close as possible to the originals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.tasks.images.labelled import LabelledImages

REGULARISATION = 0.1
"""The share of the mean variance that is added to each eigenvalue of the covariance, as in Nguyen et al., 2021."""
_AT_ONCE = 4096


@dataclass(frozen=True)
class Whitening:
    """The linear map x ↦ (x − mean) · W with W = (C + 0.1 · tr(C)/d · I)^(−1/2), for the covariance C of flat images.

    Reference: Nguyen et al., "Dataset distillation with infinitely wide convolutional networks", NeurIPS 2021.
    """

    mean: Tensor
    """`[d]`."""
    forward: Tensor
    """The matrix W, `[d, d]`."""
    inverse: Tensor
    """The inverse of W, `[d, d]`."""

    @staticmethod
    def of(images: Tensor) -> Whitening:
        """Compute the whitening of images `[n, channels, height, width]`."""
        flat = images.flatten(1)
        mean = flat.mean(0)
        covariance = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=images.device)
        for part in flat.split(_AT_ONCE):
            centred = (part - mean).double()
            covariance += centred.T @ centred / len(flat)
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0) + REGULARISATION * values.mean()
        forward = (vectors * values.rsqrt()) @ vectors.T
        inverse = (vectors * values.sqrt()) @ vectors.T
        return Whitening(mean, forward.to(images), inverse.to(images))

    def apply(self, images: Tensor) -> Tensor:
        """Return whitened images."""
        return torch.cat([(part - self.mean) @ self.forward for part in images.flatten(1).split(_AT_ONCE)]).view_as(
            images
        )

    def undo(self, images: Tensor) -> Tensor:
        """Return the images of which `images` are the whitened ones."""
        return (images.flatten(1) @ self.inverse + self.mean).view_as(images)


def whitened(data: LabelledImages) -> tuple[LabelledImages, Whitening]:
    """Return the data set with whitened images, and the whitening, which is that of the train images."""
    whitening = Whitening.of(data.train_images)
    return (
        replace(data, train_images=whitening.apply(data.train_images), test_images=whitening.apply(data.test_images)),
        whitening,
    )
