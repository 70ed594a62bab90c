"""Solvers of Hx = b for a symmetric H that is known only by its products with vectors, one method per file."""

from bilevel.solvers.conjugate_gradients import ConjugateGradient
from bilevel.solvers.empirical_fisher import EmpiricalFisher
from bilevel.solvers.linear_solver import LinearSolver, Solution
from bilevel.solvers.neumann import Neumann
from bilevel.solvers.nystrom import Nystrom

__all__ = ["ConjugateGradient", "EmpiricalFisher", "LinearSolver", "Neumann", "Nystrom", "Solution"]
