"""A stream of news about made-up people, each fact in one sentence among filler, from a seeded grammar; needs no files.

    The old miller saw the gate. The trade of Mavole is potter. Some bread in winter was cold.   What is the trade of
    Mavole?   potter

Every person has a trade, a colour, an animal and a town. The base model is taught these as they were once, for all
people; then all of them change, to another value drawn at random, so that nothing but a document tells it. Each change
is told `TELLINGS` times, among other filler every time. Filler is drawn at random as well: its words cannot be
predicted, and learning them is learning noise. It mentions people, towns and trades too.

Why people are known before: a small model that has never seen a name answers alike for all such names, and one SGD step
on a document about one of them changes its answer for every one; after 200 documents the last ones are all it says.
Where the base model tells people apart, a step is about its own person first of all, and there is something to gain by
choosing tokens.
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
"""Documents about each fact of a stream. After a single one, most facts are lost again 200 documents later."""


def corpus(seed: int, meta: int = 150, validation: int = 50, test: int = 100) -> Corpus:
    """News about so many made-up people in each part; the parts share no person. The tuning documents are about all of
    them, as they were before.
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
    """Different pronounceable names."""
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
    """Another value of every kind than the person had."""
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
