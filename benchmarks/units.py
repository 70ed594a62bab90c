"""What each estimator costs in units: one unit is one inner gradient, forward and backward pass.

    python benchmarks/units.py    # about a minute

Operations are those of matrix products, as PyTorch's flop counter counts them: the same in every run. Process time is
that of a call over that of one plain inner step, the least of several calls. One thread. The outer loss has no matrix
product, so its gradients cost nothing here: the one that every estimator takes is left out of the formulas, and those
that `Penalty` takes in every step are in the formula and not among the operations. Writes
`benchmarks/results/units.md`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clocks_alone  # noqa: F401
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import bilevel
from bilevel import (
    ConjugateGradient,
    EmpiricalFisher,
    Forward,
    ForwardGradient,
    HessianFree,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    PersistentES,
    Reverse,
    SingleLoop,
    TruncatedReverse,
    ZerothOrder,
)
from bilevel.estimators.names import describe
from bilevel.report.files import write_text
from bilevel.report.progress import bar
from bilevel.unrolling.checkpoint_schedules import slots, steps_computed
from bilevel.unrolling.unroll import unroll

RESULTS = Path(__file__).parent / "results"
STEPS, META = 24, 8
REPEATS = 3


@dataclass(frozen=True)
class Case:
    """An estimator and what it is said to cost."""

    estimator: bilevel.Estimator
    formula: str
    """In T, N and the settings."""
    units: Callable[[int, int], float]
    """The same for T and N."""
    outer_gradients: Callable[[int], int] = lambda T: 0
    """How many of these units are gradients of the outer loss, which has no matrix product here; a function of T."""


def reverse(checkpoints: Any) -> Case:
    """Going back with that many states kept: every step is differentiated once, and computed so often besides."""

    def units(T: int, N: int) -> float:
        return steps_computed(T, slots(checkpoints, T)) + 3 * T

    formula = "4T" if checkpoints == "all" else "3T + steps computed"
    return Case(Reverse(checkpoints), formula, units)


CASES = [
    Case(Reverse("graph"), "3T", lambda T, N: 3 * T),
    *map(reverse, ("all", "sqrt", "log", 3)),
    Case(TruncatedReverse(6), "T + 3s", lambda T, N: T + 3 * 6),
    Case(Forward(), "(1 + 2N)·T", lambda T, N: (1 + 2 * N) * T),
    Case(Forward(chunk_size=2), "(2N + ⌈N/k⌉)·T", lambda T, N: (2 * N + N / 2) * T),
    Case(ForwardGradient(4), "(1 + 2b)·T", lambda T, N: (1 + 2 * 4) * T),
    Case(ForwardGradient(4, chunk_size=2), "(2b + ⌈b/k⌉)·T", lambda T, N: (2 * 4 + 2) * T),
    Case(ForwardGradient(4, chunk_size=2, tangents="shared"), "(1 + 2b)·T", lambda T, N: (1 + 2 * 4) * T),
    Case(ForwardGradient(4, tangents="difference"), "(1 + 2b)·T", lambda T, N: (1 + 2 * 4) * T),
    Case(ZerothOrder(4), "(1 + 2b)·T", lambda T, N: (1 + 2 * 4) * T),
    Case(ZerothOrder(4, scheme="forward"), "(1 + b)·T", lambda T, N: (1 + 4) * T),
    Case(PersistentES(4), "(1 + 2b)·T", lambda T, N: (1 + 2 * 4) * T),
    Case(
        Implicit(ConjugateGradient(iterations=5, tolerance=0.0, damping=10.0)),
        "T + 3 + 2·products",
        lambda T, N: T + 3 + 2 * 5,
    ),
    Case(Implicit(Neumann(iterations=5)), "T + 3 + 2·products", lambda T, N: T + 3 + 2 * 6),
    Case(Implicit(Nystrom(rank=5, damping=10.0)), "T + 3 + 2·products", lambda T, N: T + 3 + 2 * 6),
    Case(Implicit(EmpiricalFisher(rank=5, damping=10.0)), "T + 3 + 2·products", lambda T, N: T + 3 + 2),
    Case(HessianFree(), "T + 3", lambda T, N: T + 3),
    Case(HessianFree(preconditioner="optimizer"), "T + 4", lambda T, N: T + 4),
    Case(HessianFree(mixed="difference"), "T + 2", lambda T, N: T + 2),
    Case(HessianFree(preconditioner="optimizer", mixed="difference", lookahead=True), "T + 3", lambda T, N: T + 3),
    Case(Penalty(), "3T + 2", lambda T, N: 3 * T + 2, lambda T: T),
    Case(SingleLoop(solver_steps=5), "T + 3K + 2", lambda T, N: T + 3 * 5 + 2),
    Case(SingleLoop(order="simultaneous"), "5T", lambda T, N: 5 * T, lambda T: T),
    Case(Penalty(steps=6), "T + 2s + 2", lambda T, N: T + 2 * 6 + 2, lambda T: 6),
]


def problem(width: int, depth: int, examples: int) -> tuple[bilevel.GradientDescent, Tensor]:
    """Weights of eight groups of examples; an MLP, all layers of which have the same size."""
    torch.manual_seed(0)
    x, y = torch.randn(examples, width), torch.randint(0, width, (examples,))
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    network = nn.Sequential(*layers[:-1])

    def inner_loss(model: Any, meta: Tensor, batch: None) -> Tensor:
        weights = meta.sigmoid().repeat_interleave(examples // META)
        return (weights * cross_entropy(model(x), y, reduction="none")).mean()

    def outer_loss(model: Any, meta: Tensor, batch: None) -> Tensor:
        return torch.stack([p.square().sum() for p in model.parameters()]).sum()

    optimizer = bilevel.optimizer(torch.optim.SGD, lr=0.1)
    return bilevel.GradientDescent(inner_loss, outer_loss, network, optimizer), torch.zeros(META)


def counted(call: Callable[[], Any]) -> int:
    """The floating point operations in matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def seconds(call: Callable[[], Any]) -> float:
    """Process time, the least of several calls."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def measured(
    subject: tuple[bilevel.GradientDescent, Tensor], case: Case, measure: Callable[[Callable[[], Any]], float], T: int
) -> float:
    """What an estimate over T steps takes, in that of one plain step.

    The first estimate of a problem computes a step twice, to see that it repeats itself; it is not measured.
    """
    found, meta = subject
    steps = bilevel.no_batches(T)
    case.estimator(found, meta, steps)
    run = unroll(found, meta, steps, None, seed=0)
    plain = measure(lambda: run.descend(run.start())) / T
    return measure(lambda: case.estimator(found, meta, steps)) / plain


def main() -> None:
    torch.set_num_threads(1)
    subject = problem(width=128, depth=6, examples=128)
    rows = []
    with bar("estimators", len(CASES)) as shown:
        for case in CASES:
            rows.append([measured(subject, case, measure, STEPS) for measure in (counted, seconds)])
            shown.advance(type(case.estimator).__name__)
    versions = f"bilevel {bilevel.__version__}, torch {torch.__version__}, python {platform.python_version()}"
    lines = [
        "# Cost of the estimators in units",
        "",
        f"`python benchmarks/units.py`: an MLP of six layers of 128, 128 examples in {META} groups with a weight each, "
        f"N = {META} and T = {STEPS}; float32, one thread. {versions}.",
        "",
        "One unit is one inner gradient. The outer loss's own gradient, which every estimator takes once, is left out. "
        "`Penalty` takes one in every step as well, and each counts as a unit in its formula; this outer loss has no "
        "matrix product, so these are not among the operations. "
        "The operations in matrix products agree with the formulas, less what the first layer's inputs do not need. "
        "Process time contains everything else as well; it was taken on a busy machine, where it varies by a third. "
        "*Steps computed* are those of the way there and those computed again on the way back "
        "(`bilevel.unrolling.checkpoint_schedules`). *Products* with the Hessian are the iterations of conjugate "
        "gradients, and one more than `iterations` of a Neumann series or than the rank of a Nyström approximation.",
        "",
        "| estimator | formula | by the formula | operations | process time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, (operations, spent) in zip(CASES, rows, strict=True):
        name = f"`{describe(case.estimator)}`"
        units = f"{case.units(STEPS, META):.0f}"
        if free := case.outer_gradients(STEPS):
            units += f", {free} of them outer gradients"
        lines.append(f"| {name} | {case.formula} | {units} | {operations:.1f} | {spent:.1f} |")
    write_text(RESULTS / "units.md", "\n".join(lines) + "\n")
    print((RESULTS / "units.md").read_text())


if __name__ == "__main__":
    main()
