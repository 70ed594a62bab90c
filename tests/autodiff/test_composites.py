"""Composite forms have the values and first derivatives of PyTorch's operations, and right second and third ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from bilevel.autodiff import composites

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


SCORES, LABELS, WEIGHT = 2 * normal(4, 5), torch.tensor([0, 3, 2, 4]), torch.linspace(0.5, 1.5, 5, dtype=DOUBLE)
LISTED = torch.tensor([[0, 3, -1, 2, 1], [-1, 0, 0, 0, 0], [1, 2, 3, 0, 4], [4, -1, -1, -1, -1]])
SPEECH, WORDS = normal(7, 3, 5), torch.tensor([[1, 1, 2], [3, 4, 0], [2, 0, 0]])
TIMES, SIZES = torch.tensor([7, 6, 5]), torch.tensor([3, 2, 0])
IMAGE, SCALE, SHIFT = normal(3, 4, 5), normal(4, seed=1), normal(4, seed=2)
Call = Callable[[Callable[..., Any]], Callable[..., Tensor]]
"""From an operation, PyTorch's or the composite one, to a function of tensors."""


CASES: dict[str, tuple[Any, Callable[..., Any], Call, list[Tensor]]] = {}


def add(name: str, theirs: Any, ours: Callable[..., Any], call: Callable[..., Any], *inputs: Tensor) -> None:
    for reduction in ("mean", "sum", "none"):
        made: Call = lambda f, r=reduction: lambda *xs: call(f, r, *xs)  # noqa: E731
        CASES[f"{name}, {reduction}"] = (theirs, ours, made, list(inputs))


def add_one(name: str, theirs: Any, ours: Callable[..., Any], call: Callable[..., Any], *inputs: Tensor) -> None:
    CASES[name] = (theirs, ours, lambda f: lambda *xs: call(f, *xs), list(inputs))


TARGET, MATRIX = normal(4, 5, seed=3), WEIGHT.expand(4, 5)
F, C = functional, composites
WEIGHT_NORM: Any = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
for p in (1, 2):
    settings = {"p": p, "margin": 0.7, "weight": WEIGHT}
    add(
        f"multi margin {p}",
        *(F.multi_margin_loss, C.multi_margin_loss),
        lambda f, r, x, s=settings: f(x, LABELS, reduction=r, **s),
        SCORES,
    )
add(
    "multi margin of one",
    *(F.multi_margin_loss, C.multi_margin_loss),
    lambda f, r, x: f(x[0], LABELS[1], reduction=r),
    SCORES,
)
add(
    "multi margin of one score",
    *(F.multi_margin_loss, C.multi_margin_loss),
    lambda f, r, x: f(x[0, 0], LABELS[0], reduction=r),
    SCORES,
)
add(
    "multilabel margin of one score",
    *(F.multilabel_margin_loss, C.multilabel_margin_loss),
    lambda f, r, x: f(x[0, 0], LABELS[0], reduction=r),
    SCORES,
)
add(
    "multilabel margin",
    *(F.multilabel_margin_loss, C.multilabel_margin_loss),
    lambda f, r, x: f(x, LISTED, reduction=r),
    SCORES,
)
add(
    "multilabel margin of one",
    *(F.multilabel_margin_loss, C.multilabel_margin_loss),
    lambda f, r, x: f(x[0], LISTED[0], reduction=r),
    SCORES,
)
add("mse", F.mse_loss, C.mse_loss, lambda f, r, x, y: f(x, y, reduction=r), SCORES, TARGET)
add(
    "mse, deprecated arguments",
    *(F.mse_loss, C.mse_loss),
    lambda f, r, x, y: f(x, y, r == "mean", r != "none"),
    *(SCORES, TARGET),
)
add(
    "weighted mse",
    *(F.mse_loss, C.mse_loss),
    lambda f, r, x, y: f(x, y, reduction=r, weight=MATRIX),
    *(SCORES, TARGET),
)
add("huber", F.huber_loss, C.huber_loss, lambda f, r, x, y: f(x, y, r, 0.8), SCORES, TARGET)
add("weighted huber", F.huber_loss, C.huber_loss, lambda f, r, x, y: f(x, y, r, 0.8, MATRIX), SCORES, TARGET)
add(
    "soft margin",
    *(F.soft_margin_loss, C.soft_margin_loss),
    lambda f, r, x: f(x, TARGET.sign(), reduction=r),
    SCORES,
)
for name, arguments in {
    "": (WORDS, TIMES, SIZES),
    ", lengths as tuples": (WORDS, (7, 6, 5), (3, 2, 0)),
    ", targets in a row": (torch.tensor([1, 1, 2, 3, 4]), TIMES, SIZES),
    ", impossible": (WORDS, torch.tensor([3, 6, 5]), SIZES),
}.items():
    add(
        f"ctc{name}",
        *(F.ctc_loss, C.ctc_loss),
        lambda f, r, x, a=arguments: f(x.log_softmax(2), *a, reduction=r, zero_infinity=True),
        SPEECH,
    )
