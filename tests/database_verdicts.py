"""The entries of PyTorch's own test databases as inner models, each beside a plain PyTorch loop.

An entry is a function f of floating-point inputs x (and, for a module, of its parameters). The inner parameters are a
factor s for each entry of each x, and the module's parameters. With fixed weights w, φ = (φ₀, φ₁) and
y = f((1 + φ₁) s x),

    inner loss = mean(w (y + φ₀ y² / 2)) + mean(s²) / 20,    outer loss = mean(w' (y + y²)),

where y is divided by its largest entry at the start. The learning rate moves the parameters by a few per cent.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from database_cases import DOUBLE, FIRST_INPUT_ONLY, LEFT_OUT, WITHOUT_PENALTY, Case, Optimizer, Scaled
from torch import Tensor

import bilevel
from bilevel import errors, randomness
from bilevel.unrolling.short_check import short_check

STEPS = 2
META = torch.tensor([0.8, 0.0], dtype=DOUBLE)
MOVES = (0.03, 0.003)
"""The relative lengths of the first step that are tried."""


def weighted(y: Tensor, curvature: Any, low: float, high: float) -> Tensor:
    """mean(w (y + curvature · y² / 2))."""
    w = torch.linspace(low, high, max(y.numel(), 1), dtype=DOUBLE)[: y.numel()]
    return (w * (y + 0.5 * curvature * y.square())).sum() / max(y.numel(), 1)


class LeftOutError(Exception):
    """There is no truth to compare with; the message says why."""


class Loop:
    """A case at one learning rate."""

    def __init__(self, case: Case, model: Scaled, move: float) -> None:
        self.model, self.case = model, case
        with randomness.seeded(0, randomness.STEP, 0), torch.no_grad():
            y = copy.deepcopy(model)(META[1])
        y = y[y.isfinite()]
        self.size = float(y.abs().max()) if y.numel() and float(y.abs().max()) > 1e-8 else 1.0
        if case.optimizer is not None:
            kind, settings = case.optimizer
            self.optimizer: Optimizer = kind, settings
            return
        trial = copy.deepcopy(model)
        with randomness.seeded(0, randomness.STEP, 0):
            self.inner(trial, META, None).backward()
        moved = [p for p in trial.parameters() if p.grad is not None and p.requires_grad]
        slope = torch.cat([p.grad.reshape(-1) for p in moved]).norm()  # pyright: ignore[reportOptionalMemberAccess]
        length = torch.cat([p.detach().reshape(-1) for p in moved]).norm()
        self.optimizer = torch.optim.SGD, {"lr": float(move * length / slope) if float(slope) > 0 else 0.1}

    def inner(self, model: Any, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """The inner loss."""
        scales = sum((p.square().mean() for p in model.scales if p.numel()), torch.zeros((), dtype=DOUBLE))
        scales = 0.05 * (1 + meta[0]) * scales
        if not self.case.penalty:
            return weighted(model(meta[1]) / self.size, meta[0], 0.5, 1.5) + scales
        along = torch.zeros((), dtype=DOUBLE, requires_grad=True)
        loss = weighted(model(meta[1] + along) / self.size, meta[0], 0.5, 1.5)
        (slope,) = torch.autograd.grad(loss, along, create_graph=True)
        return loss + slope.square() + scales

    def outer(self, model: Any, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """The outer loss."""
        scales = sum((p.square().mean() for p in model.scales if p.numel()), torch.zeros((), dtype=DOUBLE))
        return weighted(model(META[1]) / self.size, 2.0, 1.2, 0.4) + 0.05 * scales

    def trained(self, meta: Tensor) -> Scaled:
        """The model after a plain PyTorch loop."""
        model = copy.deepcopy(self.model)
        kind, settings = self.optimizer
        optimizer = kind(model.parameters(), **settings)
        for t in range(STEPS):
            optimizer.zero_grad()
            with randomness.seeded(0, randomness.STEP, t):
                self.inner(model, meta, None).backward()
            optimizer.step()
        return model

    def plain(self, meta: Tensor) -> float:
        """The outer loss after a plain PyTorch loop."""
        model = self.trained(meta)
        with torch.no_grad(), randomness.seeded(0, randomness.OUTER):
            return float(self.outer(model, meta, None))

    def by_definition(self, name: str) -> Tensor:
        """−vᵀ Y with Y = ∂²g/∂θ∂φ at θ_T, and v = d, or v = α d + α (I − α H) d for two terms of Neumann's series."""
        model = self.trained(META)
        with randomness.seeded(0, randomness.OUTER):
            v = gradients(self.outer(model, META, None), model)
        if name == "Implicit":
            length = float(torch.cat([part.reshape(-1) for part in v]).norm())
            curved, coarse = (self._curvature(model, v, step / length) for step in (3e-5, 1e-4))
            size = max(float(c.norm()) for c in curved)
            if any(float((a - b).norm()) > 1e-5 * size for a, b in zip(curved, coarse, strict=True)):
                raise LeftOutError("the differences of the formula do not converge")
            v = [2 * RATE * part - RATE**2 * c for part, c in zip(v, curved, strict=True)]

        def slope(meta: Tensor) -> float:
            found = self._inner_gradient(model, meta, v, 0.0)
            return -float(sum((g * part).sum() for g, part in zip(found, v, strict=True)))

        found, noise = converged(slope)
        if noise > 1e-5:
            raise LeftOutError(f"the differences of the formula do not converge: {noise:.1e}")
        return found

    def _curvature(self, model: Scaled, along: Sequence[Tensor], step: float) -> list[Tensor]:
        """H times a vector, at θ_T, by central differences."""
        ahead, behind = (self._inner_gradient(model, META, along, s * step) for s in (1, -1))
        return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]

    def _inner_gradient(self, model: Scaled, meta: Tensor, along: Sequence[Tensor], step: float) -> list[Tensor]:
        """∇_θ g of the last step, at parameters that are moved."""
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, part in zip(moved.parameters(), along, strict=True):
                p.add_(part, alpha=step)
        with randomness.seeded(0, randomness.STEP, STEPS - 1):
            return gradients(self.inner(moved, meta, None), moved)

    def problem(self) -> bilevel.GradientDescent:
        """The problem of the library."""
        kind, settings = self.optimizer
        return bilevel.GradientDescent(self.inner, self.outer, self.model, bilevel.optimizer(kind, **settings))


