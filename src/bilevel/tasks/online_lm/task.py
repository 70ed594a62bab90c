"""Meta-learned online adaptation of language models (paper §4, E.2; CaMeLS, Hu et al., 2023).

There are three stages. First, a base model learns to answer questions. Second, a weight model is trained such that the
language model can answer questions about a document after one SGD step on the loss that it weights. Third, unseen
streams are learnt and answers are generated, with the trained weights and, for comparison, with uniform, TF-IDF and
salient-span weights and without adaptation.

Differences from the paper and its released code: the loss of answers is the mean over answer tokens for every
estimator. The divergence is from the model before any document. Ignored positions are marked by −100 and not by a word.
Every window starts from the base model, so no derivative is lost between windows. Every control chooses its own
learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bilevel import randomness
from bilevel.models import conversion
from bilevel.report.page import Section
from bilevel.tasks.online_lm import data, models, pictures, precision, tokens
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.documents import Corpus
from bilevel.tasks.online_lm.evaluation import MEASURES, Evaluation, methods
from bilevel.tasks.online_lm.presets import PRESETS
from bilevel.tasks.online_lm.problem import setup as make_setup
from bilevel.tasks.online_lm.stages import BASE, FOLDER, JUDGE, tuned_model
from bilevel.tasks.task import Preset, Setup, Task
from bilevel.training.outer_loop import OuterStep

WEIGHT_MODEL = "weight_model"
_EXAMPLES = 3


class OnlineLMTask(Task[OnlineLM]):
    """Learn which tokens of a stream of documents to learn."""

    name = "online-lm"
    summary = (
        "learn which tokens of a document to train on, so that a language model can answer questions about a stream"
    )
    presets: Mapping[str, Preset[OnlineLM]] = PRESETS

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def prepared(
        self, config: OnlineLM, data_dir: Path | None, folder: Path, seed: int, progress: bool
    ) -> OnlineLMTask:
        corpus = data.load(config.data, data_dir, seed)
        tuned_model(config, corpus, seed, folder, progress)
        return OnlineLMTask(folder)

    def setup(self, config: OnlineLM, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:  # noqa: ARG002
        corpus = data.load(config.data, data_dir, seed)
        base, tokenizer = tuned_model(config, corpus, seed, self._folder, progress=True)
        weight_model = _weight_model(config, base, seed)
        learner = _learner(config, base, seed)
        made = make_setup(config, corpus, learner, tokenizer, weight_model, seed)
        precision.warn_if_off(config, learner, made, seed)
        return made

    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:  # noqa: ARG002
        return []

    def evaluate(self, config: OnlineLM, data_dir: Path | None, meta: Any, seed: int, progress: bool) -> dict[str, Any]:
        corpus = data.load(config.data, data_dir, seed)
        role = BASE if config.judge == "base" else JUDGE
        judge, tokenizer = tuned_model(config, corpus, seed, self._folder, progress, role)
        weight_model = conversion.written_back(meta)
        store = None
        if self._folder is not None:
            weight_model.save_pretrained(self._folder / WEIGHT_MODEL)
            store = self._folder / FOLDER / "evaluation.json"
        evaluation = Evaluation(config, corpus, _learner(config, judge, seed), tokenizer, seed, store)
        found = evaluation.of(methods(config, corpus, tokenizer, weight_model), progress)
        return {"methods": found, "examples": _examples(config, corpus, tokenizer, weight_model)}

    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [
            (
                f"F1 and QA loss, {pictures.NAMES[name]}",
                f"{_shown(found, 'f1')} %, {_shown(found, 'qa_loss')}",
            )
            for name, found in results["methods"].items()
        ]

    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:  # noqa: ARG002
        rows = [
            (
                pictures.NAMES[name],
                *(_shown(found, measure) for measure in MEASURES),
                "–" if found["learning_rate"] is None else f"{found['learning_rate']:g}",
            )
            for name, found in results["methods"].items()
        ]
        return [
            Section(
                "After a stream of unseen documents",
                "Answers to questions about the documents, which the model does not see again. Mean ± standard "
                "deviation over the streams; every method chose its learning rate on a validation stream.",
                pictures.methods(results["methods"]),
                ("weights", "exact match, %", "F1, %", "QA loss", "learning rate"),
                rows,
            ),
            Section(
                "What the weight model picks",
                "Unseen documents; the darker a token, the larger its weight.",
                pictures.token_weights(results["examples"]),
            ),
        ]


def _weight_model(config: OnlineLM, base: Any, seed: int) -> Any:
    from bilevel.tasks.online_lm.weight_model import WeightModel

    body = base
    if config.body != "base":
        body, _ = models.load(config.body)
        if body.config.vocab_size != base.config.vocab_size:
            raise ValueError(
                f"body={config.body} has {body.config.vocab_size} tokens and {config.base} {base.config.vocab_size}; "
                "the weight model reads the same tokens, so take one with the same tokenizer"
            )
    with randomness.torch_seeded(seed, randomness.LM_WEIGHT_MODEL):
        return WeightModel.on_top_of(body).to(next(base.parameters()).device)


def _learner(config: OnlineLM, base: Any, seed: int) -> Any:
    """Return the model that is adapted: the base model, or a copy of it with low-rank matrices."""
    if not config.lora_rank:
        return base
    with randomness.torch_seeded(seed, randomness.LM_LORA):
        return models.with_lora(copy.deepcopy(base), config.lora_rank)


def _examples(config: OnlineLM, corpus: Corpus, tokenizer: Any, weight_model: Any) -> list[dict[str, Any]]:
    """Return the first test documents with the weights of their tokens."""
    device = next(weight_model.parameters()).device
    made = []
    for document in corpus.test[:_EXAMPLES]:
        encoded = tokens.document(tokenizer, document.text, min(config.context, 160))
        with torch.no_grad():
            weights = weight_model(input_ids=encoded.ids.to(device))[0].tolist()
        shown = [text if (text := encoded.text[start:end]) else "·" for start, end in encoded.spans]
        made.append({"tokens": shown, "weights": [round(weight, 4) for weight in weights]})
    return made


def _shown(found: Mapping[str, Any], measure: str) -> str:
    factor, digits = (1, 2) if measure == "qa_loss" else (100, 1)
    score = found[measure]
    spread = f" ± {factor * score['std']:.{digits}f}" if len(score["runs"]) > 1 else ""
    return f"{factor * score['mean']:.{digits}f}{spread}"
