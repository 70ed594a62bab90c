"""The interface of a linear solver: Hx = b for a symmetric H that is known only by its products with vectors.

A vector is a list of tensors. A solver is a frozen object that holds its settings. Its cost is the number of products
with H that it takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Vector: TypeAlias = "list[Tensor]"
MatrixProduct: TypeAlias = Callable[[Sequence[Tensor]], Vector]
"""The function v ↦ Hv."""


@dataclass(frozen=True)
class Solution:
    """The result of a linear solve."""

    x: Vector
    residual: float
    """‖b − Hx‖ / ‖b‖, of the damped system if the solver damps it."""
    iterations: int
    """The number of products with H that the solver took."""
    converged: bool
    """Whether the solver reached its goal."""
    message: str
    """A sentence that describes the outcome."""


class LinearSolver(ABC):
    """A method that solves Hx = b for a symmetric H `[M, M]` from products Hv alone."""

    @property
    @abstractmethod
    def products(self) -> int:
        """The largest number of products with H that one solution takes; the planner uses it."""

    @property
    def gradients_wanted(self) -> int:
        """How many of the last inner gradients the solver is made from; most are made from none."""
        return 0

    def with_gradients(self, gradients: Sequence[Vector]) -> LinearSolver:  # noqa: ARG002
        """Return the solver made from inner gradients, the newest last."""
        return self

    @abstractmethod
    def solve(self, product: MatrixProduct, b: Sequence[Tensor]) -> Solution:
        """Compute x with Hx ≈ b.

        Args:
            product: the function v ↦ Hv.
            b: the right-hand side, a list of tensors with M entries in all.

        Returns:
            The solution and whether the solver reached its goal. A solve that fails returns its last iterate with
            `converged=False` and the reason in `message`.
        """
