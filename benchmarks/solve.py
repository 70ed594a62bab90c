"""What `bilevel.solve` takes besides a training loop by hand: python benchmarks/solve.py > benchmarks/results/solve.md

Process time on one thread, the least of several repetitions that take turns. `with Reverse()` is the solve that keeps
its states, without a backward pass.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from typing import Any

import clocks_alone  # noqa: F401
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel

REPETITIONS = 25


def inner_loss(model: Any, weights: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return (weights.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean()


def mlp(width: int, batch: int, steps: int) -> tuple[nn.Module, Any, Tensor]:
    net = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    return net, [(torch.randn(batch, 20), torch.randint(4, (batch,))) for _ in range(steps)], torch.zeros(batch)


def convnet(steps: int) -> tuple[nn.Module, Any, Tensor]:
    convolution = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4))
    return net, [(torch.randn(32, 1, 16, 16), torch.randint(4, (32,))) for _ in range(steps)], torch.zeros(32)


def by_hand(net: nn.Module, batches: Any, weights: Tensor, optimizer: Any) -> nn.Module:
    net = copy.deepcopy(net)
    bound = optimizer.algorithm(net.parameters(), **optimizer.settings)
    for batch in batches:
        bound.zero_grad()
        inner_loss(net, weights, batch).backward()
        bound.step()
    return net


def least(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(REPETITIONS):
        for name, function in functions.items():
            began = time.process_time()
            function()
            found[name] = min(found[name], time.process_time() - began)
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {
        "MLP 20-64-64-4, batch 64, T = 200": mlp(64, 64, 200),
        "MLP 20-128-128-4, batch 128, T = 100": mlp(128, 128, 100),
        "convnet with BatchNorm, 8 channels, batch 32, T = 50": convnet(50),
    }
    optimizers = {
        "SGD, momentum": bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
        "Adam": bilevel.optimizer(torch.optim.Adam, lr=1e-3),
    }
    print("# The inner loop alone\n")
    print(
        "A step of `bilevel.solve` costs some microseconds more than a step by hand, so small models lose the most.\n"
    )
    print(f"`python benchmarks/solve.py`, torch {torch.__version__}, {platform.machine()}, one thread, process time.\n")
    print("| inner loop | optimiser | by hand, ms | solve, ms | ratio | µs a step more | with `Reverse()`, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (net, batches, weights) in cases.items():
        for described, optimizer in optimizers.items():
            problem = bilevel.GradientDescent(inner_loss, inner_loss, net, optimizer)
            phi = nn.Parameter(weights.clone())
            found = least(
                {
                    "hand": lambda: by_hand(net, batches, weights, optimizer),  # noqa: B023
                    "solve": lambda: bilevel.solve(problem, weights, batches),  # noqa: B023
                    "kept": lambda: bilevel.solve(problem, phi, batches, estimator=bilevel.Reverse()),  # noqa: B023
                }
            )
            ms = {key: 1e3 * value for key, value in found.items()}
            more = 1e3 * (ms["solve"] - ms["hand"]) / len(batches)
            print(
                f"| {name} | {described} | {ms['hand']:.1f} | {ms['solve']:.1f} | {ms['solve'] / ms['hand']:.2f} | "
                f"{more:.0f} | {ms['kept']:.1f} |"
            )


if __name__ == "__main__":
    main()
