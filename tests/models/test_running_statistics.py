"""Tensors that modules update while they compute: the inner loop has the plain loop's values and derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_training import numerical_gradient
from torch import Tensor, nn

import bilevel

DOUBLE = torch.float64
META = torch.linspace(0.5, 1.5, 6, dtype=DOUBLE)

EXACT: list[bilevel.Estimator] = [
    bilevel.Reverse(),
    bilevel.Reverse("sqrt"),
    bilevel.Reverse("log"),
    bilevel.Reverse("graph"),
    bilevel.Reverse(2, offload="disk"),
    bilevel.TruncatedReverse(4),
    bilevel.Forward(),
    bilevel.Forward(chunk_size=1),
    bilevel.ForwardGradient(6, "coordinate"),
    bilevel.ForwardGradient(6, "coordinate", tangents="shared", chunk_size=4),
    bilevel.ForwardGradient(6, "coordinate", tangents="difference"),
    bilevel.ZerothOrder(6, 1e-5, distribution="coordinate"),
]
"""Estimators that are exact here, up to differences."""


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Case:
    """A network, trained in training mode and judged in evaluation mode."""

    def __init__(self, network: nn.Module, *shape: int, calls: int = 1, judged_in_training: bool = False) -> None:
        self.network = network.double()
        self.x, self.y = normal(6, *shape), normal(6, 1, seed=2)
        self.calls, self.judged_in_training = calls, judged_in_training

    def inner(self, model: Any, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        model.train()
        inputs = [self.x, -0.5 * self.x, 2 * self.x][: self.calls]
        return torch.stack([(meta[:, None] * (model(x) - self.y) ** 2).mean() for x in inputs]).sum()

    def outer(self, model: Any, meta: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        model.train(self.judged_in_training)
        return (model(-self.x) - self.y).square().mean()

    def plainly_trained(self, meta: Tensor, batches: Sequence[Any], optimizer: Any, settings: Any) -> nn.Module:
        trained = copy.deepcopy(self.network)
        bound = optimizer(trained.parameters(), **settings)
        for batch in batches:
            for layer in trained.modules():  # an average that is not detached keeps the graph of the step before
                layer._buffers.update({k: b if b is None else b.detach() for k, b in layer._buffers.items()})
            bound.zero_grad()
            self.inner(trained, meta, batch).backward()
            bound.step()
        return trained

    def problem(self, optimizer: Any, settings: Any) -> bilevel.GradientDescent:
        return bilevel.GradientDescent(self.inner, self.outer, self.network, bilevel.optimizer(optimizer, **settings))


def fully_connected(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Linear(5, 1))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3),
        nn.Tanh(), nn.Flatten(), nn.Linear(12, 1),
    )  # fmt: skip


def with_instance_norm() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv1d(1, 3, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))


class FunctionalNorm(nn.Module):
    """A batch normalisation of the user's own, on PyTorch's low-level function."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("mean"), self.get_buffer("var")
        return torch.batch_norm(x, None, None, mean, var, self.training, 0.2, 1e-5, False)


