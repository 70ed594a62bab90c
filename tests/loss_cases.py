"""Every loss of `torch.nn.functional` as the inner and outer loss of a small problem, and a plain PyTorch loop for it.

`python tests/loss_cases.py` prints the page `docs/losses.md`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import bilevel

DOUBLE = torch.float64
STEPS, RATE = 2, 0.2
META = torch.tensor([0.9, 0.4], dtype=DOUBLE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers in float64."""
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


INPUTS, START = normal(4, 3), 0.7 * normal(3, 5, seed=1)
LABELS = torch.tensor([0, 3, 2, 4])
SIGNS = normal(4, 5, seed=2).sign()
NOISE = normal(4, 5, seed=3)


@dataclass(frozen=True)
class LossCase:
    """One loss: `loss(scores, shift, reduction)`, where the shift moves a target if the loss has one that may move."""

    name: str
    setting: str
    loss: Callable[[Tensor, Any, str], Tensor]
    target_moves: bool
    reduction: str

    def __str__(self) -> str:
        target = "moving" if self.target_moves else "fixed"
        return f"{self.name} {self.setting}, {target} target, {self.reduction}"

    def inner(self, theta: Tensor, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """The inner loss; φ scales it, decays the parameters and, for some cases, moves the target."""
        found = self.loss(INPUTS @ theta, meta[1] if self.target_moves else 0.0, self.reduction)
        weights = torch.linspace(0.5, 1.5, max(found.numel(), 1), dtype=DOUBLE).reshape(found.shape)
        return meta[0] * (weights * found).mean() + 0.1 * meta[1] * theta.square().sum()

    def outer(self, theta: Tensor, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """The outer loss: the same loss on other inputs, with both parts of its reduction."""
        shift = 0.5 * meta[0] if self.target_moves else 0.0
        return self.loss(-INPUTS @ theta, shift, self.reduction).mean() + 0.05 * theta.sum()

    def plain(self, meta: Tensor) -> float:
        """The outer loss after a plain PyTorch loop."""
        theta = START.clone().requires_grad_()
        optimizer = torch.optim.SGD([theta], lr=RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.inner(theta, meta, None).backward()
            optimizer.step()
        with torch.no_grad():
            return float(self.outer(theta, meta, None))

    def expected(self) -> Tensor:
        """Five-point central differences of the plain loop."""
        step, grad = 1e-4, torch.zeros_like(META)
        for i in range(len(META)):
            move = step * torch.eye(len(META), dtype=DOUBLE)[i]
            near = self.plain(META + move) - self.plain(META - move)
            far = self.plain(META + 2 * move) - self.plain(META - 2 * move)
            grad[i] = (8 * near - far) / (12 * step)
        return grad

    def problem(self) -> bilevel.GradientDescent:
        """The problem of the library."""
        return bilevel.GradientDescent(self.inner, self.outer, START, bilevel.optimizer(torch.optim.SGD, lr=RATE))


F = functional
FIXED: dict[tuple[str, str], Callable[[Tensor, Any, str], Tensor]] = {
    ("cross_entropy", "labels"): lambda x, s, r: F.cross_entropy(x, LABELS, reduction=r),
    ("cross_entropy", "weights, label smoothing"): lambda x, s, r: F.cross_entropy(
        x, LABELS, weight=torch.linspace(0.5, 1.5, 5, dtype=DOUBLE), label_smoothing=0.1, reduction=r
    ),
    ("cross_entropy", "ignore_index"): lambda x, s, r: F.cross_entropy(x, LABELS, ignore_index=3, reduction=r),
    ("nll_loss", ""): lambda x, s, r: F.nll_loss(x.log_softmax(1), LABELS, reduction=r),
    ("nll_loss", "weights"): lambda x, s, r: F.nll_loss(
        x.log_softmax(1), LABELS, weight=torch.linspace(0.5, 1.5, 5, dtype=DOUBLE), reduction=r
    ),
    ("cosine_embedding_loss", ""): lambda x, s, r: F.cosine_embedding_loss(
        x, NOISE, SIGNS[:, 0], margin=0.1, reduction=r
    ),
    ("multi_margin_loss", "p=1"): lambda x, s, r: F.multi_margin_loss(x, LABELS, reduction=r),
    ("multi_margin_loss", "p=2, weights"): lambda x, s, r: F.multi_margin_loss(
        x, LABELS, p=2, margin=0.7, weight=torch.linspace(0.5, 1.5, 5, dtype=DOUBLE), reduction=r
    ),
    ("multilabel_margin_loss", ""): lambda x, s, r: F.multilabel_margin_loss(
        x, torch.tensor([[0, 3, -1, 2, 1], [-1, 0, 0, 0, 0], [1, 2, 3, 0, 4], [4, -1, 1, 1, 1]]), reduction=r
    ),
    ("ctc_loss", ""): lambda x, s, r: F.ctc_loss(
        torch.stack([x, -x], 1).log_softmax(2),
        torch.tensor([[1, 1], [3, 0]]),
        torch.tensor([4, 3]),
        torch.tensor([2, 1]),
        reduction=r,
    ),
}
"""Losses whose targets are labels, or have no derivative."""
MOVING: dict[tuple[str, str], Callable[[Tensor, Any, str], Tensor]] = {
    ("l1_loss", ""): lambda x, s, r: F.l1_loss(x, NOISE + s, reduction=r),
    ("mse_loss", ""): lambda x, s, r: F.mse_loss(x, NOISE + s, reduction=r),
    ("huber_loss", ""): lambda x, s, r: F.huber_loss(x, NOISE + s, reduction=r),
    ("huber_loss", "delta=0.4"): lambda x, s, r: F.huber_loss(x, NOISE + s, delta=0.4, reduction=r),
    ("smooth_l1_loss", ""): lambda x, s, r: F.smooth_l1_loss(x, NOISE + s, reduction=r),
    ("smooth_l1_loss", "beta=0.4"): lambda x, s, r: F.smooth_l1_loss(x, NOISE + s, beta=0.4, reduction=r),
    ("soft_margin_loss", ""): lambda x, s, r: F.soft_margin_loss(x, SIGNS + s, reduction=r),
    ("binary_cross_entropy", ""): lambda x, s, r: F.binary_cross_entropy(
        x.sigmoid(), (NOISE + s).sigmoid(), reduction=r
    ),
    ("binary_cross_entropy_with_logits", ""): lambda x, s, r: F.binary_cross_entropy_with_logits(
        x, (NOISE + s).sigmoid(), reduction=r
    ),
    ("binary_cross_entropy_with_logits", "pos_weight"): lambda x, s, r: F.binary_cross_entropy_with_logits(
        x, (NOISE + s).sigmoid(), pos_weight=torch.linspace(0.5, 1.5, 5, dtype=DOUBLE), reduction=r
    ),
    ("cross_entropy", "soft targets"): lambda x, s, r: F.cross_entropy(
        x, ((1 + s) * NOISE).softmax(1), label_smoothing=0.1, reduction=r
    ),
    ("kl_div", ""): lambda x, s, r: F.kl_div(x.log_softmax(1), ((1 + s) * NOISE).softmax(1), reduction=_batch_mean(r)),
    ("kl_div", "log_target"): lambda x, s, r: F.kl_div(
        x.log_softmax(1), ((1 + s) * NOISE).log_softmax(1), reduction=_batch_mean(r), log_target=True
    ),
    ("poisson_nll_loss", "full"): lambda x, s, r: F.poisson_nll_loss(x, (NOISE + s).exp(), full=True, reduction=r),
    ("poisson_nll_loss", "log_input=False"): lambda x, s, r: F.poisson_nll_loss(
        x.exp(), (NOISE + s).exp(), log_input=False, reduction=r
    ),
    ("gaussian_nll_loss", ""): lambda x, s, r: F.gaussian_nll_loss(x, NOISE + s, x.square() + 0.5, reduction=r),
    ("hinge_embedding_loss", ""): lambda x, s, r: F.hinge_embedding_loss(
        (x - s).square(), SIGNS, margin=1.3, reduction=r
    ),
    ("margin_ranking_loss", ""): lambda x, s, r: F.margin_ranking_loss(x, NOISE + s, SIGNS, margin=0.3, reduction=r),
    ("multilabel_soft_margin_loss", ""): lambda x, s, r: F.multilabel_soft_margin_loss(
        x, (NOISE + s).sigmoid(), reduction=r
    ),
    ("cosine_embedding_loss", "other input from φ"): lambda x, s, r: F.cosine_embedding_loss(
        x, NOISE + s, SIGNS[:, 0], margin=0.1, reduction=r
    ),
    ("triplet_margin_loss", ""): lambda x, s, r: F.triplet_margin_loss(x, NOISE + s, -NOISE, reduction=r),
    ("triplet_margin_with_distance_loss", ""): lambda x, s, r: F.triplet_margin_with_distance_loss(
        x, NOISE + s, -NOISE, distance_function=lambda a, b: (a - b).square().mean(1), swap=True, reduction=r
    ),
}
"""Losses whose targets may be computed from φ."""


def _batch_mean(reduction: str) -> str:
    return "batchmean" if reduction == "mean" else reduction


def cases() -> Iterator[LossCase]:
    """Every loss with each reduction, and with fixed and moving targets."""
    for reduction in ("mean", "sum", "none"):
        for (name, setting), loss in FIXED.items():
            yield LossCase(name, setting, loss, False, reduction)
        for (name, setting), loss in MOVING.items():
            for target_moves in (False, True):
                yield LossCase(name, setting, loss, target_moves, reduction)


ESTIMATORS: dict[str, bilevel.Estimator] = {
    "`Reverse()`": bilevel.Reverse(),
    '`Reverse("graph")`': bilevel.Reverse("graph"),
    "`Forward()`": bilevel.Forward(),
    "`Forward(chunk_size=1)`": bilevel.Forward(chunk_size=1),
    '`tangents="shared"`': bilevel.ForwardGradient(2, "coordinate", tangents="shared"),
    '`tangents="difference"`': bilevel.ForwardGradient(2, "coordinate", tangents="difference"),
}


@functools.cache
def verdicts(case: LossCase) -> dict[str, str]:
    """What each estimator makes of the loss: right, right by Hessian-vector products, or its relative error."""
    expected, found = case.expected(), {}
    for name, estimator in ESTIMATORS.items():
        estimate = estimator(case.problem(), META, bilevel.no_batches(STEPS))
        error = float((estimate.grad - expected).norm() / expected.norm())
        how = "products" if "hessian_product_steps" in estimate.diagnostics else "right"
        found[name] = how if error < 1e-7 else f"off by {error:.1e}"
    return found


def page() -> str:
    """The page `docs/losses.md`."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for case in cases():
        row = found.setdefault((case.name, case.setting), {name: set() for name in ESTIMATORS})
        for name, how in verdicts(case).items():
            row[name].add(how)
    rows = [["loss", *ESTIMATORS], ["---"] * (1 + len(ESTIMATORS))]
    for (name, setting), row in sorted(found.items()):
        title = f"`{name}` ({setting})" if setting else f"`{name}`"
        rows.append([title, *(" / ".join(sorted(how)) for how in row.values())])
    return "\n".join([HEADER, *(f"| {' | '.join(row)} |" for row in rows), ""])


HEADER = """# Losses

Every loss of `torch.nn.functional` was taken as the inner and as the outer loss, with each reduction, with a fixed
target and, where the target is a floating-point tensor, with a target that depends on the meta parameters. The table
says how each estimator came out beside five-point differences of a plain PyTorch loop in float64: "right" within a
relative error of 1e-7, or "products" for right, with Hessian-vector products in the place of forward mode (see
`Estimate.diagnostics`). The two columns with `tangents=` are settings of `ForwardGradient`.

`multi_margin_loss`, `multilabel_margin_loss` and `ctc_loss` have no second derivative in PyTorch, `soft_margin_loss`
has none with respect to its target, and `mse_loss` and `huber_loss` have no forward-mode derivative, or a partial one.
While a loss is differentiated, these functions are replaced by composite forms with equal values
(`bilevel.autodiff.composites`); the user's code is not changed. A composite `ctc_loss` is slower than PyTorch's own: it
is a loop over time in Python.

Made by `python tests/loss_cases.py > docs/losses.md`. A test compares the page with the results.
"""


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(page(), end="")
