"""PDE discovery as a bilevel problem. The inner problem solves the equation; the outer loss is the misfit to
observations.

h(φ) = mean over observations of (u_φ(x_i, t_i) − u_i)² / variance of the u_i  +  penalty(φ)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

import bilevel
from bilevel.optim.update_rule import Optimizer
from bilevel.tasks.pde import differentiable, numerical, observations, pinn, unknowns
from bilevel.tasks.pde.config import PDE
from bilevel.tasks.pde.counter import Counter
from bilevel.tasks.pde.equations import EQUATIONS
from bilevel.tasks.pde.observations import Observations, Reference
from bilevel.tasks.pde.secant import Secant
from bilevel.tasks.task import Setup
from bilevel.training.outer_loop import OuterStep


def reference(config: PDE, data_dir: Path | None) -> Reference:
    """Return the solution that is observed and with which the result is compared."""
    equation = EQUATIONS[config.equation]
    if config.unknown == "source":
        return _with_source(config)
    if data_dir is None:
        return observations.own_reference(config.equation)
    return observations.read_reference(equation, data_dir)


def observed(config: PDE, data_dir: Path | None, seed: int) -> Observations:
    """Return the observations of a run."""
    if config.observations:
        return observations.read_table(Path(config.observations))
    return observations.on_grid(reference(config, data_dir), config.observed_x, config.observed_t, config.noise, seed)


def setup(config: PDE, data_dir: Path | None, outer_steps: int, seed: int, start: int = 0) -> Setup:
    """Return the bilevel problem with start value number `start`.

    Each row of the metrics contains the number of solves in the step, and the current values of the unknowns.

    Raises:
        ValueError: all observations have the same value.
    """
    data = observed(config, data_dir, seed)
    if float(np.std(data.u)) == 0:
        raise ValueError("all observations have the same value; at least two different ones are needed")
    counter = Counter()
    inner_batches = None
    if config.solver == "numerical":
        problem: Any = _black_box(config, data, counter)
    elif config.solver == "differentiable":
        problem, inner_batches = _stepping(config, data, counter)
    else:
        problem, inner_batches = pinn.problem(config, functools.partial(_misfit, data), counter, data, seed)
    counter.steps_of_a_solve = 1 if inner_batches is None else len(inner_batches)

    def record(step: OuterStep) -> None:
        step.row["solves"] = counter.take()
        if config.unknown not in ("initial-condition", "source"):
            step.row["found"] = unknowns.found(config, step.meta).tolist()

    return Setup(
        problem=problem,
        meta=unknowns.start(config, seed, start),
        inner_batches=inner_batches,
        outer_batch=None,
        optimizer=_optimizer(config, outer_steps),
        update=bilevel.OuterUpdate(
            project=functools.partial(unknowns.allowed, config), max_backtracks=config.max_backtracks
        ),
        callbacks=[record],
    )


def _optimizer(config: PDE, outer_steps: int) -> Optimizer:
    name = config.outer_optimizer
    if name == "auto":
        # The secant method leaves a plateau, such as that at large viscosities of Burgers' equation; L-BFGS does not.
        name = "secant" if config.equation == "burgers" or config.unknown == "coefficient" else "lbfgs"
        if config.unknown not in ("coefficient", "coefficients"):
            name = "adam" if (config.unknown, config.equation) == ("library", "kdv") else "lbfgs"
    if name == "secant":
        # KdV's loss has many local minima at small coefficients, where there are many waves, so its steps are short.
        first = config.outer_lr or (
            0.1 if config.equation == "kdv" else 0.5 if config.unknown == "coefficient" else 0.2
        )
        return bilevel.optimizer(Secant, lr=first, longest=4 * first)
    if name == "lbfgs":
        settings = {"max_iter": 1, "history_size": 20, "tolerance_grad": 0.0, "tolerance_change": 0.0}
        return bilevel.optimizer(torch.optim.LBFGS, lr=config.outer_lr or 0.5, **settings)
    decay = functools.partial(ExponentialLR, gamma=0.001 ** (1 / outer_steps))
    rate = config.outer_lr or (0.03 if config.unknown == "library" else 0.3)
    return bilevel.optimizer(torch.optim.Adam, lr=rate, schedule=decay)


def _misfit(data: Observations, predicted: Tensor) -> Tensor:
    """Compute the mean squared difference from the observations, relative to their variance."""
    values = torch.from_numpy(data.u).to(predicted.dtype)
    return (predicted - values).square().mean() / values.var(unbiased=False)


# -- the numerical solver: a black box ---------------------------------------------------------------------------------


def _black_box(config: PDE, data: Observations, counter: Counter) -> bilevel.BlackBox:
    x, t = data.places[0], data.times[0]

    def solve(meta: Tensor) -> Tensor:
        counter.steps += 1
        return torch.from_numpy(data.of(numerical_field(config, meta, x, t)))

    return bilevel.BlackBox(solve, lambda predicted, meta, batch: _misfit(data, predicted))


def numerical_field(config: PDE, meta: Tensor, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Compute the field `[places, times]` by SciPy."""
    here = unknowns.situation(config, meta)
    accuracy = numerical.Accuracy(config.resolution, config.solver_tolerance, time_limit=config.time_limit)
    coefficients = {name: float(value) for name, value in here.coefficients.items()}
    whole = np.unique(np.concatenate([[0.0], t]))
    field = numerical.solve(EQUATIONS[config.equation], coefficients, x, whole, accuracy)
    return field[:, np.searchsorted(whole, t)]


