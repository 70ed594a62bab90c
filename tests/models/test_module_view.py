"""Modules as trees of tensors: whatever is reached through a `ModuleView` is computed with the view's tensors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel

import bilevel
from bilevel import trees
from bilevel.models.conversion import as_plain_tree, as_tree, written_back
from bilevel.models.module_view import ModuleView, modules_in


class Network(nn.Module):
    """One of everything that a module can hold."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.named = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        self.chain = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.again = self.layers[0]  # the same module under two names
        self.last = nn.Linear(3, 3, bias=False)
        self.last.weight = cast(nn.Linear, self.layers[1]).weight  # tied
        self.list_of_layers = [self.first, self.last]
        self.by_name = {"first": self.first}
        self.offset = nn.Parameter(torch.randn(3))
        self.tensors = nn.ParameterList([nn.Parameter(torch.randn(3))])
        self.register_buffer("scale", torch.tensor(2.0))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.config = {"width": 3}

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        x = self.again(self.chain(self.encode(x)))
        for layer in [*self.layers, *self.named.values(), self.last, self.normed]:
            x = torch.tanh(layer(x))
        return self.scale * x + self.offset + self.tensors[0] + shift

    def encode(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def entrance(self) -> nn.Module:
        return self.first

    def weights_one_by_one(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield cast(nn.Linear, layer).weight

    @property
    def double_offset(self) -> Tensor:
        return 2 * self.offset

    @property
    def exit(self) -> nn.Module:
        return self.last

    @functools.cached_property
    def triple_offset(self) -> Tensor:
        return 3 * self.offset


X = torch.tensor([[0.3, -0.7], [1.1, 0.4]], dtype=torch.float64)
H = torch.tensor([[0.3, -0.7, 0.1]], dtype=torch.float64)

USES: dict[str, Callable[[Any], Any]] = {
    "call": lambda net: net(X),
    "call with keywords": lambda net: net(x=X, shift=1.0),
    "submodule": lambda net: net.first(X),
    "submodule's parameter": lambda net: net.first.weight,
    "parameter": lambda net: net.offset,
    "tied weight": lambda net: net.last(H),
    "tied weight as a parameter": lambda net: net.last.weight,
    "module under a second name": lambda net: net.again(H),
    "method": lambda net: net.encode(X),
    "method with keywords": lambda net: net.encode(x=X),
    "method that returns a module": lambda net: net.entrance()(X),
    "method that returns self": lambda net: net.eval()(X),
    "generator": lambda net: sum(w.square().sum() for w in net.weights_one_by_one()),
    "property": lambda net: net.double_offset,
    "property that is a module": lambda net: net.exit(H),
    "cached property": lambda net: net.triple_offset,
    "parameters": lambda net: sum(p.square().sum() for p in net.parameters()),
    "next of parameters": lambda net: next(net.parameters()),
    "named_parameters": lambda net: sum(p.square().sum() for name, p in net.named_parameters() if "bias" in name),
    "parameters of a submodule": lambda net: sum(p.square().sum() for p in net.named.parameters()),
    "get_submodule": lambda net: net.get_submodule("named.b")(H),
    "children": lambda net: next(net.children())(X),
    "modules": lambda net: next(m for m in net.modules() if hasattr(m, "in_features"))(X),
    "named_modules": lambda net: dict(net.named_modules())["named.a"](H),
    "index": lambda net: net.layers[1](H),
    "slice": lambda net: net.chain[:1](H),
    "key": lambda net: net.named["b"](H),
    "iteration": lambda net: functools.reduce(lambda h, layer: layer(h), net.layers, H),
    "iteration over values": lambda net: functools.reduce(lambda h, layer: layer(h), net.named.values(), H),
    "iteration over items": lambda net: functools.reduce(lambda h, item: item[1](h), net.named.items(), H),
    "plain list of modules": lambda net: net.list_of_layers[1](net.list_of_layers[0](X)),
    "plain dict of modules": lambda net: net.by_name["first"](X),
    "parameter list": lambda net: net.tensors[0],
    "parametrised weight": lambda net: net.normed.weight,
    "parametrised layer": lambda net: net.normed(H),
    "buffer": lambda net: net.scale * net.offset,
}


def network_and_other_tensors() -> tuple[Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    network = Network().double()
    return network, {name: torch.randn_like(p) for name, p in network.named_parameters()}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_view_is_the_module_with_other_tensors(use: Callable[[Any], Tensor]) -> None:
    network, tensors = network_and_other_tensors()
    filled = copy.deepcopy(network)
    assert written_back(ModuleView(filled, tensors)) is filled
    found = use(ModuleView(network, tensors))
    assert torch.equal(found, use(filled))
    assert not torch.equal(found, use(network)), "the module's own parameters give something else"


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradient_through_a_view_is_that_of_the_module(use: Callable[[Any], Tensor]) -> None:
    network, _ = network_and_other_tensors()
    named = dict(network.named_parameters())
    expected = torch.autograd.grad(
        use(network).square().sum(), list(named.values()), materialize_grads=True, allow_unused=True
    )
    values = {name: p.detach() for name, p in named.items()}

    def through_view(tensors: dict[str, Tensor]) -> Tensor:
        return use(ModuleView(network, tensors)).square().sum()

    found = torch.func.grad(through_view)(values)
    torch.testing.assert_close(found, dict(zip(named, expected, strict=True)), rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in network.parameters())


def test_view_leaves_the_module_as_it_was() -> None:
    network, tensors = network_and_other_tensors()
    objects, values = dict(network.named_parameters()), copy.deepcopy(network.state_dict())
    view = ModuleView(network, tensors)
    for use in USES.values():
        use(view)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        view(torch.ones(5, 7, dtype=torch.float64))
    for name, parameter in network.named_parameters():
        assert parameter is objects[name]
    torch.testing.assert_close(network.state_dict(), values, rtol=0, atol=0)
    assert "triple_offset" not in network.__dict__


def test_other_attributes_are_the_modules_own() -> None:
    network, tensors = network_and_other_tensors()
    view = ModuleView(network, tensors)
    assert view.config == {"width": 3}
    assert view.training
    assert len(view.layers) == 2
    assert "a" in view.named
    assert bool(view.first)
    assert not ModuleView(nn.ModuleList())
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        view.missing  # noqa: B018
    with pytest.raises(TypeError, match="not subscriptable"):
        view.first[0]


def test_view_cannot_be_changed() -> None:
    view = ModuleView(nn.Linear(2, 1))
    with pytest.raises(AttributeError, match=r"set 'training' on the module before"):
        view.training = False


def test_names_that_the_module_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"Linear has no parameter 'wieght'; it has: weight, bias"):
        ModuleView(nn.Linear(2, 1), {"wieght": torch.ones(1, 2)})


def test_frozen_parameters_are_constants() -> None:
    network, _ = network_and_other_tensors()
    network.first.requires_grad_(False)
    view = as_tree(network)
    assert not any(name.startswith("first") for name in view.named_tensors)
    assert view.first.weight is network.first.weight
    assert torch.equal(view(X), network(X))


def test_view_as_a_tree() -> None:
    network, tensors = network_and_other_tensors()
    view = ModuleView(network, tensors)
    doubled = trees.map_leaves(lambda t: 2 * t, {"net": view, "rate": torch.ones(())})
    assert isinstance(doubled["net"], ModuleView)
    expected = functional_call(network, {name: 2 * t for name, t in tensors.items()}, (X,))
    assert torch.equal(doubled["net"](X), expected)
    assert trees.named_leaves({"net": ModuleView(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)})}, "meta")
    assert [name for name, _ in trees.named_leaves({"net": nn.ReLU()}, "meta")] == ["meta['net']"]
    assert as_plain_tree({"net": view})["net"].keys() == tensors.keys()
    assert modules_in({"a": [view, torch.ones(2)], "b": view.first}) == [network, network.first]


