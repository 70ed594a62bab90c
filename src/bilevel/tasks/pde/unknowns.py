"""What is looked for, and how the meta parameters φ stand for it.

Positive coefficients are φ = log c: every φ gives a well-posed equation. Fields are φ `[n]` in whitened form, field =
scale · A φ with A a symmetric smoothing matrix, so that ‖φ‖² measures roughness and gradients are well scaled. A
library's coefficients are φ itself, but for diffusion, which is φ's positive part: `allowed` sees to it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import randomness
from bilevel.tasks.pde.config import PDE
from bilevel.tasks.pde.differentiable import TERMS, basis_of, term_coefficients
from bilevel.tasks.pde.equations import EQUATIONS, Equation

SMOOTHNESS = 0.1
"""Of unknown fields: the length on which they vary."""

LIBRARY_UNITS = {"u": 1.0, "u_x": 1.0, "u_xx": 0.01, "u_xxx": 0.01, "u²": 1.0, "u³": 1.0, "u u_x": 1.0, "u² u_x": 1.0}
"""Typical sizes of the terms' coefficients in this domain: φ is measured in them."""


@dataclass(frozen=True)
class Situation:
    """An equation ready to be solved: coefficients by name (of its own, or of the library's terms), and fields."""

    coefficients: dict[str, Any]
    initial: Tensor | None = None
    """Grid values; `None` for the equation's own."""
    source: Tensor | None = None


def true_source(x: np.ndarray) -> np.ndarray:
    """The source that observations of an equation with an unknown source are made with."""
    return 0.5 * np.sin(2 * np.pi * x) + np.exp(-30 * (x - 0.3) ** 2)


def names(config: PDE) -> list[str]:
    """Of the entries of what is looked for."""
    equation = EQUATIONS[config.equation]
    if config.unknown == "coefficient":
        return [equation.unknown]
    if config.unknown == "coefficients":
        return list(equation.coefficients)
    if config.unknown == "library":
        return list(TERMS)
    return [f"{config.unknown} at x = {x:.3f}" for x in basis_of(equation, config.resolution).grid]


def truth(config: PDE) -> np.ndarray:
    """The true values of what is looked for."""
    equation = EQUATIONS[config.equation]
    if config.unknown in ("coefficient", "coefficients"):
        return np.array([equation.coefficients[name] for name in names(config)])
    if config.unknown == "library":
        known = term_coefficients(equation, equation.coefficients)
        return np.array([known.get(name, 0.0) for name in TERMS])
    grid = basis_of(equation, config.resolution).grid
    return equation.initial(grid) if config.unknown == "initial-condition" else true_source(grid)


def start(config: PDE, seed: int, number: int) -> Tensor:
    """φ of start `number`: coefficients uniform over their ranges, a field or a library from (almost) nothing."""
    equation, generator = EQUATIONS[config.equation], randomness.generator(seed, randomness.PDE_START, number)
    if config.unknown in ("coefficient", "coefficients"):
        drawn = [equation.largest_start[name] * (1 - generator.random()) for name in names(config)]
        return torch.tensor([math.log(c) for c in drawn], dtype=torch.float64)
    draws = 0.1 * torch.from_numpy(generator.standard_normal(len(names(config))))
    return allowed(config, draws)


def found(config: PDE, meta: Tensor) -> Tensor:
    """What φ stands for, in the order of `names`."""
    if config.unknown in ("coefficient", "coefficients"):
        return meta.exp()
    if config.unknown == "library":
        return meta * torch.tensor([LIBRARY_UNITS[name] for name in TERMS], dtype=meta.dtype)
    return _smoothing(config.equation, config.resolution) @ meta


def situation(config: PDE, meta: Tensor) -> Situation:
    """The equation that φ stands for."""
    equation, values = EQUATIONS[config.equation], found(config, meta)
    if config.unknown == "library":
        return Situation({name: values[i] for i, name in enumerate(TERMS)})
    if config.unknown in ("coefficient", "coefficients"):
        return Situation({**equation.coefficients, **{name: values[i] for i, name in enumerate(names(config))}})
    if config.unknown == "source":
        return Situation(dict(equation.coefficients), source=values)
    return Situation(dict(equation.coefficients), initial=values)


def term_coefficients_of(config: PDE, here: Situation) -> dict[str, Any]:
    """Its coefficients as those of the terms."""
    if config.unknown == "library":
        return here.coefficients
    return term_coefficients(EQUATIONS[config.equation], here.coefficients)


def penalty(config: PDE, meta: Tensor) -> Tensor:
    """What the outer loss adds to the misfit."""
    if config.unknown == "library":
        return config.penalty * meta.abs().sum()
    if config.unknown in ("initial-condition", "source"):
        return config.penalty * meta.square().sum()
    return torch.zeros((), dtype=meta.dtype)


def allowed(config: PDE, meta: Tensor) -> Tensor:
    """The nearest φ with which the equation is well-posed."""
    if config.unknown != "library":
        return meta
    lowest = torch.tensor([0.0 if name == "u_xx" else -math.inf for name in TERMS], dtype=meta.dtype)
    return torch.maximum(meta, lowest)


@functools.lru_cache(maxsize=4)
def _smoothing(name: str, points: int) -> Tensor:
    """A `[n, n]`: the filter (1 + (ℓk)²)⁻², scaled so that φ of variance 1 gives a field of variance 1."""
    equation: Equation = EQUATIONS[name]
    x = basis_of(equation, points).grid
    distance = np.abs(x[:, None] - x)
    if equation.boundary is None or equation.odd:
        distance = np.minimum(distance, 2 - distance)
    kernel = (1 + distance / SMOOTHNESS) * np.exp(-distance / SMOOTHNESS)
    return torch.from_numpy(kernel / np.linalg.norm(kernel, axis=1).mean())