add("ctc, unnormalised", F.ctc_loss, C.ctc_loss, lambda f, r, x: f(x, WORDS, TIMES, SIZES, reduction=r), SPEECH)
add(
    "ctc of one",
    *(F.ctc_loss, C.ctc_loss),
    lambda f, r, x: f(x[:, 0].log_softmax(1), WORDS[0], torch.tensor(7), torch.tensor(3), reduction=r),
    SPEECH,
)
for dim in (0, 1, 2, -1):
    shape = () if dim == -1 else tuple(n if i == dim else 1 for i, n in enumerate(IMAGE.shape))
    length = normal(*shape).abs() + 0.5
    add_one(f"weight norm {dim}", WEIGHT_NORM, C.weight_norm, lambda f, v, g, d=dim: f(v, g, d), IMAGE, length)
for order in (0.0, 1.0, 1.5, 2.0, 3.0, float("inf")):
    add_one(f"cdist {order}", torch.cdist, C.cdist, lambda f, x, y, p=order: f(x, y, p), IMAGE, TARGET[:3])
    add_one(f"pdist {order}", torch.pdist, C.pdist, lambda f, x, p=order: f(x, p), SCORES)
add_one("hardsigmoid", F.hardsigmoid, C.hardsigmoid, lambda f, x: f(2 * x), SCORES)
for name, bags in {
    "rows": {"input": WORDS, "padding_idx": -2},
    "offsets": {"input": WORDS.flatten(), "offsets": torch.tensor([0, 2, 2, 5])},
    "last offset": {"input": WORDS.flatten(), "offsets": torch.tensor([0, 4, 9]), "include_last_offset": True},
}.items():
    add_one(
        f"bags of embeddings, {name}",
        *(F.embedding_bag, C.embedding_bag),
        lambda f, w, s, kw=bags: f(weight=w, per_sample_weights=s.reshape(kw["input"].shape), mode="sum", **kw),
        *(SCORES.mT, normal(3, 3)),
    )
for padding in (None, 1, -5):
    add_one(
        f"embedding, padding {padding}",
        *(F.embedding, C.embedding),
        lambda f, w, p=padding: f(WORDS, w.mT, p).square(),
        SCORES,
    )
NORMS = [IMAGE, SCALE, SHIFT]
add_one("layer norm", F.layer_norm, C.layer_norm, lambda f, x, w, b: f(x.mT, (4,), w, b), *NORMS)
add_one("layer norm, torch.", torch.layer_norm, C.layer_norm, lambda f, x, w, b: f(x.mT, (4,), w, b), *NORMS)
add_one(
    "layer norm with its statistics",
    *(torch.native_layer_norm, C.native_layer_norm),
    lambda f, x, w, b: f(x.mT, (4,), w, b, 1e-5)[0],
    *NORMS,
)
for training in (True, False):
    more = (SCALE, SCALE.abs(), training, 0.1, 1e-5, False)
    add_one(
        f"batch norm, torch. {training}",
        *(torch.batch_norm, C.torch_batch_norm),
        lambda f, x, w, b, a=more: f(x, w, b, a[0].clone(), a[1].clone(), *a[2:]),
        *NORMS,
    )
    add_one(
        f"instance norm, torch. {training}",
        *(torch.instance_norm, C.torch_instance_norm),
        lambda f, x, w, b, a=more: f(x, w, b, a[0].clone(), a[1].clone(), *a[2:]),
        *NORMS,
    )