def test_tied_weights_count_once() -> None:
    model = tiny_gpt2()
    view = as_tree(model)
    assert "transformer.wte.weight" in view.named_tensors
    assert "lm_head.weight" not in view.named_tensors
    assert view.lm_head.weight is view.transformer.wte.weight
    assert trees.size(view) == sum(p.numel() for p in model.parameters())


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "n_positions": 6, "n_embd": 4, "n_layer": 1, "n_head": 2}
    config = GPT2Config(bos_token_id=1, eos_token_id=1, **sizes)  # pyright: ignore[reportArgumentType]
    return GPT2LMHeadModel(config).double().eval()


IDS = torch.tensor([[1, 5, 2, 2], [3, 0, 6, 4]])

USES_OF_GPT2: dict[str, Callable[[Any], Tensor]] = {
    "call": lambda model: model(input_ids=IDS, labels=IDS).loss,
    "body and head": lambda model: model.lm_head(model.transformer(input_ids=IDS)[0]),
    "block": lambda model: model.transformer.h[0].mlp(model.transformer.wte(IDS)),
    "base_model": lambda model: model.base_model(input_ids=IDS).last_hidden_state,
    "input embeddings": lambda model: model(inputs_embeds=model.get_input_embeddings()(IDS)).logits,
    "output embeddings": lambda model: model.get_output_embeddings().weight,
    "parameters": lambda model: sum(p.square().sum() for p in model.parameters()),  # type: ignore[return-value]
}


