"""What a parameter is: one tensor, wherever it stands, unless the user said that it is a constant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import numerical_gradient
from torch import Tensor, nn

import bilevel
from bilevel import trees
from bilevel.models.conversion import Memory, as_params, as_tree
from bilevel.models.sharing import presented

DOUBLE = torch.float64
ESTIMATORS: list[bilevel.Estimator] = [
    bilevel.Reverse(),
    bilevel.Reverse("sqrt"),
    bilevel.Forward(),
    bilevel.ForwardGradient(3, "coordinate", tangents="shared"),
    bilevel.ForwardGradient(3, "coordinate", tangents="difference"),
    bilevel.ZerothOrder(3, 1e-5, distribution="coordinate"),
]
META = torch.tensor([0.7, 1.2, -0.4], dtype=DOUBLE)
X, Y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 3, bias=False).double()


def inner(output: Tensor, meta: Tensor) -> Tensor:
    return ((meta * (output - Y)) ** 2).mean()


def assert_right(
    problem: bilevel.GradientDescent, h: Callable[[Tensor], float], steps: int = 3, meta: Any = META
) -> None:
    expected = numerical_gradient(h, META, 1e-4)
    for estimator in ESTIMATORS:
        estimate = estimator(problem, meta, [None] * steps)
        assert abs(estimate.value.item() - h(META)) < 1e-10, estimator
        grads = list(estimate.grad.values()) if isinstance(estimate.grad, dict) else [estimate.grad]
        for grad in grads:
            torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8, msg=repr(estimator))


def trained(tree: Any, loss: Callable[[Any, Tensor], Tensor], parameters: list[Tensor], meta: Tensor) -> None:
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(tree, meta).backward()
        optimizer.step()


def run(tree: Any, use: Callable[[Any], Tensor], parameters: Callable[[Any], list[Tensor]]) -> None:
    """Compare training of the tree's tensors with a plain loop over `parameters(copy of the tree)`."""

    def h(meta: Tensor) -> float:
        mine = copy.deepcopy(tree)
        trained(mine, lambda t, m: inner(use(t), m), parameters(mine), meta)
        with torch.no_grad():
            return (use(mine) + Y).square().mean().item()

    problem = bilevel.GradientDescent(
        lambda t, meta, batch: inner(use(t), meta),
        lambda t, meta, batch: (use(t) + Y).square().mean(),
        tree,
        bilevel.optimizer(torch.optim.Adam, lr=0.1),
    )
    assert_right(problem, h)


def test_weight_shared_by_two_modules_of_a_dict() -> None:
    first, second = linear(0), linear(1)
    second.weight = first.weight
    run(
        {"a": first, "b": second},
        lambda t: torch.tanh(t["a"](X)) @ t["b"].weight.T + t["b"](X),
        lambda t: [t["a"].weight],
    )


def test_weight_of_a_module_that_also_stands_alone() -> None:
    layer = linear(0)
    run([layer, layer.weight], lambda t: torch.tanh(t[0](X)) @ t[1], lambda t: [t[1]])


def test_one_tensor_in_two_places() -> None:
    # Plain tensors are trained, so the copies of the plain loop record.
    weight = linear(0).weight.detach()
    run(
        {"a": weight, "b": [weight]},
        lambda t: torch.tanh(X @ t["a"]) @ t["b"][0],
        lambda t: [t["a"].requires_grad_()],
    )


def test_frozen_parameters_and_buffers_of_a_dict_are_constants() -> None:
    network: Any = nn.Sequential(linear(0), nn.BatchNorm1d(3).double(), linear(1)).eval()
    network[1].running_mean += 0.3
    network[0].weight.requires_grad_(False)
    tree = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    run(
        tree,
        lambda t: torch.func.functional_call(network, t, (X,)),
        lambda t: [p for p in t.values() if p.requires_grad],
    )


