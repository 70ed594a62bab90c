"""Modules that cannot be right are refused by name; those that can are right; no module is changed by an estimate."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import numerical_gradient, trained_module
from torch import Tensor, nn

import bilevel
import bilevel.experimental
from bilevel.models.module_view import ModuleView

DOUBLE = torch.float64
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
META = torch.linspace(0.5, 1.5, 3, dtype=DOUBLE)
ESTIMATORS: list[bilevel.Estimator] = [
    bilevel.Reverse(),
    bilevel.Reverse("graph"),
    bilevel.Forward(),
    bilevel.ForwardGradient(3, "coordinate", tangents="shared"),
    bilevel.ForwardGradient(3, "coordinate", tangents="difference"),
]
BATCHES = [None] * 3


def problem_with(network: nn.Module) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(inner, outer, network, bilevel.optimizer(torch.optim.SGD, lr=0.1))


def inner(model: Any, meta: Tensor, batch: None) -> Tensor:
    return (model(X * meta) - 1).square().mean()


def outer(model: Any, meta: Tensor, batch: None) -> Tensor:
    return (model(-X) + 1).square().mean()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def embedding(**settings: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4, **settings), nn.Linear(4, 1))


def with_hook(register: Callable[[nn.Module], Any]) -> nn.Module:
    made = network()
    register(made)
    return made


class Hidden(nn.Module):
    """A module that holds another one which cannot be used there."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


def changes(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in inputs)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: embedding(max_norm=0.5), r"'0' of params is an Embedding with max_norm=0.5"),
    "max_norm of a bag": (
        lambda: nn.EmbeddingBag(3, 4, max_norm=0.5),
        r"params is an EmbeddingBag with max_norm=0.5",
    ),
    "frequency": (lambda: embedding(scale_grad_by_freq=True), r"is an Embedding with scale_grad_by_freq=True"),
    "sparse": (lambda: embedding(sparse=True), r"is an Embedding with sparse=True"),
    "TorchScript": (lambda: torch.jit.script(nn.Linear(3, 1)), r"compiled by TorchScript"),
    "DataParallel inside": (lambda: Hidden(nn.DataParallel(network())), r"'inside' of params is a DataParallel inside"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), r"run one batch through the module first"),
    "meta device": (lambda: nn.Linear(3, 1, device="meta"), r"'weight' of params is on the meta device"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), r"is a SyncBatchNorm whose batch statistics"),
    "recomputed": (
        lambda: nn.Sequential(bilevel.experimental.Recomputed(nn.BatchNorm1d(3))),
        r"'0.layer' of params is a BatchNorm1d inside a Recomputed layer",
    ),
    "hook on .grad": (
        lambda: with_hook(lambda m: m[0].bias.register_post_accumulate_grad_hook(lambda p: None)),  # pyright: ignore
        r"parameter '0.bias' of params has a hook from register_post_accumulate_grad_hook",
    ),
    "backward hook": (
        lambda: with_hook(lambda m: m[2].register_full_backward_hook(changes)),  # pyright: ignore[reportIndexIssue]
        r"register_full_backward_hook on a Linear changes gradients",
    ),
    "backward pre-hook": (
        lambda: with_hook(lambda m: m.register_full_backward_pre_hook(lambda module, gradients: None)),
        r"register_full_backward_pre_hook",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward(), bilevel.ZerothOrder(1, 1e-4)], ids=repr)
def test_modules_that_cannot_be_right_are_refused(name: str, estimator: bilevel.Estimator) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        estimator(problem_with(make()), META, BATCHES)


def test_frozen_embeddings_may_be_sparse_or_scaled() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(3, 3, sparse=True, scale_grad_by_freq=True), nn.Linear(3, 1)).double()
    made[0].requires_grad_(False)
    ids = torch.tensor([0, 1, 1, 2])
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta.sum() * model(ids)).square().mean(),
        lambda model, meta, batch: model(ids).sum(),
        made,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    found = [estimator(problem, META, BATCHES).grad for estimator in ESTIMATORS]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-6, atol=1e-9)


# -- modules that must be right ----------------------------------------------------------------------------------------


