"""Online adaptation as a bilevel problem. An inner step learns a document; the outer loss is that of answers about
them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import bilevel
from bilevel import randomness, trees
from bilevel.tasks.online_lm import losses, tokens
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.documents import Corpus, questions_of
from bilevel.tasks.online_lm.tokens import Padded
from bilevel.tasks.online_lm.windows import window
from bilevel.tasks.task import Setup


@dataclass(frozen=True)
class OuterBatch:
    """The data of an outer loss, which evaluates the model after its documents."""

    questions: Padded
    locality: Padded
    initial_log_probs: Tensor
    """Log-probabilities `[batch, length, vocabulary]` of the base model before any document, on the locality texts."""


def setup(config: OnlineLM, corpus: Corpus, model: Any, tokenizer: Any, weight_model: Any, seed: int) -> Setup:
    """Return the bilevel problem, in which `model` is adapted and `weight_model` holds the meta parameters."""
    device = next(model.parameters()).device
    for steps in {config.inner_steps, *([config.short_steps] if config.short_draws else [])}:
        window(0, steps, len(corpus.meta), seed)  # raises here if there are too few documents

    def documents(draw: int) -> list[int]:
        """Return the documents of a draw. The first draws are short windows; long windows are counted separately."""
        short = draw < config.short_draws
        number, steps = (draw, config.short_steps) if short else (draw - config.short_draws, config.inner_steps)
        return window(number, steps, len(corpus.meta), seed)

    def inner_batches(draw: int) -> Sequence[Tensor]:
        chosen = [corpus.meta[i] for i in documents(draw)]
        encoded = [tokens.document(tokenizer, each.text, config.context).ids.to(device) for each in chosen]
        return bilevel.batches(lambda t: encoded[t], steps=len(encoded))

    def outer_batch(draw: int) -> OuterBatch:
        generator = randomness.generator(seed, randomness.LM_QUESTIONS, draw)
        asked = questions_of([corpus.meta[i] for i in documents(draw)])
        if len(asked) > config.outer_questions:
            order = generator.permutation(len(asked))[: config.outer_questions]
            asked = [asked[i] for i in order]
        other = randomness.generator(seed, randomness.LM_LOCALITY, draw).integers(
            len(corpus.locality), size=config.locality_batch
        )
        return OuterBatch(
            tokens.questions(tokenizer, asked, config.context).to(device),
            *_before(model, tokens.texts(tokenizer, [corpus.locality[int(i)] for i in other], config.context)),
        )

    return Setup(
        problem=problem(config, model),
        meta=weight_model,
        inner_batches=inner_batches,
        outer_batch=outer_batch,
        optimizer=bilevel.optimizer(torch.optim.Adam, lr=config.outer_lr),
        update=bilevel.OuterUpdate(clip_norm=config.clip_norm or None),
    )


def problem(config: OnlineLM, model: Any) -> bilevel.GradientDescent:
    """Return the problem whose inner loop is SGD on the weighted loss of one document after the other.

    The outer loss is the loss of answers plus the divergence from the initial model.
    """
    lowered = functools.partial(in_precision, config.precision)

    def inner_loss(adapted: Any, weight_model: Any, ids: Tensor) -> Tensor:
        weights = lowered(weight_model)(input_ids=ids)
        logits = lowered(adapted)(input_ids=ids, use_cache=False).logits
        return losses.weighted_nll(losses.widened(logits), ids, losses.widened(weights))

    def outer_loss(adapted: Any, _weight_model: Any, batch: OuterBatch) -> Tensor:
        answers, divergence = outer_parts(lowered(adapted), batch)
        return answers + config.kl_weight * divergence

    return bilevel.GradientDescent(
        inner_loss, outer_loss, model, bilevel.optimizer(torch.optim.SGD, lr=config.inner_lr)
    )


def in_precision(precision: str, model: Any) -> Any:
    """Return the model with which the loss is computed: with parameters rounded to bf16 for precision "bfloat16".

    Rounding is part of the function that is differentiated, so the state, its tangents and its cotangents stay float32.
    (Autocast rounds operation by operation, and matrix products of its tangents then have operands of two dtypes.)
    """
    return trees.map_leaves(lambda t: t.to(torch.bfloat16), model) if precision == "bfloat16" else model


def outer_parts(adapted: Any, batch: OuterBatch) -> tuple[Tensor, Tensor]:
    """Compute the loss of answers, and the divergence from the initial model."""
    asked = adapted(input_ids=batch.questions.ids, attention_mask=batch.questions.mask, use_cache=False).logits
    other = adapted(input_ids=batch.locality.ids, attention_mask=batch.locality.mask, use_cache=False).logits
    return (
        losses.answer_nll(losses.widened(asked), batch.questions.labels),
        losses.kl_from_initial(losses.widened(other), batch.initial_log_probs, batch.locality.mask),
    )


def _before(model: Any, locality: Padded) -> tuple[Padded, Tensor]:
    """Return the locality texts, and the base model's log-probabilities on them, in float32 for every precision."""
    placed = locality.to(next(model.parameters()).device)
    with torch.no_grad():
        logits = model(input_ids=placed.ids, attention_mask=placed.mask, use_cache=False).logits
    return placed, log_softmax(losses.widened(logits), -1)
