"""Exact match and token F1 as defined by SQuAD (Rajpurkar et al., 2016), each the best over the right answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def plain(answer: str) -> str:
    """Convert to lower case, remove punctuation and articles, and make all spaces single.

    >>> plain(" The  U.S. army!")
    'us army'
    """
    without = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", without).split())


def exact_match(given: str, answers: Sequence[str]) -> float:
    """Return 1 if the given answer is one of the right answers, else 0."""
    return float(any(plain(given) == plain(answer) for answer in answers))


def f1(given: str, answers: Sequence[str]) -> float:
    """Compute the harmonic mean of precision and recall over words, for the right answer for which it is largest.

    >>> f1("the red horse", ["red horse", "a mare"]), f1("red", ["red horse"]), f1("", ["red"])
    (1.0, 0.6666666666666666, 0.0)
    """
    return max(_f1(plain(given).split(), plain(answer).split()) for answer in answers)


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    if not given or not right:
        return float(given == right)
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right))
