"""Token weights that are not learnt, as controls."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.tasks.online_lm.tokens import EncodedDocument

Weighting = Callable[[EncodedDocument], Tensor]
"""A function from a document to its weights `[1, length]`, one for each token."""

_NUMBER = re.compile(r"\d[\d.,:/-]*\d|\d")
_CAPITALISED = re.compile(r"\b[A-Z][\w'-]*(?:\s+(?:of|the|de|von|van)\s+[A-Z][\w'-]*|\s+[A-Z][\w'-]*)*")


def uniform(document: EncodedDocument) -> Tensor:
    """Return the weight 1 for every token."""
    return torch.ones(document.ids.shape)


def tf_idf(documents: Sequence[EncodedDocument], vocabulary: int) -> Weighting:
    """Return a weighting by term frequency times inverse document frequency, with the frequencies of `documents`."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfTransformer

    rows = np.repeat(np.arange(len(documents)), [document.ids.numel() for document in documents])
    columns = torch.cat([document.ids[0] for document in documents]).numpy()
    counts = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(documents), vocabulary))
    frequencies = TfidfTransformer(norm=None).fit(counts)  # pyright: ignore[reportArgumentType]
    idf = torch.tensor(frequencies.idf_, dtype=torch.float32)

    def weigh(document: EncodedDocument) -> Tensor:
        ids = document.ids[0]
        frequency = torch.bincount(ids, minlength=vocabulary)[ids].float() / len(ids)
        return normalised(frequency * idf[ids]).unsqueeze(0)

    return weigh


def salient_spans(find: Callable[[str], list[tuple[int, int]]] | None = None) -> Weighting:
    """Return a weighting that selects the tokens of named entities, dates and numbers.

    If a document has no such tokens, all its tokens have the same weight.

    Args:
        find: a function that returns the spans of characters in a text. The default is spaCy's small English model if
            it is installed, else `capitalised_or_number`.
    """
    spans_of = find or entity_finder()

    def weigh(document: EncodedDocument) -> Tensor:
        spans = spans_of(document.text)
        inside = [any(s < end and start < e for s, e in spans) for start, end in document.spans]
        weights = torch.tensor(inside, dtype=torch.float32)
        return normalised(weights if any(inside) else torch.ones(len(inside))).unsqueeze(0)

    return weigh


def entity_finder() -> Callable[[str], list[tuple[int, int]]]:
    """Return spaCy's named entities if its model `en_core_web_sm` is installed, else `capitalised_or_number`."""
    if importlib.util.find_spec("spacy") and importlib.util.find_spec("en_core_web_sm"):
        spacy: Any = importlib.import_module("spacy")
        pipeline = spacy.load("en_core_web_sm")
        return lambda text: [(entity.start_char, entity.end_char) for entity in pipeline(text).ents]
    return capitalised_or_number


def capitalised_or_number(text: str) -> list[tuple[int, int]]:
    """Find sequences of capitalised words, and numbers. Return their spans of characters.

    A word that begins a sentence is left out unless it is also capitalised elsewhere in the text.

    >>> [("In 1066 William of Normandy won. Then he ruled.")[s:e] for s, e in capitalised_or_number(
    ...     "In 1066 William of Normandy won. Then he ruled.")]
    ['1066', 'William of Normandy']
    """
    starts = {m.end() for m in re.finditer(r"^\s*|[.!?][\"')]*\s+", text)}
    inside = {m.group() for m in re.finditer(r"\b[A-Z][\w'-]*", text) if m.start() not in starts}
    found = [m.span() for m in _NUMBER.finditer(text)]
    for match in _CAPITALISED.finditer(text):
        start, end = match.span()
        first = re.match(r"[\w'-]+\s*", match.group())
        assert first is not None
        if start in starts and first.group().strip() not in inside:
            start += first.end()
            rest = re.search(r"[A-Z]", text[start:end])
            if rest is None:
                continue
            start += rest.start()
        found.append((start, end))
    return sorted(found)


def normalised(weights: Tensor) -> Tensor:
    """Scale weights to mean one."""
    return weights / weights.mean()
