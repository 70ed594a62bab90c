"""The equations solved by SciPy: pseudo-spectral in space, an adaptive integrator in time. Nothing is differentiated.

- Burgers: u is odd and of period 2, so a sine series on (0, 1) has the accuracy of a Fourier series, with half the
  points; SciPy's BDF, an implicit method, because ν goes up to 10.
- Allen–Cahn: u + 1 vanishes at both ends; a sine series on (−1, 1), and BDF.
- KdV: a Fourier series. The stiff part ν u_xxx only turns phases, so it is integrated exactly (an integrating factor)
  and the rest by DOP853, an explicit method of order 8.

Collocation: the unknowns are values at grid points, products are taken pointwise, derivatives are those of the series.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from bilevel.errors import SolverError
from bilevel.tasks.pde.equations import LEFT, Equation

Values = np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """How fine, and how long at most."""

    points: int = 512
    """Grid points on a period, or intervals of the grid: the paper's number."""
    tolerance: float = 1e-8
    """Relative tolerance of the time integrator; the absolute one is a hundredth of it."""
    most_evaluations: int = 200_000
    """Right-hand sides after which a solve counts as failed."""
    time_limit: float = 60.0
    """Seconds after which a solve counts as failed."""


def solve(
    equation: Equation, coefficients: Mapping[str, float], x: Values, t: Values, accuracy: Accuracy | None = None
) -> Values:
    """The field u at the places x `[X]` and the times t `[T]` (increasing, from 0 on), as `[X, T]`.

    Raises:
        SolverError: a coefficient with which the equation is ill-posed, a solution that blows up, or too much work.

    >>> from bilevel.tasks.pde.equations import EQUATIONS
    >>> burgers = EQUATIONS["burgers"]
    >>> u = solve(burgers, burgers.coefficients, np.array([-0.5, 0.5]), np.array([0.0, 0.5]), Accuracy(points=128))
    >>> u.round(3)
    array([[ 1.   ,  0.755],
           [-1.   , -0.755]])
    """
    accuracy = accuracy or Accuracy()
    require_well_posed(equation, coefficients)
    method = {"burgers": _burgers, "allen-cahn": _allen_cahn, "kdv": _kdv}[equation.name]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
        return method(equation, dict(coefficients), x, t, accuracy)


def require_well_posed(equation: Equation, coefficients: Mapping[str, float]) -> None:
    """Raise for a coefficient that is not finite, or that must be positive and is not."""
    for name, value in coefficients.items():
        if not math.isfinite(value):
            raise SolverError(f"{equation.name}: {name} = {value}, not a finite number")
    value = coefficients[equation.unknown]
    if value <= 0:
        why = "this equation" if equation.boundary is None else "an equation of diffusion, which is then ill-posed,"
        raise SolverError(
            f"{equation.name}: {equation.unknown} = {value:g}; a positive number is needed for {why}; let the meta "
            "parameter be its logarithm"
        )