class Averaging(nn.Module):
    """Subtracts an average of its inputs, which it updates in one of several ways."""

    average: Tensor
    calls: Tensor

    def __init__(self, update: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.update(self, (x * self.layer.weight[0]).mean(0))
            self.calls += 1
        return self.layer(x - self.average) / (1 + self.calls)


def assigns(module: Averaging, value: Tensor) -> None:
    module.average = 0.5 * module.average + 0.5 * value


def multiplies_and_adds(module: Averaging, value: Tensor) -> None:
    module.average.mul_(0.5).add_(value, alpha=0.5)


def operators(module: Averaging, value: Tensor) -> None:
    module.average *= 0.5
    module.average += 0.5 * value


def interpolates(module: Averaging, value: Tensor) -> None:
    average = module.average
    average.lerp_(value, 0.5)


def copies(module: Averaging, value: Tensor) -> None:
    module.average.copy_(0.5 * module.average + 0.5 * value)


def writes_entries(module: Averaging, value: Tensor) -> None:
    new = 0.5 * module.average + 0.5 * value
    module.average[0] = new[0]
    module.average[1:] = new[1:]


def sets_data(module: Averaging, value: Tensor) -> None:
    module.average.data.mul_(0.5).add_(0.3)
    module.average.data = module.average.data + 0.1


def writes_into_a_view(module: Averaging, value: Tensor) -> None:
    module.average[1:].mul_(0.5).add_(0.3)


def writes_out(module: Averaging, value: Tensor) -> None:
    torch.mul(module.average.detach(), 0.5, out=module.average)


class Teacher(nn.Module):
    """A frozen copy that is moved at every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(3, 1)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for p in self.teacher.parameters():
                    p.mul_(0.9).add_(0.1)
        return self.student(x) + self.teacher(x)


CASES: dict[str, Callable[[], Case]] = {
    "batch norm": lambda: Case(fully_connected(nn.BatchNorm1d(5)), 3),
    "cumulative average": lambda: Case(fully_connected(nn.BatchNorm1d(5, momentum=None)), 3),
    "two calls a step": lambda: Case(fully_connected(nn.BatchNorm1d(5)), 3, calls=2),
    "cumulative average, three calls": lambda: Case(fully_connected(nn.BatchNorm1d(5, momentum=None)), 3, calls=3),
    "without weight": lambda: Case(fully_connected(nn.BatchNorm1d(5, affine=False)), 3),
    "judged in training mode": lambda: Case(fully_connected(nn.BatchNorm1d(5)), 3, judged_in_training=True),
    "convolutions": lambda: Case(convolutional(), 1, 4, 4),
    "instance norm": lambda: Case(with_instance_norm(), 1, 6),
    "low-level function": lambda: Case(fully_connected(FunctionalNorm()), 3),
    "frozen teacher": lambda: Case(Teacher(), 3),
    **{
        f"average: {update.__name__}": lambda update=update: Case(Averaging(update), 3)
        for update in (
            assigns, multiplies_and_adds, operators, interpolates, copies, writes_entries,
            writes_into_a_view, sets_data, writes_out
        )
    },
}  # fmt: skip
BATCHES = [None] * 4
# A bias before a batch normalisation has gradient 0, whose rounding Adam divides by eps.
TRAININGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.5}),
    "adam": (torch.optim.Adam, {"lr": 0.05, "eps": 1e-3}),
}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", TRAININGS)
def test_values_and_hypergradients_are_those_of_the_plain_loop(name: str, training: str) -> None:
    if training == "adam" and name not in ("batch norm", "convolutions", "average: operators"):
        pytest.skip("one optimiser is enough for the others")
    case, (optimizer, settings) = CASES[name](), TRAININGS[training]
    before = copy.deepcopy(case.network.state_dict())

    def h(meta: Tensor) -> float:
        trained = case.plainly_trained(meta, BATCHES, optimizer, settings)
        with torch.no_grad():
            return case.outer(trained, meta, None).item()

    expected = numerical_gradient(h, META, 1e-4)
    final = case.plainly_trained(META, BATCHES, optimizer, settings).state_dict()
    problem = case.problem(optimizer, settings)
    for estimator in EXACT:
        estimate = estimator(problem, META, BATCHES)
        assert abs(estimate.value.item() - h(META)) < 1e-10, estimator
        rough = isinstance(estimator, bilevel.ZerothOrder) or "difference" in repr(estimator)
        torch.testing.assert_close(
            estimate.grad, expected, rtol=1e-5 if rough else 1e-7, atol=1e-7 if rough else 1e-9, msg=repr(estimator)
        )
        found = copy.deepcopy(case.network)
        found.load_state_dict(estimate.state.params.state_dict())
        for key, value in found.state_dict().items():
            torch.testing.assert_close(value, final[key], rtol=1e-10, atol=1e-10)
    for key, value in case.network.state_dict().items():
        assert torch.equal(value, before[key]), f"the user's {key} was changed"


def test_statistics_carry_derivative() -> None:
    """Without it the hypergradient is another one, so the test above can tell."""
    case = CASES["batch norm"]()
    problem = case.problem(torch.optim.SGD, {"lr": 0.2})
    exact = bilevel.Reverse()(problem, META, BATCHES).grad
    step = problem.step

    def cut(state: Any, meta: Any, batch: Any) -> Any:
        after: Any = step(state, meta, batch)
        return after._replace(buffers={name: b.detach() for name, b in after.buffers.items()})

    problem.step = cut
    assert (bilevel.Reverse()(problem, META, BATCHES).grad - exact).norm() > 1e-3 * exact.norm()


def test_a_tree_of_modules_names_buffers_by_place() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3).double()
    tree = {"a": nn.Sequential(nn.Linear(3, 3).double(), norm), "b": nn.Sequential(norm, nn.Linear(3, 1).double())}
    x = normal(6, 3)

    def inner(models: Any, meta: Tensor, batch: None) -> Tensor:
        return (meta[:, None] * models["b"](models["a"](x)) ** 2).mean()

    def outer(models: Any, meta: Tensor, batch: None) -> Tensor:
        for model in models.values():
            model.eval()
        return models["b"](models["a"](x)).square().mean()

    problem = bilevel.GradientDescent(inner, outer, tree, bilevel.optimizer(torch.optim.SGD, lr=0.1))

    def h(meta: Tensor) -> float:
        models = copy.deepcopy(tree)
        parameters = {id(p): p for model in models.values() for p in model.parameters()}
        bound = torch.optim.SGD(parameters.values(), lr=0.1)
        for _ in BATCHES:
            bound.zero_grad()
            inner(models, meta, None).backward()
            bound.step()
        with torch.no_grad():
            return outer(models, meta, None).item()

    estimate = bilevel.Reverse()(problem, META, BATCHES)
    assert list(estimate.state.buffers) == ["a.1.running_mean", "a.1.running_var", "a.1.num_batches_tracked"]
    assert estimate.state.buffers["a.1.num_batches_tracked"] == 2 * len(BATCHES)
    torch.testing.assert_close(estimate.grad, numerical_gradient(h, META, 1e-4), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "estimator",
    [bilevel.Implicit(bilevel.ConjugateGradient(damping=1.0)), bilevel.HessianFree(0.1)],
    ids=lambda e: type(e).__name__,
)
def test_implicit_methods_take_statistics_as_constants(estimator: bilevel.Estimator) -> None:
    case = CASES["batch norm"]()
    estimate = estimator(case.problem(torch.optim.SGD, {"lr": 0.2}), META, BATCHES)
    final = case.plainly_trained(META, BATCHES, torch.optim.SGD, {"lr": 0.2})
    assert abs(estimate.value.item() - case.outer(final, META, None).item()) < 1e-10


def test_a_stream_goes_on_with_the_statistics() -> None:
    case = CASES["cumulative average"]()
    problem = case.problem(torch.optim.SGD, {"lr": 0.2})
    first = bilevel.Reverse()(problem, META, BATCHES)
    second = bilevel.Reverse()(problem, META, BATCHES, carried=first.carried)
    whole = bilevel.Reverse()(problem, META, BATCHES * 2)
    assert first.carried is not None
    assert abs(second.value - whole.value) < 1e-12
    for name, value in whole.state.buffers.items():
        torch.testing.assert_close(second.state.buffers[name], value, rtol=1e-12, atol=1e-12)


def test_compiling_refuses_statistics_by_name() -> None:
    case = CASES["batch norm"]()
    problem = bilevel.GradientDescent(
        case.inner, case.outer, case.network, bilevel.optimizer(torch.optim.SGD, lr=0.1), compile="aot_eager"
    )
    with pytest.raises(bilevel.errors.CompileError, match=r"updates '1.running_mean'.*take compile=False"):
        bilevel.Reverse()(problem, META, BATCHES)


def sometimes(module: Averaging, value: Tensor) -> None:
    if module.calls == 2:
        module.average = value


def test_a_buffer_that_is_updated_at_other_parameters_alone_is_refused() -> None:
    case = Case(Averaging(sometimes), 3)
    before = case.network.get_buffer("average").clone()
    with pytest.raises(ValueError, match=r"Averaging changed its tensor 'average'.*not at the initial parameters"):
        bilevel.Reverse()(case.problem(torch.optim.SGD, {"lr": 0.1}), META, BATCHES)
    assert torch.equal(case.network.get_buffer("average"), before)


@pytest.mark.parametrize("calls", [1, 2])
def test_statistics_in_half_precision_inputs(calls: int) -> None:
    """Statistics are kept in the layer's dtype, as PyTorch's kernels keep them."""
    layer = nn.BatchNorm1d(3)
    x = normal(6, 3).to(torch.bfloat16)
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: meta * sum(model(x).float().square().mean() for _ in range(calls)),
        lambda model, meta, batch: model.eval()(x.float()).square().mean(),
        layer,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    estimate = bilevel.Reverse()(problem, torch.ones(()), [None])
    for _ in range(calls):
        layer(x)
    for name, value in estimate.state.buffers.items():
        torch.testing.assert_close(value, layer.get_buffer(name), rtol=1e-5, atol=1e-6)


def test_a_resumed_stream_has_its_statistics_again(tmp_path: Path) -> None:
    case = CASES["cumulative average"]()

    def fit(**settings: Any) -> Tensor:
        return bilevel.fit(
            case.problem(torch.optim.SGD, {"lr": 0.1}),
            META,
            BATCHES,
            phases=[bilevel.Phase(bilevel.Reverse(), 4)],
            optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
            stream=True,
            progress=False,
            **settings,
        ).meta

    def stop(step: Any) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    whole = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(out=tmp_path, callbacks=[stop])
    assert torch.equal(fit(out=bilevel.RunFolder(tmp_path, resume=True)), whole)
