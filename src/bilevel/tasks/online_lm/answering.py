"""Evaluation of what a model knows: its loss on right answers, and its generated answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bilevel.tasks.online_lm import losses, scores, tokens
from bilevel.tasks.online_lm.documents import Question

_AT_ONCE = 100


def judged(
    model: Any, tokenizer: Any, asked: Sequence[Question], context: int, answer_tokens: int, beams: int
) -> dict[str, float]:
    """Compute the mean exact match and F1 of the generated answers, and the loss per answer token."""
    given = answers(model, tokenizer, [question.text for question in asked], context, answer_tokens, beams)
    return {
        "exact_match": statistics.fmean(scores.exact_match(g, q.answers) for g, q in zip(given, asked, strict=True)),
        "f1": statistics.fmean(scores.f1(g, q.answers) for g, q in zip(given, asked, strict=True)),
        "qa_loss": qa_loss(model, tokenizer, asked, context),
    }


def qa_loss(model: Any, tokenizer: Any, asked: Sequence[Question], context: int) -> float:
    """Compute the mean −log p over all answer tokens of all questions."""
    device = next(model.parameters()).device
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(asked), _AT_ONCE):
            batch = tokens.questions(tokenizer, asked[start : start + _AT_ONCE], context).to(device)
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
            total += float(losses.token_nll(logits.float(), batch.labels).sum())
            count += float(losses.counted(batch.labels))
    return total / count


def answers(
    model: Any, tokenizer: Any, asked: Sequence[str], context: int, answer_tokens: int, beams: int
) -> list[str]:
    """Generate the model's answers, without sampling."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    padding = tokens.padding_id(tokenizer)
    settings = GenerationConfig(
        max_new_tokens=answer_tokens,
        num_beams=beams,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=tokens.end_of(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    given = []
    for start in range(0, len(asked), _AT_ONCE):
        prompts = [
            tokenizer(tokens.prompt(text), add_special_tokens=False, verbose=False)["input_ids"][-context:]
            for text in asked[start : start + _AT_ONCE]
        ]
        longest = max(len(each) for each in prompts)
        ids = torch.tensor([[padding] * (longest - len(each)) + each for each in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=device)
        with torch.no_grad():
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        given += [text.strip() for text in tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)]
    return given
