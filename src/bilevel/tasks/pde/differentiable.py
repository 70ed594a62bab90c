"""Time steps of the equations in torch, with exact derivatives of the solution with respect to coefficients, the
initial condition and a source.

    u_t = Σ_j c_j term_j(u) + s(x),   terms u, u_x, u_xx, u_xxx, u², u³, u u_x, u² u_x

For period 2 the basis is a Fourier basis, in which the first four terms are diagonal. For u fixed at both ends the
basis is a sine series of u minus its boundary value, in which u_xx is diagonal. The diagonal part L is integrated
exactly, and the rest N by the classical Runge–Kutta method ("integrating factor", order 4):

    E = e^{LΔ/2},   k_1 = N(û),   k_2 = N(E(û + Δk_1/2)),   k_3 = N(Eû + Δk_2/2),   k_4 = N(E²û + ΔE k_3),
    û ← E²û + (Δ/6)(E²k_1 + 2E(k_2 + k_3) + k_4).

One time step is one inner step. Its batch is a pair (Δ, number of the observation time at which it ends, or −1), and a
step ends at every observation time. The state is {"u": grid values `[n]`, "seen": predictions `[places, times]`}.

Reference: Canuto et al., Spectral Methods: Fundamentals in Single Domains, 2006, appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.tasks.pde.equations import LEFT, Equation

TERMS = ("u", "u_x", "u_xx", "u_xxx", "u²", "u³", "u u_x", "u² u_x")

State = dict[str, Tensor]


def term_coefficients(equation: Equation, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the coefficients of the terms from the coefficients of the equation."""
    if equation.name == "burgers":
        return {"u_xx": values["viscosity"], "u u_x": -values["advection"]}
    if equation.name == "allen-cahn":
        return {"u_xx": values["diffusion"], "u": values["reaction"], "u³": -values["reaction"]}
    return {"u_xxx": -values["dispersion"], "u u_x": -values["advection"]}


