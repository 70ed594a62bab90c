"""PDE discovery as a bilevel problem: its hypergradients, its observations, what it finds, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import Page
from scipy.io import savemat
from torch import Tensor

import bilevel
from bilevel import cli
from bilevel.errors import DataError, SolverError
from bilevel.tasks.pde import evaluation, observations, problem, unknowns
from bilevel.tasks.pde.config import PDE
from bilevel.tasks.pde.differentiable import TERMS
from bilevel.tasks.pde.equations import EQUATIONS
from bilevel.tasks.pde.secant import Secant
from bilevel.training import metrics
from bilevel.unrolling.inner_loop import InnerLoop

NAMES = tuple(EQUATIONS)
ROUGH = ("--solver-tolerance", "1e-6")
TABLE = np.array([[x, t, np.sin(3 * x) * (1 - t)] for x in (-0.6, -0.1, 0.4, 0.7) for t in (0.25, 0.5)])


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A file of made-up observations, for which no reference has to be solved."""
    path = tmp_path / "observed.csv"
    np.savetxt(path, TABLE, delimiter=",", header="x,t,u", comments="")
    return str(path)


def value(setup: Any, meta: Tensor) -> float:
    """h(φ), plainly."""
    steps = setup.inner_batches or bilevel.no_batches(1)
    return float(InnerLoop(setup.problem, meta, steps, None, 0).value()[0])


