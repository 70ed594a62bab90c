"""`bilevel.check` on ten kinds of models with random weights, each with one weight for every example.

python benchmarks/check_models.py          # the table, and benchmarks/results/check_models.md
python benchmarks/check_models.py bert     # the whole report on one model
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from bilevel.checking.report import Report

EXAMPLES, STEPS = 4, 3
Losses = Callable[[Any], Tensor]
"""The loss of each example, from the model."""


def tokens(length: int = 6, vocabulary: int = 40) -> Tensor:
    """Reproducible token numbers."""
    return torch.randint(5, vocabulary, (EXAMPLES, length), generator=torch.Generator().manual_seed(1))


def of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each sequence."""
    return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def bert() -> tuple[nn.Module, Losses]:
    """An encoder that classifies, with dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: Any = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=32, num_labels=3)  # pyright: ignore[reportCallIssue]
    ids, labels = tokens(), torch.tensor([0, 1, 2, 1])
    return BertForSequenceClassification(config), lambda model: functional.cross_entropy(
        model(input_ids=ids).logits, labels, reduction="none"
    )


def gpt2() -> tuple[nn.Module, Losses]:
    """A decoder with tied embeddings and dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ids = tokens()
    return GPT2LMHeadModel(config), lambda model: of_tokens(model(input_ids=ids).logits[:, :-1], ids[:, 1:])


def llama() -> tuple[nn.Module, Losses]:
    """A decoder with rotary positions, grouped queries and RMSNorm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    ids = tokens()
    return LlamaForCausalLM(config), lambda model: of_tokens(model(input_ids=ids).logits[:, :-1], ids[:, 1:])


def t5() -> tuple[nn.Module, Losses]:
    """An encoder and a decoder with relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: Any = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    ids, answers = tokens(), tokens(4)

    def losses(model: Any) -> Tensor:
        return of_tokens(model(input_ids=ids, decoder_input_ids=answers).logits[:, :-1], answers[:, 1:])

    return T5ForConditionalGeneration(config), losses


def vit() -> tuple[nn.Module, Losses]:
    """A vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,  # pyright: ignore[reportCallIssue]
    )
    images, labels = torch.randn(EXAMPLES, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    return ViTForImageClassification(config), lambda model: functional.cross_entropy(
        model(pixel_values=images).logits, labels, reduction="none"
    )


def wav2vec2() -> tuple[nn.Module, Losses]:
    """Convolutions on sound with GroupNorm and weight_norm, then a transformer, and CTC."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(4, 2),
        conv_kernel=(8, 3),
        num_feat_extract_layers=2,  # pyright: ignore[reportCallIssue]
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    sound = torch.randn(EXAMPLES, 120)
    labels = torch.randint(1, 12, (EXAMPLES, 3), generator=torch.Generator().manual_seed(2))

    def losses(model: Any) -> Tensor:
        scores = model(input_values=sound).logits.log_softmax(-1).transpose(0, 1)
        lengths = torch.full((EXAMPLES,), scores.shape[0]), torch.full((EXAMPLES,), 3)
        return functional.ctc_loss(scores, labels, *lengths, reduction="none") / 3

    return Wav2Vec2ForCTC(config), losses


# -- by hand -----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block of a ResNet, with BatchNorm."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out) for _ in range(3)])
        self.shortcut = nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(inside)) + self.norms[2](self.shortcut(x))).relu()


def resnet() -> tuple[nn.Module, Losses]:
    """Residual blocks with BatchNorm in training mode."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        Residual(6, 6, 1),
        Residual(6, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    images, labels = torch.randn(EXAMPLES, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    return model, lambda model: functional.cross_entropy(model(images), labels, reduction="none")


class UNet(nn.Module):
    """Down, up, and a shortcut between, with GroupNorm and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        return self.out(torch.cat([down, self.up(self.middle(down))], 1))


def unet() -> tuple[nn.Module, Losses]:
    """Segmentation."""
    images = torch.randn(EXAMPLES, 1, 8, 8)
    labels = (images > 0.3).float()

    def losses(model: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(model(images), labels, reduction="none").mean((1, 2, 3))

    return UNet(), losses


class Tagger(nn.Module):
    """An embedding and an LSTM in both directions, on packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 4)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        found, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=ids.shape[1])
        return self.out(found)


def tagger() -> tuple[nn.Module, Losses]:
    """Tags of words in sequences of several lengths."""
    ids, lengths = tokens(), torch.tensor([6, 3, 5, 4])
    return Tagger(), lambda model: of_tokens(model(ids, lengths), ids % 4)


class GraphNetwork(nn.Module):
    """Two rounds of messages along edges, gathered by `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = nn.ModuleList([nn.Linear(2 * 5, 5) for _ in range(2)])
        self.out = nn.Linear(5, 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in self.messages:
            sent = layer(torch.cat([nodes[edges[0]], nodes[edges[1]]], 1)).tanh()
            nodes = nodes + torch.zeros_like(nodes).index_add(0, edges[1], sent)
        return self.out(nodes)


def gnn() -> tuple[nn.Module, Losses]:
    """Labels of nodes."""
    nodes, labels = torch.randn(EXAMPLES, 5), torch.tensor([0, 1, 1, 0])
    edges = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])
    return GraphNetwork(), lambda model: functional.cross_entropy(model(nodes, edges), labels, reduction="none")


MODELS: dict[str, Callable[[], tuple[nn.Module, Losses]]] = {
    each.__name__: each for each in (bert, gpt2, llama, t5, vit, wav2vec2, resnet, unet, tagger, gnn)
}


def report_on(name: str) -> tuple[Report, float, int]:
    """The report, the seconds that it took, and the number of parameters."""
    torch.manual_seed(0)
    model, losses = MODELS[name]()
    model.train()
    problem = bilevel.GradientDescent(
        lambda model, weights, batch: (weights * losses(model)).mean(),
        lambda model, weights, batch: losses(model).square().mean(),
        model,
        bilevel.optimizer(torch.optim.AdamW, lr=1e-3),
    )
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = bilevel.check(problem, torch.linspace(0.5, 1.5, EXAMPLES), STEPS, progress=False)
    return report, time.process_time() - begun, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Print one report, or write the table of all."""
    if len(sys.argv) > 1:
        print(report_on(sys.argv[1])[0])
        return
    lines = [
        "# `bilevel.check` on ten models",
        "",
        f"Random weights, {EXAMPLES} examples with a weight each as meta parameters, {STEPS} steps of AdamW, float32,",
        f"one thread of {platform.machine()}, torch {torch.__version__}. The columns count the rows of each report:",
        "all of them should be right. The time is process time. Made by `python benchmarks/check_models.py`.",
        "",
        "| model | parameters | right | wrong | could not be judged | seconds | first row that is not right |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in MODELS:
        report, seconds, count = report_on(name)
        others = [*report.wrong, *report.unjudged]
        right = sum(f.verdict.value == "right" for f in report.findings)
        first = f"{others[0].part}, {others[0].tested}: {others[0].found}" if others else ""
        lines.append(
            f"| {name} | {count} | {right} | {len(report.wrong)} | {len(report.unjudged)} | {seconds:.1f} | {first} |"
        )
        print(lines[-1], flush=True)
    target = Path(__file__).parent / "results" / "check_models.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
