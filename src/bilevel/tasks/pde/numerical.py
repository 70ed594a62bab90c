"""Solution of the equations by SciPy, pseudo-spectral in space and with an adaptive integrator in time.

Nothing is differentiated.

- Burgers: u is odd and of period 2. A sine series on (0, 1) has the accuracy of a Fourier series with half the points.
  The integrator is SciPy's BDF, an implicit method, because ν goes up to 10.
- Allen–Cahn: u + 1 vanishes at both ends. The series is a sine series on (−1, 1), and the integrator is BDF.
- KdV: a Fourier series. The stiff part ν u_xxx only rotates phases, so it is integrated exactly (an integrating
factor),
  and the rest by DOP853, an explicit method of order 8.

The method is collocation: the unknowns are values at grid points, products are computed pointwise, and derivatives are
those of the series.
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
    """The resolution of a solve, and the limits of its work."""

    points: int = 512
    """The number of grid points on a period, or of intervals of the grid. The default is the paper's number."""
    tolerance: float = 1e-8
    """The relative tolerance of the time integrator. The absolute tolerance is a hundredth of it."""
    most_evaluations: int = 200_000
    """The number of evaluations of the right-hand side after which a solve counts as failed."""
    time_limit: float = 60.0
    """The number of seconds after which a solve counts as failed."""


def solve(
    equation: Equation, coefficients: Mapping[str, float], x: Values, t: Values, accuracy: Accuracy | None = None
) -> Values:
    """Compute the field u at the places x `[X]` and the times t `[T]`, as `[X, T]`.

    Args:
        equation: the equation.
        coefficients: the values of its coefficients by name.
        x: the places, in [−1, 1].
        t: the times, which increase and are at least 0.
        accuracy: the resolution and the limits.

    Raises:
        SolverError: the equation is ill-posed with these coefficients, the solution blows up, or a limit is exceeded.

    >>> from bilevel.tasks.pde.equations import EQUATIONS
    >>> burgers = EQUATIONS["burgers"]
    >>> u = solve(burgers, burgers.coefficients, np.array([-0.5, 0.5]), np.array([0.0, 0.5]), Accuracy(points=128))
    >>> u.round(3)
    array([[ 1.   ,  0.592],
           [-1.   , -0.592]])
    """
    accuracy = accuracy or Accuracy()
    require_well_posed(equation, coefficients)
    method = {"burgers": _burgers, "allen-cahn": _allen_cahn, "kdv": _kdv}[equation.name]
    with np.errstate(over="ignore", invalid="ignore"):  # values that overflow raise an error below
        return method(equation, dict(coefficients), x, t, accuracy)


def require_well_posed(equation: Equation, coefficients: Mapping[str, float]) -> None:
    """Raise a SolverError if a coefficient is not finite, or must be positive and is not."""
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
    kept = np.arange(n // 2 + 1) < n / 3  # products of the other modes would appear as lower modes ("aliasing")
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
    """Integrate with SciPy's `solve_ivp` and a limit on its work. Return `[len(start), T]`.

    `scale` is the size of a typical unknown.
    """
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
    """Return the inner points of a grid on (0, length), and the matrices of the first and second derivative.

    The derivatives are those of the sine series through values at the inner points, at the inner points.
    """
    grid = length * np.arange(1, intervals) / intervals
    k = np.pi * np.arange(1, intervals) / length
    to_modes = 2 / intervals * np.sin(np.outer(k, grid))
    first = np.cos(np.outer(grid, k)) @ (k[:, None] * to_modes)
    second = -np.sin(np.outer(grid, k)) @ (k[:, None] ** 2 * to_modes)
    return grid, first, second


def _sine_series_at(x: Values, intervals: int, length: float) -> Values:
    """Return the matrix that evaluates at places x the sine series through values at the inner grid points."""
    grid = length * np.arange(1, intervals) / intervals
    k = np.pi * np.arange(1, intervals) / length
    return np.sin(np.outer(x, k)) @ (2 / intervals * np.sin(np.outer(k, grid)))
