"""The inner solvers of PDE discovery against closed forms, against each other, and at the order they claim."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from bilevel.errors import SolverError
from bilevel.tasks.pde import differentiable, numerical, pinn
from bilevel.tasks.pde.config import PDE
from bilevel.tasks.pde.equations import EQUATIONS, Equation

X, T = np.linspace(-1, 1, 41), np.linspace(0, 1, 5)
BURGERS, ALLEN_CAHN, KDV = (EQUATIONS[name] for name in ("burgers", "allen-cahn", "kdv"))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def stepped(equation: Equation, values: Mapping[str, float], points: int, steps: int) -> np.ndarray:
    """By the differentiable solver, at X and T[1:]."""
    basis = differentiable.basis_of(equation, points)
    evaluation, u = basis.evaluation(X), torch.from_numpy(equation.initial(basis.grid))
    seen = torch.zeros(len(X), len(T) - 1, dtype=torch.float64)
    for duration, number in differentiable.time_steps(list(T[1:]), steps):
        u = differentiable.step(basis, u, differentiable.term_coefficients(equation, values), duration)
        seen = differentiable.observe(basis, evaluation, u, seen, number)
    return seen.numpy()


# -- closed forms ------------------------------------------------------------------------------------------------------


def cole_hopf(viscosity: float) -> np.ndarray:
    """Burgers' solution as a quotient of two heat integrals, by Gauss–Hermite quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    y = X[:, None, None] - np.sqrt(4 * viscosity * T[1:])[:, None] * nodes
    f = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * viscosity))
    return -(np.sin(np.pi * y) * f).sum(-1) / f.sum(-1)


@pytest.mark.parametrize("viscosity", [0.03, 0.3])
def test_burgers_is_the_quotient_of_heat_integrals(viscosity: float) -> None:
    values, exact = {"viscosity": viscosity, "advection": 1.0}, cole_hopf(viscosity)
    found = numerical.solve(BURGERS, values, X, T, numerical.Accuracy(256, 1e-9))
    assert relative(found[:, 1:], exact) < 1e-7
    assert relative(stepped(BURGERS, values, 256, 200), exact) < 1e-7


def test_allen_cahn_without_reaction_is_the_heat_equation() -> None:
    values, k = {"diffusion": 0.05, "reaction": 0.0}, np.pi / 2 * np.arange(1, 200)
    fine = np.linspace(-1, 1, 20001)
    sines = np.sin(np.outer(k, fine + 1))
    modes = np.trapezoid(sines * (ALLEN_CAHN.initial(fine) + 1), fine, axis=1)
    exact = -1 + np.einsum("k,kt,kx->xt", modes, np.exp(-0.05 * np.outer(k**2, T)), np.sin(np.outer(k, X + 1)))
    found = numerical.solve(ALLEN_CAHN, values, X, T, numerical.Accuracy(200, 1e-9))
    assert relative(found[:, 1:], exact[:, 1:]) < 1e-6
    assert relative(stepped(ALLEN_CAHN, values, 200, 100), exact[:, 1:]) < 1e-6


def test_allen_cahn_against_chebyshev_collocation() -> None:
    """An independent implementation: Chebyshev points, the boundary values imposed by leaving them alone."""
    n = 128
    theta = np.pi * np.arange(n + 1) / n
    x = np.cos(theta)
    c = np.r_[2.0, np.ones(n - 1), 2.0] * (-1.0) ** np.arange(n + 1)
    gap = x[:, None] - x + np.eye(n + 1)
    d = np.outer(c, 1 / c) / gap
    d -= np.diag(d.sum(1))
    second = (d @ d)[1:-1]

    def rate(_t: float, inner: np.ndarray) -> np.ndarray:
        u = np.r_[-1.0, inner, -1.0]
        return 0.01 * (second @ u) + 5 * (inner - inner**3)

    there = solve_ivp(rate, (0, 1), ALLEN_CAHN.initial(x[1:-1]), "BDF", t_eval=T, rtol=1e-9, atol=1e-11).y
    here = numerical.solve(ALLEN_CAHN, {"diffusion": 0.01, "reaction": 5.0}, x[1:-1], T, numerical.Accuracy(256, 1e-9))
    assert relative(here[:, 1:], there[:, 1:]) < 1e-5


def test_kdv_carries_a_soliton() -> None:
    speed, values = 1.0, {"dispersion": 0.0025, "advection": 1.0}

    def soliton(x: np.ndarray, t: np.ndarray | float = 0.0) -> np.ndarray:
        around = (x + 0.5 - speed * t + 1) % 2 - 1
        return 3 * speed / np.cosh(math.sqrt(speed / 0.01) * around) ** 2

    equation = dataclasses.replace(KDV, initial=soliton)
    exact = soliton(X[:, None], T)
    assert relative(numerical.solve(equation, values, X, T, numerical.Accuracy(256, 1e-8)), exact) < 1e-6
    assert relative(stepped(equation, values, 256, 1600), exact[:, 1:]) < 1e-5


