"""Each protection of the inner loop, switched off: a part of the check finds what is then wrong.

The table of `docs/check.md` (which part finds what) has the same rows.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from bilevel import autodiff
from bilevel.autodiff import composites, custom_functions, substitution
from bilevel.checking.report import Report
from bilevel.models import buffers, built_from_meta, conversion, parameter_hooks, sharing
from bilevel.optim import clipping, torch_step, update_rule
from bilevel.problem import GradientDescent
from bilevel.report.findings import Verdict
from bilevel.unrolling import argument_checks, inner_loop, replay, unroll

DOUBLE = torch.float64
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


X, Y = normal(6, 3), normal(6, 1, seed=1)
META = torch.linspace(0.5, 1.5, 6, dtype=DOUBLE)


def module(*layers: nn.Module) -> nn.Module:
    """Layers with reproducible parameters, in float64."""
    made = nn.Sequential(*layers).double()
    for number, parameter in enumerate(made.parameters()):
        parameter.data.copy_(0.5 * normal(*parameter.shape, seed=10 + number))
    return made


def inner(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (meta[:, None] * (model(X) - Y) ** 2).mean()


def outer(model: Any, meta: Tensor, batch: Any) -> Tensor:
    return (model(-X) - Y).square().mean()


def problem(net: Any, algorithm: Any = SGD, loss: Any = inner, judge: Any = outer, **settings: Any) -> GradientDescent:
    chosen: dict[str, Any] = {"lr": 0.1} | settings
    return GradientDescent(loss, judge, net, bilevel.optimizer(algorithm, **chosen))


Case = tuple[Any, Any, Any]
"""A problem, φ and the inner batches."""


# -- the kinds --------------------------------------------------------------------------------------------------------


def heads() -> Case:
    net = nn.ModuleDict({"a": module(nn.Linear(3, 1)), "b": module(nn.Linear(3, 1))})

    def loss(model: Any, meta: Tensor, head: str) -> Tensor:
        return (meta[:, None] * (model[head](X) - Y) ** 2).mean()

    def judge(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return sum((model[k](-X) - Y).square().mean() for k in "ab")  # type: ignore[return-value]

    return problem(net, SGD, loss, judge, momentum=0.9), META, list("abaab")


def zeros_for_unreached(patch: pytest.MonkeyPatch) -> None:
    own = GradientDescent.evaluate

    def evaluate(self: GradientDescent, params: Any, *rest: Any) -> Any:
        found = own(self, params, *rest)
        return found._replace(gradient=autodiff.fill_zeros(found.gradient, params))

    patch.setattr(GradientDescent, "evaluate", evaluate)


def with_statistics() -> Case:
    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        model.train()
        return inner(model, meta, batch)

    def judge(model: Any, meta: Tensor, batch: Any) -> Tensor:
        model.eval()
        return outer(model, meta, batch)

    net = module(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    return problem(net, SGD, loss, judge), META, 4


def without_derivative_of_statistics(patch: pytest.MonkeyPatch) -> None:
    own = buffers.Writes._replace
    patch.setattr(buffers.Writes, "_replace", lambda self, cell, value: own(self, cell, value.detach()))


def clipped() -> Case:
    return problem(module(nn.Linear(3, 1)), clip_norm=0.2), META, 4


def clip_under_no_grad(patch: pytest.MonkeyPatch) -> None:
    own = clipping.Clipping.__call__

    def call(self: Any, gradients: Any, meta: Any, step: int) -> Any:
        constant = [None if g is None else g.detach() for g in gradients]
        found = own(self, constant, meta)
        return [None if g is None else g * (f / g.detach()).detach() for g, f in zip(gradients, found, strict=True)]

    patch.setattr(clipping.Clipping, "__call__", call)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping.Clipping, "__call__", lambda self, gradients, meta, step: list(gradients))


def tied() -> Case:
    encoder, decoder = module(nn.Linear(3, 2, bias=False))[0], module(nn.Linear(3, 2, bias=False))[0]  # type: ignore[index]
    decoder.weight = encoder.weight

    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (meta[:, None] * (model["e"](X) @ model["d"].weight - X) ** 2).mean()

    def judge(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (model["e"](-X) @ model["d"].weight - X).square().mean()

    return problem({"e": encoder, "d": decoder}, SGD, loss, judge), META, 3


def ties_cut(patch: pytest.MonkeyPatch) -> None:
    own = sharing.shared
    patch.setattr(
        conversion, "shared", lambda tree, ids, constant, hooked: own(tree, [object() for _ in ids], constant, hooked)
    )


def frozen() -> Case:
    tree = {
        "frozen": nn.Parameter(torch.tensor([1.0, 2.0], dtype=DOUBLE), requires_grad=False),
        "free": nn.Parameter(torch.ones(2, dtype=DOUBLE)),
    }

    def loss(t: Any, meta: Tensor, batch: Any) -> Tensor:
        return (meta * (t["frozen"] * t["free"]) ** 2).sum()

    def judge(t: Any, meta: Tensor, batch: Any) -> Tensor:
        return ((t["frozen"] * t["free"]) ** 2).sum()

    return problem(tree, SGD, loss, judge), META[:2].clone(), 3


def frozen_trained(patch: pytest.MonkeyPatch) -> None:
    own = sharing.shared
    patch.setattr(
        conversion, "shared", lambda tree, ids, constant, hooked: own(tree, ids, [False] * len(constant), hooked)
    )


def hooked() -> Case:
    net = module(nn.Linear(3, 1))
    mask = torch.tensor([[0.0, 1.0, 0.5]], dtype=DOUBLE)
    net[0].weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[index]
    return problem(net), META, 3


def hooks_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parameter_hooks, "applied", lambda params, tensors, gradients: list(gradients))


def weight_norm() -> Case:
    normed = nn.utils.parametrizations.weight_norm
    torch.manual_seed(0)
    net = nn.Sequential(normed(nn.Linear(3, 4)), nn.Tanh(), normed(nn.Linear(4, 1))).double()
    return problem(net), META, 3


def no_composites(patch: pytest.MonkeyPatch) -> None:
    for table in substitution._TABLES.values():
        for operation in list(composites.SECOND_DERIVATIVE):
            patch.delitem(table, operation, raising=False)  # type: ignore[arg-type]


def data_in_loss() -> Case:
    def loss(t: Tensor, meta: Tensor, batch: Any) -> Tensor:
        return ((t * meta[:2] - t.data) ** 2).sum()

    start = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    return problem(start, SGD, loss, lambda t, meta, batch: t.square().sum()), META, 3


def data_moves_in_forward_mode(patch: pytest.MonkeyPatch) -> None:
    getter = Tensor.data.__get__  # type: ignore[attr-defined]
    for (forward, _), table in substitution._TABLES.items():
        if forward:
            patch.setitem(table, getter, lambda rules, func, args, kwargs: args[0])  # type: ignore[arg-type]


def warmup(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 3))


def zero_rate() -> Case:
    return problem(module(nn.Linear(3, 1)), ADAM, foreach=False, amsgrad=True, schedule=warmup), META, 4


def divides_by_rate(patch: pytest.MonkeyPatch) -> None:
    own = torch_step.TorchStep.__init__

    def init(self: Any, *arguments: Any) -> None:
        own(self, *arguments)
        self._divides_by_rate = False

    patch.setattr(torch_step.TorchStep, "__init__", init)


class Augmented(torch.utils.data.Dataset[Tensor]):
    """A dataset that draws."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, t: int) -> Tensor:
        return X + 0.5 * torch.randn_like(X)


