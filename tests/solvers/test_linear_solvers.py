"""Linear solvers against dense linear algebra. A solver joins with a row in `SOLVERS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import ConjugateGradient, Neumann, Nystrom, solvers
from bilevel.solvers import LinearSolver, Solution

Array = np.ndarray

SHAPES = [(2, 2), (), (1,)]
"""A vector of 6 numbers comes as a list of tensors of these shapes."""
M = 6


def as_list(vector: Array) -> list[Tensor]:
    parts = np.split(vector, np.cumsum([math.prod(shape) for shape in SHAPES])[:-1])
    return [torch.tensor(part).reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def as_vector(tensors: Sequence[Tensor]) -> Array:
    assert [tuple(t.shape) for t in tensors] == SHAPES
    return np.concatenate([t.numpy().reshape(-1) for t in tensors])


class System(NamedTuple):
    """Hx = b, and how often its matrix was multiplied."""

    H: Array
    b: Array
    products: list[int]

    def product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        self.products.append(1)
        return as_list(self.H @ as_vector(vector))

    def solve(self, solver: LinearSolver) -> Solution:
        return solver.solve(self.product, as_list(self.b))

    def residual(self, solution: Solution, damping: float = 0.0) -> float:
        x = as_vector(solution.x)
        return float(np.linalg.norm(self.b - self.H @ x - damping * x) / np.linalg.norm(self.b))


def system(eigenvalues: Sequence[float], seed: int = 0) -> System:
    """A symmetric matrix with these eigenvalues, and a random right-hand side."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((M, M)))
    return System(Q @ np.diag(eigenvalues) @ Q.T, rng.standard_normal(M), [])


def positive(condition: float) -> System:
    """Positive definite, with eigenvalues from 1/2 to condition/2."""
    return system(list(np.geomspace(0.5, condition / 2, M)))


# -- all of them ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A solver that solves `positive(10)` (damped) to 1e-10, and the same solver stopped after k iterations."""

    full: LinearSolver
    stopped: Callable[[int], LinearSolver]
    damping: float = 0.0


SOLVERS = {
    "ConjugateGradient": Row(
        ConjugateGradient(iterations=M + 1, tolerance=1e-12), lambda k: ConjugateGradient(k, tolerance=0.0)
    ),
    # 0.9²⁵⁰ = 4e-12
    "Neumann": Row(Neumann(iterations=250, step_size=0.2), lambda k: Neumann(k, step_size=0.2)),
    "Nystrom": Row(Nystrom(rank=M, damping=0.1), lambda k: Nystrom(k, damping=0.1), damping=0.1),
}

every_solver = pytest.mark.parametrize("row", SOLVERS.values(), ids=SOLVERS.keys())


@every_solver
def test_the_solution_is_that_of_a_dense_solve(row: Row) -> None:
    problem = positive(condition=10)
    solution = problem.solve(row.full)
    truth = np.linalg.solve(problem.H + row.damping * np.eye(M), problem.b)
    assert np.linalg.norm(as_vector(solution.x) - truth) < 1e-10 * np.linalg.norm(truth)
    assert solution.converged


@every_solver
@pytest.mark.parametrize("iterations", range(1, M))
def test_residual_and_products_are_what_they_say(row: Row, iterations: int) -> None:
    problem = positive(condition=10)
    solution = problem.solve(row.stopped(iterations))
    assert solution.residual == pytest.approx(problem.residual(solution, row.damping), rel=1e-8)
    assert solution.iterations == len(problem.products) >= iterations


@every_solver
def test_a_zero_right_hand_side_costs_nothing(row: Row) -> None:
    problem = positive(condition=10)._replace(b=np.zeros(M))
    solution = problem.solve(row.full)
    assert not as_vector(solution.x).any()
    assert (solution.converged, solution.residual, solution.iterations, problem.products) == (True, 0.0, 0, [])


@every_solver
def test_the_right_hand_side_is_left_alone(row: Row) -> None:
    problem = positive(condition=10)
    b = as_list(problem.b)
    solution = row.full.solve(problem.product, b)
    for part in solution.x:
        part.zero_()
    assert (as_vector(b) == problem.b).all()


@every_solver
def test_a_solution_scales_with_the_right_hand_side(row: Row) -> None:
    problem = positive(condition=10)
    small = problem._replace(b=1e-12 * problem.b).solve(row.full)
    once = problem.solve(row.full)
    assert as_vector(small.x) == pytest.approx(1e-12 * as_vector(once.x), rel=1e-10)
    assert small.converged


@every_solver
def test_indefinite_matrices_are_reported(row: Row) -> None:
    solution = system([-2.0, 0.5, 1.0, 1.5, 2.0, 2.5]).solve(row.full)
    assert not solution.converged
    assert "negative" in solution.message
    assert np.isfinite(as_vector(solution.x)).all()


