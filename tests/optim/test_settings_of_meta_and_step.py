"""Settings as constant trees, as functions of meta and step, and pairs of numbers, against plain PyTorch loops."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel

T = 5
GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) for shape in ((6, 3), (6, 1)))


def net() -> nn.Module:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    module[0].bias.requires_grad_(False)
    return module


def loss(model: Any, meta: Any, batch: Any) -> Tensor:
    shift = 0.0 if meta is None else 0.0 * meta.sum()
    return (model(X) - Y + shift).square().mean()


def solved(optimizer: Any, meta: Any, params: Any = None) -> Any:
    problem = bilevel.GradientDescent(loss, loss, net() if params is None else params, optimizer)
    state = bilevel.solve(problem, meta, T)
    estimate = bilevel.Reverse()(problem, meta, T)
    torch.testing.assert_close(state.params.state_dict(), estimate.state.params.state_dict())
    return state.params.state_dict()


def trained(
    algorithm: Any, groups: Callable[[nn.Module, int], list[dict[str, Any]]], **settings: Any
) -> dict[str, Any]:
    """A plain loop in which the settings of the groups are set before each step."""
    module = net()
    optimizer = algorithm(groups(module, 0), **settings)
    for step in range(T):
        for group, now in zip(optimizer.param_groups, groups(module, step), strict=True):
            group.update({name: value for name, value in now.items() if name != "params"})
        optimizer.zero_grad()
        loss(module, None, None).backward()
        optimizer.step()
    return module.state_dict()


@pytest.mark.parametrize("algorithm", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_decay_on_biases_and_norms_in_one_line(algorithm: Any, frozen: bool) -> None:
    """Frozen parameters may be named or left out."""
    module = net()
    named = {n: 0.3 * (p.ndim > 1) for n, p in module.named_parameters() if frozen or p.requires_grad}
    found = solved(bilevel.optimizer(algorithm, lr=0.1, weight_decay=named), torch.tensor(0.0), module)

    def groups(module: nn.Module, step: int) -> list[dict[str, Any]]:
        by_shape: dict[bool, list[Any]] = {True: [], False: []}
        for parameter in module.parameters():
            by_shape[parameter.ndim > 1].append(parameter)
        return [{"params": each, "weight_decay": 0.3 * decays} for decays, each in by_shape.items()]

    torch.testing.assert_close(found, trained(algorithm, groups, lr=0.1))


def test_one_value_may_stand_for_a_branch_of_a_tree() -> None:
    tree = {"body": [torch.ones(2), torch.ones(1)], "head": torch.ones(2)}

    def inner(params: Any, meta: Any, batch: Any) -> Tensor:
        return sum(p.square().sum() for p in (*params["body"], params["head"]))  # type: ignore[return-value]

    optimizer = bilevel.optimizer(
        torch.optim.SGD, lr={"body": [0.1, 0.2], "head": 0.3}, weight_decay={"body": 1.0, "head": 0}
    )
    problem = bilevel.GradientDescent(inner, inner, tree, optimizer)
    found = bilevel.solve(problem, torch.tensor(0.0), 1).params
    torch.testing.assert_close(found["body"][0], torch.full((2,), 1 - 0.1 * 3))
    torch.testing.assert_close(found["body"][1], torch.full((1,), 1 - 0.2 * 3))
    torch.testing.assert_close(found["head"], torch.full((2,), 1 - 0.3 * 2))


@pytest.mark.parametrize("wrong", [{"body": 0.1}, {"body": 0.1, "tail": 0.2}, {"body": [0.1], "head": 0.1}], ids=repr)
def test_a_tree_that_does_not_match_is_refused(wrong: Any) -> None:
    tree = {"body": [torch.ones(2), torch.ones(1)], "head": torch.ones(2)}
    problem = bilevel.GradientDescent(
        lambda p, m, b: p["head"].sum(),
        lambda p, m, b: p["head"].sum(),
        tree,
        bilevel.optimizer(torch.optim.SGD, lr=wrong),
    )
    with pytest.raises(ValueError, match="or a tree that matches them"):
        bilevel.solve(problem, torch.tensor(0.0), 1)


# -- functions of meta and step ----------------------------------------------------------------------------------------


def differences(h: Callable[[Tensor], float], point: Tensor, step: float = 1e-4) -> Tensor:
    found = torch.zeros_like(point)
    for i in range(point.numel()):
        e = torch.zeros_like(point)
        e.view(-1)[i] = step
        found.view(-1)[i] = (8 * (h(point + e) - h(point - e)) - h(point + 2 * e) + h(point - 2 * e)) / (12 * step)
    return found


RATES = torch.linspace(0.02, 0.1, 2 * T, dtype=torch.float64).reshape(T, 2)


def test_a_rate_for_every_step_and_layer() -> None:
    def rate(meta: Tensor, step: int) -> dict[str, Tensor]:
        return {name: meta[step, int(name.startswith("3"))] for name, _ in net().named_parameters()}

    optimizer = bilevel.optimizer(torch.optim.SGD, lr=rate, momentum=0.5)

    def groups(rates: Tensor, module: Any, step: int) -> list[dict[str, Any]]:
        layers = [[*module[0].parameters(), *module[1].parameters()], [*module[3].parameters()]]
        return [{"params": each, "lr": rates[step, k].item()} for k, each in enumerate(layers)]

    def h(rates: Tensor) -> float:
        module = net()
        module.load_state_dict(trained(torch.optim.SGD, functools.partial(groups, rates), lr=0.1, momentum=0.5))
        return loss(module, None, None).item()

    torch.testing.assert_close(
        solved(optimizer, RATES), trained(torch.optim.SGD, functools.partial(groups, RATES), lr=0.1, momentum=0.5)
    )
    problem = bilevel.GradientDescent(loss, loss, net(), optimizer)
    wanted = differences(h, RATES)
    for estimator in (bilevel.Reverse("sqrt"), bilevel.Reverse("graph"), bilevel.Forward()):
        torch.testing.assert_close(estimator(problem, RATES, T).grad, wanted, rtol=1e-6, atol=1e-9)
    assert (wanted.abs() > 1e-6).all()


def test_two_required_parameters_mean_meta_and_step_and_others_meta_alone() -> None:
    functions: list[Any] = [
        lambda meta: meta,
        lambda meta, scale=1.0: scale * meta,
        functools.partial(lambda scale, meta: scale * meta, 1.0),
        lambda meta, *rest: meta if not rest else meta * float("nan"),
        lambda meta, step: meta if step < 100 else meta * float("nan"),
        functools.partial(lambda scale, meta, step: meta * scale, 1.0),
    ]
    point = torch.tensor(0.1, dtype=torch.float64)
    states = [solved(bilevel.optimizer(torch.optim.SGD, lr=f), point) for f in functions]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])
    with pytest.raises(ValueError, match="needs 3 arguments"):
        solved(bilevel.optimizer(torch.optim.SGD, lr=lambda meta, step, more: meta), point)


def test_clipping_by_step() -> None:
    bounds = torch.linspace(0.01, 0.2, T, dtype=torch.float64)
    found = solved(bilevel.optimizer(torch.optim.SGD, lr=0.1, clip_norm=lambda meta, step: meta[step]), bounds)
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for bound in bounds:
        optimizer.zero_grad()
        loss(module, None, None).backward()
        nn.utils.clip_grad_norm_(module.parameters(), bound.item())
        optimizer.step()
    torch.testing.assert_close(found, copy.deepcopy(module.state_dict()))


# -- numbers inside of the update --------------------------------------------------------------------------------------


def one_group(module: nn.Module, step: int) -> list[dict[str, Any]]:
    return [{"params": [*module.parameters()]}]


PAIRS: list[tuple[Any, dict[str, Any], str, list[float]]] = [
    (torch.optim.Adam, {"lr": 0.05}, "betas", [0.7, 0.9]),
    (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}, "betas", [0.7, 0.9]),
    (torch.optim.Adamax, {"lr": 0.05}, "betas", [0.7, 0.9]),
    (torch.optim.RAdam, {"lr": 0.05}, "betas", [0.7, 0.6]),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8}, "dampening", [0.3]),
    (torch.optim.SGD, {"lr": 0.05, "dampening": 0.2}, "momentum", [0.7]),
    (torch.optim.Adam, {"lr": 0.05}, "eps", [0.1]),
    (torch.optim.ASGD, {"lr": 0.05}, "lambd", [0.2]),
]


@pytest.mark.parametrize(("algorithm", "settings", "name", "at"), PAIRS)
def test_numbers_inside_of_the_update_have_their_derivative(
    algorithm: Any, settings: dict[str, Any], name: str, at: list[float]
) -> None:
    point = torch.tensor(at, dtype=torch.float64)

    def value(meta: Tensor, step: int) -> Any:
        return (meta[0], meta[1]) if len(at) == 2 else meta[0]

    functions: dict[str, Any] = {name: value}
    optimizer = bilevel.optimizer(algorithm, **settings, **functions)

    def plain(numbers: Tensor) -> dict[str, Any]:
        constant = tuple(numbers.tolist()) if len(at) == 2 else numbers.item()
        return trained(
            algorithm, lambda module, step: [{"params": [*module.parameters()]}], **settings, **{name: constant}
        )

    def h(numbers: Tensor) -> float:
        module = net()
        module.load_state_dict(plain(numbers))
        return loss(module, None, None).item()

    torch.testing.assert_close(solved(optimizer, point), plain(point))
    problem, wanted = bilevel.GradientDescent(loss, loss, net(), optimizer), differences(h, point)
    estimators = [bilevel.Reverse(), bilevel.Reverse("graph"), bilevel.Forward()]
    for estimator in [*estimators, bilevel.ForwardGradient(len(at), "coordinate", tangents="shared")]:
        torch.testing.assert_close(estimator(problem, point, T).grad, wanted, rtol=1e-5, atol=1e-9)


def test_a_partial_is_the_class_with_its_settings() -> None:
    partial = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    assert repr(bilevel.optimizer(partial)) == repr(bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.5))
    problem = bilevel.GradientDescent(loss, loss, net(), partial)
    wanted = trained(torch.optim.SGD, lambda module, step: [{"params": [*module.parameters()]}], lr=0.1, momentum=0.5)
    torch.testing.assert_close(bilevel.solve(problem, torch.tensor(0.0), T).params.state_dict(), wanted)