def test_plain_tensors_beside_a_module_are_trained() -> None:
    run(
        {"net": linear(0), "scale": torch.ones(3, dtype=DOUBLE)},
        lambda t: t["net"](X) * t["scale"],
        lambda t: [*t["net"].parameters(), t["scale"].requires_grad_()],
    )


def test_constants_are_no_leaves() -> None:
    memory = Memory()
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    tree, _ = as_params({"frozen": frozen, "free": free, "buffer": nn.Buffer(torch.ones(2))}, memory)
    assert [name for name, _ in trees.named_leaves(tree, "params")] == ["params['free']"]
    assert presented(tree)["frozen"] is frozen
    tree, _ = as_params({"frozen": frozen, "plain": torch.ones(2)}, memory)
    assert [name for name, _ in trees.named_leaves(tree, "params")] == ["params['plain']"]
    tree, _ = as_params({"a": torch.ones(2), "b": torch.zeros(1)}, memory)
    assert len(trees.leaves(tree)) == 2


def test_meta_parameter_in_two_places_has_one_derivative() -> None:
    start = torch.zeros(3, dtype=DOUBLE)

    def use(theta: Tensor, meta: Any) -> Tensor:
        return (((X @ theta - Y[:, 0]) ** 2).mean() * meta["a"] + meta["b"].sin() * theta**2).sum()

    def outer(theta: Tensor, meta: Any) -> Tensor:
        return ((X @ theta + Y[:, 1]) ** 2).mean() + (meta["a"] * meta["b"]).sum()

    def h(meta: Tensor) -> float:
        theta = start.clone().requires_grad_()
        trained(theta, lambda t, m: use(t, {"a": m, "b": m}), [theta], meta)
        return outer(theta, {"a": meta, "b": meta}).item()

    problem = bilevel.GradientDescent(
        lambda t, m, b: use(t, m), lambda t, m, b: outer(t, m), start, bilevel.optimizer(torch.optim.Adam, lr=0.1)
    )
    assert_right(problem, h, meta={"a": META, "b": META})


