"""Calibration: closed forms of linear models, repeated noise, SciPy's own count of solves, other minima, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import least_squares

import bilevel
from bilevel.errors import NonFiniteError, SolverError
from bilevel.integrations.calibration import Calibration

RNG = np.random.default_rng(0)
DESIGN = RNG.standard_normal((20, 3))
TRUE = np.array([1.0, -2.0, 0.5])
SIGMA = np.linspace(0.1, 0.3, 20)
LINEAR = DESIGN @ TRUE + SIGMA * RNG.standard_normal(20)


def found(simulate: Any, start: Any, observed: Any, sigma: Any = None, **settings: Any) -> Calibration:
    return bilevel.calibrate(simulate, start, observed, sigma, progress=False, **settings)


@pytest.mark.parametrize("derivatives", ["differences", "forward", "reverse"])
def test_a_linear_model_gives_weighted_least_squares(derivatives: Any) -> None:
    def simulate(x: Any) -> Any:
        return DESIGN @ x if derivatives == "differences" else torch.tensor(DESIGN) @ x

    result = found(simulate, np.zeros(3) + 0.1, LINEAR, SIGMA, derivatives=derivatives)
    weighted = DESIGN / SIGMA[:, None]
    covariance = np.linalg.inv(weighted.T @ weighted)
    np.testing.assert_allclose(result.values, covariance @ weighted.T @ (LINEAR / SIGMA), rtol=1e-6)
    np.testing.assert_allclose(result.covariance, covariance, rtol=1e-5)
    np.testing.assert_allclose(result.standard_errors, np.sqrt(np.diag(covariance)), rtol=1e-5)
    assert result.degrees == 17
    assert result.explains
    assert len(result.starts) == 1
    np.testing.assert_allclose(result.residuals, (DESIGN @ result.values - LINEAR) / SIGMA, rtol=1e-12)
    assert result.chi_squared == pytest.approx(result.residuals @ result.residuals)


def test_without_sigma_it_is_estimated() -> None:
    data = DESIGN @ TRUE + 0.2 * np.random.default_rng(1).standard_normal(20)
    result = found(lambda x: DESIGN @ x, np.ones(3), data, starts=1)
    values, squares, _, _ = np.linalg.lstsq(DESIGN, data, rcond=None)
    np.testing.assert_allclose(result.values, values, rtol=1e-6)
    covariance = np.linalg.inv(DESIGN.T @ DESIGN) * squares[0] / 17
    np.testing.assert_allclose(result.covariance, covariance, rtol=1e-5)
    assert result.explains is None
    assert "sigma is unknown" in repr(result)


# -- an ordinary differential equation with four parameters ------------------------------------------------------------

TIMES = np.linspace(0.5, 12, 24)
RATES = np.array([1.1, 0.4, 0.1, 0.4])


def predators(x: np.ndarray) -> np.ndarray:
    """Lotka and Volterra's hares and lynxes."""

    def slope(_: float, y: np.ndarray) -> list[float]:
        return [x[0] * y[0] - x[1] * y[0] * y[1], x[2] * y[0] * y[1] - x[3] * y[1]]

    solved = solve_ivp(slope, (0, 12), [10.0, 5.0], t_eval=TIMES, rtol=1e-9, atol=1e-9)
    if not solved.success:
        raise SolverError(solved.message)
    return solved.y.reshape(-1)


def test_an_ode_takes_no_more_solves_than_scipy_and_a_half() -> None:
    data = predators(RATES) + 0.1 * np.random.default_rng(2).standard_normal(48)
    start = RATES * [1.2, 0.9, 1.1, 1.15]
    calls = []

    def counted(x: np.ndarray) -> np.ndarray:
        calls.append(x)
        return predators(x)

    theirs = least_squares(lambda x: (counted(x) - data) / 0.1, start, x_scale="jac")
    scipys, calls[:] = len(calls), []
    result = found(counted, start, data, 0.1)
    assert result.solves == len(calls)
    assert len(calls) <= 1.5 * scipys
    np.testing.assert_allclose(result.values, theirs.x, rtol=1e-4)
    errors = np.sqrt(np.diag(np.linalg.inv(theirs.jac.T @ theirs.jac)))
    np.testing.assert_allclose(result.standard_errors, errors, rtol=1e-2)
    assert (np.abs(result.values - RATES) < 4 * result.standard_errors).all()
    assert result.explains


def test_exact_derivatives_take_one_simulation_an_iteration() -> None:
    times = torch.linspace(0, 4, 30, dtype=torch.float64)

    def decay(x: dict[str, Any]) -> Any:
        return x["size"] * torch.exp(-x["rates"][0] * times) + x["rates"][1]

    data = decay({"size": 2.0, "rates": [torch.tensor(0.7), 0.3]}).numpy()
    noise = 0.01 * np.random.default_rng(3).standard_normal(30)
    start = {"size": 1.0, "rates": np.array([1.0, 0.0])}
    result = found(decay, start, data + noise, 0.01, derivatives="forward")
    assert set(result.values) == {"size", "rates"}
    assert isinstance(result.values["size"], float)
    assert result.values["rates"].shape == (2,)
    assert abs(result.values["rates"][0] - 0.7) < 4 * result.standard_errors["rates"][0]
    assert result.solves < 15