def augmented() -> Case:
    def loss(model: Any, meta: Tensor, x: Tensor) -> Tensor:
        return (meta[:, None] * (model(x) - Y) ** 2).mean()

    return problem(module(nn.Linear(3, 1)), SGD, loss), META, Augmented()


def batches_without_a_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inner_loop.InnerLoop, "_fetch", lambda self, t: self.inner_batches[t])


def momentum() -> Case:
    return problem(module(nn.Linear(3, 1)), momentum=0.9), META, 3


def first_momentum_detached(patch: pytest.MonkeyPatch) -> None:
    """What torch.optim.SGD does: the first buffer is a detached copy of the gradient."""
    own = torch_step.TorchStep.__call__

    def call(self: Any, parameters: Any, gradients: Any, state: Any, step: int, settings: Any) -> Any:
        after, memory = own(self, parameters, gradients, state, step, settings)
        if step == 0:
            memory = [b._replace(memory={k: _stopped(v) for k, v in b.memory.items()}) for b in memory]
        return after, memory

    patch.setattr(torch_step.TorchStep, "__call__", call)


def _stopped(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class Saves(torch.autograd.Function):
    """A cube whose backward pass computes with a number that was saved as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.square = (3 * x.detach() ** 2).clone()
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.square


def custom_function() -> Case:
    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (meta[:, None] * (Saves.apply(model(X)) - Y) ** 2).mean()  # type: ignore[operator]

    return problem(module(nn.Linear(3, 1)), SGD, loss), META, 2


def functions_unverified(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(custom_functions, "is_verified", lambda function: True)


class Adaptive(SGD):
    """Takes a number out of PyTorch in its step."""

    def step(self, closure: Any = None) -> Any:
        norm = sum(float(p.grad.detach().square().sum()) for p in self.param_groups[0]["params"]) ** 0.5
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(1 / (1 + norm))
        return super().step(closure)


def own_optimizer() -> Case:
    return problem(module(nn.Linear(3, 1)), Adaptive), META, 3


def optimizers_unverified(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(update_rule.Optimizer, "_verify", lambda self, *arguments: None)


def queue() -> Case:
    kept: list[Tensor] = []

    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        kept.append(model(X).detach())
        return inner(model, meta, batch) + 0.3 * (model(X) * torch.stack(kept[-3:]).mean(0)).mean()

    return problem(module(nn.Linear(3, 1)), SGD, loss), META, 5


def memory_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inner_loop, "require_repeatable", lambda *arguments: None)
    patch.setattr(replay.GoingBack, "finish", lambda self: None)
    patch.setattr(unroll, "compare_values", lambda *arguments: None)


def built() -> Case:
    base = module(nn.Linear(3, 1))[0]  # type: ignore[index]

    def make(meta: Tensor) -> nn.Module:
        made = nn.Linear(3, 1).double()
        made.weight = nn.Parameter(base.weight.detach() * meta[0])
        made.bias = nn.Parameter(base.bias.detach() * meta[1])
        return made

    return problem(make), META, 3


def leaves_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(built_from_meta.Origins, "initial", lambda self, tensor: tensor.detach())


def renormalised() -> Case:
    ids = torch.tensor([0, 1, 2, 3, 1, 0])

    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (meta[:, None] * (model(ids) - Y) ** 2).mean()

    def judge(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (model(ids.flip(0)) - Y).square().mean()

    return problem(module(nn.Embedding(5, 3, max_norm=0.4), nn.Linear(3, 1)), SGD, loss, judge), META, 3


def nothing_refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(conversion, "refuse_unfit", lambda *arguments, **named: None)
    patch.setattr(argument_checks, "left_as_given", lambda **places: contextlib.nullcontext())


def reads_outside() -> Case:
    meta = META.clone()

    def loss(model: Any, given: Tensor, batch: Any) -> Tensor:
        return inner(model, meta, batch) + 0.1 * given.square().mean() * model(X).square().mean()

    return problem(module(nn.Linear(3, 1)), SGD, loss), meta, 3


def nothing_off(patch: pytest.MonkeyPatch) -> None:
    """The warning about outside reads is not repeated; the check looks by itself."""


def dropout_transposed() -> Case:
    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (meta[:, None] * (functional.dropout((model(X)).t(), 0.5).t() - Y) ** 2).mean()

    return problem(module(nn.Linear(3, 2), nn.Tanh()), SGD, loss), META, 3


def dropout_by_pytorch(patch: pytest.MonkeyPatch) -> None:
    for table in substitution._TABLES.values():
        patch.delitem(table, functional.dropout, raising=False)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Off:
    """A protection, the problem that needs it, and the parts of the check that notice its absence."""

    kind: str
    case: Callable[[], Case]
    switch: Callable[[pytest.MonkeyPatch], None]
    parts: tuple[str, ...]
    verdict: Verdict = Verdict.WRONG


LOOP, TWICE, STEP, WHOLE = "the loop", "a step twice", "one step", "the whole loop"
OFF = [
    Off("a parameter without a gradient is left alone", heads, zeros_for_unreached, (LOOP,)),
    Off("running statistics carry their derivative", with_statistics, without_derivative_of_statistics, (STEP, WHOLE)),
    Off("clipping has a derivative", clipped, clip_under_no_grad, (STEP, WHOLE)),
    Off("clipping happens", clipped, no_clipping, (LOOP,)),
    Off("tied weights stay tied", tied, ties_cut, (LOOP,)),
    Off("frozen tensors of a tree stay frozen", frozen, frozen_trained, (LOOP,)),
    Off("hooks of parameters run", hooked, hooks_ignored, (LOOP,)),
    Off("wrong second derivatives are replaced", weight_norm, no_composites, (STEP, WHOLE)),
    Off("`.data` is a constant in forward mode", data_in_loss, data_moves_in_forward_mode, (STEP, WHOLE)),
    Off("a learning rate of 0 divides nothing", zero_rate, divides_by_rate, (STEP,)),
    Off("batches are read under a stream of their own", augmented, batches_without_a_stream, (TWICE,)),
    Off("the first momentum has a derivative", momentum, first_momentum_detached, (STEP, WHOLE)),
    Off("custom functions are verified", custom_function, functions_unverified, (STEP, WHOLE)),
    Off("optimisers of one's own are verified", own_optimizer, optimizers_unverified, (STEP, WHOLE)),
    Off("losses with a memory are refused", queue, memory_unchecked, (TWICE,)),
    Off("parameters made from meta keep their derivative", built, leaves_cut, (WHOLE,)),
    Off("`max_norm` is refused", renormalised, nothing_refused, (TWICE, "your objects")),
    Off("dropout draws one mask in all modes", dropout_transposed, dropout_by_pytorch, (STEP, WHOLE)),
    Off("reads of meta from outside are reported", reads_outside, nothing_off, ("outside reads",), Verdict.UNJUDGED),
]


def checked(case: Callable[[], Case]) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bilevel.check(*case(), progress=False)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("off", OFF, ids=lambda off: off.kind)
def test_a_protection_that_is_switched_off_is_missed(off: Off, monkeypatch: pytest.MonkeyPatch) -> None:
    off.switch(monkeypatch)
    report = checked(off.case)
    found = {finding.part for finding in report.findings if finding.verdict is off.verdict}
    assert set(off.parts) <= found, str(report)


RIGHT = [
    off.case for off in OFF if off.case not in (custom_function, own_optimizer, queue, renormalised, reads_outside)
]


@pytest.mark.parametrize("case", list(dict.fromkeys(RIGHT)), ids=lambda case: case.__name__)
def test_with_all_protections_there_is_no_alarm(case: Callable[[], Case]) -> None:
    report = checked(case)
    assert report.passed, str(report)


def test_the_page_says_which_part_finds_what() -> None:
    page = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    section = page.split("## Which part finds what")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", section, flags=re.MULTILINE))
    assert {off.kind: ", ".join(off.parts) for off in OFF}.items() <= rows.items()
