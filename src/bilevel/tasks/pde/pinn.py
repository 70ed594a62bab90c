"""A physics-informed network as the inner problem: it is trained to satisfy the equation.

The network and the loss are those of the paper: û(x, t) = (1 − e^{−t}) · net(x, t) + u(0, x), with a tanh network of 9
layers of 20 units. The loss is the mean square of the equation's residual at random points, plus the mean square of the
residual of the boundary conditions.

Derivatives with respect to x and t are propagated through the layers as (u, u_t, u_x, u_xx, u_xxx), with the chain rule
for tanh written out. An estimator therefore differentiates only plain arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import bilevel
from bilevel import randomness
from bilevel.tasks.pde import unknowns
from bilevel.tasks.pde.config import PDE
from bilevel.tasks.pde.counter import Counter
from bilevel.tasks.pde.differentiable import term_coefficients
from bilevel.tasks.pde.equations import EQUATIONS, LAST_TIME, LEFT, RIGHT, Equation
from bilevel.tasks.pde.observations import Observations

Network = list[dict[str, Tensor]]


class Jet(NamedTuple):
    """u and its derivatives at points `[n]` (inside the network `[n, width]`)."""

    u: Tensor
    t: Tensor
    x: Tensor
    xx: Tensor
    xxx: Tensor


class Points(NamedTuple):
    """The points of a training step: inner points `[n]` for the equation, and times `[n/8]` for both ends."""

    x: Tensor
    t: Tensor
    ends: Tensor


def problem(
    config: PDE, misfit: Callable[[Tensor], Tensor], counter: Counter, data: Observations, seed: int
) -> tuple[bilevel.GradientDescent, Any]:
    """Return the training of a network as a bilevel problem, and its batches.

    The initial network and the points are the same in every outer step, so that h is a function of φ alone.
    """
    equation, dtype = EQUATIONS[config.equation], _dtype(config)
    x, t = (torch.from_numpy(each).to(dtype) for each in (data.x, data.t))

    def inner_loss(network: Network, meta: Tensor, points: Points) -> Tensor:
        counter.steps += 1
        here = unknowns.situation(config, meta)
        c = {name: torch.as_tensor(value).to(dtype) for name, value in here.coefficients.items()}
        residual = _residual(equation, c, solution(equation, network, points.x, points.t))
        return residual.square().mean() + _boundary_loss(equation, network, points.ends)

    def outer_loss(network: Network, meta: Tensor, batch: Any) -> Tensor:
        return misfit(solution(equation, network, x, t).u)

    algorithm = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.inner_optimizer]
    made = bilevel.GradientDescent(
        inner_loss, outer_loss, initial_network(config, seed), bilevel.optimizer(algorithm, lr=config.inner_lr)
    )
    return made, bilevel.batches(lambda step: random_points(config, seed, step), config.solver_steps)


def initial_network(config: PDE, seed: int) -> Network:
    """Draw weights uniformly in ±√(6/(fan in + fan out)). Biases are 0."""
    generator = randomness.generator(seed, randomness.PDE_NETWORK)
    sizes = [2, *[config.width] * (config.depth - 1), 1]
    layers: Network = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        bound = math.sqrt(6 / (fan_in + fan_out))
        weights = torch.from_numpy(generator.uniform(-bound, bound, (fan_in, fan_out)))
        layers.append({"weights": weights.to(_dtype(config)), "biases": torch.zeros(fan_out, dtype=_dtype(config))})
    return layers


def random_points(config: PDE, seed: int, step: int) -> Points:
    """Draw points uniformly over the domain, as a function of the seed and the number of the training step."""
    generator, n = randomness.generator(seed, randomness.PDE_POINTS, step), config.collocation
    x, t, ends = generator.uniform(LEFT, RIGHT, n), *(generator.uniform(0, LAST_TIME, m) for m in (n, max(1, n // 8)))
    return Points(*(torch.from_numpy(each).to(_dtype(config)) for each in (x, t, ends)))


def solution(equation: Equation, network: Network, x: Tensor, t: Tensor) -> Jet:
    """Compute û and its derivatives at points."""
    net, initial = _network_jet(network, x, t), _initial_jet(equation, x)
    grown, rest = 1 - torch.exp(-t), torch.exp(-t)
    return Jet(
        grown * net.u + initial[0],
        rest * net.u + grown * net.t,
        *(grown * part + known for part, known in zip(net[2:], initial[1:], strict=True)),
    )


def trained(config: PDE, meta: Tensor, seed: int, data: Observations) -> Network:
    """Train the network at φ."""
    made, batches = problem(config, lambda predicted: predicted.sum(), Counter(), data, seed)
    state = made.init(meta)
    for step in range(len(batches)):
        state = made.step(state, meta, batches[step])
    return state.params


def network_field(config: PDE, network: Network, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Compute û `[places, times]`."""
    xs, ts = (torch.from_numpy(part.ravel()).to(_dtype(config)) for part in np.meshgrid(x, t, indexing="ij"))
    with torch.no_grad():
        found = solution(EQUATIONS[config.equation], network, xs, ts).u
    return found.double().numpy().reshape(len(x), len(t))


