"""Adaptation of a model to a stream of documents, with one step per document and without hypergradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bilevel.tasks.online_lm import losses
from bilevel.tasks.online_lm.baselines import Weighting
from bilevel.tasks.online_lm.tokens import EncodedDocument

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def adapted(
    model: Any,
    documents: Sequence[EncodedDocument],
    weigh: Weighting,
    lr: float,
    optimizer: str = "sgd",
    precision: str = "float32",
) -> Any:
    """Return a copy of the model after one step on the weighted loss of each document, in order."""
    learner = copy.deepcopy(model).eval()
    parameters = [p for p in learner.parameters() if p.requires_grad]
    device = parameters[0].device
    steps = OPTIMIZERS[optimizer](parameters, lr=lr)
    for document in documents:
        ids = document.ids.to(device)
        with torch.no_grad():
            weights = weigh(document).to(device)
        with losses.autocast(precision, device):
            logits = learner(input_ids=ids, use_cache=False).logits
        loss = losses.weighted_nll(losses.widened(logits), ids, losses.widened(weights))
        steps.zero_grad()
        loss.backward()
        steps.step()
    return learner


def learned(weight_model: Any) -> Weighting:
    """Return the weighting that a trained weight model computes."""
    device = next(iter(weight_model.parameters())).device

    def weigh(document: EncodedDocument) -> torch.Tensor:
        return weight_model(input_ids=document.ids.to(device))

    return weigh
