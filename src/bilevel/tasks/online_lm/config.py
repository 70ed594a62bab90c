"""The settings of an online-lm run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bilevel import checks

DataName = Literal["grammar", "squad", "streamingqa", "archivalqa"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OnlineLM:
    """Learn weights for the tokens of a document such that a model can answer questions after one SGD step on it."""

    data: DataName = "grammar"
    """Documents with questions: `grammar` generates its own, the others are read from --data-dir."""
    base: str = "scratch"
    """Language model: a Hugging Face name or a local path, or `scratch` for a small model that the run trains
    itself."""
    body: str = "base"
    """Language model in the weight model: `base` for a copy of the language model, or another name or path."""
    judge: str = "base"
    """Language model that learns the evaluation streams with the trained weights: `base`, or another name or path."""
    architecture: Literal["gpt2", "llama"] = "gpt2"
    """Architecture of a model from scratch."""
    width: int = 128
    """Hidden size of a model from scratch."""
    layers: int = 1
    """Layers of a model from scratch."""
    heads: int = 4
    """Attention heads of a model from scratch."""
    vocabulary: int = 4000
    """Largest number of tokens of a tokenizer from scratch."""
    lora_rank: int = 0
    """Adapt low-rank matrices of this rank in place of the weights themselves (LoRA, needs peft); 0 for all weights."""
    precision: Precision = "float32"
    """`bfloat16` computes the losses in bf16; weights, inner state and its tangents stay float32."""
    context: int = 64
    """Largest number of tokens of a document; longer documents are cut, with a warning."""
    answer_tokens: int = 8
    """Largest number of tokens of a generated answer."""
    tune_steps: int = 700
    """Steps that teach the base model to answer questions (and, from scratch, the language)."""
    tune_batch: int = 32
    """Questions in each tuning step."""
    tune_documents: int = 16
    """Documents in each tuning step; 0 for questions only."""
    tune_lr: float = 3e-3
    """Highest learning rate of the tuning steps (AdamW, one cycle)."""
    inner_steps: int = 24
    """T: documents of an inner loop, with one SGD step each; the outer loss is that of the last state."""
    inner_lr: float = 0.08
    """Learning rate of a step on a document."""
    short_draws: int = 90
    """Estimates at the beginning with short_steps documents instead of inner_steps: the paper's first phase."""
    short_steps: int = 6
    """Documents of an inner loop in the first phase."""
    outer_questions: int = 64
    """Largest number of questions about these documents in an outer loss."""
    outer_lr: float = 3e-4
    """Outer learning rate of Adam."""
    clip_norm: float = 1.0
    """Largest norm of a hypergradient, to which longer ones are scaled; 0 for no bound."""
    kl_weight: float = 0.1
    """Weight of the divergence from the model before any document, on other text."""
    locality_batch: int = 8
    """Pieces of other text in an outer loss."""
    stream: int = 200
    """Largest number of documents of an evaluation stream."""
    evaluation_runs: int = 4
    """Evaluation streams, of different documents as long as there are enough."""
    validation_runs: int = 2
    """Streams on which each learning rate is validated."""
    evaluation_optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser with which a stream is learnt for evaluation."""
    learning_rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16)
    """Learning rates from which every method chooses one by its QA loss on a validation stream."""
    beams: int = 1
    """Beams with which an answer is generated."""
    device: str = "auto"
    """Torch device, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        checks.each_field(self, checks.whole_number, "width", "layers", "heads", "inner_steps", "short_steps")
        checks.each_field(self, checks.whole_number, "outer_questions", "locality_batch", "stream", "evaluation_runs")
        checks.each_field(self, checks.whole_number, "validation_runs", "tune_batch", "answer_tokens", "beams")
        checks.each_field(
            self, checks.whole_number, "lora_rank", "tune_steps", "tune_documents", "short_draws", at_least=0
        )
        checks.each_field(self, checks.positive, "tune_lr", "inner_lr", "outer_lr")
        checks.each_field(self, checks.not_negative, "kl_weight", "clip_norm")
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates={self.learning_rates}: positive numbers are needed, at least one")
        if self.lora_rank and self.precision == "bfloat16":
            raise ValueError(
                "lora_rank with precision=bfloat16: the frozen weights would stay float32; use only one of the two"
            )
        if self.context < 16:
            raise ValueError(f"context={self.context}: at least 16 tokens are needed for a question and its answer")
        if self.vocabulary < 300:
            raise ValueError(f"vocabulary={self.vocabulary}: at least 300 are needed, 256 of them for single bytes")
        if self.base == "scratch" and self.width % self.heads:
            raise ValueError(f"width={self.width} cannot be divided among heads={self.heads}")
