"""PDE discovery: unknown parts of an equation from its solution, observed at a few points (paper §4, Figure 2).

Differences from the paper and its released code: the unknown is the logarithm of the coefficient, so that no step leads
to an ill-posed equation. A derivative costs two additional solves (the released code takes 13, or 289). The outer
optimiser is the secant method, because one number is unknown. A failure of the solver is an error or leads to a shorter
step, and is counted in the results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError, SolverError
from bilevel.estimators import Forward, ForwardGradient, Reverse, ZerothOrder
from bilevel.report.page import Section
from bilevel.report.progress import bar
from bilevel.tasks.pde import evaluation, pictures, problem, unknowns
from bilevel.tasks.pde.config import PDE
from bilevel.tasks.pde.equations import EQUATIONS
from bilevel.tasks.task import Preset, Setup, Task, Trained
from bilevel.training import checkpoint_files, metrics
from bilevel.training.outer_loop import OuterStep

FIELDS = "fields.safetensors"

_POINTS_OF_PATH = 30


class PDETask(Task[PDE]):
    """Recover unknown parts of a partial differential equation."""

    name = "pde"
    summary = "recover unknown coefficients, fields or terms of a partial differential equation from a few observations"
    presets: Mapping[str, Preset[PDE]] = {
        "coefficient": Preset(
            PDE(), ZerothOrder(), 30, "the paper's: one coefficient, any solver; needs no files", patience=3
        ),
        "coefficients": Preset(
            PDE(solver="differentiable", unknown="coefficients"),
            Forward(),
            60,
            "all coefficients of the equation, exact derivatives",
            patience=8,
        ),
        "initial-condition": Preset(
            PDE(solver="differentiable", unknown="initial-condition", starts=1, observed_x=32, observed_t=16),
            Reverse(),
            200,
            "the field that the solution starts from, hundreds of unknowns",
        ),
        "source": Preset(
            PDE(solver="differentiable", unknown="source", starts=1, observed_x=32, observed_t=16),
            Reverse(),
            200,
            "a source in the equation, hundreds of unknowns",
        ),
        "library": Preset(
            PDE(solver="differentiable", unknown="library", starts=1, observed_x=32, observed_t=16, penalty=1e-5),
            Reverse(),
            150,
            "which of eight candidate terms there are, and their coefficients",
        ),
    }

    def adapted(self, preset: Preset[PDE], config: PDE) -> Preset[PDE]:
        if config.solver == "numerical":
            count = len(unknowns.names(config))
            estimator = ZerothOrder() if count == 1 else ZerothOrder(directions=count, distribution="orthogonal")
            return dataclasses.replace(preset, estimator=estimator)
        if config.solver == "pinn":
            return dataclasses.replace(
                preset, estimator=ForwardGradient(tangents="difference"), outer_steps=min(preset.outer_steps, 12)
            )
        return dataclasses.replace(preset, estimator=Forward()) if preset.estimator == ZerothOrder() else preset

    def setup(self, config: PDE, data_dir: Path | None, outer_steps: int, seed: int) -> Setup:
        return problem.setup(config, data_dir, outer_steps, seed)

    def callbacks(self, folder: Path, outer_steps: int, start: Any) -> list[Callable[[OuterStep], None]]:  # noqa: ARG002
        return []

    def judge(self, run: Trained[PDE]) -> dict[str, Any]:
        """Run the outer loops of the other starts, and compare the results of all starts with the truth."""
        found: list[Tensor | None] = [run.meta]
        reasons: list[str] = []
        if run.config.start_count > 1:
            with bar("further starts", run.config.start_count - 1, show=run.progress) as shown:
                for number in range(1, run.config.start_count):
                    setup = problem.setup(run.config, run.data_dir, run.outer_steps, run.seed, number)
                    try:
                        found.append(run.fit(setup, _name(number)))
                    except (NonFiniteError, SolverError) as error:
                        found.append(None)
                        reasons.append(f"start {number}: {error}")
                    shown.advance()
        rows = [metrics.read(run.folder / _name(number) / metrics.FILE) for number in range(len(found))]
        return {**_judged(run, found, rows), "reasons": reasons}

    def evaluate(
        self,
        config: PDE,
        data_dir: Path | None,
        meta: Any,
        seed: int,
        progress: bool,  # noqa: ARG002
    ) -> dict[str, Any]:
        found = evaluation.errors_of(config, data_dir, meta, seed)
        return {name: evaluation.summary([found[name]]) for name in ("coefficient_error", "field_error")}

    def headline(self, results: Mapping[str, Any]) -> list[tuple[str, str]]:
        failed = results["failures"]
        return [
            (f"relative error of the {results['unknown']}, median", _number(results["coefficient_error"]["median"])),
            ("the same, mean ± std", _spread(results["coefficient_error"])),
            ("relative error of the field, mean ± std", _spread(results["field_error"])),
            ("solves for each start, mean ± std", _spread(results["solves"])),
            (f"starts that failed, of {results['starts']}", str(failed["raised"] + failed["far_off"])),
        ]

    def sections(self, folder: Path, results: Mapping[str, Any]) -> list[Section]:
        rows = [metrics.read(folder / _name(number) / metrics.FILE) for number in range(results["starts"])]
        return pictures.sections(results, rows, checkpoint_files.load(folder / FIELDS))


def _name(number: int) -> str:
    """Return the name of the subfolder of a start. The first start uses the run's own folder."""
    return f"start-{number:02d}" if number else "."