add_one(
    "batch norm with its statistics",
    *(torch.native_batch_norm, C.native_batch_norm),
    lambda f, x, w, b: f(x, w, b, None, None, True, 0.1, 1e-5)[0],
    *NORMS,
)
for cut, more in ((0, 1), (1, 1), (2, 0)):
    add_one(
        f"transposed convolution, {cut}, {more}",
        *(F.conv_transpose1d, C.conv_transpose),
        lambda f, x, w, b, c=cut, m=more: f(x, w, b, 2, c, m),
        *(IMAGE, normal(4, 2, 3), normal(2)),
    )
add_one(
    "transposed convolution of images",
    *(F.conv_transpose2d, C.conv_transpose),
    lambda f, x, w: f(x, w, None, (2, 3), (1, 0), (0, 2)),
    *(normal(1, 2, 3, 2), normal(2, 1, 2, 3)),
)
add_one("instance norm", F.instance_norm, C.instance_norm, lambda f, x, w, b: f(x, None, None, w, b), *NORMS)
add_one("batch norm", F.batch_norm, C.batch_norm, lambda f, x, w, b: f(x, None, None, w, b, True), *NORMS)
add_one("batch norm, eval", F.batch_norm, C.batch_norm, lambda f, x, w, b: f(x, SCALE, SCALE.abs(), w, b), *NORMS)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("name", CASES)
def test_value_and_first_derivative_are_those_of_pytorch(name: str) -> None:
    theirs, ours, call, inputs = CASES[name]
    first, second = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected, found = call(theirs)(*first), call(ours)(*second)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = normal(*expected.shape, seed=5)
    gradients = [torch.autograd.grad((y * weights).sum(), xs) for y, xs in ((expected, first), (found, second))]
    rounding = 1e-7 if name == "hardsigmoid" else 1e-11  # PyTorch keeps 1/6 in single precision
    torch.testing.assert_close(*gradients[::-1], rtol=rounding, atol=1e-12)


CONVENTIONS = ("unnormalised", "impossible", "embedding, padding 1", "embedding, padding -5")
"""Cases in which the first derivative follows a convention of PyTorch, and is not that of the value."""


@pytest.mark.parametrize("name", [name for name in CASES if not any(word in name for word in CONVENTIONS)])
def test_second_derivative_and_forward_mode_are_right(name: str) -> None:
    _, ours, call, inputs = CASES[name]
    points = [x.clone().requires_grad_() for x in inputs]
    function = call(ours)
    assert gradcheck(function, points, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, points, check_fwd_over_rev=True, fast_mode=True)


def test_running_statistics_are_updated_as_by_pytorch() -> None:
    for theirs, ours in ((F.batch_norm, C.batch_norm), (F.instance_norm, C.instance_norm)):
        found = []
        for operation in (theirs, ours):
            statistics = torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)
            operation(IMAGE, *statistics, None, None, True, 0.3)
            found.append(statistics)
        torch.testing.assert_close(*found, rtol=1e-13, atol=0)


def test_an_impossible_alignment_costs_infinitely_much() -> None:
    arguments = (SPEECH.log_softmax(2), WORDS, torch.tensor([3, 6, 5]), SIZES)
    found = composites.ctc_loss(*arguments, reduction="none")
    torch.testing.assert_close(found, functional.ctc_loss(*arguments, reduction="none"))
    assert found[0] == torch.inf


def test_composites_take_the_arguments_of_the_operations() -> None:
    tables = {**composites.SECOND_DERIVATIVE, **composites.FORWARD_MODE, **composites.THIRD_DERIVATIVE}
    for operation, composite in tables.items():
        if inspect.isfunction(operation):
            theirs = list(inspect.signature(operation).parameters)
            assert list(inspect.signature(composite).parameters)[: len(theirs)] == theirs