def gradients(loss: Tensor, model: Scaled) -> list[Tensor]:
    """The gradient of a loss by all parameters, with zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def differences(h: Callable[[Tensor], float], step: float) -> Tensor:
    """Five-point central differences at φ."""
    grad = torch.zeros_like(META)
    for i, e in enumerate(step * torch.eye(len(META), dtype=DOUBLE)):
        grad[i] = (8 * (h(META + e) - h(META - e)) - (h(META + 2 * e) - h(META - 2 * e))) / (12 * step)
    return grad


def converged(h: Callable[[Tensor], float]) -> tuple[Tensor, float]:
    """The differences at the best of two step sizes, and how far they are from those at three times that step."""
    pairs = [(differences(h, step), differences(h, 3 * step)) for step in (1e-4, 1e-5)]
    found = [(near, float((near - far).norm() / near.norm().clamp_min(1e-12))) for near, far in pairs]
    return min(found, key=lambda pair: pair[1] if pair[1] == pair[1] else torch.inf)


ESTIMATORS: dict[str, bilevel.Estimator] = {
    "Reverse": bilevel.Reverse(),
    "Reverse(graph)": bilevel.Reverse("graph"),
    "Reverse(sqrt)": bilevel.Reverse("sqrt"),
    "TruncatedReverse": bilevel.TruncatedReverse(STEPS),
    "Forward": bilevel.Forward(),
    "Forward(chunk_size=1)": bilevel.Forward(chunk_size=1),
    "ForwardGradient": bilevel.ForwardGradient(2, "coordinate"),
    "shared": bilevel.ForwardGradient(2, "coordinate", tangents="shared"),
    "difference": bilevel.ForwardGradient(2, "coordinate", tangents="difference"),
    "ZerothOrder": bilevel.ZerothOrder(2, 1e-5, distribution="coordinate"),
}
LOOSE = ("difference", "ZerothOrder")
"""Estimators that take differences themselves."""
RATE = 0.5
BY_DEFINITION: dict[str, bilevel.Estimator] = {
    "HessianFree": bilevel.HessianFree(),
    "Implicit": bilevel.Implicit(bilevel.Neumann(1, RATE)),
}
"""Biased estimators, which are compared with differences of their own formulas."""
MAIN = ("Reverse", "Reverse(graph)", "Forward", "Forward(chunk_size=1)", "shared", "difference", "ZerothOrder")
"""Estimators for every case; all estimators are taken for the first case of an entry."""
WITH_PENALTY = ("Reverse", "Forward(chunk_size=1)")


@dataclass(frozen=True)
class Row:
    """What one estimator made of one case."""

    case: str
    estimator: str
    verdict: str
    detail: str


def on_purpose(error: BaseException) -> bool:
    """Whether an error was raised by this library, with a message of its own."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
    ours = "/bilevel/" in last and type(error) in (ValueError, TypeError, NotImplementedError) and len(str(error)) > 40
    return isinstance(error, errors.BilevelError) or ours


