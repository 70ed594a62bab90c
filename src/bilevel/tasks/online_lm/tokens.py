"""Conversion of text to token ids, with truncation and padding, and the training of a tokenizer.

Positions without a target have the label `IGNORED` (−100, PyTorch's own value, which is not an id of any vocabulary).
For a tokenizer without a padding token, another token is used, because labels and attention mask exclude the padding.
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
    """A document in the form in which an inner step uses it."""

    ids: Tensor
    """Token ids `[1, length]`."""
    text: str
    spans: tuple[tuple[int, int], ...]
    """The span of characters of each token."""
    truncated: bool = False


@dataclass(frozen=True)
class Padded:
    """A batch of sequences, padded on the right."""

    ids: Tensor
    """Token ids `[batch, length]`."""
    mask: Tensor
    """Mask `[batch, length]`, 1 at tokens and 0 at padding."""
    labels: Tensor
    """Labels `[batch, length]`: the ids to be predicted, and `IGNORED` elsewhere."""

    def to(self, device: torch.device) -> Padded:
        """Return a copy on a device."""
        return Padded(self.ids.to(device), self.mask.to(device), self.labels.to(device))


def document(tokenizer: Any, text: str, context: int) -> EncodedDocument:
    """Encode the first `context` tokens of a text.

    Raises:
        ValueError: the text has no token to learn from.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = found["input_ids"], [tuple(span) for span in found["offset_mapping"]]
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is not None:  # with a start token, the first token of the text is predicted as well
        ids, spans = [start, *ids], [(0, 0), *spans]
    if len(ids) < 2:
        raise ValueError(f"the document {text[:40]!r} has no token to learn from")
    cut = len(ids) > context
    return EncodedDocument(torch.tensor([ids[:context]]), text, tuple(spans[:context]), cut)


def prompt(question: str) -> str:
    """Return the text after which the model generates its answer."""
    return f"Question: {question} Answer:"


def question_and_answer(tokenizer: Any, question: Question, context: int) -> tuple[list[int], list[int]]:
    """Return the ids of prompt, answer and end, and the labels, which contain only the answer and its end.

    If the sequence is too long, the beginning of the prompt is removed. The answer is always kept.
    """
    answer = tokenizer(" " + question.answers[0], add_special_tokens=False, verbose=False)["input_ids"]
    answer = [*answer, end_of(tokenizer)][-(context - 1) :]
    before = tokenizer(prompt(question.text), add_special_tokens=False, verbose=False)["input_ids"]
    before = before[-(context - len(answer)) :]
    return before + answer, [IGNORED] * len(before) + answer


def questions(tokenizer: Any, asked: Sequence[Question], context: int) -> Padded:
    """Encode questions with their answers as one batch."""
    pairs = [question_and_answer(tokenizer, question, context) for question in asked]
    return padded([ids for ids, _ in pairs], [labels for _, labels in pairs], padding_id(tokenizer))


def texts(tokenizer: Any, pieces: Sequence[str], context: int) -> Padded:
    """Encode texts as one batch, in which every token except the first is predicted."""
    ids = [document(tokenizer, piece, context).ids[0].tolist() for piece in pieces]
    return padded(ids, ids, padding_id(tokenizer))


def padded(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], padding: int) -> Padded:
    """Pad sequences of different lengths to one batch."""
    length = max(len(each) for each in ids)

    def filled(rows: Iterable[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

    return Padded(filled(ids, padding), filled([[1] * len(each) for each in ids], 0), filled(labels, IGNORED))


def padding_id(tokenizer: Any) -> int:
    """Return the id of the padding token, or that of the end token if the tokenizer has no padding token."""
    return end_of(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def end_of(tokenizer: Any) -> int:
    """Return the id of the token that ends an answer.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, so no answer can end; "
            "set tokenizer.eos_token to one of its tokens and save it again"
        )
    return tokenizer.eos_token_id


def train_tokenizer(pieces: Iterable[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer on these texts, like that of GPT-2 and, like that, without a padding token."""
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
