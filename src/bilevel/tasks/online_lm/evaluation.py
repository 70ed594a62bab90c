"""Evaluation of how many questions about an unseen stream a model can answer, for each method of weighting tokens.

Every method takes one step per document with the same optimiser. It chooses its learning rate from the same list by its
QA loss on a validation stream, so that no method has to use a learning rate that suits another method.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel import randomness
from bilevel.errors import CheckpointError
from bilevel.report.files import write_json
from bilevel.report.progress import bar
from bilevel.tasks.online_lm import baselines, tokens
from bilevel.tasks.online_lm.adaptation import adapted, learned
from bilevel.tasks.online_lm.answering import judged, qa_loss
from bilevel.tasks.online_lm.baselines import Weighting
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.documents import Corpus, Document, questions_of

MEASURES = ("exact_match", "f1", "qa_loss")


class Evaluation:
    """An evaluation of methods, one after the other. Results that are already known are read from a file."""

    def __init__(
        self, config: OnlineLM, corpus: Corpus, model: Any, tokenizer: Any, seed: int, store: Path | None = None
    ) -> None:
        self._config, self._corpus, self._model, self._tokenizer = config, corpus, model, tokenizer
        self._seed, self._store = seed, store
        self._known = _read(store)

    def of(self, weightings: Mapping[str, Weighting | None], progress: bool) -> dict[str, Any]:
        """Evaluate methods. Return `exact_match`, `f1` and `qa_loss` as `{mean, std, runs}`, and the chosen rate, of
        each.

        A method without a weighting is the model before the stream.
        """
        config = self._config
        learning = [name for name, weigh in weightings.items() if weigh is not None]
        total = len(learning) * len(config.learning_rates) + len(weightings) * config.evaluation_runs
        found: dict[str, Any] = {}
        with bar("evaluation", total, show=progress) as shown:
            for name, weigh in weightings.items():
                rate = None if weigh is None else self._best_rate(name, weigh, shown)
                runs = [self._run(name, weigh, rate, number, shown) for number in range(config.evaluation_runs)]
                found[name] = {measure: summary([run[measure] for run in runs]) for measure in MEASURES}
                found[name]["learning_rate"] = rate
        return found

    def stream(self, part: Sequence[Document], number: int) -> list[Document]:
        """Return at most `stream` documents, which make whole stories, in a random order.

        Different streams have different stories as long as there are enough.
        """
        cuts: list[list[Document]] = []
        while len(cuts) <= number:
            cuts += _cut(
                part, self._config.stream, randomness.generator(self._seed, randomness.LM_EVALUATION, 0, len(cuts))
            )
        order = randomness.generator(self._seed, randomness.LM_EVALUATION, 1, number).permutation(len(cuts[number]))
        return [cuts[number][i] for i in order]

    def _best_rate(self, name: str, weigh: Weighting, shown: Any) -> float:
        losses = {}
        for rate in self._config.learning_rates:
            compute = functools.partial(self._validate, weigh, rate)
            losses[rate] = self._remembered(f"{name} validation {rate}", compute)
            shown.advance(f"{name}, learning rate {rate}: QA loss {losses[rate]:.3f}")
        return min(losses, key=lambda rate: losses[rate])

    def _validate(self, weigh: Weighting, rate: float) -> float:
        runs = [self._validation_loss(weigh, rate, number) for number in range(self._config.validation_runs)]
        return statistics.fmean(runs)

    def _validation_loss(self, weigh: Weighting, rate: float, number: int) -> float:
        documents = self.stream(self._corpus.validation, number)
        model = self._after(documents, weigh, rate)
        loss = qa_loss(model, self._tokenizer, questions_of(documents), self._config.context)
        return loss if math.isfinite(loss) else _DIVERGED

    def _run(self, name: str, weigh: Weighting | None, rate: float | None, number: int, shown: Any) -> dict[str, float]:
        documents = self.stream(self._corpus.test, number)
        config = self._config

        def compute() -> dict[str, float]:
            model = self._model if weigh is None or rate is None else self._after(documents, weigh, rate)
            asked = questions_of(documents)
            return judged(model, self._tokenizer, asked, config.context, config.answer_tokens, config.beams)

        run = self._remembered(f"{name} test {number}", compute)
        shown.advance(f"{name}: F1 {run['f1']:.1%}")
        return run

    def _after(self, documents: Sequence[Document], weigh: Weighting, rate: float) -> Any:
        config = self._config
        encoded = [tokens.document(self._tokenizer, each.text, config.context) for each in documents]
        return adapted(self._model, encoded, weigh, rate, config.evaluation_optimizer, config.precision)

    def _remembered(self, key: str, compute: Any) -> Any:
        if key not in self._known:
            self._known[key] = compute()
            if self._store is not None:
                write_json(self._store, self._known)
        return self._known[key]


_DIVERGED = 1e30
"""The number that replaces a loss that is NaN. JSON has no NaN, and a learning rate with this loss is never chosen."""


def methods(config: OnlineLM, corpus: Corpus, tokenizer: Any, weight_model: Any) -> dict[str, Weighting | None]:
    """Return the weighting of the trained weight model and those with which it is compared, by name."""
    seen = [tokens.document(tokenizer, each.text, config.context) for each in corpus.meta]
    return {
        "meta_learned": learned(weight_model),
        "uniform": baselines.uniform,
        "tf_idf": baselines.tf_idf(seen, len(tokenizer)),
        "salient_spans": baselines.salient_spans(),
        "no_adaptation": None,
    }


def _cut(part: Sequence[Document], size: int, generator: np.random.Generator) -> list[list[Document]]:
    """Divide the stories, in a random order, into streams of at most `size` documents.

    The last stream is kept only if no further story would fit into it, or if there is no other stream.
    """
    stories: dict[Any, list[Document]] = {}
    for number, document in enumerate(part):
        stories.setdefault(document.story or number, []).append(document)
    groups = list(stories.values())
    cuts: list[list[Document]] = [[]]
    for index in generator.permutation(len(groups)):
        if cuts[-1] and len(cuts[-1]) + len(groups[index]) > size:
            cuts.append([])
        cuts[-1] += groups[index]
    room = size - len(cuts[-1])
    return cuts[:-1] if len(cuts) > 1 and room >= max(map(len, groups)) else cuts


def summary(runs: Sequence[float]) -> dict[str, Any]:
    """Return the mean, the standard deviation and the runs themselves."""
    spread = statistics.stdev(runs) if len(runs) > 1 else 0.0
    return {"mean": statistics.fmean(runs), "std": spread, "runs": list(runs)}


def _read(store: Path | None) -> dict[str, Any]:
    if store is None or not store.exists():
        return {}
    try:
        return json.loads(store.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{store} is damaged ({error}); delete it to evaluate again") from error