def test_every_solver_is_in_the_table() -> None:
    named = [getattr(solvers, name) for name in solvers.__all__]
    found = {c for c in named if isinstance(c, type) and issubclass(c, LinearSolver) and c is not LinearSolver}
    found.remove(solvers.EmpiricalFisher)  # it solves with another matrix than H; test_empirical_fisher.py tests it
    assert found == {type(row.full) for row in SOLVERS.values()}


# -- conjugate gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", range(1, M + 1))
@pytest.mark.parametrize("condition", [2.0, 30.0, 1000.0])
def test_conjugate_gradients_are_the_best_in_the_krylov_space(condition: float, iterations: int) -> None:
    problem = positive(condition)
    H, b = problem.H, problem.b
    solution = problem.solve(ConjugateGradient(iterations, tolerance=0.0))
    krylov = [b]
    for _ in range(iterations - 1):
        krylov.append(H @ krylov[-1] / np.linalg.norm(H @ krylov[-1]))
    V, _ = np.linalg.qr(np.stack(krylov, axis=1))
    best = V @ np.linalg.solve(V.T @ H @ V, V.T @ b)
    # orthogonality is lost to rounding at the rate of the condition number
    assert np.linalg.norm(as_vector(solution.x) - best) < 1e-12 * condition * np.linalg.norm(best)

    def energy(error: Array) -> float:
        return float(np.sqrt(error @ H @ error))

    truth = np.linalg.solve(H, b)
    root = np.sqrt(condition)
    bound = 2 * ((root - 1) / (root + 1)) ** iterations * energy(truth)
    assert energy(as_vector(solution.x) - truth) <= bound


def test_conjugate_gradients_stop_at_the_tolerance() -> None:
    problem = positive(condition=100)
    residuals = [problem.solve(ConjugateGradient(k, tolerance=0.0)).residual for k in range(1, M + 1)]
    for tolerance in (0.9, 0.5, 0.1, 1e-8):
        solution = problem.solve(ConjugateGradient(iterations=20, tolerance=tolerance))
        assert solution.converged
        assert solution.iterations == next(k for k, residual in enumerate(residuals, 1) if residual <= tolerance)


def test_conjugate_gradients_say_when_iterations_ran_out() -> None:
    solution = positive(condition=100).solve(ConjugateGradient(iterations=2, tolerance=1e-9))
    assert not solution.converged
    assert "after 2 products, not the tolerance 1e-09" in solution.message


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_damping_is_added_to_the_diagonal(damping: float) -> None:
    problem = positive(condition=10)
    solution = problem.solve(ConjugateGradient(M + 1, tolerance=1e-12, damping=damping))
    truth = np.linalg.solve(problem.H + damping * np.eye(M), problem.b)
    assert np.linalg.norm(as_vector(solution.x) - truth) < 1e-10 * np.linalg.norm(truth)
    early = problem.solve(ConjugateGradient(3, tolerance=0.0, damping=damping))
    assert early.residual == pytest.approx(problem.residual(early, damping), rel=1e-8)