def test_fit_keeps_a_meta_parameter_in_two_places_one() -> None:
    meta = {"a": META, "b": META}
    problem = bilevel.GradientDescent(
        lambda t, m, b: (m["a"] * t**2 + m["b"] * t).sum(),
        lambda t, m, b: (t - 1).square().sum() + m["a"].square().sum(),
        torch.ones(3, dtype=DOUBLE),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    assert len(trees.leaves(as_tree(meta))) == 1
    result = bilevel.fit(
        problem,
        meta,
        [None] * 2,
        phases=[bilevel.Phase(bilevel.Reverse(), 2)],
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
        progress=False,
    )
    assert torch.equal(result.meta["a"], result.meta["b"])
    assert not torch.equal(result.meta["a"], META)


def test_inner_loop_starts_from_a_parameter_that_is_also_in_meta() -> None:
    network = linear(0)

    def inner_loss(model: Any, meta: Any, batch: None) -> Tensor:
        return (model(X) - Y).square().mean() + 0.1 * (model.weight - meta.weight).square().sum()

    def h(vector: Tensor) -> float:
        start = copy.deepcopy(network)
        nn.utils.vector_to_parameters(vector, start.parameters())
        model = copy.deepcopy(start)
        trained(model, lambda t, m: inner_loss(t, start, None), list(model.parameters()), META)
        return (model(-X) - Y).square().mean().item()

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda model, meta, batch: (model(-X) - Y).square().mean(),
        network,
        bilevel.optimizer(torch.optim.Adam, lr=0.1),
    )
    vector = nn.utils.parameters_to_vector(network.parameters()).detach()
    expected = numerical_gradient(h, vector, 1e-5)
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        found = estimator(problem, network, [None] * 3).grad["weight"].reshape(-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


# -- hooks -------------------------------------------------------------------------------------------------------------


def clears_a_row(gradient: Tensor) -> None:
    gradient[0] = 0


HOOKS: dict[str, list[Callable[[Tensor], Any]]] = {
    "mask": [lambda g: g * torch.tensor([[0.0], [1.0], [1.0]], dtype=DOUBLE)],
    "two in order": [lambda g: g.clamp(max=0.0), lambda g: 3 * g + 0.01],
    "not linear": [torch.tanh, lambda g: g / (1 + g.norm())],
    "in place": [lambda g: g.mul_(0.5)],
    "in place, returning nothing": [clears_a_row],
    "looks only": [lambda g: None],
    "constant": [torch.ones_like],
}


def hooked(hooks: list[Callable[[Tensor], Any]]) -> nn.Linear:
    layer = linear(0)
    for hook in hooks:
        layer.weight.register_hook(hook)
    return layer


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("alone", [False, True], ids=["module", "tensor"])
def test_hooks_on_parameters_are_applied(name: str, alone: bool) -> None:
    def h(meta: Tensor) -> float:
        layer = hooked(HOOKS[name])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            inner(layer(X), meta).backward()
            optimizer.step()
        return (layer(-X) - Y).square().mean().item()

    layer = hooked(HOOKS[name])
    problem = bilevel.GradientDescent(
        lambda m, meta, batch: inner(X @ m.T if alone else m(X), meta),
        lambda m, meta, batch: ((-X @ m.T if alone else m(-X)) - Y).square().mean(),
        layer.weight if alone else layer,
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    if name == "constant":  # then no step depends on meta
        with pytest.raises(bilevel.errors.NoDependenceError):
            bilevel.Reverse()(problem, META, [None] * 3)
        return
    assert_right(problem, h)


def test_hook_sees_the_current_parameter() -> None:
    def h(meta: Tensor) -> float:
        layer = linear(0)
        layer.weight.register_hook(lambda g: g + 0.3 * layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            inner(layer(X), meta).backward()
            optimizer.step()
        return (layer(-X) - Y).square().mean().item()

    layer = linear(0)
    layer.weight.register_hook(lambda g: g + 0.3 * layer.weight)
    problem = bilevel.GradientDescent(
        lambda m, meta, batch: inner(m(X), meta),
        lambda m, meta, batch: (m(-X) - Y).square().mean(),
        layer,
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    assert_right(problem, h)


@torch.no_grad()
def without_derivative(gradient: Tensor) -> Tensor:
    return 2 * gradient


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "no_grad": (without_derivative, r"hook on parameter 'weight' works under torch.no_grad\(\)"),
    "data": (lambda g: g.data.mul_(2), r"hook on parameter 'weight' works through .data"),
    "shape": (lambda g: g.sum(), r"returned \(\), torch.float64 for a gradient of \(3, 3\)"),
    "no tensor": (lambda g: 1.0, r"returned float for a gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Forward()], ids=lambda e: type(e).__name__)
def test_hooks_without_a_derivative_are_refused(name: str, estimator: bilevel.Estimator) -> None:
    hook, message = REFUSED[name]
    problem = bilevel.GradientDescent(
        lambda m, meta, batch: inner(m(X), meta),
        lambda m, meta, batch: m(X).square().mean(),
        hooked([hook]),
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    with pytest.raises(ValueError, match=message):
        estimator(problem, META, [None] * 2)


@pytest.mark.parametrize("estimator", [bilevel.Implicit(), bilevel.HessianFree(0.1)], ids=lambda e: type(e).__name__)
def test_implicit_methods_refuse_hooks(estimator: bilevel.Estimator) -> None:
    problem = bilevel.GradientDescent(
        lambda m, meta, batch: inner(m(X), meta),
        lambda m, meta, batch: m(X).square().mean(),
        hooked([lambda g: 2 * g]),
        bilevel.optimizer(torch.optim.SGD, lr=0.5),
    )
    with pytest.raises(ValueError, match=r"a parameter has hooks.*take Reverse or ForwardGradient"):
        estimator(problem, META, [None] * 2)
