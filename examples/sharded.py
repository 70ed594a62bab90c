"""Weights of eight sources of data, learnt through the training of a network that is spread over processes (FSDP2).

    torchrun --nproc-per-node 2 examples/sharded.py

Four of the sources draw their labels by lot; their weights fall.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.experimental import Workers, join_workers
from bilevel.models.module_view import ModuleView


def main() -> None:
    torch.set_num_threads(1)
    # All processes hold one model together, so they share no directions; the first one still writes for all.
    workers = Workers.of(sharers=Workers()) if join_workers().size > 1 else Workers()

    torch.manual_seed(0)  # the same in every process
    x = torch.randn(8, 20, 8)  # source, example, feature
    right = (x[..., 0] > 0).long()
    y = torch.cat([right[:4], torch.randint(2, (4, 20))])
    trusted = torch.randn(40, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    if workers.size > 1:
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer)

    def inner_loss(model: ModuleView, weights: torch.Tensor, batch: None) -> torch.Tensor:
        losses = cross_entropy(model(x.flatten(0, 1)), y.flatten(), reduction="none")
        return (weights.sigmoid() * losses.reshape(8, 20).mean(1)).mean()

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda model, weights, batch: cross_entropy(model(trusted), (trusted[:, 0] > 0).long()),
        model,
        bilevel.optimizer(torch.optim.SGD, lr=1.0, momentum=0.9),
    )
    fitted = bilevel.fit(
        problem,
        torch.zeros(8),
        10,
        phases=[bilevel.Phase(bilevel.ForwardGradient(4, tangents="difference"), steps=12)],
        optimizer=bilevel.optimizer(torch.optim.Adam, lr=0.1),
        progress=False,
        workers=workers,
    )
    if workers.first:
        print(f"mean weight of good sources {fitted.meta[:4].mean():+.3f}, of the others {fitted.meta[4:].mean():+.3f}")


if __name__ == "__main__":
    main()
