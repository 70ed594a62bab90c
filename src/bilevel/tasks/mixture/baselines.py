"""Other ways to choose proportions, with which those found by hypergradients are compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bilevel import randomness
from bilevel.tasks.mixture.config import Mixture
from bilevel.tasks.mixture.models import network
from bilevel.tasks.mixture.problem import batch, bound_optimizer, losses, mixed_loss, trained
from bilevel.tasks.mixture.sources import Sources

_CANDIDATES = 10_000
"""The number of random proportions at which the regression predicts the loss."""


def target_loss(model: torch.nn.Module, examples: Tensor) -> float:
    """Compute the mean loss of a model on examples `[k, length]`."""
    with torch.no_grad():
        return float(torch.cat([losses(model, part) for part in examples.split(2000)]).mean())


def trials(config: Mixture, data: Sources, count: int, seed: int) -> tuple[Tensor, list[float]]:
    """Train at `count` random proportions, uniform on the simplex; return these `[count, S]` and the target losses."""
    generator = randomness.generator(seed, randomness.MIXTURE_SEARCH)
    drawn = torch.from_numpy(generator.dirichlet(np.ones(len(data.train)), count)).float().to(data.target.device)
    models = (
        trained(
            config, data, p, config.evaluation_steps, seed, 0, (randomness.MIXTURE_NETWORK, randomness.MIXTURE_ORDER)
        )
        for p in drawn
    )
    return drawn, [target_loss(model, data.target) for model in models]


def best_of(tried: tuple[Tensor, list[float]]) -> Tensor:
    """Return the proportions of the trial with the smallest target loss: random search."""
    drawn, values = tried
    return drawn[int(np.argmin(values))]


def by_regression(tried: tuple[Tensor, list[float]], seed: int) -> Tensor:
    """Return the proportions for which a quadratic ridge regression on the trials predicts the smallest loss.

    The idea is that of RegMix (Liu et al., 2024, arXiv 2407.01492), which trains a gradient-boosted regression on
    hundreds of small trainings. The penalty is chosen by generalised cross-validation.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures

    drawn, values = tried
    model = make_pipeline(PolynomialFeatures(2), RidgeCV(np.logspace(-6, 1, 15)))
    model.fit(drawn.cpu().numpy(), np.asarray(values))
    candidates = randomness.generator(seed, randomness.MIXTURE_SEARCH, 1).dirichlet(
        np.ones(drawn.shape[1]), _CANDIDATES
    )
    return torch.from_numpy(candidates[int(np.argmin(model.predict(candidates)))]).to(drawn)


def by_alignment(config: Mixture, data: Sources, steps: int, seed: int, every: int = 10, rate: float = 0.5) -> Tensor:
    """Return proportions by the alignment of gradients, updated during one training.

    After every `every` steps, the cosine c_s of the gradient of source s and that of the target changes the
    proportions to p_s exp(rate · c_s), normalised. The result is the mean over the second half of the training.
    """
    with randomness.torch_seeded(seed, randomness.MIXTURE_NETWORK, 0):
        model = network(config, data.tokens, data.target.device)
    optimizer = bound_optimizer(config, model)
    parameters = list(model.parameters())
    scores, path = torch.zeros(len(data.train), device=data.target.device), []

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)])

    for step in range(steps):
        examples = batch(config, data, randomness.derive(seed, randomness.MIXTURE_ORDER), 0, step)
        if step % every == 0:
            target = gradient(losses(model, data.target).mean())
            of_sources = [gradient(losses(model, each).mean()) for each in examples[0]]
            scores = scores + rate * torch.stack([torch.cosine_similarity(g, target, dim=0) for g in of_sources])
            path.append(scores.softmax(0))
        optimizer.zero_grad()
        mixed_loss(model, scores.softmax(0), examples).backward()
        optimizer.step()
    return torch.stack(path[len(path) // 2 :]).mean(0)


def on_target_alone(config: Mixture, data: Sources, steps: int, seed: int, number: int) -> torch.nn.Module:
    """Train newly initialised model `number` on the target examples alone."""
    alone = Sources({"target": data.target}, data.target, data.test, data.tokens)
    return trained(
        config,
        alone,
        torch.ones(1, device=data.target.device),
        steps,
        seed,
        number,
        (randomness.MIXTURE_NETWORK, randomness.MIXTURE_ORDER),
    )


Search = Callable[[], Tensor]
"""A function that returns proportions `[S]`."""


def searches(config: Mixture, data: Sources, seed: int) -> dict[str, Search]:
    """Return the ways to choose proportions by name. Those that need trial trainings are left out without any."""
    count = len(data.train)
    found: dict[str, Search] = {
        "uniform": lambda: torch.full((count,), 1 / count, device=data.target.device),
        "proportional": lambda: data.proportional().to(data.target.device),
        "alignment": lambda: by_alignment(config, data, config.evaluation_steps, seed),
    }
    if config.trial_trainings:
        made: list[tuple[Tensor, list[float]]] = []

        def tried() -> tuple[Tensor, list[float]]:
            if not made:
                made.append(trials(config, data, config.trial_trainings, seed))
            return made[0]

        found["random_search"] = lambda: best_of(tried())
        found["regression"] = lambda: by_regression(tried(), seed)
    return found
