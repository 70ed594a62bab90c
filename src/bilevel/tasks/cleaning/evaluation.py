"""Evaluation of how well wrong labels were found, and of new networks trained on the weighted examples."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import randomness
from bilevel.tasks.cleaning import files
from bilevel.tasks.cleaning.config import Cleaning
from bilevel.tasks.cleaning.pictures import NAMES
from bilevel.tasks.cleaning.problem import NoisyLabels, inner_batches, network, weighted_loss, weights
from bilevel.tasks.image_data import LabelledImages
from bilevel.tasks.trials import accuracies_of

SHOWN = 20
"""The number of images, those with the smallest weights, that the results contain."""


def evaluate(
    config: Cleaning, data: LabelledImages, noisy: NoisyLabels, phi: Tensor, seed: int, progress: bool
) -> dict[str, Any]:
    """Return the entries of `results.json`: `auc`, `test_accuracy`, the weights and others."""
    if not noisy.known:
        return _without_truth(config, data, noisy, phi, seed, progress)
    from sklearn.metrics import roc_auc_score, roc_curve

    learnt, wrong = weights(phi).cpu(), noisy.wrong.cpu()
    suspicion = (-phi).double().cpu().numpy()
    false_positives, true_positives, _ = roc_curve(wrong.numpy(), suspicion)
    suspects = torch.argsort(phi.cpu(), stable=True)
    return {
        "auc": float(roc_auc_score(wrong.numpy(), suspicion)),
        "found_among_as_many": float(wrong[suspects[: int(wrong.sum())]].float().mean()),
        "test_accuracy": accuracies(config, data, noisy, phi, seed, progress),
        "roc": {"false_positives": _rounded(false_positives), "true_positives": _rounded(true_positives)},
        "weights": {"wrong": _rounded(learnt[wrong].numpy()), "right": _rounded(learnt[~wrong].numpy())},
        "suspects": [_suspect(noisy, learnt, int(number)) for number in suspects[:SHOWN]],
    }


def accuracies(
    config: Cleaning, data: LabelledImages, noisy: NoisyLabels, phi: Tensor, seed: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Compute the test accuracy, as a fraction, after each of four kinds of training.

    They train with the learnt weights, with equal weights, on the rightly labelled examples only (which are unknown in
    practice), and on the trusted examples only (which are known). All of them train networks from the same
    initialisations, for the same number of steps, with the same learning rate.
    """
    images, labels, alike = noisy.images, noisy.labels, torch.ones_like(phi)
    trusted_alike = torch.ones_like(noisy.trusted_labels, dtype=phi.dtype)
    examples = {
        "cleaned": (weights(phi), images, labels),
        "everything": (alike, images, labels),
        "trusted_alone": (trusted_alike, noisy.trusted_images, noisy.trusted_labels),
    }
    if noisy.known:
        right = ~noisy.wrong
        clean = {"clean_part": (alike[right], images[right], labels[right])}
        examples = {**{name: examples[name] for name in ("cleaned", "everything")}, **clean, **examples}
    trials = {name: partial(_trained_accuracy, config, data, those, seed) for name, those in examples.items()}
    return accuracies_of(trials, NAMES, config.evaluation_runs, progress)


def _without_truth(
    config: Cleaning, data: LabelledImages, noisy: NoisyLabels, phi: Tensor, seed: int, progress: bool
) -> dict[str, Any]:
    """Return the entries about a file: nobody knows which of its labels are wrong."""
    found, learnt = files.load(config, seed), weights(phi).cpu()
    suspects = torch.argsort(phi.cpu(), stable=True).tolist()
    return {
        "test_accuracy": accuracies(config, data, noisy, phi, seed, progress),
        "weights": {"all": _rounded(learnt.numpy())},
        "suspects": [
            {
                "row": found.rows[number],
                "weight": round(float(learnt[number]), 4),
                "label": found.names[int(noisy.labels[number])],
            }
            for number in suspects
        ],
    }


def _trained_accuracy(
    config: Cleaning, data: LabelledImages, examples: tuple[Tensor, Tensor, Tensor], seed: int, number: int
) -> float:
    """Compute the test accuracy of newly initialised network `number` after training on these examples."""
    weight, images, labels = examples
    with randomness.torch_seeded(seed, randomness.CLEANING_NETWORK, number):
        model = network(config, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.inner_lr, momentum=config.momentum)
    batches = inner_batches(config, labels, randomness.derive(seed, randomness.CLEANING_BATCHES), number)
    for step in range(config.evaluation_steps or config.inner_steps):
        chosen = batches[step % len(batches)]
        here = slice(None) if chosen is None else chosen
        optimizer.zero_grad()
        weighted_loss(model, weight[here], images[here], labels[here]).backward()
        optimizer.step()
    with torch.no_grad():
        hits = [
            (model(x).argmax(1) == y).float().sum()
            for x, y in zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
        ]
    return float(torch.stack(hits).sum()) / len(data.test_labels)


def _suspect(noisy: NoisyLabels, learnt: Tensor, number: int) -> dict[str, Any]:
    """Return the entry for an example with a small weight. Its image is base64 of its bytes `[height, width,
    channels]`.
    """
    image = noisy.images[number].cpu().movedim(0, -1)
    pixels = (255 * image).round().to(torch.uint8).contiguous()
    return {
        "example": number,
        "weight": round(float(learnt[number]), 4),
        "label": int(noisy.labels[number]),
        "true_label": int(noisy.true_labels[number]),
        "shape": list(image.shape),
        "pixels": base64.b64encode(pixels.numpy().tobytes()).decode(),
    }


def _rounded(numbers: Any) -> list[float]:
    return [round(float(x), 4) for x in numbers]