@pytest.mark.parametrize("use", USES_OF_GPT2.values(), ids=USES_OF_GPT2)
def test_gradient_through_a_view_of_gpt2(use: Callable[[Any], Tensor]) -> None:
    model = tiny_gpt2()
    named = dict(model.named_parameters())
    loss = use(model).square().sum()
    expected = torch.autograd.grad(loss, list(named.values()), materialize_grads=True, allow_unused=True)
    values = {name: p.detach() for name, p in named.items()}
    found = torch.func.grad(lambda tensors: use(ModuleView(model, tensors)).square().sum())(values)
    # its own loss is computed in float32
    torch.testing.assert_close(found, dict(zip(named, expected, strict=True)), rtol=1e-6, atol=1e-7)
    view = as_tree(model)
    assert view.config is model.config
    assert view.device == torch.device("cpu")


# -- modules in a problem --------------------------------------------------------------------------------------------


def dropout_problem(
    inner: Callable[[Any], Any], outer: Callable[[Any], Any]
) -> tuple[nn.Module, bilevel.GradientDescent]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta * inner(model)(X).squeeze(1)).square().sum(),
        lambda model, meta, batch: outer(model)(X).sum(),
        network,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    return network, problem


@pytest.mark.parametrize("switched", ["inner", "outer"])
def test_loss_may_switch_its_model_to_evaluation(switched: str) -> None:
    """Without reaching into the other loss, nor into steps that are computed again."""
    meta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    grads: dict[str, list[Tensor]] = {}
    for mode in ("train", "eval"):
        switches = {"inner": lambda model: model, "outer": lambda model: model}
        switches[switched] = lambda model, mode=mode: getattr(model, mode)()
        network, problem = dropout_problem(**switches)
        estimators = (bilevel.Forward(), bilevel.Reverse(), bilevel.Reverse("graph"))
        estimates = [estimator(problem, meta, bilevel.no_batches(3)) for estimator in estimators]
        assert all(layer.training for layer in network.modules())
        grads[mode] = [estimate.grad for estimate in estimates]
        torch.testing.assert_close(grads[mode][1:], grads[mode][:1] * 2, rtol=1e-12, atol=0)
        if switched == "inner":  # the outer loss still has dropout
            outer = {seed: bilevel.Forward()(problem, meta, bilevel.no_batches(3), seed=seed).value for seed in (0, 1)}
            assert outer[0] != outer[1]
    assert not torch.allclose(grads["train"][0], grads["eval"][0])


def test_spectral_norm_is_refused_in_training_mode() -> None:
    network = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 1).double())
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta * model(X)).square().sum(),
        lambda model, meta, batch: model(X).sum(),
        network,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    meta = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"_SpectralNorm .*iterated under torch.no_grad.*put that layer in eval mode"):
        bilevel.Reverse()(problem, meta, bilevel.no_batches(2))
    network.eval()
    reverse = bilevel.Reverse()(problem, meta, bilevel.no_batches(2)).grad
    torch.testing.assert_close(reverse, bilevel.Forward()(problem, meta, bilevel.no_batches(2)).grad)


class Dropped(nn.Module):
    """Both of what behaves otherwise in eval mode: dropout and running statistics, if wanted."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3) if normalised else nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)))


@pytest.mark.parametrize("normalised", [False, True])
def test_evaluating_a_final_state_leaves_the_users_module_in_training_mode(normalised: bool) -> None:
    """As with a trained copy in plain PyTorch; otherwise the next inner loop would train in eval mode."""
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    net = Dropped(normalised)
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta.sigmoid() * (model(x).squeeze(1) - 1).square()).mean(),
        lambda model, meta, batch: model(x).square().mean(),
        net,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    meta = torch.zeros(8)
    first = bilevel.Reverse()(problem, meta, 3)
    solved = bilevel.solve(problem, meta, 3)
    for model in (first.state.params, solved.params):
        assert model.training
        assert model.eval() is not net
        assert not model.training
        assert not model.drop.training
        assert torch.equal(model(x), model(x))  # nothing is dropped
        model.drop.train()
        assert model.drop.training
        assert not model.training
        assert not torch.equal(model(x), model(x))
        assert all(layer.training for layer in net.modules())
    second = bilevel.Reverse()(problem, meta, 3)
    assert torch.equal(second.grad, first.grad)
    assert torch.equal(bilevel.solve(problem, meta, 3).params.out.weight, solved.params.out.weight)


def test_a_callback_that_evaluates_a_meta_network_leaves_it_in_training_mode() -> None:
    torch.manual_seed(0)
    weigher = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    x, y = torch.randn(6, 1), torch.ones(6)
    problem = bilevel.GradientDescent(
        lambda w, net, batch: (net(x).sigmoid().squeeze(1) * (x.squeeze(1) * w - y).square()).mean(),
        lambda w, net, batch: (x.squeeze(1) * w - 1).square().mean(),
        torch.zeros(()),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )

    def fit(*callbacks: Any) -> list[float]:
        result = bilevel.fit(
            problem,
            copy.deepcopy(weigher),
            2,
            estimator=bilevel.Reverse(),
            steps=3,
            callbacks=callbacks,
            progress=False,
        )
        return [row["outer_loss"] for row in result.history]

    assert fit(lambda step: step.meta.eval()) == fit()
