"""The way from the final inner state back to the meta parameters, which some estimators have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from bilevel.trees import Tree


class ReversePass(ABC):
    """Multiplies cotangents d of the final inner state by dθ_T/dφ, or by what an estimator has in its place.

    It is made together with the final state, and holds what the way back needs: kept states, temporary files, or a
    graph. `close` releases them; so does leaving the `with` statement, and the end of the object.
    """

    state: Tree
    """θ_T, without a graph."""
    from_start: bool = True
    """Whether the way back reaches the initial state."""

    @abstractmethod
    def pull_back(self, last: Tree, d: Sequence[Tensor], keep: bool = False, count: int | None = None) -> list[Tensor]:
        """Return d · dθ_T/dφ, one tensor for each leaf of φ.

        Args:
            last: θ_T again.
            d: one cotangent for each differentiable leaf of θ_T.
            count: m, if d are the cotangents of m outer losses, `[m, *leaf.shape]` each. The result then has the same
                leading axis. `None` for a single cotangent.
            keep: whether the pass will be used again. What a pass uses up is then computed again by the next one, at
                the cost of running the inner loop once more.
        """

    def close(self) -> None:  # noqa: B027  (nothing to release is common)
        """Release kept states, files and graphs."""

    def __enter__(self) -> ReversePass:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