@dataclass(frozen=True)
class FourierBasis:
    """The Fourier basis for values at n points of a period of 2."""

    points: int

    @property
    def grid(self) -> np.ndarray:
        return LEFT + 2 * np.arange(self.points) / self.points

    @property
    def wavenumbers(self) -> Tensor:
        return math.pi * torch.arange(self.points // 2 + 1, dtype=torch.float64)

    def modes(self, values: Tensor) -> Tensor:
        """Compute the modes of values on the grid, without the upper third, into which products would alias."""
        kept = torch.arange(self.points // 2 + 1) < self.points / 3
        return torch.fft.rfft(values) * kept

    def values(self, modes: Tensor) -> Tensor:
        return torch.fft.irfft(modes, self.points)

    def linear(self, c: Mapping[str, Any]) -> Tensor:
        """Return L, the symbol of the terms that are diagonal in this basis."""
        k = self.wavenumbers
        real = c.get("u", 0.0) - c.get("u_xx", 0.0) * k**2
        imaginary = c.get("u_x", 0.0) * k - c.get("u_xxx", 0.0) * k**3
        return torch.complex(real + torch.zeros_like(k), imaginary + torch.zeros_like(k))

    def nonlinear(self, c: Mapping[str, Any], modes: Tensor) -> Tensor:
        """Compute the modes of all other terms, with u u_x = ½(u²)_x and u² u_x = ⅓(u³)_x."""
        u = self.values(modes)
        plain, flux = self._sum(c, u, {"u²": 1.0, "u³": 1.0}), self._sum(c, u, {"u u_x": 1 / 2, "u² u_x": 1 / 3})
        ik = torch.complex(torch.zeros_like(self.wavenumbers), self.wavenumbers)
        total = torch.zeros_like(modes)
        if plain is not None:
            total = total + self.modes(plain)
        return total if flux is None else total + ik * self.modes(flux)

    def _sum(self, c: Mapping[str, Any], u: Tensor, factors: Mapping[str, float]) -> Tensor | None:
        powers = {"u²": u**2, "u³": u**3, "u u_x": u**2, "u² u_x": u**3}
        parts = [factor * c[name] * powers[name] for name, factor in factors.items() if name in c]
        return torch.stack(parts).sum(0) if parts else None

    def evaluation(self, x: np.ndarray) -> Tensor:
        """Return the matrix from grid values to values at places x `[X, n]`."""
        n, k = self.points, np.arange(self.points // 2 + 1)
        weight = np.where((k == 0) | (2 * k == n), 1, 2) / n
        phase = np.pi * k * (x[:, None, None] - self.grid[None, :, None])
        return torch.from_numpy((weight * np.cos(phase)).sum(-1))


@dataclass(frozen=True)
class SineBasis:
    """The sine basis for values at the inner points of n intervals on (−1, 1); both ends have the value `boundary`."""

    points: int
    boundary: float

    @property
    def grid(self) -> np.ndarray:
        return LEFT + 2 * np.arange(1, self.points) / self.points

    @property
    def wavenumbers(self) -> Tensor:
        return math.pi / 2 * torch.arange(1, self.points, dtype=torch.float64)

    def modes(self, values: Tensor) -> Tensor:
        """Compute the sine transform of values minus the boundary value, by the FFT of their odd continuation."""
        v = values - self.boundary
        zero = torch.zeros_like(v[:1])
        whole = torch.cat([zero, v, zero, -v.flip(0)])
        return -torch.fft.rfft(whole).imag[1 : self.points] / self.points

    def values(self, modes: Tensor) -> Tensor:
        zero = torch.zeros_like(modes[:1])
        spectrum = torch.cat([zero, modes, zero]) * self.points
        return torch.fft.irfft(torch.complex(torch.zeros_like(spectrum), -spectrum))[1 : self.points] + self.boundary

    def linear(self, c: Mapping[str, Any]) -> Tensor:
        return -c.get("u_xx", 0.0) * self.wavenumbers**2

    def nonlinear(self, c: Mapping[str, Any], modes: Tensor) -> Tensor:
        u = self.values(modes)
        powers = {"u": u, "u²": u**2, "u³": u**3}
        parts = [c[name] * power for name, power in powers.items() if name in c]
        return self.modes(torch.stack(parts).sum(0) + self.boundary) if parts else torch.zeros_like(modes)

    def evaluation(self, x: np.ndarray) -> Tensor:
        """Return the matrix from grid values to values at places x `[X, n]`, both minus the boundary value."""
        k = np.pi / 2 * np.arange(1, self.points)
        matrix = np.sin(np.outer(x - LEFT, k)) @ np.sin(np.outer(k, self.grid - LEFT)) * 2 / self.points
        return torch.from_numpy(matrix)


Basis = FourierBasis | SineBasis


def basis_of(equation: Equation, points: int) -> Basis:
    """Return the basis for an equation. Burgers' solution is odd and of period 2, so its basis is the Fourier basis."""
    if equation.boundary is None or equation.odd:
        return FourierBasis(points)
    return SineBasis(points, equation.boundary)


def step(basis: Basis, u: Tensor, c: Mapping[str, Any], Δ: float, source: Tensor | None = None) -> Tensor:
    """Compute the grid values after a time step Δ."""
    half = torch.exp(basis.linear(c) * (Δ / 2))
    whole = half * half
    # In the sine basis the source is treated as a function that vanishes at the ends, like u − boundary.
    offset = basis.boundary if isinstance(basis, SineBasis) else 0.0
    given = None if source is None else basis.modes(source + offset)

    def rate(modes: Tensor) -> Tensor:
        found = basis.nonlinear(c, modes)
        return found if given is None else found + given

    start = basis.modes(u)
    k1 = rate(start)
    k2 = rate(half * (start + Δ / 2 * k1))
    k3 = rate(half * start + Δ / 2 * k2)
    k4 = rate(whole * start + Δ * half * k3)
    return basis.values(whole * start + Δ / 6 * (whole * k1 + 2 * half * (k2 + k3) + k4))


def time_steps(times: Sequence[float], steps: int) -> list[tuple[float, int]]:
    """Return about `steps` time steps from 0 to the last observation time, with a step that ends at each of the times.

    Args:
        times: the observation times, which increase.
        steps: the approximate number of time steps.

    Returns:
        Pairs of the step's length Δ and the number of the observation time at which the step ends, or −1.

    >>> time_steps([0.5, 1.0], 4)
    [(0.25, -1), (0.25, 0), (0.25, -1), (0.25, 1)]
    """
    made: list[tuple[float, int]] = []
    before = 0.0
    for number, time in enumerate(times):
        count = max(1, math.ceil((time - before) / times[-1] * steps - 1e-9))
        made += [((time - before) / count, number if i == count - 1 else -1) for i in range(count)]
        before = time
    return made


def observe(basis: Basis, evaluation: Tensor, u: Tensor, seen: Tensor, number: int) -> Tensor:
    """Return the predictions `[places, times]` with the column of this observation time filled in, unless it is −1."""
    if number < 0:
        return seen
    offset = basis.boundary if isinstance(basis, SineBasis) else 0.0
    column = evaluation @ (u - offset) + offset
    chosen = torch.zeros(seen.shape[1], dtype=seen.dtype)
    chosen[number] = 1
    return seen + column[:, None] * chosen