@dataclass(frozen=True)
class Truth:
    """The loop of a case, and what differences of it say."""

    loop: Loop
    grad: Tensor
    value: float
    noise: float


def prepared(case: Case) -> Truth:
    """The truth of a case: with factors on all inputs, or on the first one alone."""
    if case.entry in LEFT_OUT:
        raise LeftOutError(LEFT_OUT[case.entry])
    if case.entry in FIRST_INPUT_ONLY:
        return _with(case, 1)
    try:
        return _with(case, 1000)
    except LeftOutError as error:
        try:
            return _with(case, 1)
        except LeftOutError:
            raise error from None


def _with(case: Case, inputs: int) -> Truth:
    why = ""
    for move in MOVES:
        try:
            model = case.make()
            model.scale_inputs(inputs)
            if not list(model.parameters()):
                raise LeftOutError("no floating-point input")
            if not copy.deepcopy(model).count_outputs(META[1]):
                raise LeftOutError("a constant for PyTorch: no output has a derivative")
            model.count_outputs(META[1])
            loop = Loop(case, model, move)
            value = loop.plain(META)
            near, noise = converged(loop.plain)
        except LeftOutError:
            raise
        except Exception as error:
            raise LeftOutError(f"the plain loop raises {type(error).__name__}: {str(error)[:150]}") from error
        if noise < 1e-6:
            return Truth(loop, near, value, noise)
        why = f"the differences of the plain loop do not converge: {noise:.1e}"
    raise LeftOutError(why)


def judge(case: Case, names: Sequence[str] = tuple(ESTIMATORS)) -> Iterator[Row]:
    """One row for each estimator."""
    with warnings.catch_warnings(), short_check(False):
        warnings.simplefilter("ignore")
        try:
            found = prepared(case)
        except LeftOutError as error:
            yield Row(str(case), "", "left out", str(error))
            return
        loop, truth, value, noise = found.loop, found.grad, found.value, found.noise
        for name in names:
            try:
                estimator = ESTIMATORS.get(name) or BY_DEFINITION[name]
                expected = truth if name in ESTIMATORS else loop.by_definition(name)
                estimate = estimator(loop.problem(), META, bilevel.no_batches(STEPS))
                error = float((estimate.grad - expected).norm() / expected.norm().clamp_min(1e-9))
                off = abs(float(estimate.value) - value) / max(abs(value), 1e-12)
                bound = 1e-3 if name in LOOSE else 1e-4 if name in BY_DEFINITION else 3e-6
                right = error <= bound and off < 1e-7
                detail = f"off by {error:.1e}, its value by {off:.1e}, the differences by {noise:.1e}"
                yield Row(str(case), name, "right" if right else "WRONG", detail)
            except LeftOutError as error:
                yield Row(str(case), name, "left out", str(error))
            except Exception as error:
                kind = "refused" if on_purpose(error) else "obscure"
                yield Row(str(case), name, kind, f"{type(error).__name__}: {error}")


def judge_all(cases: Iterable[Case]) -> Iterator[Row]:
    """The rows of all cases: with all estimators for the first case of an entry, and with the main ones for others."""
    seen: set[str] = set()
    for case in cases:
        first, exact = case.entry not in seen, case.optimizer is None
        seen.add(case.entry)
        more = [*ESTIMATORS, *(BY_DEFINITION if exact else ())]
        yield from judge(case, WITH_PENALTY if case.penalty else more if first else MAIN)


def with_penalty(cases: Iterable[Case]) -> Iterator[Case]:
    """The same cases with a gradient penalty."""
    return (replace(case, penalty=True) for case in cases if case.entry not in WITHOUT_PENALTY)
