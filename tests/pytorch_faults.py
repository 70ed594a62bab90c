"""Operations whose derivatives are missing or wrong in PyTorch, each with a few lines that show the fault.

`python tests/pytorch_faults.py > docs/pytorch_faults.md` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

DOUBLE, F = torch.float64, functional
COMPOSITE, PRODUCTS, REFUSED = "composite form", "Hessian-vector products", "refused"


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Reproducible normal numbers in float64."""
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Fault:
    """One fault of PyTorch."""

    operation: str
    derivative: str
    """Which derivative: first, second, third, or forward mode."""
    fault: str
    """What is wrong with it: missing, wrong, or an error."""
    versions: str
    """The releases of torch in which the fault was seen."""
    here: str
    """What this library does."""
    instead: str
    """What to write instead, where the operation is refused."""
    show: Callable[[], Any]
    """Raises a RuntimeError while PyTorch has the fault."""

    def __str__(self) -> str:
        return f"{self.operation}, {self.derivative}"


def second(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Compare second derivatives with differences of first ones."""
    return lambda: gradgradcheck(call, [x.clone().requires_grad_() for x in inputs], fast_mode=True)


def third(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Compare the second derivatives of a slope with differences."""
    along = normal(*inputs[0].shape, seed=7)

    def slope(*xs: Tensor) -> Tensor:
        return (torch.autograd.grad(call(*xs).tanh().sum(), xs[0], create_graph=True)[0] * along).sum()

    return second(slope, *inputs)


def first(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Compare first derivatives with differences."""
    return lambda: gradcheck(call, [x.clone().requires_grad_() for x in inputs], fast_mode=True)


def forward(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Compare derivatives in forward mode with differences."""
    settings: Any = {"check_forward_ad": True, "check_backward_ad": False}
    return lambda: gradcheck(call, [x.clone().requires_grad_() for x in inputs], **settings)


def forward_over_reverse(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Differentiate a gradient in forward mode."""
    return lambda: torch.func.jvp(
        torch.func.grad(lambda x: call(x, *inputs[1:])), (inputs[0],), (torch.ones_like(inputs[0]),)
    )


def chunked(reduction: str) -> Callable[..., Tensor]:
    """The cross-entropy of linear scores, in chunks."""
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return lambda x, w: F.linear_cross_entropy(x, w, LABELS, reduction=reduction, options=options)


SCORES, LABELS = 2 * normal(4, 5), torch.tensor([0, 3, 2, 4])
LISTED = torch.tensor([[0, 3, -1, 2, 1], [-1, 0, 0, 0, 0], [1, 2, 3, 0, 4], [4, -1, -1, -1, -1]])
SPEECH, WORDS = normal(7, 3, 5), torch.tensor([[1, 1, 2], [3, 4, 0], [2, 0, 0]])
TIMES, SIZES = torch.tensor([7, 6, 5]), torch.tensor([3, 2, 0])
IMAGE, SCALE, SHIFT = normal(3, 4, 5), normal(4, seed=1), normal(4, seed=2)
POINTS, OTHERS, TRIANGLE = normal(3, 2), normal(4, 2, seed=1), normal(3, 3, seed=2) + 4 * torch.eye(3, dtype=DOUBLE)
TWICE = torch.tensor([0, 1, 0])
WEIGHT_NORM: Any = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
_V = "2.13"


FAULTS: tuple[Fault, ...] = (
    Fault(
        "torch.as_strided_scatter",
        "first",
        "wrong",
        _V,
        REFUSED,
        "`x.flatten().scatter(0, index, y.flatten())`",
        first(lambda x, y: torch.as_strided_scatter(x, y, (2,), (2,), 1).tanh(), normal(6), normal(2, seed=1)),
    ),
    Fault(
        "F.max_unpool1d, 2d, 3d with an index that occurs twice",
        "first",
        "wrong",
        _V,
        REFUSED,
        "indices that differ",
        first(lambda x: F.max_unpool1d(x, torch.tensor([[[1, 1, 3]]]), 2, 2, 0, (6,)).tanh(), normal(1, 1, 3)),
    ),
    Fault(
        "F.multi_margin_loss",
        "second",
        "missing",
        _V,
        COMPOSITE,
        "",
        second(lambda x: F.multi_margin_loss(x, LABELS, p=2), SCORES),
    ),
    Fault(
        "F.multilabel_margin_loss",
        "second",
        "missing",
        _V,
        COMPOSITE,
        "",
        second(lambda x: F.multilabel_margin_loss(x, LISTED).square(), SCORES),
    ),
    Fault(
        "F.ctc_loss",
        "second",
        "missing",
        _V,
        COMPOSITE,
        "",
        second(lambda x: F.ctc_loss(x.log_softmax(2), WORDS, TIMES, SIZES), SPEECH),
    ),
    Fault(
        "F.soft_margin_loss, by the target",
        "first",
        "missing",
        _V,
        COMPOSITE,
        "",
        second(lambda y: F.soft_margin_loss(SCORES, y), SCORES.sign()),
    ),
    Fault("F.hardsigmoid", "second", "missing", _V, COMPOSITE, "", second(lambda x: F.hardsigmoid(x).square(), SCORES)),
    Fault(
        "F.embedding_bag with per_sample_weights",
        "second",
        "missing",
        _V,
        COMPOSITE,
        "",
        second(
            lambda w, s: F.embedding_bag(WORDS, w, mode="sum", per_sample_weights=s).square(),
            normal(5, 2),
            normal(3, 3, seed=1),
        ),
    ),
    Fault(
        "torch.cdist without a matrix product",
        "second",
        "missing",
        _V,
        COMPOSITE,
        "",
        second(torch.cdist, POINTS, OTHERS),
    ),
    Fault("torch.pdist", "second", "missing", _V, COMPOSITE, "", second(torch.pdist, OTHERS)),
    Fault(
        "weight_norm",
        "second",
        "wrong",
        _V,
        COMPOSITE,
        "",
        second(lambda v, g: WEIGHT_NORM(v, g, 0), SCORES, normal(4, 1)),
    ),
    Fault(
        "F.linear_cross_entropy in chunks",
        "second",
        "wrong",
        _V,
        COMPOSITE,
        "",
        second(chunked("mean"), normal(4, 3), normal(5, 3, seed=1)),
    ),
    Fault(
        "F.layer_norm with a bias and no weight",
        "second",
        "an error",
        _V,
        COMPOSITE,
        "",
        second(lambda x, b: F.layer_norm(x, (5,), None, b), IMAGE, normal(5, seed=1)),
    ),
    Fault(
        "torch.segment_reduce, reduce='max', 'mean' or 'min'",
        "second",
        "missing",
        _V,
        REFUSED,
        "`torch.stack([part.mean() for part in x.split(lengths)])`",
        second(lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([3, 2])).square(), normal(5)),
    ),
    Fault("F.layer_norm", "third", "wrong", _V, COMPOSITE, "", third(lambda x: F.layer_norm(x, (4, 5)), IMAGE)),
    Fault(
        "torch.native_layer_norm",
        "third",
        "wrong",
        _V,
        COMPOSITE,
        "",
        third(lambda x: torch.native_layer_norm(x, (4, 5), None, None, 1e-5)[0], IMAGE),
    ),
    Fault("F.instance_norm", "third", "wrong", _V, COMPOSITE, "", third(lambda x: F.instance_norm(x), IMAGE)),
    Fault(
        "F.batch_norm",
        "third",
        "wrong",
        _V,
        COMPOSITE,
        "",
        third(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), IMAGE, SCALE, SHIFT),
    ),
    Fault(
        "torch.native_batch_norm",
        "third",
        "wrong",
        _V,
        COMPOSITE,
        "",
        third(lambda x, w, b: torch.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)[0], IMAGE, SCALE, SHIFT),
    ),
    Fault(
        "F.conv_transpose1d, 2d, 3d with an output_padding",
        "third",
        "an error",
        _V,
        COMPOSITE,
        "",
        third(lambda x, w: F.conv_transpose1d(x, w, None, 2, 1, 1), normal(2, 3, 4), normal(3, 2, 3, seed=1)),
    ),
    Fault(
        "F.mse_loss", "forward mode", "missing", _V, COMPOSITE, "", forward_over_reverse(F.mse_loss, SCORES, IMAGE[0])
    ),
    Fault(
        "F.huber_loss",
        "forward mode",
        "missing",
        _V,
        COMPOSITE,
        "",
        forward_over_reverse(F.huber_loss, SCORES, IMAGE[0]),
    ),
    Fault(
        "torch.triangular_solve",
        "forward mode",
        "wrong",
        _V,
        PRODUCTS,
        "",
        forward(lambda b, a: torch.triangular_solve(b, a)[0], POINTS, TRIANGLE),
    ),
    Fault(
        "Tensor.scatter_reduce, reduce='prod'",
        "forward mode",
        "wrong",
        _V,
        PRODUCTS,
        "",
        forward(lambda x, y: x.scatter_reduce(0, TWICE, y, "prod"), normal(3), normal(3, seed=1)),
    ),
)


def page() -> str:
    """The page `docs/pytorch_faults.md`."""
    rows = ["| operation | derivative | in PyTorch | seen in torch | here |", "| --- | --- | --- | --- | --- |"]
    for each in FAULTS:
        here = each.here if not each.instead else f"{each.here}; write {each.instead}"
        rows.append(f"| `{each.operation}` | {each.derivative} | {each.fault} | {each.versions} | {here} |")
    return "\n".join([HEADER, *rows, ""])


HEADER = """# Derivatives that PyTorch lacks or gets wrong

A hypergradient needs second derivatives of the inner loss, or third ones if that loss takes a gradient itself. PyTorch
has first derivatives of nearly all operations, but the higher ones of some are missing or wrong. The table lists those
that are known, and what the library does while it differentiates a loss. The user's own code is not changed.

- *Composite form*: the operation is replaced by others with the same value, which have all derivatives.
- *Hessian-vector products*: forward mode is replaced by a second backward pass, which is exact too; see
  `Estimate.diagnostics`.
- *Refused*: a `MissingDerivativeError` names the operation.

Normalisations are replaced only in losses that take a gradient themselves, because PyTorch's own kernels are faster and
their second derivatives are right.

Made by `python tests/pytorch_faults.py > docs/pytorch_faults.md`. A test shows every fault again, and fails if a
release of PyTorch has repaired it; another compares the derivatives that replace it with differences.
"""


if __name__ == "__main__":
    print(page(), end="")
