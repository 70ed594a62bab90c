"""The losses of both levels, on logits `[batch, length, vocabulary]`: position i predicts token i + 1.

Every estimator sees these same functions, so exact reverse and (FG)²U descend on one objective. (The code released with
the paper averaged the answer's loss over ignored positions for one and not for the other, took a real token for the
ignored one, and measured the divergence from the current model.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from bilevel.tasks.online_lm.tokens import IGNORED


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p(label_{i+1} | …label_i) for every position but the last `[batch, length − 1]`, 0 where it is ignored."""
    targets = labels[:, 1:]
    flat = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(targets.shape)


def weighted_nll(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(1/n) Σ_i w_i · nll_i over the n predicted tokens; weight `[batch, length]` i belongs to token i.

    With weights of one it is the usual language model's loss. It is not divided by the sum of the weights: how large
    they are is how much is learnt.
    """
    found = token_nll(logits, labels) * weights[:, 1:]
    return found.sum() / counted(labels)


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean −log p over the answers' tokens alone, whatever the length of prompts and padding."""
    return token_nll(logits, labels).sum() / counted(labels)


def kl_from_initial(logits: Tensor, initial_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions with mask 1 of KL(p_initial ‖ p), p_initial being the model before any document."""
    log_probs = log_softmax(logits, -1)
    each = (initial_log_probs.exp() * (initial_log_probs - log_probs)).sum(-1)
    return (each * mask).sum() / mask.sum()


def widened(values: Tensor) -> Tensor:
    """What autocast left in bf16 as float32; anything else as it is."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def counted(labels: Tensor) -> Tensor:
    """How many tokens are predicted."""
    return (labels[:, 1:] != IGNORED).sum()


def autocast(precision: str, device: torch.device) -> Any:
    """Inside, matrix products are computed in bf16 if asked for; parameters, states and tangents stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