def forward_hooks() -> nn.Module:
    made = network()
    made[0].register_forward_hook(lambda module, inputs, output: 1.5 * output)  # pyright: ignore
    made[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
    made.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return made


def compiled_layer() -> nn.Module:
    made = network()
    made[2] = torch.compile(made[2], backend="aot_eager")  # pyright: ignore[reportArgumentType]
    return made


def compiled_in_place() -> nn.Module:
    made = network()
    made.compile(backend="aot_eager")
    return made


def observed() -> nn.Module:
    made = network()
    made[2].register_full_backward_hook(lambda module, inputs, outputs: None)
    return made


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "forward hooks": forward_hooks,
    "torch.compile": lambda: torch.compile(network(), backend="aot_eager"),  # type: ignore[dict-item, return-value]
    "a layer in torch.compile": compiled_layer,
    "module.compile()": compiled_in_place,
    "DataParallel": lambda: nn.DataParallel(network()),
    "a backward hook that only looks": observed,
}


@pytest.mark.parametrize("name", RIGHT)
def test_modules_that_compute_something_else_than_their_layers(name: str) -> None:
    plain = forward_hooks() if name == "forward hooks" else network()

    def h(meta: Tensor) -> float:
        trained = trained_module(inner, plain, meta, BATCHES, lambda p: torch.optim.SGD(p, lr=0.1))
        return outer(trained, meta, None).item()

    expected = numerical_gradient(h, META, 1e-4)
    problem = problem_with(RIGHT[name]())
    for estimator in ESTIMATORS:
        estimate = estimator(problem, META, BATCHES)
        assert abs(estimate.value.item() - h(META)) < 1e-10
        torch.testing.assert_close(estimate.grad, expected, rtol=1e-6, atol=1e-9)


# -- nothing of the user's is changed ----------------------------------------------------------------------------------


class Recorded(nn.Module):
    """An LSTM (which lists its weights a second time), a batch normalisation, and a loss that may fail."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(3, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 1)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.train(not self.training)
        output = self.out(self.norm(self.rnn(x.unsqueeze(1))[0][:, 0]))
        if self.fails:
            raise KeyError("in the middle of a call")
        return output


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_module_is_left_as_it_was(estimator: bilevel.Estimator, fails: bool) -> None:
    made = Recorded().double()
    made.fails = fails
    before = copy.deepcopy(made.state_dict())
    identities = {name: id(p) for name, p in made.named_parameters()}
    if fails:
        with pytest.raises(KeyError):
            estimator(problem_with(made), META, BATCHES)
    else:
        estimator(problem_with(made), META, BATCHES)
    assert all(layer.training for layer in made.modules())
    assert {name: id(p) for name, p in made.named_parameters()} == identities
    assert all(p.grad is None and isinstance(p, nn.Parameter) for p in made.parameters())
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
    assert [id(w) for w in made.rnn._flat_weights] == [id(p) for p in made.rnn.parameters()]
    copy.deepcopy(made)


def test_threads_may_share_a_module() -> None:
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)).double()
    problems = [problem_with(made), problem_with(made)]
    estimators = [bilevel.Reverse(), bilevel.Forward(), bilevel.Reverse("sqrt")]
    metas = [META * k for k in (1.0, 1.3, 0.8, 0.5)]
    expected = [bilevel.Reverse()(problems[0], meta, BATCHES).grad for meta in metas]
    state = torch.get_rng_state()
    found: dict[int, list[Tensor]] = {number: [] for number in range(len(metas))}

    def work(number: int) -> None:
        for estimator in estimators:
            for problem in problems:
                found[number].append(estimator(problem, metas[number], BATCHES).grad)

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, grads in found.items():
        assert len(grads) == len(estimators) * len(problems)
        for grad in grads:
            torch.testing.assert_close(grad, expected[number], rtol=1e-9, atol=1e-12)
    assert all(isinstance(p, nn.Parameter) for p in made.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_threads_may_call_views_of_one_module() -> None:
    """Outside of estimates too, as with the models of final states."""

    class Slow(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            first = super().forward(input)
            time.sleep(0.002)
            return first + super().forward(input)

    made = Slow(1, 1, bias=False).double()
    wrong: list[float] = []

    def work(value: float) -> None:
        view = ModuleView(made, {"weight": torch.full((1, 1), value, dtype=DOUBLE)})
        for _ in range(10):
            found = view(torch.ones(1, dtype=DOUBLE)).item()
            if found != 2 * value or view.weight.item() != value:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert isinstance(made.weight, nn.Parameter)
