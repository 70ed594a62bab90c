"""Problems that are right, and in which a check could easily see a fault that is not there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from bilevel.report.findings import Verdict

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
Case = tuple[Any, Any, int]


def data(columns: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(8, columns, generator=generator).to(dtype),
        torch.randn(8, 1, generator=generator).to(dtype),
    )


X, Y = data()
WEIGHTS = torch.linspace(0.5, 1.5, 8)


def regression(
    net: nn.Module, algorithm: Any, steps: int, forward: Any = None, meta: Any = WEIGHTS, **settings: Any
) -> Case:
    """Weighted regression: `forward(model, x)` predicts."""
    predict = forward or (lambda model, x: model(x))

    def inner(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (meta[:, None] * (predict(model, X) - Y) ** 2).mean()

    def outer(model: Any, meta: Tensor, batch: Any) -> Tensor:
        return (model(-X) - Y).square().mean()

    return bilevel.GradientDescent(inner, outer, net, bilevel.optimizer(algorithm, **settings)), meta, steps


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*layers)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def target_network() -> Case:
    """BYOL: a target that follows by a moving average, under no_grad."""

    class Byol(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.head = net(nn.Linear(4, 3)), net(nn.Linear(3, 3))
            self.target = copy.deepcopy(self.online).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for old, new in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    old.mul_(0.9).add_(new, alpha=0.1)
                target = self.target(x.flip(0))
            return functional.mse_loss(self.head(self.online(x)), target, reduction="none").mean(1)

    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta * model(X)).mean(),
        lambda model, meta, batch: model.online(X).square().mean(),
        Byol(),
        bilevel.optimizer(SGD, lr=0.1),
    )
    return problem, WEIGHTS, 4


class Rounded(torch.autograd.Function):
    """Rounds, with the identity as its derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return (4 * x).round() / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        return gradient