def test_a_steady_source() -> None:
    """u_t = ν u_xx + s from u = 0 for s = sin πx has u = (1 − e^{−νπ²t}) sin(πx)/(νπ²), in both bases."""
    for basis in (differentiable.FourierBasis(32), differentiable.SineBasis(32, 0.0)):
        u, source = torch.zeros(len(basis.grid), dtype=torch.float64), torch.from_numpy(np.sin(np.pi * basis.grid))
        for _ in range(50):
            u = differentiable.step(basis, u, {"u_xx": 0.1}, 0.02, source)
        rate = 0.1 * np.pi**2
        assert relative(u.numpy(), (1 - math.exp(-rate)) / rate * source.numpy()) < 1e-7


@pytest.mark.parametrize(
    ("term", "exact"),
    [
        ("u", lambda x: np.exp(0.1) * np.sin(np.pi * x)),
        ("u_x", lambda x: np.sin(np.pi * (x + 0.1))),
        ("u_xx", lambda x: np.exp(-0.1 * np.pi**2) * np.sin(np.pi * x)),
        ("u_xxx", lambda x: np.sin(np.pi * x - 0.1 * np.pi**3)),
        ("u²", lambda x: np.sin(np.pi * x) / (1 - 0.1 * np.sin(np.pi * x))),
        ("u³", lambda x: np.sin(np.pi * x) / np.sqrt(1 - 0.2 * np.sin(np.pi * x) ** 2)),
    ],
)
def test_each_term_of_the_library_alone(term: str, exact: Callable[[np.ndarray], np.ndarray]) -> None:
    basis = differentiable.FourierBasis(128)
    u = torch.from_numpy(np.sin(np.pi * basis.grid))
    for _ in range(20):
        u = differentiable.step(basis, u, {term: 1.0}, 0.005)
    assert relative(u.numpy(), exact(basis.grid)) < 1e-8


@pytest.mark.parametrize(("term", "power"), [("u u_x", 1), ("u² u_x", 2)])
def test_steepening_terms_follow_their_characteristics(term: str, power: int) -> None:
    """u_t = c u^p u_x: u(t, x) = u(0, x + c t u^p)."""
    basis, duration = differentiable.FourierBasis(128), 0.1
    u = torch.from_numpy(np.sin(np.pi * basis.grid))
    for _ in range(40):
        u = differentiable.step(basis, u, {term: 1.0}, duration / 40)
    found = u.numpy()
    assert np.abs(found - np.sin(np.pi * (basis.grid + duration * found**power))).max() < 1e-7


# -- order of convergence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "values", "points", "steps"),
    [
        (BURGERS, {"viscosity": 0.05, "advection": 1.0}, 128, 20),
        (ALLEN_CAHN, {"diffusion": 0.01, "reaction": 5.0}, 64, 16),
        (KDV, KDV.coefficients, 64, 200),
    ],
)
def test_time_steps_converge_with_order_four(
    equation: Equation, values: Mapping[str, float], points: int, steps: int
) -> None:
    finest = stepped(equation, values, points, 16 * steps)
    errors = [relative(stepped(equation, values, points, count * steps), finest) for count in (1, 2, 4)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) > 3.5, (errors, orders)


def test_the_numerical_solver_converges_spectrally_in_space() -> None:
    """Poles at distance δ from the real axis: errors fall like e^{−πδn/2}, faster than any power of n."""
    values = {"viscosity": 0.02, "advection": 1.0}
    finest = numerical.solve(BURGERS, values, X, T, numerical.Accuracy(512, 1e-10))
    errors = [
        relative(numerical.solve(BURGERS, values, X, T, numerical.Accuracy(n, 1e-10)), finest) for n in (32, 64, 128)
    ]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[1] > 1.6 * orders[0] > 4, (errors, orders)


@pytest.mark.parametrize("equation", [BURGERS, ALLEN_CAHN, KDV])
def test_the_numerical_solver_follows_its_tolerance(equation: Equation) -> None:
    values = {**equation.coefficients, equation.unknown: 0.01}
    points = 128
    finest = numerical.solve(equation, values, X, T, numerical.Accuracy(points, 1e-11))
    errors = [
        relative(numerical.solve(equation, values, X, T, numerical.Accuracy(points, tolerance)), finest)
        for tolerance in (1e-4, 1e-6, 1e-8)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2], errors
    assert errors[2] < 1e-6