def test_damping_makes_an_indefinite_matrix_definite() -> None:
    problem = system([-2.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    solution = problem.solve(ConjugateGradient(20, tolerance=1e-12, damping=2.5))
    assert solution.converged
    assert problem.residual(solution, damping=2.5) < 1e-10


def test_negative_curvature_returns_the_iterate_before_it() -> None:
    problem = system([-2.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    met = problem.solve(ConjugateGradient(20))
    assert f"after {met.iterations} of 20 products" in met.message
    assert met.iterations > 1, "pick another seed: here there should be an iterate before it"
    before = problem.solve(ConjugateGradient(met.iterations - 1, tolerance=0.0))
    assert (as_vector(met.x) == as_vector(before.x)).all()
    assert met.residual == pytest.approx(problem.residual(met), rel=1e-8)


def test_a_nan_in_a_product_is_reported() -> None:
    problem = positive(condition=10)
    problem.H[2, 3] = np.nan
    solution = problem.solve(ConjugateGradient(20))
    assert not solution.converged
    assert "NaN" in solution.message
    assert np.isfinite(as_vector(solution.x)).all()


# -- Neumann -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 7, 40])
@pytest.mark.parametrize("step_size", [0.05, 0.2, 0.39])
def test_neumann_is_the_truncated_series(iterations: int, step_size: float) -> None:
    problem = positive(condition=10)
    solution = problem.solve(Neumann(iterations, step_size))
    step = np.eye(M) - step_size * problem.H
    powers = [np.linalg.matrix_power(step, k) for k in range(iterations + 1)]
    series = step_size * np.sum(powers, axis=0) @ problem.b
    assert np.linalg.norm(as_vector(solution.x) - series) < 1e-12 * np.linalg.norm(series)
    truth = np.linalg.solve(problem.H, problem.b)
    error = np.linalg.matrix_power(step, iterations + 1) @ truth
    assert np.linalg.norm(truth - as_vector(solution.x) - error) < 1e-12 * np.linalg.norm(truth)
    assert solution.converged


def test_neumann_reports_divergence_before_the_residual_shows_it() -> None:
    problem = positive(condition=10)  # λ_max = 5, so 0.4 is the limit
    assert problem.solve(Neumann(8, step_size=0.399)).converged
    diverging = problem.solve(Neumann(8, step_size=0.42))
    assert not diverging.converged
    assert "step_size" in diverging.message
    assert diverging.residual < 1, "pick another right-hand side: the residual gives it away"


def test_neumann_that_hits_the_solution_has_converged() -> None:
    problem = system([2.0] * M)
    assert problem._replace(H=2 * np.eye(M)).solve(Neumann(3, step_size=0.5)).converged


# -- Nyström -------------------------------------------------------------------------------------------------------


def directions_of(solver: Nystrom) -> Array:
    """The vectors that the solver multiplies the matrix with, from its products with the identity."""
    seen: list[Array] = []

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        seen.append(as_vector(vector))
        return list(vector)

    solver.solve(product, as_list(np.ones(M)))
    return np.stack(seen[: solver.rank], axis=1)


@pytest.mark.parametrize("rank", range(1, M + 1))
@pytest.mark.parametrize("damping", [0.02, 3.0])
def test_nystrom_inverts_the_low_rank_approximation(rank: int, damping: float) -> None:
    problem, solver = positive(condition=100), Nystrom(rank, damping)
    Q = directions_of(solver)
    assert pytest.approx(np.eye(rank), abs=1e-14) == Q.T @ Q
    low_rank = problem.H @ Q @ np.linalg.solve(Q.T @ problem.H @ Q, Q.T @ problem.H)
    truth = np.linalg.solve(low_rank + damping * np.eye(M), problem.b)
    assert np.linalg.norm(as_vector(problem.solve(solver).x) - truth) < 1e-10 * np.linalg.norm(truth)


def test_nystrom_is_exact_for_a_matrix_of_its_rank_or_less() -> None:
    problem = system([0.0, 0.0, 0.0, 0.0, 3.0, 50.0])
    truth = np.linalg.solve(problem.H + 0.1 * np.eye(M), problem.b)
    for rank in (2, 3, M, 100):
        solution = problem.solve(Nystrom(rank, damping=0.1))
        assert np.linalg.norm(as_vector(solution.x) - truth) < 1e-10 * np.linalg.norm(truth)
        assert solution.converged
    assert not problem.solve(Nystrom(1, damping=0.1)).converged


def test_nystrom_draws_other_directions_for_another_seed() -> None:
    problem = positive(condition=100)
    first, again, other = (as_vector(problem.solve(Nystrom(2, seed=seed)).x) for seed in (0, 0, 1))
    assert (first == again).all()
    assert not np.allclose(first, other)


def test_nystrom_says_when_it_missed_curvature() -> None:
    solution = positive(condition=100).solve(Nystrom(rank=1, damping=0.01))
    assert not solution.converged
    assert "raise rank or damping" in solution.message


def test_nystrom_leaves_negative_curvature_out() -> None:
    problem = system([-2.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    values, vectors = np.linalg.eigh(problem.H)
    positive_part = vectors[:, 1:] @ np.diag(values[1:]) @ vectors[:, 1:].T
    solution = problem.solve(Nystrom(M, damping=0.1))
    truth = np.linalg.solve(positive_part + 0.1 * np.eye(M), problem.b)
    assert np.linalg.norm(as_vector(solution.x) - truth) < 1e-10 * np.linalg.norm(truth)


def test_nystrom_in_single_precision() -> None:
    problem = positive(condition=10)
    matrix = torch.tensor(problem.H, dtype=torch.float32)
    b = torch.tensor(problem.b, dtype=torch.float32)
    solution = Nystrom(M, damping=0.1).solve(lambda v: [matrix @ v[0]], [b])
    truth = np.linalg.solve(problem.H + 0.1 * np.eye(M), problem.b)
    assert solution.x[0].dtype == torch.float32
    assert np.linalg.norm(solution.x[0].numpy() - truth) < 1e-5 * np.linalg.norm(truth)


def test_nystrom_reports_a_nan() -> None:
    problem = positive(condition=10)
    problem.H[2, 3] = np.nan
    solution = problem.solve(Nystrom(3))
    assert not solution.converged
    assert "NaN" in solution.message


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "setting", "value"),
    [
        (ConjugateGradient, "iterations", 0),
        (ConjugateGradient, "iterations", True),
        (ConjugateGradient, "iterations", 2.0),
        (ConjugateGradient, "tolerance", -1e-3),
        (ConjugateGradient, "tolerance", math.nan),
        (ConjugateGradient, "damping", -1.0),
        (ConjugateGradient, "damping", math.inf),
        (Neumann, "iterations", -1),
        (Neumann, "step_size", 0.0),
        (Neumann, "step_size", math.inf),
        (Nystrom, "rank", 0),
        (Nystrom, "damping", 0.0),
        (Nystrom, "seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(solver: type[LinearSolver], setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value!r}: "):
        solver(**{setting: value})
