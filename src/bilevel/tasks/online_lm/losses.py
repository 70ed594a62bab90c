"""The inner and outer losses, on logits `[batch, length, vocabulary]`. Position i predicts token i + 1.

All estimators use these functions, so exact reverse mode and (FG)²U have the same objective. (The code released with
the paper averaged the answer's loss over ignored positions for one method and not for the other, used a real token as
the mark of ignored positions, and measured the divergence from the current model.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from bilevel.tasks.online_lm.tokens import IGNORED


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute −log p(label_{i+1} | …label_i) for every position except the last, `[batch, length − 1]`.

    It is 0 at ignored positions.
    """
    targets = labels[:, 1:]
    flat = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(targets.shape)


def weighted_nll(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Compute (1/n) Σ_i w_i · nll_i over the n predicted tokens, where w_i is the weight of token i.

    With weights of one it is the usual loss of a language model. It is not divided by the sum of the weights, because
    their size determines how much is learnt.

    Args:
        logits: `[batch, length, vocabulary]`.
        labels: `[batch, length]`.
        weights: `[batch, length]`.
    """
    found = token_nll(logits, labels) * weights[:, 1:]
    return found.sum() / counted(labels)


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean −log p over the tokens of answers. It does not depend on the length of prompts and padding."""
    return token_nll(logits, labels).sum() / counted(labels)


def kl_from_initial(logits: Tensor, initial_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean of KL(p_initial ‖ p) over positions with mask 1; p_initial is the model before any document."""
    log_probs = log_softmax(logits, -1)
    each = (initial_log_probs.exp() * (initial_log_probs - log_probs)).sum(-1)
    return (each * mask).sum() / mask.sum()


def widened(values: Tensor) -> Tensor:
    """Return bf16 values, which autocast computes, as float32, and all other values unchanged."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def counted(labels: Tensor) -> Tensor:
    """Return the number of predicted tokens."""
    return (labels[:, 1:] != IGNORED).sum()


def autocast(precision: str, device: torch.device) -> Any:
    """Context in which matrix products are computed in bf16 for precision "bfloat16".

    Parameters, states and tangents stay float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
