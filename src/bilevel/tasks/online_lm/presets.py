"""Configurations: small ones that run on any machine, and those of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from bilevel.estimators import ForwardGradient, Reverse
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.task import Preset

_PAPER = OnlineLM(
    data="squad",
    base="distilgpt2",
    context=1000,
    answer_tokens=24,
    tune_steps=5000,
    tune_batch=64,
    tune_documents=0,
    tune_lr=2.5e-5,
    inner_steps=24,
    inner_lr=5e-4,
    clip_norm=0.0,
    short_draws=0,
    outer_questions=128,
    outer_lr=2.5e-6,
    kl_weight=0.1,
    locality_batch=8,
    stream=1665,
    evaluation_runs=1,
    evaluation_optimizer="adam",
    learning_rates=(2.5e-6, 1e-5, 2.5e-5, 1e-4),
    beams=12,
)
"""The settings of Table F.2 and, for settings that the paper does not state, the defaults of the released code. Presets
cannot contain `--accumulate 32`."""

PRESETS: Mapping[str, Preset[OnlineLM]] = {
    "tiny": Preset(
        OnlineLM(),
        estimator=Reverse("sqrt"),
        outer_steps=120,
        summary="a small GPT-2 trained by the run, news about made-up people among filler; needs no files",
    ),
    "squad-tiny": Preset(
        OnlineLM(
            data="squad",
            width=64,
            layers=2,
            context=192,
            tune_steps=2000,
            tune_lr=2e-3,
            evaluation_runs=3,
            learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1),
            inner_lr=0.03,
        ),
        estimator=Reverse("sqrt"),
        outer_steps=150,
        summary="the same model on SQuAD from --data-dir, of which it can learn little",
    ),
    "distilgpt2": Preset(
        _PAPER,
        estimator=ForwardGradient(directions=12, chunk_size=4),
        outer_steps=1000,
        summary="DistilGPT2 with the paper's settings, on SQuAD from --data-dir; for a GPU",
    ),
    "gpt2": Preset(
        dataclasses.replace(_PAPER, base="gpt2", body="distilgpt2"),
        estimator=ForwardGradient(directions=8, chunk_size=2),
        outer_steps=1000,
        summary="GPT-2 with the paper's settings, on SQuAD from --data-dir; for a GPU",
    ),
    "gpt2-xl": Preset(
        dataclasses.replace(_PAPER, base="gpt2", body="distilgpt2", judge="gpt2-xl"),
        estimator=ForwardGradient(directions=8, chunk_size=2),
        outer_steps=1000,
        summary="weights trained with GPT-2, judged by adapting GPT-2 XL, as in the paper's tables; for a large GPU",
    ),
}