@pytest.mark.parametrize("equation", [BURGERS, ALLEN_CAHN])
def test_the_jacobians_given_to_bdf_are_those_of_the_rates(equation: Equation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong one would cost steps, and change nothing else."""

    class Stop(Exception):  # noqa: N818
        pass

    def check(rate: Any, span: Any, start: np.ndarray, *_: Any, jac: Any, **__: Any) -> None:
        direction = np.sin(np.arange(len(start)))
        u = start + 0.1 * np.cos(np.arange(len(start)))
        difference = (rate(0.0, u + 1e-6 * direction) - rate(0.0, u - 1e-6 * direction)) / 2e-6
        assert relative(jac(0.0, u) @ direction, difference) < 1e-6
        raise Stop

    monkeypatch.setattr(numerical, "solve_ivp", check)
    with pytest.raises(Stop):
        numerical.solve(equation, equation.coefficients, X, T, numerical.Accuracy(64))


@pytest.mark.parametrize(("equation", "points"), [(BURGERS, 512), (ALLEN_CAHN, 192), (KDV, 192)])
def test_both_solvers_agree(equation: Equation, points: int) -> None:
    values = {**equation.coefficients, equation.unknown: 0.01}
    a = numerical.solve(equation, values, X, T, numerical.Accuracy(256, 1e-9))[:, 1:]
    assert relative(stepped(equation, values, points, 400), a) < 1e-5


# -- what cannot be solved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equation", [BURGERS, ALLEN_CAHN, KDV])
@pytest.mark.parametrize("value", [-1e-3, 0.0, math.nan, math.inf])
def test_ill_posed_coefficients_are_refused(equation: Equation, value: float) -> None:
    with pytest.raises(SolverError, match=rf"{equation.unknown} = .*(positive|finite) number"):
        numerical.solve(equation, {**equation.coefficients, equation.unknown: value}, X, T)


def test_a_shock_that_the_grid_cannot_hold_is_an_error() -> None:
    with pytest.raises(
        SolverError, match=r"burgers: (the solution blew up|SciPy's BDF stopped|no more than) .*t = 0\."
    ):
        numerical.solve(BURGERS, {"viscosity": 1e-6, "advection": 1.0}, X, T, numerical.Accuracy(64))


def test_a_solve_that_does_not_return_is_ended() -> None:
    with pytest.raises(SolverError, match="reached in 50 right-hand sides"):
        numerical.solve(KDV, KDV.coefficients, X, T, numerical.Accuracy(256, most_evaluations=50))
    with pytest.raises(SolverError, match=r"reached in 0\.01 s"):
        numerical.solve(KDV, KDV.coefficients, X, T, numerical.Accuracy(512, 1e-12, time_limit=0.01))


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equation", [BURGERS, ALLEN_CAHN, KDV])
def test_derivatives_of_the_network_are_autograds(equation: Equation) -> None:
    config = PDE(equation=equation.name, solver="pinn", depth=4, width=7)
    network = pinn.initial_network(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.rand(2, 9, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()
    found = pinn.solution(equation, network, x, t)

    def derivative(values: torch.Tensor, with_respect_to: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(values.sum(), with_respect_to, create_graph=True)[0]

    u_x = derivative(found.u, x)
    u_xx = derivative(u_x, x)
    for here, there in zip(found[1:], (derivative(found.u, t), u_x, u_xx, derivative(u_xx, x)), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("equation", [BURGERS, ALLEN_CAHN, KDV])
def test_the_network_has_the_initial_values(equation: Equation) -> None:
    config = PDE(equation=equation.name, solver="pinn")
    field = pinn.network_field(config, pinn.initial_network(config, seed=0), X, np.zeros(1))
    np.testing.assert_allclose(field[:, 0], equation.initial(X), atol=1e-12)


@pytest.mark.parametrize("equation", [BURGERS, ALLEN_CAHN, KDV])
def test_the_residual_of_the_true_solution_is_zero(equation: Equation) -> None:
    """With derivatives by finite differences of a solve: what training drives to zero is the equation."""
    values, h = {**equation.coefficients, equation.unknown: 0.02}, 5e-3
    x, t = np.linspace(-0.8, 0.8, 9), 0.3
    places = np.concatenate([x + i * h for i in (-2, -1, 0, 1, 2)])
    order = np.argsort(places)
    times = np.array([0, t - 1e-3, t, t + 1e-3])
    u = numerical.solve(equation, values, places[order], times, numerical.Accuracy(256, 1e-11))[np.argsort(order)]
    a, b, u0, c, d = np.split(u[:, 2], 5)
    jet = pinn.Jet(
        *map(
            torch.from_numpy,
            (
                u0,
                (np.split(u[:, 3], 5)[2] - np.split(u[:, 1], 5)[2]) / 2e-3,
                (8 * (c - b) - (d - a)) / (12 * h),
                (16 * (b + c) - a - d - 30 * u0) / (12 * h**2),
                (d - 2 * c + 2 * b - a) / (2 * h**3),
            ),
        )
    )
    residual = pinn._residual(equation, dict(values), jet)
    assert float(residual.abs().max()) < 0.02 * float(jet.t.abs().max())
