"""Write docs/matrix.md: estimators × optimisers × models × kinds of meta parameters, each beside a plain loop.

    python docs/make_matrix.py    # one or two minutes

A cell is one estimate of a loop of two steps in float64. It is right if its slope along a random direction is that of
central differences of the plain PyTorch loop (`bilevel.checking.whole_loop`), or refused, with the reason below the
table.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from bilevel.checking.subject import Subject
from bilevel.checking.whole_loop import compare_estimators
from bilevel.estimators.names import describe
from bilevel.report.findings import Finding, Verdict
from bilevel.report.progress import bar
from bilevel.unrolling.short_check import short_check

PAGE = Path(__file__).parent / "matrix.md"
DOUBLE, EXAMPLES, STEPS = torch.float64, 4, 2

ESTIMATORS: tuple[bilevel.Estimator, ...] = (
    bilevel.Reverse(),
    bilevel.Reverse("graph"),
    bilevel.Reverse("sqrt"),
    bilevel.ForwardGradient(1),
    bilevel.ForwardGradient(1, tangents="shared"),
    bilevel.ForwardGradient(1, tangents="difference"),
    bilevel.ZerothOrder(1, 1e-4),
)
OPTIMIZERS: Mapping[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.02}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.02}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.02}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.02}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1}),
}


def normal(*shape: int) -> Tensor:
    """Reproducible normal numbers in float64."""
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(sum(shape)))


LABELS = torch.tensor([0, 1, 2, 1])
FEATURES = torch.linspace(-1.0, 1.0, EXAMPLES, dtype=DOUBLE)[:, None]
"""From which a module computes the weights of examples."""
IDS = torch.tensor([[0, 1, 2], [3, 1, 4], [2, 2, 0], [5, 6, 1]])


class Recurrent(nn.Module):
    """A GRU whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])


class Pooled(nn.Module):
    """A transformer layer, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(1))


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "MLP with dropout": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 3)),
        normal(EXAMPLES, 3),
    ),
    "convolution, BatchNorm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
        ),
        normal(EXAMPLES, 1, 3, 3),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(8, 3), nn.Flatten(), nn.Linear(9, 3)), IDS),
    "GRU": (Recurrent, normal(EXAMPLES, 3, 3)),
    "transformer": (Pooled, normal(EXAMPLES, 3, 4)),
}
METAS = ("example weights", "a module", "initial parameters", "learning rate, decay")
Slot = tuple[str, str, str]
"""A model, a kind of meta parameters and an optimiser."""


def subject(model: str, kind: str, optimizer: str) -> Subject:
    """The problem of one row, which may be refused."""
    torch.manual_seed(0)
    make, x = MODELS[model]
    net = make().double()
    algorithm, settings = OPTIMIZERS[optimizer]
    chosen: dict[str, Any] = dict(settings)
    params: Any = net
    meta: Any = torch.linspace(0.5, 1.5, EXAMPLES, dtype=DOUBLE)

    def losses(model: Any) -> Tensor:
        return functional.cross_entropy(model(x), LABELS, reduction="none")

    def inner(model: Any, meta: Any, batch: Any) -> Tensor:
        found = losses(model)
        if kind == "example weights":
            return (meta * found).mean()
        if kind == "a module":
            return (meta(FEATURES).squeeze(1) * found).mean()
        return found.mean()

    if kind == "a module":
        meta = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid()).double()
    elif kind == "initial parameters":
        meta = net
        params = _itself
    elif kind == "learning rate, decay":
        meta = {"lr": torch.tensor(chosen["lr"], dtype=DOUBLE).log(), "decay": torch.tensor(0.1, dtype=DOUBLE)}
        chosen.update(lr=_rate, weight_decay=_decay)

    def outer(model: Any, meta: Any, batch: Any) -> Tensor:
        return losses(model).square().mean()

    problem = bilevel.GradientDescent(inner, outer, params, bilevel.optimizer(algorithm, **chosen))
    return Subject(problem, meta, STEPS, None, 0)


def _itself(meta: Any) -> Any:
    return meta


def _rate(meta: Any) -> Tensor:
    return meta["lr"].exp()


def _decay(meta: Any) -> Tensor:
    return meta["decay"]


def row(model: str, kind: str, optimizer: str) -> list[Finding]:
    """One finding for each estimator."""
    with warnings.catch_warnings(), short_check(False):
        warnings.simplefilter("ignore")
        try:
            described = subject(model, kind, optimizer)
            return list(compare_estimators(described, ESTIMATORS, 1, None))
        except (ValueError, TypeError, bilevel.errors.BilevelError) as error:
            refused = Finding("", "", Verdict.UNJUDGED, f"refused or failed: {type(error).__name__}: {error}")
            return [refused] * len(ESTIMATORS)


def word(finding: Finding, reasons: dict[str, int]) -> str:
    """A cell; reasons of refusals are collected and numbered."""
    if finding.verdict is Verdict.RIGHT:
        return "right"
    if "refused" in finding.found:
        reason = finding.found.split(": ", 1)[1]
        return f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"
    if finding.verdict is Verdict.WRONG:
        return "WRONG"
    return f"not judged ({reasons.setdefault(finding.found, len(reasons) + 1)})"


def line(slot: Slot, reasons: dict[str, int]) -> str:
    """One line of the table."""
    cells = [word(finding, reasons) for finding in row(*slot)]
    return f"| {' | '.join([*slot, *cells])} |"


@functools.cache
def slots() -> tuple[Slot, ...]:
    """All rows."""
    return tuple((model, kind, optimizer) for model in MODELS for kind in METAS for optimizer in OPTIMIZERS)


def page(lines: Sequence[str], reasons: Mapping[str, int]) -> str:
    """The page with these rows."""
    cells, kinds = len(lines) * len(ESTIMATORS), ("right", "refused", "WRONG", "not judged")
    right, refused, wrong, unjudged = (sum(line.count(f"| {what}") for line in lines) for what in kinds)
    names = [f"`{describe(estimator)}`" for estimator in ESTIMATORS]
    head = f"""# Estimators, optimisers, models and meta parameters

Each of the {cells} cells is one estimate of a loop of {STEPS} steps in float64, beside central differences of a plain
PyTorch loop along a random direction. A cell is right (the slopes agree within 1e-5 besides rounding; 1e-3 for
estimators that take differences themselves), or refused, for the numbered reason below the table. {right} are right,
{refused} refused, {wrong} wrong, and {unjudged} could not be judged. Made by `python docs/make_matrix.py`.

| model | meta parameters | optimiser | {" | ".join(names)} |
| {" | ".join(["---"] * (3 + len(names)))} |
"""
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return head + "\n".join([*lines, "", *notes]).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    reasons: dict[str, int] = {}
    lines = []
    with bar("rows", len(slots())) as shown:
        for slot in slots():
            lines.append(line(slot, reasons))
            shown.advance()
    PAGE.write_text(page(lines, reasons), encoding="utf-8")


if __name__ == "__main__":
    main()
