"""Mixtures as a bilevel problem: the meta parameters are numbers whose softmax are the proportions of the sources.

Proportions can act in two ways.

As weights, a step sees a batch of each source, and its loss is Σ_s p_s ℓ_s. The step is a smooth function of p.

As sampling rates, a step sees one batch, in which each example comes from source s with chance p_s. The step then
jumps where p moves an example to another source, and its derivative is zero elsewhere. The expected gradient
Σ_s p_s ∇ℓ_s is smooth, however. With the factor p_s/stop(p_s) on an example's loss, the value is that of ordinary
sampling, and the derivative of the gradient is an unbiased estimate of the derivative of the expected gradient.

Both have the same expected gradient. They differ in cost, S batches in a step against one, and in noise: the variance
of the gradient is Σ_s p_s² σ_s²/b with weights, and about Σ_s p_s σ_s²/b with sampling. Weights therefore favour even
proportions a little where the noise of the steps matters.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR

import bilevel
from bilevel import randomness
from bilevel.tasks.mixture.config import Mixture
from bilevel.tasks.mixture.models import network
from bilevel.tasks.mixture.sources import Sources
from bilevel.tasks.task import Setup


def setup(config: Mixture, data: Sources, outer_steps: int, seed: int) -> Setup:
    """Return the bilevel problem, uniform proportions as the start, the batches and the outer optimiser."""

    def inner_loss(model: Any, phi: Tensor, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        return mixed_loss(model, proportions(phi), batch)

    def outer_loss(model: Any, _phi: Tensor, chosen: Tensor | None) -> Tensor:
        return losses(model, data.target if chosen is None else data.target[chosen]).mean()

    device = data.target.device
    schedule = functools.partial(LinearLR, start_factor=1.0, end_factor=0.1, total_iters=max(1, outer_steps - 1))
    return Setup(
        problem=bilevel.GradientDescent(
            inner_loss, outer_loss, lambda phi: network(config, data.tokens, device), inner_optimizer(config)
        ),
        meta=torch.zeros(len(data.train), device=device),
        inner_batches=functools.partial(inner_batches, config, data, seed),
        outer_batch=functools.partial(_outer_batch, config, data, seed),
        optimizer=bilevel.optimizer(torch.optim.Adam, lr=config.outer_lr, schedule=schedule),
        stream=config.stream,
    )


def proportions(phi: Tensor) -> Tensor:
    """Return proportions `[S]` from meta parameters without bounds."""
    return phi.softmax(0)


def losses(model: Any, examples: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token in each example `[b]`, from examples `[b, length]`."""
    logits = model(examples[:, :-1])
    return cross_entropy(logits.transpose(1, 2), examples[:, 1:], reduction="none").mean(1)


def mixed_loss(model: Any, p: Tensor, batch: tuple[Tensor, Tensor | None]) -> Tensor:
    """Compute the inner loss at proportions p `[S]`.

    Args:
        model: the model.
        p: the proportions.
        batch: candidates `[S, b, length]`, and one number in [0, 1) for each example `[b]` that chooses its source; or
            `None` in its place for proportions as weights.
    """
    candidates, chooses = batch
    if chooses is None:
        each = losses(model, candidates.flatten(0, 1)).reshape(candidates.shape[:2])
        return (p * each.mean(1)).sum()
    fixed = p.detach()
    source = torch.searchsorted(fixed.cumsum(0), chooses, right=True).clamp(max=len(p) - 1)
    chosen = candidates[source, torch.arange(len(source), device=source.device)]
    return ((p / fixed)[source] * losses(model, chosen)).mean()


def inner_optimizer(config: Mixture) -> Any:
    """Return the inner optimiser of the configuration."""
    if config.optimizer == "sgd":
        return bilevel.optimizer(torch.optim.SGD, lr=config.inner_lr, momentum=0.9)
    return bilevel.optimizer(torch.optim.Adam, lr=config.inner_lr, eps=1e-4)


def bound_optimizer(config: Mixture, model: nn.Module) -> torch.optim.Optimizer:
    """Return the inner optimiser, bound to the parameters of a model, for plain training."""
    return inner_optimizer(config).bind(list(model.parameters()))[0]


def inner_batches(config: Mixture, data: Sources, seed: int, draw: int) -> Any:
    """Return the T batches of estimate `draw`: examples of each source, drawn with replacement."""
    return bilevel.batches(lambda t: batch(config, data, seed, draw, t), config.inner_steps)


def batch(config: Mixture, data: Sources, seed: int, *counters: int) -> tuple[Tensor, Tensor | None]:
    """Return the candidates of one inner step, and the numbers that choose among them if proportions sample.

    The numbers are (i + u)/b with one random u, so the count of each source differs from b·p_s by less than one.
    """
    generator = randomness.generator(seed, randomness.MIXTURE_INNER, *counters)
    device = data.target.device
    candidates = torch.stack(
        [
            each[torch.from_numpy(generator.integers(0, len(each), config.batch)).to(device)]
            for each in data.train.values()
        ]
    )
    if config.act_as == "weights":
        return candidates, None
    spread = (np.arange(config.batch) + generator.random()) / config.batch
    return candidates, torch.from_numpy(spread.astype(np.float32)).to(device)


def _outer_batch(config: Mixture, data: Sources, seed: int, draw: int) -> Tensor | None:
    """Return the numbers of the target examples of estimate `draw`, or `None` for all of them."""
    if config.outer_batch == 0:
        return None
    generator = randomness.generator(seed, randomness.MIXTURE_OUTER, draw)
    chosen = generator.choice(len(data.target), config.outer_batch, replace=False)
    return torch.from_numpy(chosen).to(data.target.device)


def trained(
    config: Mixture, data: Sources, p: Tensor, steps: int, seed: int, number: int, stream: tuple[int, int]
) -> nn.Module:
    """Train newly initialised model `number` with fixed proportions, as any PyTorch code would.

    Args:
        config: the settings.
        data: the sources.
        p: the proportions `[S]`.
        steps: the number of steps.
        seed: of the model and the batches.
        number: of the model.
        stream: counters of the initial model and of the batches.
    """
    with randomness.torch_seeded(seed, stream[0], number):
        model = network(config, data.tokens, data.target.device)
    optimizer = bound_optimizer(config, model)
    for step in range(steps):
        optimizer.zero_grad()
        mixed_loss(model, p, batch(config, data, randomness.derive(seed, stream[1]), number, step)).backward()
        optimizer.step()
    return model
