"""The library's inner loop beside the plain PyTorch loop: parameters and buffers after each step, and the outer value.

After t steps, with θ ours and θ̃ the plain loop's, the two agree if

    ‖θ − θ̃‖ ≤ √ε Σ_s ‖θ_{s+1} − θ_s‖ + 4 ε (t + 1) ‖θ‖

over all parameters, where ε is the machine epsilon of the coarsest dtype. The first term lets a step lose half of its
digits by cancellation; the second one is the rounding of the parameters themselves. Buffers are compared likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import autodiff, trees
from bilevel.models.module_view import modules_in
from bilevel.problem import Descent
from bilevel.unrolling.double_precision import lowest_dtype
from bilevel.unrolling.inner_loop import InnerLoop
from bilevel.unrolling.plain_loop import PlainLoop


@dataclass(frozen=True)
class Apart:
    """Where the two loops part."""

    step: int
    """The number of the step after which they differ."""
    what: str
    """The tensor that is furthest off."""
    distance: float
    """How far the two loops are apart, over all tensors of its kind."""
    tolerance: float
    """How far they may be."""
    moved: float
    """How far the plain loop had moved them."""


class SideBySide:
    """Two loops that take the same steps, the library's and the plain one."""

    def __init__(self, run: InnerLoop, plain: PlainLoop) -> None:
        self.run, self.plain = run, plain
        self.state: Descent = run.start()
        copied = plain.start()
        theirs, ours = (
            [tuple(t.shape) for t in tensors]
            for tensors in (copied.tensors, trees.split(self.state.params).differentiable)
        )
        self.trains_others: str = ""
        """What the two loops train, if that is not the same; then nothing else is compared."""
        self.apart: Apart | None = None
        self.largest = 0.0
        """The largest ratio of a distance to its tolerance."""
        if theirs != ours:
            self.trains_others = f"tensors of shapes {ours} are trained, and {theirs} in the plain loop"
            return
        self._epsilon = torch.finfo(lowest_dtype(copied.tensors, plain.meta.tensors)).eps
        self._paths = {"parameters": 0.0, "buffers": 0.0}
        self._buffers = {name: copied.read(name) for name, (holder, _) in copied.slots.items() if self._is_buffer(name)}
        self.apart = self._compared(-1, self._plain_now())

    def _is_buffer(self, name: str) -> bool:
        copied = self.plain.params
        assert copied is not None
        holder, key = copied.slots[name]
        return isinstance(holder[key], Tensor) and not isinstance(holder[key], torch.nn.Parameter)

    def advance(self, t: int, ours: Callable[[Descent], Descent] | None = None) -> Apart | None:
        """Take step t in both loops, and return where they differ.

        Args:
            t: the number of the step.
            ours: computes the library's step in another way than `descend`.
        """
        before = self._plain_now()
        modules = modules_in([self.run.meta, self.state])
        with autodiff.differentiable_kernels(modules):
            self.state = self.run.descend(self.state, t, t + 1) if ours is None else ours(self.state)
        self.plain.step(t)
        after = self._plain_now()
        for kind in self._paths:
            self._paths[kind] += _length([b - a for a, b in zip(before[kind][1], after[kind][1], strict=True)])
        found = self._compared(t, after)
        self.apart = self.apart or found
        return found

    def skip_to(self, t: int) -> None:
        """Let the next step be number t, with its batch and its learning rate, from the current parameters."""
        self.state = self.state._replace(steps=t)
        self.plain.skip_to(t)

    def _plain_now(self) -> dict[str, tuple[list[str], list[Tensor]]]:
        copied = self.plain.params
        assert copied is not None
        names = list(self._followed())
        return {
            "parameters": (copied.names, [t.detach().clone() for t in copied.tensors]),
            "buffers": (names, [copied.read(name) for name in names]),
        }

    def _followed(self) -> Mapping[str, Tensor]:
        buffers = self.state.buffers if isinstance(self.state.buffers, Mapping) else {}
        return {name: tensor for name, tensor in buffers.items() if trees.is_differentiable(tensor)}

    def _compared(self, t: int, plain: dict[str, tuple[list[str], list[Tensor]]]) -> Apart | None:
        ours = {
            "parameters": trees.split(self.state.params).differentiable,
            "buffers": list(self._followed().values()),
        }
        for kind, (names, theirs) in plain.items():
            pairs = list(zip(ours[kind], theirs, strict=True))
            gaps = [_length([(a - b).to(_wide(a))]) for a, b in pairs]
            moved = self._paths[kind]
            tolerance = self._epsilon**0.5 * moved + 4 * self._epsilon * (t + 2) * _length(theirs)
            distance = math.hypot(*gaps) if gaps else 0.0
            self.largest = max(self.largest, distance / tolerance if tolerance else (math.inf if distance else 0.0))
            if distance > tolerance or not math.isfinite(distance):
                worst = names[max(range(len(gaps)), key=lambda i: gaps[i] if math.isfinite(gaps[i]) else math.inf)]
                return Apart(t, worst, distance, tolerance, moved)
        return None

    def unfollowed(self) -> list[str]:
        """Return the buffers that the plain loop changed, and that are not part of the library's inner state."""
        copied = self.plain.params
        assert copied is not None
        known = self.state.buffers if isinstance(self.state.buffers, Mapping) else {}
        return [
            name
            for name, before in self._buffers.items()
            if name not in known and self._is_buffer(name) and not torch.equal(copied.read(name), before)
        ]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _length(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.to(_wide(t)))) for t in tensors)) if tensors else 0.0
