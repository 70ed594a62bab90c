"""A stream of facts about made-up people, each in one sentence among filler, from a seeded grammar; needs no files.

    The old miller saw the gate. The trade of Mavole is potter. Some bread in winter was cold.   What is the trade of
    Mavole?   potter

Every person has a trade, a colour, an animal and a town, drawn independently, so that nothing but the document tells
them. Filler is drawn at random as well: its words cannot be predicted, and learning them is learning noise. It mentions
people, towns and trades too. A small model, trained on the facts about some people, answers questions about them, and
one SGD step on a document about a new person can change its answers: there is something to gain by choosing tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bilevel import randomness
from bilevel.tasks.online_lm.documents import Corpus, Document, Question

_NAMES, _FACTS, _TUNE, _META, _VALIDATION, _TEST, _LOCALITY = range(300, 307)


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


def corpus(seed: int, tune: int = 300, meta: int = 300, validation: int = 100, test: int = 200) -> Corpus:
    """Documents about as many made-up people in each part; the parts share no person."""
    names = people(tune + meta + validation + test, seed)
    facts = {name: _facts(seed, number) for number, name in enumerate(names)}
    generator = randomness.generator(seed, _LOCALITY)
    groups = np.split(np.array(names), np.cumsum([tune, meta, validation]))

    def documents(group: np.ndarray, stream: int, copies: int) -> list[Document]:
        made = []
        for copy in range(copies):
            for number, name in enumerate(group):
                for place, kind in enumerate(VALUES):
                    own = randomness.generator(seed, stream, copy, number, place)
                    made.append(_document(str(name), kind, facts[str(name)][kind], names, own))
        return made

    return Corpus(
        tune=documents(groups[0], _TUNE, copies=2),
        meta=documents(groups[1], _META, copies=1),
        validation=documents(groups[2], _VALIDATION, copies=1),
        test=documents(groups[3], _TEST, copies=1),
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
    order = randomness.generator(seed, _NAMES).permutation(len(starts) * len(middles) * len(ends))[:count]
    per_start = len(middles) * len(ends)
    return [starts[i // per_start] + middles[i % per_start // len(ends)] + ends[i % len(ends)] for i in order]


def _facts(seed: int, person: int) -> dict[str, str]:
    generator = randomness.generator(seed, _FACTS, person)
    return {kind: _one(values, generator) for kind, values in VALUES.items()}


def _document(name: str, kind: str, value: str, names: Sequence[str], generator: np.random.Generator) -> Document:
    sentences = [_filler(names, generator) for _ in range(_FILLER)]
    sentences.insert(int(generator.integers(_FILLER + 1)), f"The {kind} of {name} is {value}.")
    return Document(" ".join(sentences), (Question(f"What is the {kind} of {name}?", (value,)),))


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
