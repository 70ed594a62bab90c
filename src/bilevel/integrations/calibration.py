"""Calibration of a simulator: parameters and their standard errors from observations, by nonlinear least squares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bilevel import checks, randomness
from bilevel.errors import NonFiniteError, SolverError
from bilevel.report.progress import Bar, bar

Array = np.ndarray[Any, np.dtype[np.float64]]
Derivatives = Literal["differences", "forward", "reverse"]

_DOUBTFUL = 4.0
"""The number of standard deviations, √(2·degrees), by which χ² may exceed its mean before a fit is called doubtful."""


@dataclass(frozen=True)
class Start:
    """One start of the optimisation and where it ended."""

    start: Array
    """x at the start, `[n]`."""
    end: Array
    """x at the end, `[n]`."""
    chi_squared: float
    """χ² at the end, or the sum of squared residuals if sigma is unknown."""
    solves: int
    """The number of simulations, those for the Jacobian included."""
    converged: bool
    """Whether it came to rest before `max_solves`."""
    message: str
    """Why it ended."""


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`."""

    values: Any
    """The parameters with the least χ², in the form of `start`: an array `[n]` or a dict."""
    standard_errors: Any
    """Their standard errors, in the same form; infinite where the observations do not determine a parameter."""
    covariance: Array
    """(JᵀJ)⁻¹ `[n, n]` with J the Jacobian of the residuals; times χ²/degrees if sigma is unknown."""
    residuals: Array
    """(simulate(x) − observed)/sigma `[k]`; not divided if sigma is unknown."""
    chi_squared: float
    """The sum of their squares."""
    degrees: int
    """The degrees of freedom, k − n, which is the mean of χ² if the simulator can explain the observations."""
    solves: int
    """The number of simulations in all."""
    starts: tuple[Start, ...]
    """What became of each start."""
    explains: bool | None
    """Whether χ² is within four standard deviations of what noise of size sigma gives; `None` if sigma is unknown."""

    def __repr__(self) -> str:
        names = list(self.values) if isinstance(self.values, dict) else None
        found, errors = _flat(self.values), _flat(self.standard_errors)
        labels = _labels(self.values) if names else [f"x[{i}]" for i in range(len(found))]
        rows = [f"  {label} = {x:.6g} ± {e:.2g}" for label, x, e in zip(labels, found, errors, strict=True)]
        fit = {
            True: "as noise of size sigma gives",
            False: "more than noise of size sigma gives: another minimum, or the simulator cannot explain the data",
            None: "sigma is unknown, and was estimated",
        }[self.explains]
        head = f"Calibration: χ² = {self.chi_squared:.4g} for {self.degrees} degrees of freedom ({fit})"
        ending = f"  {self.solves} simulations from {len(self.starts)} start{'s' * (len(self.starts) > 1)}"
        return "\n".join([head, *rows, ending])


