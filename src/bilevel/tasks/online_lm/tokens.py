"""From text to token ids: truncation to the context, padding that no loss sees, and a tokenizer trained on the spot.

Positions that carry no target are labelled `IGNORED` (−100, PyTorch's own value, which no vocabulary holds). A
tokenizer without a padding token is padded with any id: labels and attention mask leave these positions out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.tasks.online_lm.documents import Question

IGNORED = -100
END = "<|endoftext|>"


@dataclass(frozen=True)
class EncodedDocument:
    """A document as one inner step reads it."""

    ids: Tensor
    """`[1, length]`"""
    text: str
    spans: tuple[tuple[int, int], ...]
    """The characters that each token stands for."""
    truncated: bool = False


@dataclass(frozen=True)
class Padded:
    """Sequences side by side, padded on the right."""

    ids: Tensor
    """`[batch, length]`"""
    mask: Tensor
    """`[batch, length]`, 1 at tokens and 0 at padding."""
    labels: Tensor
    """`[batch, length]`: ids that are to be predicted, `IGNORED` elsewhere."""

    def to(self, device: torch.device) -> Padded:
        """The same on a device."""
        return Padded(self.ids.to(device), self.mask.to(device), self.labels.to(device))


def document(tokenizer: Any, text: str, context: int) -> EncodedDocument:
    """The first `context` tokens of a text."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = found["input_ids"], [tuple(span) for span in found["offset_mapping"]]
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is not None:  # so that the first token is predicted as well
        ids, spans = [start, *ids], [(0, 0), *spans]
    if len(ids) < 2:
        raise ValueError(f"the document {text[:40]!r} has no token to learn from")
    cut = len(ids) > context
    return EncodedDocument(torch.tensor([ids[:context]]), text, tuple(spans[:context]), cut)


def prompt(question: str) -> str:
    """What the model is shown before its answer."""
    return f"Question: {question} Answer:"


def question_and_answer(tokenizer: Any, question: Question, context: int) -> tuple[list[int], list[int]]:
    """Ids of prompt, answer and end, and their labels: the answer and its end alone.

    A prompt that is too long loses its beginning, so that the answer always stays.
    """
    answer = tokenizer(" " + question.answers[0], add_special_tokens=False, verbose=False)["input_ids"]
    answer = [*answer, end_of(tokenizer)][-(context - 1) :]
    before = tokenizer(prompt(question.text), add_special_tokens=False, verbose=False)["input_ids"]
    before = before[-(context - len(answer)) :]
    return before + answer, [IGNORED] * len(before) + answer


def questions(tokenizer: Any, asked: Sequence[Question], context: int) -> Padded:
    """Questions with their answers as one batch."""
    pairs = [question_and_answer(tokenizer, question, context) for question in asked]
    return padded([ids for ids, _ in pairs], [labels for _, labels in pairs], padding_id(tokenizer))


def texts(tokenizer: Any, pieces: Sequence[str], context: int) -> Padded:
    """Texts as one batch, every token but the first to be predicted."""
    ids = [document(tokenizer, piece, context).ids[0].tolist() for piece in pieces]
    return padded(ids, ids, padding_id(tokenizer))


def padded(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], padding: int) -> Padded:
    """Sequences of different lengths as one batch."""
    length = max(len(each) for each in ids)

    def filled(rows: Iterable[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

    return Padded(filled(ids, padding), filled([[1] * len(each) for each in ids], 0), filled(labels, IGNORED))


def padding_id(tokenizer: Any) -> int:
    """The padding token's id; where there is none, the end's, which then stands at positions that nothing reads."""
    return end_of(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def end_of(tokenizer: Any) -> int:
    """The id that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, so no answer can end; "
            "set tokenizer.eos_token to one of its tokens and save it again"
        )
    return tokenizer.eos_token_id


def train_tokenizer(pieces: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer for these texts, as GPT-2's; without a padding token, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,  # pyright: ignore[reportCallIssue]
        special_tokens=[END],  # pyright: ignore[reportCallIssue]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore[reportCallIssue]
        show_progress=False,  # pyright: ignore[reportCallIssue]
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)