def _burgers(equation: Equation, c: dict[str, float], x: Values, t: Values, accuracy: Accuracy) -> Values:
    grid, first, second = _sine_matrices(accuracy.points // 2, 1.0)
    ν, a = c["viscosity"], c["advection"]

    def rate(_time: float, u: Values) -> Values:
        return ν * (second @ u) - a * u * (first @ u)

    def jacobian(_time: float, u: Values) -> Values:
        found = ν * second - a * u[:, None] * first
        found[np.diag_indices_from(found)] -= a * (first @ u)
        return found

    u = _integrate(equation, rate, equation.initial(grid), t, accuracy, "BDF", jacobian)
    return _sine_series_at(x, accuracy.points // 2, 1.0) @ u


def _allen_cahn(equation: Equation, c: dict[str, float], x: Values, t: Values, accuracy: Accuracy) -> Values:
    grid, _, second = _sine_matrices(accuracy.points, 2.0)
    ν, r = c["diffusion"], c["reaction"]

    def rate(_time: float, v: Values) -> Values:  # v = u + 1, for which u − u³ = v (1 − v) (v − 2)
        return ν * (second @ v) + r * v * (1 - v) * (v - 2)

    def jacobian(_time: float, v: Values) -> Values:
        found = ν * second
        found[np.diag_indices_from(found)] += r * (-2 + 6 * v - 3 * v**2)
        return found

    v = _integrate(equation, rate, equation.initial(LEFT + grid) + 1, t, accuracy, "BDF", jacobian)
    return _sine_series_at(x - LEFT, accuracy.points, 2.0) @ v - 1


def _kdv(equation: Equation, c: dict[str, float], x: Values, t: Values, accuracy: Accuracy) -> Values:
    n = accuracy.points
    grid = LEFT + 2 * np.arange(n) / n
    k = np.pi * np.arange(n // 2 + 1)
    turning = 1j * c["dispersion"] * k**3  # û_t = iνk³ û − ½ a ik (u²)^
    kept = np.arange(n // 2 + 1) < n / 3  # the rest would come back as other waves ("aliasing")
    square = np.where(kept, -0.5j * c["advection"] * k, 0)

    def rate(time: float, w: Values) -> Values:  # û = exp(turning · t) w
        factor = np.exp(turning * time)
        u = np.fft.irfft(factor * w.view(complex), n)
        return (square * np.fft.rfft(u * u) / factor).view(float)

    start = np.where(kept, np.fft.rfft(equation.initial(grid)), 0).view(float)
    w = np.ascontiguousarray(_integrate(equation, rate, start, t, accuracy, "DOP853", None, scale=n).T).view(complex)
    modes = np.exp(turning * t[:, None]) * w
    weight = np.where(np.arange(n // 2 + 1) == 0, 1, 2) / n
    return np.real(np.exp(1j * np.outer(x - LEFT, k)) @ (weight * modes).T)


def _integrate(
    equation: Equation,
    rate: Callable[[float, Values], Values],
    start: Values,
    t: Values,
    accuracy: Accuracy,
    method: str,
    jacobian: Callable[[float, Values], Values] | None,
    scale: float = 1.0,
) -> Values:
    """SciPy's `solve_ivp` with a limit on its work, `[len(start), T]`. `scale` is the size of a typical unknown."""
    began, evaluations = time.monotonic(), 0

    def limited(now: float, u: Values) -> Values:
        nonlocal evaluations
        evaluations += 1
        if evaluations > accuracy.most_evaluations:
            raise _gave_up(equation, now, f"{accuracy.most_evaluations} right-hand sides")
        if time.monotonic() - began > accuracy.time_limit:
            raise _gave_up(equation, now, f"{accuracy.time_limit:g} s")
        found = rate(now, u)
        if not np.isfinite(found).all():
            raise SolverError(f"{equation.name}: the solution blew up at t = {now:.3g}")
        return found

    options: dict[str, Any] = {} if jacobian is None else {"jac": jacobian}
    found = solve_ivp(
        limited,
        (0.0, max(float(t[-1]), 1e-12)),
        start,
        method,
        t_eval=t,
        rtol=accuracy.tolerance,
        atol=accuracy.tolerance * scale / 100,
        **options,
    )
    if not found.success or found.y.shape[1] != len(t) or not np.isfinite(found.y).all():
        raise SolverError(f"{equation.name}: SciPy's {method} stopped at t = {found.t[-1]:.3g}: {found.message}")
    return found.y


def _gave_up(equation: Equation, now: float, limit: str) -> SolverError:
    return SolverError(
        f"{equation.name}: no more than t = {now:.3g} was reached in {limit}; the solution may be about to blow up, or "
        "the grid too coarse for it"
    )


@functools.lru_cache(maxsize=8)
def _sine_matrices(intervals: int, length: float) -> tuple[Values, Values, Values]:
    """The inner points of a grid on (0, length), and the first and second derivative at them of the sine series through
    values at them.
    """
    grid = length * np.arange(1, intervals) / intervals
    k = np.pi * np.arange(1, intervals) / length
    to_modes = 2 / intervals * np.sin(np.outer(k, grid))
    first = np.cos(np.outer(grid, k)) @ (k[:, None] * to_modes)
    second = -np.sin(np.outer(grid, k)) @ (k[:, None] ** 2 * to_modes)
    return grid, first, second


def _sine_series_at(x: Values, intervals: int, length: float) -> Values:
    """The matrix that evaluates the sine series through values at the inner grid points at other places x."""
    grid = length * np.arange(1, intervals) / intervals
    k = np.pi * np.arange(1, intervals) / length
    return np.sin(np.outer(x, k)) @ (2 / intervals * np.sin(np.outer(k, grid)))