def _network_jet(network: Network, x: Tensor, t: Tensor) -> Jet:
    """Compute the network's value and derivatives, with one matrix product per layer for all five of them."""
    n = len(x)
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    pairs = [(x, t), (zeros, ones), (ones, zeros), (zeros, zeros), (zeros, zeros)]
    rows = torch.cat([torch.stack(pair, 1) for pair in pairs])
    for number, layer in enumerate(network):
        rows = rows @ layer["weights"]
        jet = Jet(*(rows[i * n : (i + 1) * n] for i in range(5)))
        jet = jet._replace(u=jet.u + layer["biases"])
        if number < len(network) - 1:
            jet = _tanh(jet)
        rows = torch.cat(list(jet))
    return Jet(*(rows[i * n : (i + 1) * n, 0] for i in range(5)))


def _tanh(h: Jet) -> Jet:
    y = torch.tanh(h.u)
    first = 1 - y * y
    second = -2 * y * first
    third = first * (6 * y * y - 2)
    return Jet(
        y,
        first * h.t,
        first * h.x,
        first * h.xx + second * h.x**2,
        first * h.xxx + 3 * second * h.x * h.xx + third * h.x**3,
    )


def _residual(equation: Equation, c: dict[str, Any], u: Jet) -> Tensor:
    """Compute the residual of the equation."""
    terms = {"u": u.u, "u_xx": u.xx, "u_xxx": u.xxx, "u³": u.u**3, "u u_x": u.u * u.x}
    return u.t - sum(value * terms[name] for name, value in term_coefficients(equation, c).items())


def _boundary_loss(equation: Equation, network: Network, times: Tensor) -> Tensor:
    left, right = (solution(equation, network, torch.full_like(times, end), times) for end in (LEFT, RIGHT))
    if equation.boundary is None:
        return sum(((a - b).square().mean() for a, b in ((left.u, right.u), (left.x, right.x))), torch.zeros(()))
    return ((left.u - equation.boundary).square() + (right.u - equation.boundary).square()).mean()


def _initial_jet(equation: Equation, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute u(0, x) and its first three derivatives."""
    π, s, c = math.pi, torch.sin(math.pi * x), torch.cos(math.pi * x)
    if equation.name == "burgers":
        return -s, -π * c, π**2 * s, π**3 * c
    if equation.name == "kdv":
        return c, -π * s, -(π**2) * c, π**3 * s
    return (
        x**2 * c,
        2 * x * c - π * x**2 * s,
        2 * c - 4 * π * x * s - π**2 * x**2 * c,
        -6 * π * s - 6 * π**2 * x * c + π**3 * x**2 * s,
    )


def _dtype(config: PDE) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[config.dtype]
