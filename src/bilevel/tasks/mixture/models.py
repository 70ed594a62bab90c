"""The models of the mixture task: a table of the next token, and a small transformer on bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bilevel.tasks.mixture.config import Mixture


class Table(nn.Module):
    """Logits of the next token for each token."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(tokens, tokens)
        nn.init.normal_(self.logits.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits `[b, length, tokens]` of the tokens that follow the ids `[b, length]`."""
        return self.logits(ids)


class Transformer(nn.Module):
    """A causal transformer with a learned embedding for each position."""

    def __init__(self, tokens: int, length: int, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width}: a multiple of {heads} is needed, one part for each head of attention")
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits `[b, length, tokens]` of the tokens that follow the ids `[b, length]`."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, length, width = x.shape
        parts = self.projections(self.before_attention(x)).reshape(b, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.joined(seen.transpose(1, 2).reshape(b, length, width))
        return x + self.hidden(self.before_hidden(x))


def network(config: Mixture, tokens: int, device: torch.device) -> nn.Module:
    """Return a newly initialised model. It uses torch's global random number generator."""
    if config.data == "rules":
        return Table(tokens).to(device)
    return Transformer(tokens, config.length, config.width, config.layers).to(device)
