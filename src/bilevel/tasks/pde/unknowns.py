"""The unknowns of a problem, and their representation by the meta parameters φ.

A positive coefficient c is represented by φ = log c, so that every φ gives a well-posed equation. A field is
represented by φ `[n]` with field = scale · A φ, where A is a symmetric smoothing matrix. With it, ‖φ‖² measures
roughness and gradients are well scaled. The coefficients of a library are φ itself. The coefficient of diffusion must
be positive, and `allowed` projects φ accordingly.
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
"""The length scale ℓ on which unknown fields vary."""

LIBRARY_UNITS = {"u": 1.0, "u_x": 1.0, "u_xx": 0.01, "u_xxx": 0.01, "u²": 1.0, "u³": 1.0, "u u_x": 1.0, "u² u_x": 1.0}
"""Typical sizes of the terms' coefficients in this domain, which are the units of φ."""


@dataclass(frozen=True)
class Situation:
    """An equation that can be solved: coefficients by name (its own, or those of the library's terms), and fields."""

    coefficients: dict[str, Any]
    initial: Tensor | None = None
    """The initial values on the grid; `None` for the equation's own."""
    source: Tensor | None = None


def true_source(x: np.ndarray) -> np.ndarray:
    """Return the true source for observations of an equation with an unknown source."""
    return 0.5 * np.sin(2 * np.pi * x) + np.exp(-30 * (x - 0.3) ** 2)


def names(config: PDE) -> list[str]:
    """Return the names of the entries of the unknowns."""
    equation = EQUATIONS[config.equation]
    if config.unknown == "coefficient":
        return [equation.unknown]
    if config.unknown == "coefficients":
        return list(equation.coefficients)
    if config.unknown == "library":
        return list(TERMS)
    return [f"{config.unknown} at x = {x:.3f}" for x in basis_of(equation, config.resolution).grid]


def truth(config: PDE) -> np.ndarray:
    """Return the true values of the unknowns."""
    equation = EQUATIONS[config.equation]
    if config.unknown in ("coefficient", "coefficients"):
        return np.array([equation.coefficients[name] for name in names(config)])
    if config.unknown == "library":
        known = term_coefficients(equation, equation.coefficients)
        return np.array([known.get(name, 0.0) for name in TERMS])
    grid = basis_of(equation, config.resolution).grid
    return equation.initial(grid) if config.unknown == "initial-condition" else true_source(grid)


def start(config: PDE, seed: int, number: int) -> Tensor:
    """Return φ of start `number`. Coefficients are uniform over their ranges; fields and libraries are almost zero."""
    equation, generator = EQUATIONS[config.equation], randomness.generator(seed, randomness.PDE_START, number)
    if config.unknown in ("coefficient", "coefficients"):
        drawn = [equation.largest_start[name] * (1 - generator.random()) for name in names(config)]
        return torch.tensor([math.log(c) for c in drawn], dtype=torch.float64)
    draws = 0.1 * torch.from_numpy(generator.standard_normal(len(names(config))))
    return allowed(config, draws)


def found(config: PDE, meta: Tensor) -> Tensor:
    """Return the values of the unknowns at φ, in the order of `names`."""
    if config.unknown in ("coefficient", "coefficients"):
        return meta.exp()
    if config.unknown == "library":
        return meta * torch.tensor([LIBRARY_UNITS[name] for name in TERMS], dtype=meta.dtype)
    return _smoothing(config.equation, config.resolution) @ meta


def situation(config: PDE, meta: Tensor) -> Situation:
    """Return the equation at φ."""
    equation, values = EQUATIONS[config.equation], found(config, meta)
    if config.unknown == "library":
        return Situation({name: values[i] for i, name in enumerate(TERMS)})
    if config.unknown in ("coefficient", "coefficients"):
        return Situation({**equation.coefficients, **{name: values[i] for i, name in enumerate(names(config))}})
    if config.unknown == "source":
        return Situation(dict(equation.coefficients), source=values)
    return Situation(dict(equation.coefficients), initial=values)


def term_coefficients_of(config: PDE, here: Situation) -> dict[str, Any]:
    """Return the coefficients of the terms from those of the equation."""
    if config.unknown == "library":
        return here.coefficients
    return term_coefficients(EQUATIONS[config.equation], here.coefficients)


def penalty(config: PDE, meta: Tensor) -> Tensor:
    """Compute the penalty, which the outer loss adds to the misfit."""
    if config.unknown == "library":
        return config.penalty * meta.abs().sum()
    if config.unknown in ("initial-condition", "source"):
        return config.penalty * meta.square().sum()
    return torch.zeros((), dtype=meta.dtype)


def allowed(config: PDE, meta: Tensor) -> Tensor:
    """Return the nearest φ with which the equation is well-posed."""
    if config.unknown != "library":
        return meta
    lowest = torch.tensor([0.0 if name == "u_xx" else -math.inf for name in TERMS], dtype=meta.dtype)
    return torch.maximum(meta, lowest)


@functools.lru_cache(maxsize=4)
def _smoothing(name: str, points: int) -> Tensor:
    """Return the matrix A `[n, n]` of the filter (1 + (ℓk)²)⁻², scaled such that φ of variance 1 gives a field of
    variance 1.
    """
    equation: Equation = EQUATIONS[name]
    x = basis_of(equation, points).grid
    distance = np.abs(x[:, None] - x)
    if equation.boundary is None or equation.odd:
        distance = np.minimum(distance, 2 - distance)
    kernel = (1 + distance / SMOOTHNESS) * np.exp(-distance / SMOOTHNESS)
    return torch.from_numpy(kernel / np.linalg.norm(kernel, axis=1).mean())
