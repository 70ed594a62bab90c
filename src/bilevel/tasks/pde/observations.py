"""Observations of a solution, and the reference solution for evaluation, from a file or from a finer solve."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bilevel import randomness
from bilevel.errors import DataError
from bilevel.tasks.pde import numerical
from bilevel.tasks.pde.equations import EQUATIONS, LAST_TIME, LEFT, RIGHT, Equation

Values = np.ndarray


FILES = {
    "burgers": ("burgers_shock.mat", "x", "t", "usol"),
    "allen-cahn": ("Allen_Cahn.mat", "x", "t", "u"),
    "kdv": ("KdV.mat", "x", "tt", "uu"),
}
"""The usual names of files with these solutions, and the names of x, t and u in them."""

OTHER_NAMES = {"Allen_Cahn.mat": ("Allen_Cahn_deepxde.mat",)}


@dataclass(frozen=True)
class Reference:
    """A solution on a grid."""

    x: Values
    t: Values
    u: Values
    """The values `[len(x), len(t)]`."""
    source: str
    """A description of where the solution comes from."""


@dataclass(frozen=True)
class Observations:
    """Values of u at places and times. Each array `[n]` has one entry for every observation."""

    x: Values
    t: Values
    u: Values
    noise: float = 0.0
    """The standard deviation of the noise in u, if it is known; else 0."""

    @functools.cached_property
    def places(self) -> tuple[Values, Values]:
        """The distinct places, and the number of each observation's place."""
        return np.unique(self.x, return_inverse=True)

    @functools.cached_property
    def times(self) -> tuple[Values, Values]:
        """The distinct times, and the number of each observation's time."""
        return np.unique(self.t, return_inverse=True)

    def of(self, field: Values) -> Values:
        """Return the observed entries of a field `[places, times]`."""
        return field[self.places[1], self.times[1]]


@functools.lru_cache(maxsize=6)
def own_reference(name: str, x_points: int = 256, t_points: int = 101) -> Reference:
    """Compute the solution with the true coefficients, on a grid two to four times finer than that of the inversion."""
    equation = EQUATIONS[name]
    points = 2048 if equation.odd else 1024
    x, t = np.linspace(LEFT, RIGHT, x_points), np.linspace(0, LAST_TIME, t_points)
    u = numerical.solve(equation, equation.coefficients, x, t, numerical.Accuracy(points, 1e-10))
    return Reference(x, t, u, f"this program's own solver with {points} points and tolerance 1e-10")


def read_reference(equation: Equation, folder: Path) -> Reference:
    """Read the solution in the equation's `.mat` file.

    Raises:
        DataError: the file is missing or damaged, or does not hold a solution of this equation.
    """
    from scipy.io import loadmat

    name, *keys = FILES[equation.name]
    names = (name, *OTHER_NAMES.get(name, ()))
    path = next((folder / each for each in names if (folder / each).is_file()), None)
    if path is None:
        raise DataError(f"there is no {' or '.join(names)} in {folder}; leave --data-dir out to do without")
    try:
        content = loadmat(path)
    except Exception as error:  # a damaged file causes errors of many kinds
        raise DataError(f"{path} is damaged or no MATLAB file: {error or type(error).__name__}") from error
    missing = [key for key in keys if key not in content]
    if missing:
        has = ", ".join(key for key in content if not key.startswith("__"))
        raise DataError(f"{path} has no {', '.join(missing)}; it holds {has or 'nothing'}")
    try:
        x, t, u = (np.asarray(np.real(content[key]), dtype=float) for key in keys)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {', '.join(keys)} must be arrays of numbers ({error})") from error
    x, t = x.ravel(), t.ravel()
    if u.shape == (len(t), len(x)):
        u = u.T
    _require_solution(path, equation, x, t, u)
    return Reference(x, t, u, path.name)


def _require_solution(path: Path, equation: Equation, x: Values, t: Values, u: Values) -> None:
    """Raise a DataError unless u holds values on a grid of places and times that start from the initial values."""
    if u.shape != (len(x), len(t)):
        raise DataError(f"{path}: u is {u.shape} for {len(x)} places and {len(t)} times")
    if not (np.isfinite(x).all() and np.isfinite(t).all() and np.isfinite(u).all()):
        raise DataError(f"{path} holds NaN or infinity")
    if not ((np.diff(x) > 0).all() and (np.diff(t) > 0).all()):
        raise DataError(f"{path}: x and t must increase")
    require_inside(x, t, str(path))
    wrong = np.linalg.norm(u[:, 0] - equation.initial(x)) / np.linalg.norm(equation.initial(x))
    if t[0] != 0 or wrong > 0.01:
        raise DataError(
            f"{path} does not start with the initial values of {equation.name} (t = {t[0]:g}, relative difference "
            f"{wrong:.2g})"
        )


def require_inside(x: Values, t: Values, what: str) -> None:
    """Raise a DataError if places or times are outside of the equation's domain."""
    outside = (x < LEFT - 1e-9) | (x > RIGHT + 1e-9), (t < 0) | (t > LAST_TIME + 1e-9)
    for name, values, wrong, low, high in (("x", x, outside[0], LEFT, RIGHT), ("t", t, outside[1], 0, LAST_TIME)):
        if wrong.any():
            raise DataError(f"{what}: {name} = {values[wrong][0]:g} is outside of the domain [{low:g}, {high:g}]")


def on_grid(reference: Reference, places: int, times: int, noise: float, seed: int) -> Observations:
    """Return a grid of observations inside the domain, at grid points of the reference, with Gaussian noise.

    Args:
        reference: the solution to observe.
        places: the number of places.
        times: the number of times.
        noise: the standard deviation of the noise, relative to that of the observed values.
        seed: the seed of the noise.

    Raises:
        ValueError: the reference has too few places or times.
    """
    if places > len(reference.x) - 2 or times > len(reference.t) - 1:
        raise ValueError(
            f"a grid of {places} x {times} observations, but the reference solution has {len(reference.x)} places "
            f"and {len(reference.t)} times"
        )
    i = np.round((np.arange(places) + 0.5) / places * (len(reference.x) - 1)).astype(int)
    j = np.round((np.arange(times) + 1) / times * (len(reference.t) - 1)).astype(int)
    x, t = np.meshgrid(reference.x[i], reference.t[j], indexing="ij")
    u = reference.u[np.ix_(i, j)].ravel()
    deviation = noise * float(u.std())
    draws = randomness.generator(seed, randomness.PDE_NOISE).standard_normal(len(u))
    return Observations(x.ravel(), t.ravel(), u + deviation * draws, deviation)


def read_table(path: Path) -> Observations:
    """Read observations from a text file with three columns x, t and u, separated by commas.

    The first line may hold the names of the columns.

    Raises:
        DataError: the file is missing or has another form.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}; a file with a line x,t,u for each observation is needed")
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        if lines and lines[0].replace(" ", "").lower() == "x,t,u":
            del lines[0]
        if not lines:
            raise DataError(f"{path} holds no observations; a line x,t,u with three numbers for each is needed")
        table = np.loadtxt(lines, delimiter=",", ndmin=2)
    except ValueError as error:
        raise DataError(f"{path}: {error}; a line x,t,u with three numbers for each observation is needed") from error
    if table.shape[1] != 3 or not np.isfinite(table).all():
        raise DataError(
            f"{path} holds {table.shape[0]} rows of {table.shape[1]}; three finite numbers x,t,u are needed"
        )
    x, t, u = table.T
    require_inside(x, t, str(path))
    return Observations(x, t, u)
