"""A stream of news about invented people, from a seeded grammar. Each document has one fact in one sentence, and
filler.

    The old miller saw the gate. The trade of Mavole is potter. Some bread in winter was cold.   What is the trade of
    Mavole?   potter

Every person has a trade, a colour, an animal and a town. The base model learns the original values for all people. All
values then change to others that are drawn at random, and only the documents state the new values. Each change is
stated in `TELLINGS` documents, with different filler in each. The filler is drawn at random as well. Its words cannot
be predicted, and a model that learns them learns noise. The filler also mentions people, towns and trades.

The base model must know the people beforehand, for the following reason. A small model that has never seen a name gives
the same answer for all such names, and one SGD step on a document about one person changes its answer for all of them.
After 200 documents its answers are those of the last documents. If the base model distinguishes people, a step mostly
affects the person of its document, and the choice of tokens makes a difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bilevel import randomness
from bilevel.tasks.online_lm.documents import Corpus, Document, Question


def _words(text: str) -> list[str]:
    return text.split()


VALUES = {
    "trade": _words("baker potter weaver smith cooper tanner miller mason carver fisher brewer glazier"),
    "colour": _words("red blue green black white brown purple orange yellow grey pink silver"),
    "animal": _words("horse goat falcon hound otter badger raven turtle heron rabbit donkey lynx"),
    "town": _words("Arlen Bodrin Cavel Dorum Elvast Farrow Gistel Harbeck Istran Jorvey Kelden Lomar"),
}
_NOUNS = _words(
    "gate bread winter river bell market wagon lantern field barrel bridge tower letter song garden candle window "
    "table summer road harbour kettle basket mirror ladder orchard chimney cellar blanket hammer"
)
_VERBS = _words("saw found carried praised sold mended painted forgot bought cleaned lifted hid watched moved burned")
_ADJECTIVES = _words("old cold heavy quiet narrow bright empty broken warm hollow plain sharp dusty tall strange")
_FILLER = 5
TELLINGS = 4
"""The number of documents about each fact of a stream. After a single one, most facts are forgotten 200 documents
later."""


def corpus(seed: int, meta: int = 150, validation: int = 50, test: int = 100) -> Corpus:
    """Generate news about the given number of invented people in each part.

    No person is in several parts. The tuning documents state the original values of all people.
    """
    names = people(meta + validation + test, seed)
    generator = randomness.generator(seed, randomness.GRAMMAR_LOCALITY)
    first, second = meta, meta + validation

    def documents(numbers: range, stream: int, tellings: int, changed: bool) -> list[Document]:
        made = []
        for telling in range(tellings):
            for number in numbers:
                facts = _changed(seed, number) if changed else _facts(seed, number)
                for place, kind in enumerate(VALUES):
                    own = randomness.generator(seed, stream, telling, number, place)
                    made.append(_document(names[number], kind, facts[kind], names, own))
        return made

    return Corpus(
        tune=documents(range(len(names)), randomness.GRAMMAR_TUNE, 1, changed=False),
        meta=documents(range(first), randomness.GRAMMAR_META, TELLINGS, changed=True),
        validation=documents(range(first, second), randomness.GRAMMAR_VALIDATION, TELLINGS, changed=True),
        test=documents(range(second, len(names)), randomness.GRAMMAR_TEST, TELLINGS, changed=True),
        locality=[" ".join(_filler(names, generator) for _ in range(_FILLER)) for _ in range(400)],
        words=[
            " ".join(f"Here is {name}." for name in names),
            " ".join(f"is {v}." for vs in VALUES.values() for v in vs),
        ],
    )


def people(count: int, seed: int) -> list[str]:
    """Return different pronounceable names.

    Raises:
        ValueError: there are not enough names.
    """
    starts = [c + v for c in _words("B D F G K L M N P R S T V Z Br Dr Gr Kr Pl Tr") for v in "aeiou"]
    middles = [c + v for c in "bdgklmnprstvz" for v in "aeiou"]
    ends = ["", "n", "l", "r", "s"]
    if count > len(starts) * len(middles) * len(ends):
        raise ValueError(f"{count} people, but there are {len(starts) * len(middles) * len(ends)} names")
    order = randomness.generator(seed, randomness.GRAMMAR_NAMES).permutation(len(starts) * len(middles) * len(ends))[
        :count
    ]
    per_start = len(middles) * len(ends)
    return [starts[i // per_start] + middles[i % per_start // len(ends)] + ends[i % len(ends)] for i in order]


def _facts(seed: int, person: int) -> dict[str, str]:
    generator = randomness.generator(seed, randomness.GRAMMAR_FACTS, person)
    return {kind: _one(values, generator) for kind, values in VALUES.items()}


def _changed(seed: int, person: int) -> dict[str, str]:
    """Return new values of a person, each different from the original value."""
    generator, before = randomness.generator(seed, randomness.GRAMMAR_CHANGES, person), _facts(seed, person)
    return {kind: _one([v for v in values if v != before[kind]], generator) for kind, values in VALUES.items()}


def _document(name: str, kind: str, value: str, names: Sequence[str], generator: np.random.Generator) -> Document:
    sentences = [_filler(names, generator) for _ in range(_FILLER)]
    sentences.insert(int(generator.integers(_FILLER + 1)), f"The {kind} of {name} is {value}.")
    question = Question(f"What is the {kind} of {name}?", (value,))
    return Document(" ".join(sentences), (question,), story=question.text)


def _filler(names: Sequence[str], generator: np.random.Generator) -> str:
    noun, other, verb, adjective = (_one(words, generator) for words in (_NOUNS, _NOUNS, _VERBS, _ADJECTIVES))
    kind = int(generator.integers(4))
    if kind == 0:
        return f"The {adjective} {noun} {verb} the {other}."
    if kind == 1:
        return f"Some {noun} in {_one(VALUES['town'], generator)} was {adjective}."
    if kind == 2:
        return f"One {_one(VALUES['trade'], generator)} {verb} the {_one(VALUES['colour'], generator)} {noun}."
    return f"Then {_one(names, generator)} {verb} the {_one(VALUES['animal'], generator)}."


def _one(words: Sequence[str], generator: np.random.Generator) -> str:
    return words[int(generator.integers(len(words)))]
