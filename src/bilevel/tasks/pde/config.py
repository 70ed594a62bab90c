"""The settings of a PDE run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bilevel import checks
from bilevel.tasks.pde.equations import EquationName

SolverName = Literal["numerical", "pinn", "differentiable"]
UnknownName = Literal["coefficient", "coefficients", "initial-condition", "source", "library"]


@dataclass(frozen=True)
class PDE:
    """Recover unknown parts of a partial differential equation from a few observations of its solution."""

    equation: EquationName = "burgers"
    """The equation, with the paper's coefficients and initial values."""
    solver: SolverName = "numerical"
    """Inner problem: `numerical` solves the equation with SciPy, as a black box; `pinn` trains a physics-informed
    network; `differentiable` makes time steps of the equation in torch."""
    unknown: UnknownName = "coefficient"
    """Unknown part: `coefficient` is that of the paper; `coefficients` are all of the equation; `initial-condition` and
    `source` are whole fields; `library` are the coefficients of eight candidate terms. The last three need the
    differentiable solver."""
    starts: int = 0
    """Number of start values, drawn uniformly from the paper's range; each has its own outer loop. 0 for 10
    (for a network: 2)."""
    observed_x: int = 8
    """Number of places of observation."""
    observed_t: int = 8
    """Number of times of observation at each place."""
    noise: float = 0.0
    """Standard deviation of the noise on observations, relative to that of the observed values."""
    observations: str = ""
    """Text file with a line x,t,u for each observation, to use instead of a grid of observations; empty for none."""
    points: int = 0
    """Grid points of the inner solver; 0 for a number that suits the equation."""
    inner_steps: int = 0
    """Time steps of the differentiable solver, or training steps of the network; 0 for the solver's default."""
    solver_tolerance: float = 1e-8
    """Relative tolerance of SciPy's integrator."""
    time_limit: float = 60.0
    """Number of seconds after which a solve by SciPy counts as failed."""
    max_backtracks: int = 8
    """Largest number of times that an outer step is halved because the solver failed at the new point."""
    outer_optimizer: Literal["auto", "secant", "adam", "lbfgs"] = "auto"
    """Outer optimiser: `secant` suits one unknown, `lbfgs` (one evaluation per step) many unknowns with exact
    hypergradients, `adam` (with a learning rate that decays to a thousandth) noisy hypergradients. `auto` selects
    secant for one coefficient and for those of burgers, adam for kdv's library, else lbfgs."""
    outer_lr: float = 0.0
    """Outer learning rate; for the secant method, the first step and a quarter of the longest step. 0 for 0.5 (secant:
    kdv 0.1, several coefficients 0.2; adam: 0.3, a library 0.03)."""
    penalty: float = 1e-6
    """Weight of the penalty on unknown fields (squares) and on a library's coefficients (absolute values)."""
    inner_optimizer: Literal["adam", "sgd"] = "adam"
    """Optimiser that trains the network."""
    inner_lr: float = 0.003
    """Learning rate of the network's optimiser."""
    collocation: int = 256
    """Number of random points at which each training step evaluates the residual of the equation."""
    depth: int = 9
    """Layers of the network."""
    width: int = 20
    """Units of a hidden layer."""
    dtype: Literal["float32", "float64"] = "float64"
    """Precision of the network."""

    def __post_init__(self) -> None:
        checks.each_field(self, checks.whole_number, "observed_x", "observed_t", "collocation", "width")
        checks.whole_number(self.depth, "depth", at_least=2)
        checks.each_field(self, checks.whole_number, "starts", "points", "inner_steps", "max_backtracks", at_least=0)
        checks.each_field(self, checks.not_negative, "noise", "outer_lr", "penalty")
        checks.each_field(self, checks.positive, "solver_tolerance", "time_limit", "inner_lr")
        if self.points and (self.points < 16 or self.points % 2):
            raise ValueError(f"points={self.points}: an even number of at least 16 is needed, or 0")
        if self.unknown in ("initial-condition", "source", "library") and self.solver != "differentiable":
            raise ValueError(f"unknown={self.unknown!r} needs --solver differentiable, not {self.solver!r}")
        if self.unknown == "library" and self.equation == "allen-cahn":
            raise ValueError("unknown='library' needs an equation of period 2: burgers or kdv")

    @property
    def start_count(self) -> int:
        """The number of start values."""
        return self.starts or (2 if self.solver == "pinn" else 10)

    @property
    def resolution(self) -> int:
        """The number of grid points of the inner solver."""
        if self.solver == "numerical":
            return self.points or {"burgers": 512, "allen-cahn": 256, "kdv": 256}[self.equation]
        return self.points or {"burgers": 1024, "allen-cahn": 256, "kdv": 128}[self.equation]

    @property
    def solver_steps(self) -> int:
        """The number of time steps of the differentiable solver, or of training steps of the network."""
        if self.solver == "pinn":
            return self.inner_steps or 100
        return self.inner_steps or {"burgers": 200, "allen-cahn": 100, "kdv": 400}[self.equation]
