"""What a stream is made of: documents, each with questions about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question with the answers that count as right; the first is the one to be trained on."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A text, and what should be known after having read it."""

    text: str
    questions: tuple[Question, ...]
    story: str = ""
    """Documents of one story are learnt in the same stream, in any order; one without a name is a story of its own."""


def questions_of(documents: Sequence[Document]) -> list[Question]:
    """All questions about these documents, each once."""
    return list(dict.fromkeys(question for document in documents for question in document.questions))


@dataclass(frozen=True)
class Corpus:
    """Documents in four parts that share none: to teach answering, to train the weight model, to choose, to judge."""

    tune: Sequence[Document]
    meta: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]
    locality: Sequence[str]
    """Text that has nothing to do with the stream, on which the model should stay what it was."""
    words: Sequence[str] = ()
    """Text that a tokenizer from scratch should know besides the documents for tuning: words, not facts."""