def _judged(run: Trained[PDE], found: list[Tensor | None], rows: list[list[metrics.Row]]) -> dict[str, Any]:
    config = run.config
    judged = [None if meta is None else evaluation.errors_of(config, run.data_dir, meta, run.seed) for meta in found]
    data, known = problem.observed(config, run.data_dir, run.seed), problem.reference(config, run.data_dir)
    ended = [i for i, each in enumerate(judged) if each is not None and each["field"] is not None]
    best = min(ended, key=lambda i: rows[i][-1]["outer_loss"], default=None)
    fields = {"x": known.x, "t": known.t, "reference": known.u, "observed_x": data.x, "observed_t": data.t}
    if best is not None:
        chosen = judged[best]
        assert chosen is not None
        meta = found[best]
        assert meta is not None
        fields.update(found=chosen["field"], values=unknowns.found(config, meta).numpy())
    checkpoint_files.save(run.folder / FIELDS, {name: torch.from_numpy(value.copy()) for name, value in fields.items()})
    errors = [None if each is None else each["coefficient_error"] for each in judged]
    solves = evaluation.summary([sum(row["solves"] for row in start) for start in rows])
    few = config.unknown not in ("initial-condition", "source")
    return {
        "equation": EQUATIONS[config.equation].formula,
        "solver": config.solver,
        "unknown": config.unknown,
        "names": unknowns.names(config) if few else [],
        "truth": unknowns.truth(config).tolist(),
        "reference": known.source,
        "observations": len(data.u),
        "noise": data.noise,
        "starts": len(found),
        "best_start": best,
        "coefficient_error": evaluation.summary(errors),
        "field_error": evaluation.summary([None if each is None else each["field_error"] for each in judged]),
        "solves": {**solves, "total": sum(solves["runs"])},
        "failures": {
            "raised": sum(meta is None for meta in found),
            "far_off": sum(error is not None and error > evaluation.FAR_OFF for error in errors),
        },
        "backtracks": sum(row.get("backtracks", 0) for start in rows for row in start),
        "seconds_of_starts": [start[-1]["seconds"] if start else None for start in rows],
        "found": [meta if meta is None else unknowns.found(config, meta).tolist() for meta in found] if few else [],
        "standard_errors": [None if meta is None else evaluation.standard_error(config, meta, data) for meta in found],
        "path": _path(config, rows[0], data),
    }


def _path(config: PDE, rows: list[metrics.Row], data: Any) -> list[dict[str, Any]]:
    """Return the coefficients of the first start after some of its outer steps, with their standard errors there."""
    if config.unknown not in ("coefficient", "coefficients"):
        return []
    wanted = rows[:: -(-len(rows) // _POINTS_OF_PATH)]
    return [
        {
            "outer_step": row["outer_step"],
            "found": row["found"],
            "standard_error": evaluation.standard_error(config, torch.tensor(row["found"]).double().log(), data),
        }
        for row in wanted
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _spread(found: Mapping[str, Any]) -> str:
    return _number(found["mean"]) if len(found["runs"]) == 1 else f"{_number(found['mean'])} ± {_number(found['std'])}"