@pytest.mark.slow
def test_standard_errors_are_those_of_repeated_noise() -> None:
    """(found − true)/standard error is about standard normal: the squares over 40 seeds sum to χ² with 40 degrees."""
    times = np.linspace(0, 4, 30)
    squares = 0.0
    for seed in range(40):
        noise = 0.05 * np.random.default_rng(seed).standard_normal(30)
        result = found(lambda x: x[0] * np.exp(-x[1] * times), [1.0, 1.0], 2 * np.exp(-0.7 * times) + noise, 0.05)
        squares += float((result.values[1] - 0.7) / result.standard_errors[1]) ** 2
    assert abs(squares - 40) < 4 * (2 * 40) ** 0.5


# -- other minima ------------------------------------------------------------------------------------------------------

WAVE = np.linspace(0, 10, 60)


def wave(x: np.ndarray) -> np.ndarray:
    return np.sin(x[0] * WAVE)


def test_it_starts_again_from_another_minimum_and_stops_at_the_right_one() -> None:
    data = wave(np.array([2.0])) + 0.05 * np.random.default_rng(4).standard_normal(60)
    alone = found(wave, [3.4], data, 0.05, starts=1)
    assert alone.explains is False
    assert "another minimum" in repr(alone)
    result = found(wave, [3.4], data, 0.05, starts=30)
    assert result.explains
    assert abs(result.values[0] - 2.0) < 4 * result.standard_errors[0]
    assert 1 < len(result.starts) < 30
    assert result.starts[-1].chi_squared == pytest.approx(result.chi_squared)
    assert all(each.chi_squared > 1000 for each in result.starts[:-1])
    assert sum(each.solves for each in result.starts) <= result.solves <= sum(s.solves for s in result.starts) + 2
    again = found(wave, [3.4], data, 0.05, starts=30)
    np.testing.assert_array_equal(again.values, result.values)


def test_within_bounds_starts_are_drawn_from_all_of_them() -> None:
    data = wave(np.array([2.0]))
    result = found(wave, [7.0], data + 1e-3, 0.01, starts=50, bounds=(0.5, 8.0), seed=1)
    assert result.explains
    assert all(0.5 <= each.start[0] <= 8.0 for each in result.starts)
    assert result.values[0] == pytest.approx(2.0, abs=1e-2)


def test_a_step_to_where_there_is_no_solution_is_made_shorter() -> None:
    def simulate(x: np.ndarray) -> np.ndarray:
        if x[0] > 2.5:
            raise SolverError("the mesh is inverted")
        return np.array([1.0, 2.0, 3.0]) * np.exp(-3 * (2.4 - x[0]))

    result = found(simulate, [0.0], simulate(np.array([2.4])), 1e-3)
    assert result.values[0] == pytest.approx(2.4, abs=1e-5)


def test_a_parameter_that_the_data_do_not_determine_has_an_infinite_error() -> None:
    with np.errstate(divide="ignore"):
        result = found(lambda x: (x[0] + x[1]) * np.arange(1.0, 9.0), [1.0, 1.0], 3 * np.arange(1.0, 9.0), 0.1)
    assert np.isinf(result.standard_errors).all()
    assert sum(result.values) == pytest.approx(3.0)


# -- what is refused ---------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fewer observations than parameters": ({"observed": [1.0, 2.0, 3.0]}, ValueError, "3 numbers for 3 parameters"),
    "sigma of another length": ({"sigma": np.ones(3)}, ValueError, "sigma has 3 numbers and observed 20"),
    "sigma zero": ({"sigma": 0.0}, ValueError, "standard deviations are positive"),
    "nan observed": ({"observed": np.full(20, np.nan)}, ValueError, "observed holds NaN"),
    "text": ({"start": "fast"}, TypeError, "start is 'fast'"),
    "nothing": ({"start": []}, ValueError, "start is empty"),
    "outside": ({"bounds": (2.0, 3.0)}, ValueError, "start must lie between bounds"),
    "one bound": ({"bounds": 1.0}, ValueError, "pass a pair"),
    "bounds of another length": ({"bounds": (np.zeros(2), 2.0)}, ValueError, "one for each parameter"),
    "another number of results": ({"simulate": lambda x: np.zeros(3)}, ValueError, "3 numbers and observed has 20"),
    "nan at start": ({"simulate": lambda x: np.full(20, np.nan)}, NonFiniteError, "start where it has a finite result"),
    "no effect": ({"simulate": lambda x: DESIGN[:, :2] @ x[:2]}, ValueError, r"when x\[2\] is moved"),
    "numpy for exact derivatives": (
        {"simulate": lambda x: np.zeros(20), "derivatives": "reverse"},
        TypeError,
        "simulate returned ndarray; derivatives='reverse' needs a tensor",
    ),
    "derivatives": ({"derivatives": "adjoint"}, ValueError, "'differences', 'forward', 'reverse'"),
    "too few solves": ({"max_solves": 3}, ValueError, "max_solves=3: a whole number of at least 5"),
    "no function": ({"simulate": 3}, TypeError, "simulate"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    changes, error, message = BAD[what]
    arguments: dict[str, Any] = {
        "simulate": lambda x: DESIGN @ x,
        "start": np.ones(3),
        "observed": LINEAR,
        "sigma": SIGMA,
        **changes,
    }
    with pytest.raises(error, match=message):
        bilevel.calibrate(**arguments, progress=False)


def test_an_error_of_the_simulator_arrives_unchanged() -> None:
    mine = KeyError("mesh 17")

    def simulate(x: Any) -> Any:
        raise mine

    with pytest.raises(KeyError) as caught:
        found(simulate, [1.0], [1.0, 2.0])
    assert caught.value is mine
