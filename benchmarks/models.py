"""The three models that the benchmarks train inside: an MLP, the paper's ConvNet, and a small GPT-2.

Losses are written for a model that is called as usual, so that other libraries can be given the same ones.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import clocks_alone  # noqa: F401
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.tasks.condensation.models import build


@dataclass(frozen=True)
class Subject:
    """A model, its two losses, the meta parameters, and the inner optimiser."""

    network: nn.Module
    inner_loss: Callable[[Any, Tensor], Tensor]
    outer_loss: Callable[[Any], Tensor]
    meta: Tensor
    algorithm: type[torch.optim.Optimizer]
    settings: dict[str, Any]

    def problem(self) -> bilevel.GradientDescent:
        """As a problem of this library."""
        return bilevel.GradientDescent(
            lambda model, meta, batch: self.inner_loss(model, meta),
            lambda model, meta, batch: self.outer_loss(model),
            self.network,
            bilevel.optimizer(self.algorithm, **self.settings),
        )


def mlp(dtype: torch.dtype = torch.float32) -> Subject:
    """Per-example weights of 128 examples; 85 thousand parameters, Adam inside."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 64).to(dtype), torch.randint(0, 10, (128,))
    clean_x, clean_y = torch.randn(128, 64).to(dtype), torch.randint(0, 10, (128,))
    sizes = (64, 256, 256)
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return Subject(
        nn.Sequential(*hidden, nn.Linear(sizes[-1], 10)).to(dtype),
        lambda model, meta: (meta.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean(),
        lambda model: cross_entropy(model(clean_x), clean_y),
        torch.zeros(128, dtype=dtype),
        torch.optim.Adam,
        {"lr": 1e-3},
    )


def convnet(dtype: torch.dtype = torch.float32) -> Subject:
    """Ten condensed images of 28 × 28; the paper's ConvNet at width 32, SGD with momentum inside."""
    torch.manual_seed(0)
    network = build("convnet", (1, 28, 28), 10, 32, 3).to(dtype)
    real, labels = torch.rand(64, 1, 28, 28).to(dtype), torch.randint(0, 10, (64,))
    return Subject(
        network,
        lambda model, meta: cross_entropy(model(meta), torch.arange(10)),
        lambda model: cross_entropy(model(real), labels),
        torch.rand(10, 1, 28, 28).to(dtype),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9},
    )


def gpt2(algorithm: type[torch.optim.Optimizer], settings: dict[str, float], dtype: torch.dtype) -> Subject:
    """Per-token weights of four documents of 128 tokens; a GPT-2 with 2 million parameters and random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=1000,
        n_positions=128,
        n_embd=192,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    # attention without PyTorch's fused kernels, which have no second derivative: other libraries leave them as they are
    network = GPT2LMHeadModel._from_config(shape, attn_implementation="eager")
    network.to(dtype=dtype).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
    ids, outer_ids = torch.randint(0, 1000, (4, 128)), torch.randint(0, 1000, (4, 128))

    def inner_loss(model: Any, meta: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return (meta.sigmoid() * cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")).mean()

    return Subject(
        network,
        inner_loss,
        lambda model: model(input_ids=outer_ids, labels=outer_ids).loss,
        torch.zeros(4, 127, dtype=dtype),
        algorithm,
        settings,
    )


def gpt2_sgd(dtype: torch.dtype = torch.float32) -> Subject:
    """SGD inside."""
    return gpt2(torch.optim.SGD, {"lr": 0.01}, dtype)


def gpt2_adam(dtype: torch.dtype = torch.float32) -> Subject:
    """Adam inside."""
    return gpt2(torch.optim.Adam, {"lr": 1e-4}, dtype)


def with_recomputed_layers(subject: Subject) -> Subject:
    """The same transformer, every layer of which is computed again when it is needed."""
    network = copy.deepcopy(subject.network)
    layers: Any = network.get_submodule("transformer.h")
    for i, layer in enumerate(layers):
        layers[i] = bilevel.experimental.Recomputed(layer)
    return replace(subject, network=network)


def gpt2_recomputed(dtype: torch.dtype = torch.float32) -> Subject:
    """SGD inside, and recomputed layers."""
    return with_recomputed_layers(gpt2_sgd(dtype))


MODELS: dict[str, Callable[..., Subject]] = {
    "mlp-adam": mlp,
    "convnet-momentum": convnet,
    "gpt2-sgd": gpt2_sgd,
    "gpt2-adam": gpt2_adam,
}