class Spike(torch.autograd.Function):
    """A sign with a smooth derivative, as in spiking networks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


def straight_through(x: Tensor) -> Tensor:
    return x + ((4 * x).round() / 4 - x).detach()


def lower_precision_in_a_closure() -> Case:
    x, y = data()
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta[:, None] * (model(x) - y) ** 2).mean(),
        lambda model, meta, batch: (model(-x) - y).square().mean(),
        net(nn.Linear(4, 1)),
        bilevel.optimizer(SGD, lr=0.1),
    )
    return problem, WEIGHTS, 3


def half_precision(dtype: torch.dtype) -> Case:
    x, y = data(dtype=dtype)
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta[:, None] * (model(x) - y) ** 2).mean(),
        lambda model, meta, batch: (model(-x) - y).square().mean(),
        net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype),
        bilevel.optimizer(SGD, lr=0.1),
    )
    return problem, WEIGHTS.to(dtype), 5


def autocast() -> Case:
    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    return regression(net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), SGD, 4, forward, lr=0.1)


def at_the_bound_of_a_clamp() -> Case:
    model = net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta.clamp(0, 1)[:, None] * (model(X.relu()) - Y) ** 2).mean(),
        lambda model, meta, batch: (model(-X) - Y).square().mean(),
        model,
        bilevel.optimizer(ADAM, lr=0.01),
    )
    return problem, torch.ones(8), 4


def settings_from_meta() -> Case:
    meta = {"w": WEIGHTS, "lr": torch.tensor(-2.0), "decay": torch.tensor(0.1)}
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta["w"][:, None] * (model(X) - Y) ** 2).mean(),
        lambda model, meta, batch: (model(-X) - Y).square().mean(),
        net(nn.Linear(4, 1)),
        bilevel.optimizer(
            ADAMW,
            lr=lambda meta: meta["lr"].exp(),
            weight_decay=lambda meta: meta["decay"],
            schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        ),
    )
    return problem, meta, 4


def rates_of_layers() -> Case:
    return regression(net(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), SGD, 3, lr=[0.1, 0.2, 0.05, 0.3])


def meta_is_a_module() -> Case:
    weigh = net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Sigmoid())
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta(X) * (model(X) - Y) ** 2).mean(),
        lambda model, meta, batch: (model(-X) - Y).square().mean(),
        net(nn.Linear(4, 1)),
        bilevel.optimizer(ADAM, lr=0.05),
    )
    return problem, weigh, 4


def initialisation_is_learned() -> Case:
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (model(X) - Y).square().mean(),
        lambda model, meta, batch: (model(-X) - Y).square().mean(),
        lambda meta: meta,
        bilevel.optimizer(SGD, lr=0.1),
    )
    return problem, model, 3


def given_by_its_steps() -> Case:
    def step(state: Any, meta: Tensor, batch: Any) -> Any:
        gradient = torch.func.grad(lambda theta: (meta * (X @ theta - Y[:, 0]) ** 2).mean())(state["theta"])
        velocity = 0.9 * state["velocity"] + gradient
        return {"theta": state["theta"] - 0.1 * velocity, "velocity": velocity}

    problem = bilevel.Problem(
        lambda meta: {"theta": torch.zeros(4), "velocity": torch.zeros(4)},
        step,
        lambda state, meta, batch: (-X @ state["theta"] - Y[:, 0]).square().mean(),
    )
    return problem, WEIGHTS, 4


def recurrent() -> Case:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 5), "out": nn.Linear(5, 1)})
    sequence = torch.randn(3, 8, 4)

    def predict(model: Any, x: Tensor) -> Tensor:
        return model["out"](model["rnn"](x)[0][-1])

    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta[:, None] * (predict(model, sequence) - Y) ** 2).mean(),
        lambda model, meta, batch: (predict(model, -sequence) - Y).square().mean(),
        model,
        bilevel.optimizer(ADAM, lr=0.01),
    )
    return problem, WEIGHTS, 3


def transformer() -> Case:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
    sequence = torch.randn(8, 3, 4)
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta[:, None, None] * (model(sequence) - sequence.flip(1)) ** 2).mean(),
        lambda model, meta, batch: (model(-sequence) - sequence).square().mean(),
        model,
        bilevel.optimizer(ADAMW, lr=1e-2),
    )
    return problem, WEIGHTS, 3


def convolutional() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    x, y = torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8,))
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta * functional.cross_entropy(model(x), y, reduction="none")).mean(),
        lambda model, meta, batch: functional.cross_entropy(model(-x), y),
        model,
        bilevel.optimizer(SGD, lr=0.1, momentum=0.9),
    )
    return problem, WEIGHTS, 4


CASES: dict[str, Callable[[], Case]] = {
    "a target network": target_network,
    "a detached target": lambda: regression(
        net(nn.Linear(4, 1)), ADAM, 4, lambda model, x: model(x) - 0.5 * model(x.flip(0)).detach(), lr=0.1
    ),
    "straight-through by detach": lambda: regression(
        net(nn.Linear(4, 1)), SGD, 4, lambda model, x: straight_through(model(x)), lr=0.1
    ),
    "straight-through function": lambda: regression(
        net(nn.Linear(4, 1)),
        SGD,
        4,
        lambda model, x: Rounded.apply(model(x)),
        lr=0.1,  # type: ignore[operator]
    ),
    "spiking neurons": lambda: regression(
        net(nn.Linear(4, 5), nn.Linear(5, 1)),
        SGD,
        4,
        lambda model, x: model[1](Spike.apply(model[0](x))),  # type: ignore[operator]
        lr=0.1,
    ),
    "Gumbel softmax": lambda: regression(
        net(nn.Linear(4, 1)),
        SGD,
        3,
        lambda model, x: functional.gumbel_softmax(model(x) * torch.ones(3), hard=True)[:, :1] * model(x),
        lr=0.1,
    ),
    "ReLUs": lambda: regression(net(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 1)), ADAM, 5, lr=0.01),
    "dropout": lambda: regression(
        net(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)), SGD, 5, lr=0.1, momentum=0.9
    ),
    "noise in the loss": lambda: regression(
        net(nn.Linear(4, 1)), SGD, 4, lambda model, x: model(x + 0.1 * torch.randn_like(x)) + torch.rand(8, 1), lr=0.1
    ),
    "clipping": lambda: regression(net(nn.Linear(4, 1)), SGD, 4, lr=0.1, clip_norm=0.3, clip_value=0.5),
    "a choice by argmax": lambda: regression(
        net(nn.Linear(4, 1)), SGD, 4, lambda model, x: model(x).max(0, keepdim=True).values * model(x), lr=0.1
    ),
    "float32 in a closure": lower_precision_in_a_closure,
    "bfloat16": lambda: half_precision(torch.bfloat16),
    "float16": lambda: half_precision(torch.float16),
    "autocast": autocast,
    "the bound of a clamp": at_the_bound_of_a_clamp,
    "learning rate and decay from meta": settings_from_meta,
    "a rate for each parameter": rates_of_layers,
    "meta is a module": meta_is_a_module,
    "a learned initialisation": initialisation_is_learned,
    "given by its steps": given_by_its_steps,
    "LSTM": recurrent,
    "transformer layer": transformer,
    "convolutions and BatchNorm": convolutional,
}


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", CASES)
def test_there_is_no_alarm(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = bilevel.check(*CASES[name](), progress=False)
    assert report.passed, str(report)
    compared = {finding.part for finding in report.findings if finding.verdict is Verdict.RIGHT}
    assert {"a step twice", "one step", "the whole loop"} <= compared
