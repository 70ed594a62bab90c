"""Evaluation of results: errors relative to the truth, and the standard errors of the coefficients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.errors import SolverError
from bilevel.tasks.pde import pinn, problem, unknowns
from bilevel.tasks.pde.config import PDE
from bilevel.tasks.pde.observations import Observations

FAR_OFF = 0.1
"""The relative error of the coefficients above which a start counts as not converged."""


def relative_error(found: np.ndarray, true: np.ndarray) -> float:
    """Compute ‖found − true‖ / ‖true‖."""
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def field_of(config: PDE, meta: Tensor, seed: int, data: Observations, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Compute the field `[places, times]` at φ by the inner solver."""
    if config.solver == "numerical":
        return problem.numerical_field(config, meta, x, t)
    if config.solver == "differentiable":
        return problem.stepped_field(config, unknowns.situation(config, meta), x, t)
    return pinn.network_field(config, pinn.trained(config, meta, seed, data), x, t)


def errors_of(config: PDE, data_dir: Path | None, meta: Tensor, seed: int) -> dict[str, Any]:
    """Return the relative errors of the unknowns and of the field, and the field itself.

    If the field cannot be computed, the entry is the solver's message.
    """
    known = problem.reference(config, data_dir)
    data = problem.observed(config, data_dir, seed)
    coefficient = relative_error(unknowns.found(config, meta).numpy(), unknowns.truth(config))
    try:
        field = field_of(config, meta, seed, data, known.x, known.t)
    except SolverError as error:
        return {"coefficient_error": coefficient, "field_error": None, "field": None, "reason": str(error)}
    return {"coefficient_error": coefficient, "field_error": relative_error(field, known.u), "field": field}


def standard_error(config: PDE, meta: Tensor, data: Observations) -> list[float] | None:
    """Compute the standard error of each coefficient from the misfit at φ.

    It is the root of the diagonal of s² (JᵀJ)⁻¹ with J = ∂(predictions)/∂c and s² the mean squared misfit per degree of
    freedom. At the minimum it is the usual standard error of least squares. At other points it says how much of the
    misfit a coefficient could explain.

    Returns:
        The standard errors, or `None` for fields, libraries and networks, or without degrees of freedom.
    """
    if config.unknown not in ("coefficient", "coefficients") or config.solver == "pinn" or len(data.u) <= len(meta):
        return None
    x, t = data.places[0], data.times[0]

    def predictions(point: Tensor) -> np.ndarray:
        return data.of(field_of(config, point, 0, data, x, t))

    step, columns = 1e-3, []
    try:
        misfit = predictions(meta) - data.u
        for i in range(len(meta)):
            moved = step * torch.eye(len(meta), dtype=meta.dtype)[i]
            columns.append((predictions(meta + moved) - predictions(meta - moved)) / (2 * step))
    except SolverError:
        return None
    jacobian = np.stack(columns, 1)
    variance = float(misfit @ misfit) / (len(misfit) - len(meta))
    information = jacobian.T @ jacobian
    if np.linalg.cond(information) > 1e14:
        return None
    in_logarithm = np.sqrt(variance * np.diag(np.linalg.inv(information)))
    return (in_logarithm * unknowns.found(config, meta).numpy()).tolist()


def summary(runs: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean, the standard deviation and the median of the runs that have a value."""
    numbers = [run for run in runs if run is not None and math.isfinite(run)]
    if not numbers:
        return {"mean": None, "std": None, "median": None, "runs": list(runs)}
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
        "median": statistics.median(numbers),
        "runs": list(runs),
    }
