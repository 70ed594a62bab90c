"""The three equations of the paper's PDE experiments: coefficients, domains, initial and boundary conditions.

    Burgers      u_t + a u u_x = ν u_xx             u(0, x) = −sin πx      u(t, ±1) = 0
    Allen–Cahn   u_t = ν u_xx + r (u − u³)          u(0, x) = x² cos πx    u(t, ±1) = −1
    KdV          u_t + a u u_x + ν u_xxx = 0        u(0, x) = cos πx       period 2

All are on x ∈ [−1, 1], t ∈ [0, 1]. In the paper ν is unknown and the other coefficient is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

EquationName = Literal["burgers", "allen-cahn", "kdv"]

LEFT, RIGHT, LAST_TIME = -1.0, 1.0, 1.0


@dataclass(frozen=True)
class Equation:
    """One equation with its true coefficients."""

    name: EquationName
    formula: str
    coefficients: Mapping[str, float]
    """The true values by name. The first is the one that is unknown in the paper."""
    largest_start: Mapping[str, float]
    """The upper ends of the ranges from which start values are drawn uniformly. The lower ends are 0. The range of the
    first coefficient is that of the paper."""
    initial: Callable[[np.ndarray], np.ndarray]
    """The function u(0, x)."""
    boundary: float | None
    """The value of u at both ends; `None` for a period of 2."""
    odd: bool = False
    """Whether u(t, −x) = −u(t, x), in which case half of the work suffices."""

    @property
    def unknown(self) -> str:
        """The name of the coefficient that is unknown in the paper."""
        return next(iter(self.coefficients))


EQUATIONS: dict[str, Equation] = {
    equation.name: equation
    for equation in (
        Equation(
            "burgers",
            "u_t + a u u_x = ν u_xx",
            {"viscosity": 0.01 / np.pi, "advection": 1.0},
            {"viscosity": 10.0, "advection": 2.0},
            initial=lambda x: -np.sin(np.pi * x),
            boundary=0.0,
            odd=True,
        ),
        Equation(
            "allen-cahn",
            "u_t = ν u_xx + r (u − u³)",
            {"diffusion": 0.001, "reaction": 5.0},
            {"diffusion": 0.1, "reaction": 10.0},
            initial=lambda x: x**2 * np.cos(np.pi * x),
            boundary=-1.0,
        ),
        Equation(
            "kdv",
            "u_t + a u u_x + ν u_xxx = 0",
            {"dispersion": 0.0025, "advection": 1.0},
            {"dispersion": 0.01, "advection": 2.0},
            initial=lambda x: np.cos(np.pi * x),
            boundary=None,
        ),
    )
}
