"""The documents of a stream, each with questions about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question with the answers that count as right. Training uses the first answer."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A text with questions that can be answered from it."""

    text: str
    questions: tuple[Question, ...]
    story: str = ""
    """The name of a story. Documents of one story are learnt in the same stream, in any order. A document without a
    name is a story of its own."""


def questions_of(documents: Sequence[Document]) -> list[Question]:
    """Return all questions about these documents, each once."""
    return list(dict.fromkeys(question for document in documents for question in document.questions))


@dataclass(frozen=True)
class Corpus:
    """Documents in four disjoint parts: to tune the base model, to train the weight model, to choose rates, to test."""

    tune: Sequence[Document]
    meta: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]
    locality: Sequence[str]
    """Text that is unrelated to the stream, on which the model should not change."""
    words: Sequence[str] = ()
    """Text with words, not facts, that a tokenizer from scratch learns in addition to the tuning documents."""