def calibrate(
    simulate: Callable[[Any], Any],
    start: Any,
    observed: Any,
    sigma: Any = None,
    *,
    bounds: tuple[Any, Any] | None = None,
    derivatives: Derivatives = "differences",
    accuracy: float = float(np.finfo(float).eps),
    starts: int = 10,
    spread: float = 0.5,
    max_solves: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Find the parameters of a simulator that explain observations, and their standard errors.

    It minimises χ²(x) = Σ_j ((simulate(x)_j − observed_j)/sigma_j)² by the Gauss–Newton method in a trust region
    (`scipy.optimize.least_squares`). The covariance of the result is (JᵀJ)⁻¹, where J is the Jacobian of the residuals.
    Such errors are right to first order in sigma, for independent normal noise.

    If the first start ends where χ² is larger than noise explains, in another minimum for instance, it starts again
    nearby, up to `starts` times, until one ends where the noise explains the rest. Without sigma this cannot be told;
    then all starts are made and the best one is returned.

    Args:
        simulate: a function from the parameters to what was observed `[k]`. It is given parameters in the form of
            `start` and returns an array. For derivatives other than differences it is given float64 tensors, and
            returns a tensor that was computed from them by PyTorch. It may raise `bilevel.errors.SolverError` at
            parameters where it cannot be computed; the step towards them is then made shorter.
        start: the parameters at which to start: an array `[n]`, a number, or a dict of numbers and arrays.
        observed: the observations `[k]`, k > n.
        sigma: the standard deviation of the noise, one number or `[k]`. If it is unknown, it is taken to be the same
            for all observations, and estimated by √(χ²/(k − n)).
        bounds: the least and the largest parameters, each in the form of `start` or one number.
        derivatives: `"differences"` of n further simulations for each Jacobian; `"forward"` or `"reverse"`, exact
            Jacobians by PyTorch, in forward mode (n tangents at once) or in reverse mode (one backward pass for each
            observation).
        accuracy: the relative error of the simulator, such as the tolerance of its solver. Differences take steps of
            √accuracy relative to the parameters.
        starts: the largest number of starts.
        spread: how far further starts are from the first: by normal factors of this size times |x_i| (times 1 where
            x_i = 0); uniformly within `bounds` where these are finite.
        max_solves: the largest number of simulations for each start.
        seed: determines the further starts.
        progress: show a progress bar.

    Cost: about ten iterations of 1 + n simulations for each start; with exact derivatives one simulation and one
    Jacobian for each iteration. Bias: that of least squares, of the order of sigma².

    Raises:
        ValueError: an argument is not what it should be.
        NonFiniteError: the simulation at the start is not finite.
        ImportError: SciPy is not installed.

    References: Nocedal and Wright, Numerical Optimization, chapter 10; Branch, Coleman and Li, 1999 (the trust region).

    >>> import numpy as np
    >>> times = np.linspace(0, 4, 30)
    >>> def decay(x):
    ...     return x["size"] * np.exp(-x["rate"] * times)
    >>> noise = 0.01 * np.random.default_rng(0).standard_normal(30)
    >>> found = calibrate(
    ...     decay, {"size": 1.0, "rate": 1.0}, decay({"size": 2.0, "rate": 0.7}) + noise, 0.01, progress=False
    ... )
    >>> round(found.values["rate"], 3), round(found.standard_errors["rate"], 4), found.explains
    (0.703, 0.0031, True)
    """
    subject = _Subject.of(simulate, start, observed, sigma, bounds, derivatives, accuracy)
    checks.whole_number(starts, "starts")
    checks.positive(spread, "spread")
    checks.whole_number(max_solves, "max_solves", at_least=subject.size + 2)
    randomness.check_seed(seed)
    draws = randomness.generator(seed, randomness.CALIBRATION)
    ended: list[Start] = []
    with bar("start 1", max_solves, show=progress) as shown:
        for number in range(starts):
            begin = subject.first if number == 0 else subject.drawn(draws, spread)
            ended.append(subject.fit(begin, max_solves, partial(_note, shown, number + 1), needed=number == 0))
            if ended[-1].converged and subject.explains(ended[-1].chi_squared):
                break
    best = min(ended, key=lambda each: each.chi_squared)
    return replace(subject.result(best), starts=tuple(ended), solves=subject.solves)


def _note(shown: Bar, number: int, chi_squared: float) -> None:
    shown.advance(f"χ² = {chi_squared:.4g}", description=f"start {number}")


@dataclass
class _Subject:
    """A simulator, its observations, and where its parameters may be."""

    simulate: Callable[[Any], Any]
    form: Any
    first: Array
    observed: Array
    sigma: Array | None
    low: Array
    high: Array
    derivatives: Derivatives
    accuracy: float
    solves: int = 0

    @classmethod
    def of(
        cls, simulate: Any, start: Any, observed: Any, sigma: Any, bounds: Any, derivatives: Any, accuracy: Any
    ) -> _Subject:
        checks.a_function(simulate, "simulate", "simulate(parameters)")
        checks.one_of(derivatives, "derivatives", ("differences", "forward", "reverse"))
        checks.positive(accuracy, "accuracy")
        first = _numbers(start, "start")
        data = _numbers(observed, "observed")
        if len(data) <= len(first):
            raise ValueError(
                f"observed has {len(data)} numbers for {len(first)} parameters; more observations than parameters are "
                "needed"
            )
        noise = None
        if sigma is not None:
            noise = _numbers(sigma, "sigma")
            if len(noise) not in (1, len(data)):
                raise ValueError(
                    f"sigma has {len(noise)} numbers and observed {len(data)}; pass one number, or as many"
                )
            if not (noise > 0).all():
                raise ValueError(f"sigma={noise.min():g}: standard deviations are positive; leave sigma out if unknown")
        low, high = np.full(len(first), -np.inf), np.full(len(first), np.inf)
        if bounds is not None:
            if not isinstance(bounds, tuple | list) or len(bounds) != 2:
                raise ValueError(f"bounds={bounds!r}: pass a pair, (least parameters, largest parameters)")
            low, high = (_bound(bound, first, what) for bound, what in zip(bounds, ("least", "largest"), strict=True))
            if not ((low < high).all() and (low <= first).all() and (first <= high).all()):
                raise ValueError(f"start must lie between bounds, and it is {first} between {low} and {high}")
        return cls(simulate, start, first, data, noise, low, high, derivatives, float(accuracy))

    @property
    def size(self) -> int:
        """n, the number of parameters."""
        return len(self.first)

    @property
    def degrees(self) -> int:
        """k − n."""
        return len(self.observed) - self.size

    def explains(self, chi_squared: float) -> bool | None:
        """Whether noise of size sigma gives such a χ² or a larger one."""
        if self.sigma is None:
            return None
        return chi_squared <= self.degrees + _DOUBTFUL * (2 * self.degrees) ** 0.5

    def drawn(self, draws: np.random.Generator, spread: float) -> Array:
        """Draw another start."""
        scale = np.where(self.first == 0, 1.0, np.abs(self.first))
        near = self.first + spread * scale * draws.standard_normal(self.size)
        inside = np.isfinite(self.low) & np.isfinite(self.high)
        with np.errstate(invalid="ignore"):
            anywhere = self.low + draws.random(self.size) * (self.high - self.low)
        return np.where(inside, anywhere, np.clip(near, self.low, self.high))

    # -- the residuals and their Jacobian ------------------------------------------------------------------------------

    def residuals(self, x: Array) -> Array:
        """(simulate(x) − observed)/sigma; NaN where there is no solution."""
        self.solves += 1
        try:
            with torch.no_grad():
                found = self.simulate(_in_form(x if self.derivatives == "differences" else torch.tensor(x), self.form))
        except SolverError:
            return np.full(len(self.observed), np.nan)
        predicted = np.asarray(found, dtype=float).reshape(-1)
        if predicted.shape != self.observed.shape:
            raise ValueError(
                f"simulate returned {len(predicted)} numbers and observed has {len(self.observed)}; they must be as "
                "many, in the same order"
            )
        off = predicted - self.observed
        return off if self.sigma is None else off / self.sigma

    def jacobian(self, x: Array, at_x: Array) -> Array:
        """∂residuals/∂x `[k, n]`."""
        if self.derivatives != "differences":
            return self._exact_jacobian(x)
        columns = []
        for i in range(self.size):
            step = self.accuracy**0.5 * (abs(x[i]) or abs(self.first[i]) or 1.0)
            if x[i] + step > self.high[i]:
                step = -step
            there = x.copy()
            there[i] += step
            moved = self.residuals(there)
            if not np.isfinite(moved).all():  # on the edge of where there is a solution
                there[i] = x[i] - step
                step, moved = -step, self.residuals(there)
            if not np.isfinite(moved).all():
                raise SolverError(
                    f"simulate gives no finite result on either side of {_labels(self.form)[i]} = {x[i]:g}, at a "
                    f"distance of {abs(step):.2g}, so there is no derivative; take a smaller accuracy, or bounds"
                )
            columns.append((moved - at_x) / (there[i] - x[i]))
        return np.stack(columns, axis=1)

    def _exact_jacobian(self, x: Array) -> Array:
        def predicted(x: Tensor) -> Tensor:
            found = self.simulate(_in_form(x, self.form))
            if not isinstance(found, Tensor):
                raise TypeError(
                    f"simulate returned {type(found).__name__}; derivatives={self.derivatives!r} needs a tensor that "
                    'was computed from its tensors by PyTorch; take derivatives="differences" for other simulators'
                )
            return found.reshape(-1)

        derivative = torch.func.jacfwd if self.derivatives == "forward" else torch.func.jacrev
        found = np.asarray(derivative(predicted)(torch.tensor(x)).detach(), dtype=float)
        return found if self.sigma is None else found / np.broadcast_to(self.sigma, len(found))[:, None]

    # -- one start -----------------------------------------------------------------------------------------------------

    def fit(self, start: Array, max_solves: int, note: Callable[[float], None], needed: bool) -> Start:
        """Run the optimisation from one start."""
        least_squares = _scipy()
        before, least, kept = self.solves, [np.inf], dict[bytes, Array]()

        def function(x: Array) -> Array:
            found = self.residuals(x)
            if np.isfinite(found).all():
                least[0] = min(least[0], float(found @ found))
                kept.clear()
                kept[x.tobytes()] = found
            note(least[0])
            return found

        def derivative(x: Array) -> Array:
            at_x = kept.get(x.tobytes())
            return self.jacobian(x, self.residuals(x) if at_x is None else at_x)

        at_start = function(start)
        if not np.isfinite(at_start).all():
            if needed:
                raise NonFiniteError(
                    f"simulate gives NaN, infinity or a SolverError at start = {_in_form(start, self.form)!r}; start "
                    "where it has a finite result"
                )
            return Start(start, start, np.inf, self.solves - before, False, "no finite result at this start")
        if needed and not (still := self.jacobian(start, at_start)).any(0).all():
            label = _labels(self.form)[int(np.flatnonzero(~still.any(0))[0])]
            raise ValueError(
                f"simulate gives the same to the last bit when {label} is moved, so the observations say nothing about "
                "it; leave it out, or pass accuracy= so that differences take larger steps"
            )
        share = 1 + self.size if self.derivatives == "differences" else 1
        try:
            found = least_squares(
                _Remembered(function, start, at_start),
                start,
                jac=derivative,
                bounds=(self.low, self.high),
                x_scale="jac",
                max_nfev=max(1, max_solves // share),
            )
        except SolverError as error:
            end = np.frombuffer(next(iter(kept))) if kept else start
            return Start(start, end, least[0], self.solves - before, False, str(error))
        chi_squared = float(found.fun @ found.fun)
        return Start(start, found.x, chi_squared, self.solves - before, found.status > 0, found.message)

    def result(self, best: Start) -> Calibration:
        """Return the result at the end of the best start."""
        residuals = self.residuals(best.end)
        jacobian = self.jacobian(best.end, residuals)
        chi_squared = float(residuals @ residuals)
        _, values, rows = np.linalg.svd(jacobian, full_matrices=False)
        # Differences have relative errors of about √accuracy.
        rounding = self.accuracy if self.derivatives != "differences" else 10 * self.accuracy**0.5
        seen = values > values[0] * max(jacobian.shape) * rounding
        covariance = (rows[seen].T / values[seen] ** 2) @ rows[seen]
        if self.sigma is None:
            covariance = covariance * (chi_squared / self.degrees)
        variances = np.diag(covariance).copy()
        variances[(np.abs(rows[~seen]) > 1e-3).any(0)] = np.inf
        return Calibration(
            values=_in_form(best.end, self.form),
            standard_errors=_in_form(np.sqrt(variances), self.form),
            covariance=covariance,
            residuals=residuals,
            chi_squared=chi_squared,
            degrees=self.degrees,
            solves=self.solves,
            starts=(),
            explains=self.explains(chi_squared),
        )


class _Remembered:
    """A function whose value at one point is known."""

    def __init__(self, function: Callable[[Array], Array], point: Array, value: Array) -> None:
        self._function, self._point, self._value = function, point, value

    def __call__(self, x: Array) -> Array:
        return self._value if np.array_equal(x, self._point) else self._function(x)


def _scipy() -> Any:
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise ImportError("calibrate needs the package scipy: pip install 'bilevel[tasks]'") from error
    return least_squares


# -- the form of the parameters ---------------------------------------------------------------------------------------


def _flat(value: Any) -> Array:
    parts = value.values() if isinstance(value, Mapping) else [value]
    return np.concatenate([np.asarray(part, dtype=float).reshape(-1) for part in parts])


def _numbers(value: Any, name: str) -> Array:
    try:
        found = _flat(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); pass numbers: an array, or a number") from error
    if not found.size:
        raise ValueError(f"{name} is empty")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return found


def _bound(bound: Any, like: Array, what: str) -> Array:
    found = _flat(bound)
    if len(found) not in (1, len(like)) or np.isnan(found).any():
        raise ValueError(f"the {what} parameters of bounds are {bound!r}; pass one number, or one for each parameter")
    return np.broadcast_to(found, like.shape).copy()


def _labels(form: Any) -> list[str]:
    """Names of the single numbers."""
    if not isinstance(form, Mapping):
        count = np.size(form)
        return [f"x[{i}]" for i in range(count)]
    sizes = {name: np.shape(part) for name, part in form.items()}
    return [f"{name}{list(index) if index else ''}" for name, shape in sizes.items() for index in np.ndindex(*shape)]


def _in_form(x: Any, form: Any) -> Any:
    """Return the numbers x `[n]`, an array or a tensor, in the form of the start."""

    def part(numbers: Any, like: Any) -> Any:
        if np.ndim(like) == 0:
            return float(numbers[0]) if isinstance(numbers, np.ndarray) else numbers[0]
        return numbers.reshape(np.shape(like))

    if not isinstance(form, Mapping):
        return part(x, form)
    found, at = {}, 0
    for name, like in form.items():
        found[name] = part(x[at : at + np.size(like)], like)
        at += np.size(like)
    return found