# -- the differentiable solver -----------------------------------------------------------------------------------------


def _stepping(
    config: PDE,
    data: Observations,
    counter: Counter,
    situation_of: Callable[[Tensor], unknowns.Situation] | None = None,
) -> tuple[bilevel.Problem, Any]:
    situation_of = situation_of or functools.partial(unknowns.situation, config)
    equation = EQUATIONS[config.equation]
    basis = differentiable.basis_of(equation, config.resolution)
    places, times = data.places, data.times
    evaluation = basis.evaluation(places[0])
    at_start = int(times[0][0] == 0)  # observations at t = 0 need no step
    batches = differentiable.time_steps(list(times[0][at_start:]), config.solver_steps)

    def init(meta: Tensor) -> differentiable.State:
        here = situation_of(meta)
        u = torch.from_numpy(equation.initial(basis.grid)) if here.initial is None else here.initial
        seen = torch.zeros(len(places[0]), len(times[0]), dtype=torch.float64)
        return {"u": u, "seen": differentiable.observe(basis, evaluation, u, seen, at_start - 1)}

    def step(state: differentiable.State, meta: Tensor, batch: tuple[float, int]) -> differentiable.State:
        counter.steps += 1
        duration, number = batch
        here = situation_of(meta)
        u = differentiable.step(basis, state["u"], unknowns.term_coefficients_of(config, here), duration, here.source)
        number = number + at_start if number >= 0 else -1
        return {"u": u, "seen": differentiable.observe(basis, evaluation, u, state["seen"], number)}

    def outer_loss(state: differentiable.State, meta: Tensor, batch: Any) -> Tensor:
        return _misfit(data, state["seen"][places[1], times[1]]) + unknowns.penalty(config, meta)

    return bilevel.Problem(init, step, outer_loss), batches


def stepped_field(config: PDE, here: unknowns.Situation, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Compute the field `[places, times]` by the differentiable solver.

    Raises:
        SolverError: the solution blows up.
    """
    xs, ts = (part.ravel() for part in np.meshgrid(x, t, indexing="ij"))
    points = Observations(xs, ts, np.arange(len(xs), dtype=float))
    problem, batches = _stepping(config, points, Counter(), lambda meta: here)
    nothing = torch.zeros(())
    with torch.no_grad():
        state = problem.init(nothing)
        for batch in batches:
            state = problem.step(state, nothing, batch)
    field = state["seen"].numpy()
    if not np.isfinite(field).all():
        raise bilevel.errors.SolverError(f"{config.equation}: the differentiable solver blew up")
    return field


def _with_source(config: PDE) -> Reference:
    """Compute the solution with the true source, with twice the points and four times the steps of the inversion."""
    finer = dataclasses.replace(config, points=2 * config.resolution, inner_steps=4 * config.solver_steps)
    known = observations.own_reference(config.equation)
    basis = differentiable.basis_of(EQUATIONS[config.equation], finer.resolution)
    source = torch.from_numpy(unknowns.true_source(basis.grid))
    coefficients = dict(EQUATIONS[config.equation].coefficients)
    u = stepped_field(finer, unknowns.Situation(coefficients, source=source), known.x, known.t)
    words = (
        f"this program's differentiable solver with {finer.points} points and {finer.inner_steps} steps, and a source"
    )
    return dataclasses.replace(known, u=u, source=words)