# -- hypergradients ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unknown", ["coefficients", "initial-condition", "source", "library"])
def test_exact_hypergradients_of_the_differentiable_solver(name: Any, unknown: Any, table: str) -> None:
    if unknown == "library" and name == "allen-cahn":
        pytest.skip("refused, as another test shows")
    config = PDE(name, "differentiable", unknown, points=32, inner_steps=40, observations=table, penalty=0.01)
    setup = problem.setup(config, None, 1, 0)
    meta = setup.meta if unknown != "coefficients" else torch.tensor([0.05, 1.5], dtype=torch.float64).log()
    if unknown == "library":
        meta = 0.02 * torch.arange(1.0, 9.0, dtype=torch.float64)
    reverse = bilevel.Reverse()(setup.problem, meta, setup.inner_batches).grad
    forward = bilevel.Forward()(setup.problem, meta, setup.inner_batches).grad
    torch.testing.assert_close(reverse, forward, rtol=1e-9, atol=1e-12)
    direction = torch.randn(meta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = 1e-5 * direction
    difference = (value(setup, meta + shift) - value(setup, meta - shift)) / 2e-5
    assert float(reverse @ direction) == pytest.approx(difference, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_differences_of_scipys_solver_agree_with_exact_derivatives_of_the_other(name: Any, table: str) -> None:
    meta = torch.tensor([0.02, 1.5], dtype=torch.float64).log()
    exact = problem.setup(PDE(name, "differentiable", "coefficients", observations=table, points=192), None, 1, 0)
    black = problem.setup(PDE(name, "numerical", "coefficients", observations=table, points=128), None, 1, 0)
    there = bilevel.Forward()(exact.problem, meta, exact.inner_batches)
    here = bilevel.ZerothOrder(2, step_size=1e-3, distribution="orthogonal")(black.problem, meta)
    assert float(here.value) == pytest.approx(float(there.value), rel=1e-3)
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-3, atol=1e-5 * float(there.grad.abs().max()))


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_gradients_through_the_training_of_a_network(name: Any, optimizer: Any, table: str) -> None:
    config = PDE(
        name, "pinn", observations=table, depth=3, width=6, collocation=16, inner_steps=5, inner_optimizer=optimizer
    )
    setup = problem.setup(config, None, 1, 0)
    meta = torch.tensor([0.05], dtype=torch.float64).log()
    found = bilevel.ForwardGradient(1)(setup.problem, meta, setup.inner_batches)
    difference = (value(setup, meta + 1e-4) - value(setup, meta - 1e-4)) / 2e-4
    assert abs(difference) > 1e-9
    assert float(found.grad) == pytest.approx(difference, rel=1e-4)
    single = replace(config, dtype="float32")
    setup = problem.setup(single, None, 1, 0)
    rough = bilevel.ForwardGradient(1)(setup.problem, meta, setup.inner_batches)
    assert float(rough.grad) == pytest.approx(difference, rel=0.05)


# -- the secant method -------------------------------------------------------------------------------------------------


def descend(gradient: Any, start: float, steps: int, **settings: float) -> list[float]:
    phi = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, points = Secant([phi], **settings), [start]
    for _ in range(steps):
        phi.grad = torch.as_tensor(gradient(float(phi.detach())), dtype=torch.float64)
        optimizer.step()
        points.append(float(phi.detach()))
    return points


def test_secant_solves_a_quadratic_in_two_steps() -> None:
    assert descend(lambda x: 1e-9 * (x - 3), 1.0, 2)[-1] == pytest.approx(3.0, rel=1e-12)


def test_secant_strides_out_of_a_plateau_and_no_farther_than_allowed() -> None:
    points = descend(lambda x: x / (1 + x**2) ** 2, 8.0, 4, lr=0.5, longest=1.5, growth=2.0)
    assert np.diff(points) == pytest.approx([-0.5, -1.0, -1.5, -1.5])


def test_secant_converges_faster_than_linearly() -> None:
    errors = [abs(x) for x in descend(lambda x: math.expm1(x), 1.0, 8)]
    assert errors[-1] < 1e-14
    assert errors[5] < errors[4] ** 1.5 < errors[3] ** 2


def test_secant_refuses_settings_without_sense() -> None:
    with pytest.raises(ValueError, match="longest"):
        Secant([torch.nn.Parameter(torch.zeros(1))], lr=3.0, longest=1.0)


# -- observations ------------------------------------------------------------------------------------------------------


def write_solution(folder: Path, name: str = "kdv", **changes: Any) -> Path:
    """A file as they go round, of an equation's initial values at all times."""
    file, *keys = observations.FILES[name]
    x, t = np.linspace(-1, 1, 32), np.linspace(0, 1, 9)
    u = np.repeat(EQUATIONS[name].initial(x)[:, None], 9, axis=1)
    content = {**dict(zip(keys, (x[None], t[:, None], u), strict=True)), **changes}
    savemat(folder / file, {key: array for key, array in content.items() if array is not None})
    return folder / file


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_whichever_way_round(name: str, tmp_path: Path) -> None:
    write_solution(tmp_path, name)
    once = observations.read_reference(EQUATIONS[name], tmp_path)
    key = observations.FILES[name][3]
    write_solution(tmp_path, name, **{key: once.u.T})
    twice = observations.read_reference(EQUATIONS[name], tmp_path)
    assert once.u.shape == twice.u.shape == (32, 9)
    np.testing.assert_array_equal(once.u, twice.u)
    assert once.source == observations.FILES[name][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uu": None}, "has no uu; it holds x, tt"),
        ({"uu": np.full((32, 9), np.nan)}, "holds NaN or infinity"),
        ({"uu": np.zeros((32, 9))}, "does not start with the initial values of kdv"),
        ({"uu": np.zeros((5, 5))}, r"u is \(5, 5\) for 32 places and 9 times"),
        ({"uu": "words"}, "must be arrays of numbers"),
        ({"x": np.linspace(-2, 1, 32)}, r"x = -2 is outside of the domain \[-1, 1\]"),
        ({"tt": np.linspace(0, 3, 9)}, r"t = 1\.125 is outside of the domain \[0, 1\]"),
        ({"x": np.linspace(1, -1, 32)}, "x and t must increase"),
    ],
)
def test_a_file_with_something_else_in_it_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_solution(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        observations.read_reference(EQUATIONS["kdv"], tmp_path)


@pytest.mark.parametrize("keep", [0, 60, 200, 1500])
def test_a_file_that_was_cut_off_is_refused(keep: int, tmp_path: Path) -> None:
    path = write_solution(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"KdV\.mat (is damaged|has no)"):
        observations.read_reference(EQUATIONS["kdv"], tmp_path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no Allen_Cahn\.mat or Allen_Cahn_deepxde\.mat in"):
        observations.read_reference(EQUATIONS["allen-cahn"], tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,t,u\n0.1,0.2\n", "three finite numbers"),
        ("x,t,u\n0.1,0.2,many\n", "a line x,t,u with three numbers"),
        ("0.1,0.2,0.3\n0.1,0.2,nan\n", "three finite numbers"),
        ("x,t,u\n", "holds no observations"),
        ("1.5,0.2,1\n", r"x = 1\.5 is outside of the domain"),
        ("0.5,-0.2,1\n", r"t = -0\.2 is outside of the domain"),
    ],
)
def test_a_table_of_observations_must_be_one(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "o.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        observations.read_table(tmp_path / "o.csv")


def test_a_grid_of_observations_with_noise() -> None:
    reference = observations.Reference(
        np.linspace(-1, 1, 41), np.linspace(0, 1, 21), np.random.default_rng(0).standard_normal((41, 21)), ""
    )
    clean = observations.on_grid(reference, 8, 8, 0.0, seed=0)
    noisy, again, other = (observations.on_grid(reference, 8, 8, 0.1, seed) for seed in (0, 0, 1))
    assert len(clean.u) == 64
    assert clean.x.min() > -1
    assert clean.x.max() < 1
    assert clean.t.min() > 0
    field = reference.u[np.searchsorted(reference.x, clean.places[0])][:, np.searchsorted(reference.t, clean.times[0])]
    np.testing.assert_array_equal(clean.of(field), clean.u)
    assert noisy.noise == pytest.approx(0.1 * clean.u.std())
    assert (noisy.u - clean.u).std() == pytest.approx(noisy.noise, rel=0.3)
    np.testing.assert_array_equal(noisy.u, again.u)
    assert not np.array_equal(noisy.u, other.u)
    with pytest.raises(ValueError, match="a grid of 50 x 8 observations"):
        observations.on_grid(reference, 50, 8, 0.0, seed=0)


# -- unknowns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_starts_lie_in_the_papers_range_and_differ(name: Any) -> None:
    config = PDE(name)
    found = [float(unknowns.found(config, unknowns.start(config, 0, number))) for number in range(200)]
    largest = EQUATIONS[name].largest_start[EQUATIONS[name].unknown]
    assert 0 < min(found) < 0.05 * largest
    assert 0.95 * largest < max(found) <= largest
    assert len(set(found)) == 200


def test_no_outer_step_reaches_an_ill_posed_equation() -> None:
    config = PDE("burgers")
    for phi in (-50.0, 0.0, 5.0):
        assert float(unknowns.found(config, torch.tensor([phi], dtype=torch.float64))) > 0
    library = PDE("burgers", "differentiable", "library")
    allowed = unknowns.allowed(library, -torch.ones(8, dtype=torch.float64))
    assert dict(zip(TERMS, allowed.tolist(), strict=True)) == {name: -1.0 * (name != "u_xx") for name in TERMS}


@pytest.mark.slow
def test_a_solver_that_fails_on_the_way_shortens_the_step() -> None:
    """From a viscosity of 0.02 a first step by a factor of e⁶ leads to where the grid cannot hold the shock."""
    setup = problem.setup(PDE("burgers", points=64), None, 1, 0)
    result = bilevel.fit(
        setup.problem,
        torch.tensor([0.02], dtype=torch.float64).log(),
        phases=[bilevel.Phase(bilevel.ZerothOrder(1), 3)],
        optimizer=bilevel.optimizer(Secant, lr=6.0, longest=6.0),
        update=bilevel.OuterUpdate(max_backtracks=8),
        progress=False,
    )
    assert sum(row["backtracks"] for row in result.history) >= 1
    assert all(math.isfinite(row["outer_loss"]) for row in result.history)
    assert float(result.meta) == pytest.approx(math.log(0.01 / math.pi), abs=6)


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["burgers", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kdv", "allen-cahn"))]
)
def test_the_coefficient_is_found(name: Any) -> None:
    """From observations of a finer solve; what is left is the error of 96 points."""
    config = PDE(name, points=96, starts=1, solver_tolerance=1e-7)
    setup = problem.setup(config, None, 30, seed=0)
    result = bilevel.fit(
        setup.problem,
        setup.meta,
        phases=[bilevel.Phase(bilevel.ZerothOrder(1), 30, patience=3)],
        optimizer=setup.optimizer,
        update=bilevel.OuterUpdate(max_backtracks=8),
        callbacks=setup.callbacks,
        progress=False,
    )
    errors = evaluation.errors_of(config, None, result.meta, 0)
    assert errors["coefficient_error"] < {"burgers": 0.2, "allen-cahn": 1e-2, "kdv": 1e-3}[name]
    assert sum(row["solves"] for row in result.history) <= 3 * 30
    assert all(row["solves"] == 3 for row in result.history if not row["backtracks"])


@pytest.mark.slow
def test_standard_errors_are_those_of_repeated_noise() -> None:
    """(found − true)/standard error is about standard normal: its sum of squares over 8 seeds is χ² with 8 degrees."""
    squares = []
    for seed in range(8):
        config = PDE("kdv", points=64, noise=0.02, starts=1, solver_tolerance=1e-6)
        setup = problem.setup(config, None, 5, seed)
        result = bilevel.fit(
            setup.problem,
            torch.tensor([0.0027], dtype=torch.float64).log(),
            phases=[bilevel.Phase(bilevel.ZerothOrder(1), 5)],
            optimizer=bilevel.optimizer(Secant, lr=0.05),
            progress=False,
        )
        expected = evaluation.standard_error(config, result.meta, problem.observed(config, None, seed))
        assert expected is not None
        squares.append(((float(result.meta.exp()) - 0.0025) / expected[0]) ** 2)
    assert 0.86 < sum(squares) < 26.1  # 0.1 % and 99.9 % of χ²(8)


def test_terms_that_are_not_there_are_found_to_be_small() -> None:
    config = PDE("burgers", "differentiable", "library", points=64, inner_steps=40, observed_x=16, penalty=1e-5)
    truth = torch.from_numpy(unknowns.truth(config))
    units = torch.tensor([unknowns.LIBRARY_UNITS[name] for name in TERMS], dtype=torch.float64)
    torch.testing.assert_close(unknowns.found(config, truth / units), truth)
    assert dict(zip(TERMS, truth.tolist(), strict=True))["u u_x"] == -1.0


# -- the command -------------------------------------------------------------------------------------------------------


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def run(out: Path, *flags: str) -> dict[str, Any]:
    cli.main(["run", "pde", "--out", str(out), *flags])
    return results_of(out)


@pytest.mark.slow
def test_a_run_with_several_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--equation", "kdv", "--points", "64", "--starts", "3", "--outer-steps", "10", "--noise", "0.01", *ROUGH)
    results = run(tmp_path / "run", *flags)
    assert {"task", "versions", "seconds", "peak_memory_bytes"} <= results.keys()
    for name in ("coefficient_error", "field_error", "solves"):
        assert len(results[name]["runs"]) == 3
        assert min(results[name]["runs"]) <= results[name]["median"] <= max(results[name]["runs"])
    assert results["coefficient_error"]["median"] < 0.2
    assert results["failures"]["raised"] == 0
    rows = [metrics.read(tmp_path / "run" / place / metrics.FILE) for place in (".", "start-01", "start-02")]
    assert [start[-1]["found"] for start in rows] == results["found"]
    assert results["solves"]["total"] == sum(row["solves"] for start in rows for row in start)
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert {"Relative errors", "The field", "The way of the coefficients"} <= set(page.texts["h2"])
    assert "median" in capsys.readouterr().out


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(
    "flags",
    [
        ("--solver", "differentiable", "--points", "64", "--inner-steps", "20", "--outer-steps", "2", "--starts", "1"),
        ("--preset", "source", "--points", "32", "--inner-steps", "20", "--outer-steps", "2"),
        ("--preset", "library", "--points", "32", "--inner-steps", "20", "--outer-steps", "2"),
        (
            *("--solver", "pinn", "--starts", "1", "--outer-steps", "1", "--inner-steps", "2", "--depth", "3"),
            *("--collocation", "16", "--dtype", "float32", "--inner-optimizer", "sgd"),
        ),
    ],
)
def test_every_solver_and_unknown_makes_a_report(flags: tuple[str, ...], tmp_path: Path) -> None:
    results = run(tmp_path / "run", "--observed-x", "4", "--observed-t", "4", *flags)
    assert results["coefficient_error"]["runs"][0] is not None
    assert (tmp_path / "run" / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--unknown", "source"), "needs --solver differentiable"),
        (("--preset", "library", "--equation", "allen-cahn"), "needs an equation of period 2"),
        (("--points", "33"), "an even number of at least 16"),
        (("--noise", "-1"), "noise=-1.0: a number of at least 0"),
        (("--observations", "nowhere.csv"), "there is no nowhere.csv"),
        (("--equation", "kdv", "--data-dir", "."), "there is no KdV.mat in"),
        (("--estimator", "reverse"), "a black box without derivatives"),
    ],
)
def test_what_cannot_be_run_is_refused(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "pde", "--out", str(tmp_path / "run"), *flags])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_start_that_the_solver_ends_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = problem.numerical_field

    def failing(config: PDE, meta: Tensor, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        if float(meta) > math.log(0.0035):
            raise SolverError("kdv: not this one")
        return plain(config, meta, x, t)

    starts = [float(unknowns.start(PDE("kdv"), 3, number).exp()) for number in range(4)]
    assert starts[0] < 0.0035 < max(starts), "another seed is needed"
    monkeypatch.setattr(problem, "numerical_field", failing)
    flags = ("--equation", "kdv", "--points", "64", "--starts", "4", "--outer-steps", "3", "--seed", "3", *ROUGH)
    results = run(tmp_path / "run", *flags)
    over = [start > 0.0035 for start in starts]
    assert results["failures"]["raised"] == sum(over)
    assert [run is None for run in results["coefficient_error"]["runs"]] == over
    assert len(results["reasons"]) == sum(over)
    assert "not this one" in results["reasons"][0]


def test_observations_of_ones_own(tmp_path: Path) -> None:
    """A table instead of the grid; observations at t = 0 are allowed."""
    known = observations.own_reference("kdv")
    places = [(i, j) for i in range(10, 250, 30) for j in (0, 20, 60, 100)]
    table = [[known.x[i], known.t[j], known.u[i, j]] for i, j in places]
    np.savetxt(tmp_path / "mine.csv", table, delimiter=",")
    for solver in ("numerical", "differentiable"):
        config = PDE("kdv", solver, points=64, inner_steps=200, observations=str(tmp_path / "mine.csv"))
        setup = problem.setup(config, None, 1, 0)
        assert value(setup, torch.tensor([0.0025], dtype=torch.float64).log()) < 1e-4
        assert value(setup, torch.tensor([0.004], dtype=torch.float64).log()) > 1e-2
