"""`solve` against training loops by hand, and its derivative against estimates and unrolled loops."""

from __future__ import annotations

import copy
import functools
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_training import TEN_OPTIMIZERS, class_name, train
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel
from bilevel import trees
from bilevel.errors import MissingDerivativeError, NoDependenceError, NonFiniteError

T = 6
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64), torch.randint(2, (5,), generator=GENERATOR))
    for _ in range(T)
]
OUTER = BATCHES[0]
PHI = torch.linspace(-1, 1, 5, dtype=torch.float64)


class Net(nn.Module):
    """With tied weights, running statistics, a frozen layer, and a head that only some steps reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.also_first, self.frozen, self.head = self.first, nn.Linear(3, 3), nn.Linear(3, 2)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.also_first(torch.tanh(self.first(x)) + self.frozen(x)))
        return self.head(hidden) if x[0, 0] > 0 else self.last(hidden)


def inner_loss(model: Any, phi: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return (phi.sigmoid() * functional.cross_entropy(model(x), y, reduction="none")).mean()


def outer_loss(model: Any, phi: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y)


def problem(optimizer: Any = None, net: Any = None, loss: Any = inner_loss) -> bilevel.GradientDescent:
    if optimizer is None:
        optimizer = bilevel.optimizer(torch.optim.Adam, lr=0.05)
    return bilevel.GradientDescent(loss, outer_loss, Net() if net is None else net, optimizer)


def by_hand(algorithm: Any, net: nn.Module, schedule: Any = None, loss: Any = inner_loss, **settings: Any) -> nn.Module:
    net = copy.deepcopy(net)
    optimizer = algorithm(net.parameters(), **settings)
    train(lambda batch: loss(net, PHI, batch), BATCHES, optimizer, None if schedule is None else schedule(optimizer))
    return net


def require_same(state: Any, net: nn.Module) -> None:
    found, wanted = state.params.state_dict(), net.state_dict()
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


# -- plain -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", TEN_OPTIMIZERS, ids=class_name)
@pytest.mark.parametrize("schedule", [None, functools.partial(CosineAnnealingLR, T_max=T)], ids=["", "cosine"])
def test_the_state_is_that_of_the_loop_by_hand_and_of_an_estimate(algorithm: Any, schedule: Any) -> None:
    settings = TEN_OPTIMIZERS[algorithm]
    subject = problem(bilevel.optimizer(algorithm, schedule=schedule, **settings))
    state = bilevel.solve(subject, PHI, BATCHES)
    if algorithm is not torch.optim.ASGD:  # which keeps rates in float32
        require_same(state, by_hand(algorithm, Net(), schedule, **settings))
    estimate = bilevel.Reverse("graph")(subject, PHI, BATCHES, OUTER)
    for name, tensor in estimate.state.params.state_dict().items():
        torch.testing.assert_close(state.params.state_dict()[name], tensor, rtol=1e-6, atol=1e-9)
    assert state.steps == T
    assert not any(t.requires_grad for t in trees.leaves(state) if isinstance(t, Tensor))


@pytest.mark.parametrize("algorithm", TEN_OPTIMIZERS, ids=class_name)
def test_the_optimizers_memory_goes_on_as_that_of_an_estimate(algorithm: Any) -> None:
    """A next step from the state is the step that an estimate with one more batch takes."""
    subject = problem(bilevel.optimizer(algorithm, **TEN_OPTIMIZERS[algorithm]))
    run = unrolled(subject, BATCHES[:-1])
    from bilevel.unrolling.plain_descent import plain_final_state

    ours, ordinary = (
        subject.step(state, PHI, BATCHES[-1]).params for state in (plain_final_state(run), run.descend(run.start()))
    )
    for found, wanted in zip(trees.leaves(ours), trees.leaves(ordinary), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def unrolled(subject: Any, batches: Any, meta: Any = PHI) -> Any:
    from bilevel.unrolling.unroll import unroll

    return unroll(subject, meta, batches, None, 0)


COSINE = functools.partial(CosineAnnealingLR, T_max=T)
META = {
    "rate": torch.tensor(0.1, dtype=torch.float64),
    "decay": torch.tensor([0.1, 0.3], dtype=torch.float64),
    "entries": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
}


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": lambda meta: meta["rate"], "weight_decay": lambda meta: meta["decay"].mean()},
        {
            "lr": lambda meta: [meta["rate"], 2 * meta["rate"]],
            "schedule": functools.partial(CosineAnnealingLR, T_max=T),
        },
        {"lr": 0.1, "weight_decay": lambda meta: list(meta["decay"]), "clip_norm": lambda meta: 3 * meta["rate"]},
        {"lr": lambda meta: [meta["entries"][:1], meta["rate"]]},
        {"lr": 0.1, "clip_value": 0.05},
    ],
    ids=["one rate", "rate for each", "decay for each", "rate for each entry", "clipped"],
)
@pytest.mark.parametrize("algorithm", [torch.optim.SGD, torch.optim.AdamW], ids=class_name)
def test_settings_that_depend_on_meta(algorithm: Any, settings: dict[str, Any]) -> None:
    start = {"a": torch.ones(1).double(), "b": torch.linspace(0, 1, 2).double()}

    def loss(params: Any, meta: Any, batch: Any) -> Tensor:
        return ((batch[0][:, :2] * params["b"]).sum(1) - params["a"]).square().mean()

    subject = bilevel.GradientDescent(loss, loss, start, bilevel.optimizer(algorithm, **settings))
    found = bilevel.solve(subject, META, BATCHES).params
    wanted = unrolled(subject, BATCHES, META)
    wanted = wanted.descend(wanted.start()).params
    for name in start:
        torch.testing.assert_close(found[name], wanted[name])
        assert not torch.equal(found[name], start[name])


class OwnSGD(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:  # noqa: ARG002
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                        p.sub_(group["lr"] * self.state[p]["sum"])


def test_an_optimizer_of_ones_own() -> None:
    state = bilevel.solve(problem(bilevel.optimizer(OwnSGD, lr=0.05)), PHI, BATCHES)
    require_same(state, by_hand(OwnSGD, Net(), lr=0.05))


def test_hooks_on_parameters_change_the_gradient() -> None:
    net = Net()
    net.last.weight.register_hook(lambda grad: 2 * grad)
    state = bilevel.solve(problem(bilevel.optimizer(torch.optim.SGD, lr=0.1), net), PHI, BATCHES)
    plain = Net()
    plain.last.weight.register_hook(lambda grad: 2 * grad)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    train(lambda batch: inner_loss(plain, PHI, batch), BATCHES, optimizer)
    require_same(state, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_see_the_trained_parameters(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(lambda x: torch.tanh(self.first(x)), x.requires_grad_(), use_reentrant=reentrant)
            return self.last(self.norm(hidden))

    def loss(model: Any, phi: Tensor, batch: Any) -> Tensor:
        return inner_loss(model, phi, (batch[0].clone(), batch[1]))

    settings: dict[str, Any] = {"lr": 0.1}
    subject = problem(bilevel.optimizer(torch.optim.SGD, **settings), Checkpointed(), loss)
    if reentrant:
        with pytest.raises(MissingDerivativeError, match="use_reentrant=False"):
            bilevel.solve(subject, PHI, BATCHES)
        return
    state = bilevel.solve(subject, PHI, BATCHES)
    found, plain = state.params.state_dict(), by_hand(torch.optim.SGD, Checkpointed(), loss=loss, **settings)
    for name, wanted in plain.named_parameters():
        torch.testing.assert_close(found[name], wanted.detach())


def test_dropout_is_that_of_the_estimate_with_the_same_seed() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    states = [bilevel.solve(problem(net=net), PHI, BATCHES, seed).params.state_dict() for seed in (0, 0, 1)]
    estimate = bilevel.Reverse()(problem(net=net), PHI, BATCHES, OUTER, 0)
    torch.testing.assert_close(states[0], estimate.state.params.state_dict())
    assert torch.equal(states[0]["0.weight"], states[1]["0.weight"])
    assert not torch.allclose(states[0]["0.weight"], states[2]["0.weight"])


def test_nothing_of_the_users_is_changed() -> None:
    net, phi = Net(), nn.Parameter(PHI.clone())
    before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    bilevel.solve(problem(net=net), phi, BATCHES)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert phi.grad is None
    assert all(p.grad is None for p in net.parameters())


def test_other_kinds_of_problems() -> None:
    shrink = bilevel.Problem(lambda meta: torch.ones(2), lambda s, meta, b: s * meta, lambda s, meta, b: s.sum())
    torch.testing.assert_close(bilevel.solve(shrink, torch.tensor(0.5), 3), torch.full((2,), 0.125))
    box = bilevel.BlackBox(lambda meta: meta.exp(), lambda s, meta, b: s.sum())
    torch.testing.assert_close(bilevel.solve(box, torch.zeros(2)), torch.ones(2))


# -- differentiable ----------------------------------------------------------------------------------------------------

BACKWARD: list[bilevel.Estimator] = [
    bilevel.Reverse(),
    bilevel.Reverse("sqrt"),
    bilevel.Reverse("log", offload="disk"),
    bilevel.Reverse(2, offload="cpu"),
    bilevel.Reverse("graph"),
    bilevel.TruncatedReverse(2),
    bilevel.TruncatedReverse(T),
    bilevel.Implicit(bilevel.ConjugateGradient(iterations=50)),
    bilevel.Implicit(bilevel.Neumann(iterations=3, step_size=0.1), batches=2),
    bilevel.HessianFree(),
    bilevel.HessianFree(preconditioner="optimizer"),
]
going_back = pytest.mark.parametrize("estimator", BACKWARD, ids=str)


def ridge(model: Any, phi: Tensor, batch: Any) -> Tensor:
    return inner_loss(model, phi, batch) + 0.05 * sum(p.square().sum() for p in model.parameters())


def smooth(init: Callable[[], nn.Module] = lambda: nn.Linear(3, 2).double()) -> bilevel.GradientDescent:
    torch.manual_seed(3)
    return problem(bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.5), init(), ridge)


@going_back
def test_the_gradient_of_ones_own_loss_is_that_of_an_estimate(estimator: bilevel.Estimator) -> None:
    subject, phi = smooth(), nn.Parameter(PHI.clone())
    state = bilevel.solve(subject, phi, BATCHES, estimator=estimator)
    loss = outer_loss(state.params, phi, OUTER)
    estimate = estimator(subject, PHI, BATCHES, OUTER)
    torch.testing.assert_close(loss.detach(), estimate.value)
    loss.backward()
    torch.testing.assert_close(phi.grad, estimate.grad)


@going_back
def test_the_graph_may_be_kept_for_another_backward(estimator: bilevel.Estimator) -> None:
    phi = nn.Parameter(PHI.clone())
    state = bilevel.solve(smooth(), phi, BATCHES, estimator=estimator)
    first = torch.autograd.grad(state.params.weight.sum(), phi, retain_graph=True)
    other = torch.autograd.grad(state.params.bias[0], phi, retain_graph=True)
    again = torch.autograd.grad(state.params.weight.sum(), phi)
    torch.testing.assert_close(first, again, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(first[0], other[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(state.params.weight.sum(), phi)


def test_a_module_that_computes_the_weights_and_running_statistics() -> None:
    class Weigher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.layer = nn.Linear(3, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).squeeze(1)

    def loss(model: Any, weigher: Any, batch: Any) -> Tensor:
        x, y = batch
        return (weigher(x).sigmoid() * functional.cross_entropy(model(x), y, reduction="none")).mean()

    def final(model: Any) -> Tensor:
        return outer_loss(model, PHI, OUTER) + model.norm.running_var.sum()

    weigher, subject = Weigher(), problem(loss=loss)
    state = bilevel.solve(subject, weigher, BATCHES, estimator=bilevel.Reverse("sqrt"))
    final(state.params).backward()
    judged = bilevel.GradientDescent(loss, lambda m, w, b: final(m), Net(), subject.optimizer)
    estimate = bilevel.Reverse()(judged, Weigher(), BATCHES, OUTER)
    for name, parameter in weigher.named_parameters():
        torch.testing.assert_close(parameter.grad, estimate.grad[name])
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6


def test_a_training_loop_on_the_state_goes_where_an_unrolled_loop_goes() -> None:
    """As with `higher`: several terms of one's own on the trained parameters, and a network that computes meta."""
    start, x = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.linspace(-1, 1, 4).double()

    def inner(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        return ((theta - phi) ** 4).sum() + theta.square().sum()

    subject = bilevel.GradientDescent(
        inner, lambda *_: torch.zeros(()), start, bilevel.optimizer(torch.optim.SGD, lr=0.05)
    )
    ours, plain = (nn.Linear(4, 2).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (ours, plain)]
    for _ in range(3):
        for net, optimizer in zip((ours, plain), optimizers, strict=True):
            phi, theta = net(x), start.clone().requires_grad_()
            if net is ours:
                theta = bilevel.solve(subject, phi, 5, estimator=bilevel.Reverse("sqrt")).params
            else:
                for _ in range(5):
                    theta = theta - 0.05 * torch.autograd.grad(inner(theta, phi, None), theta, create_graph=True)[0]
            optimizer.zero_grad()
            (theta.prod() + (theta[0] - phi[1]) ** 2).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight)


def test_without_gradients_there_is_no_graph_and_nothing_is_kept() -> None:
    with torch.no_grad():
        state = bilevel.solve(smooth(), nn.Parameter(PHI.clone()), BATCHES, estimator=bilevel.Reverse())
    assert not state.params.weight.requires_grad
    assert not bilevel.solve(smooth(), PHI, BATCHES, estimator=bilevel.Reverse()).params.weight.requires_grad


def temporary_files() -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(
        "bilevel-" in os.readlink(link) or "(deleted)" in os.readlink(link) for link in links if os.path.islink(link)
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
@pytest.mark.parametrize("used", [False, True])
def test_temporary_files_live_as_long_as_the_graph(used: bool) -> None:
    gc.collect()
    before, phi = temporary_files(), nn.Parameter(PHI.clone())
    state = bilevel.solve(smooth(), phi, BATCHES, estimator=bilevel.Reverse(offload="disk"))
    assert temporary_files() == before + 1
    if used:
        state.params.weight.sum().backward()
    else:
        del state
        gc.collect()
    assert temporary_files() == before


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_state_that_was_changed_in_place_is_not_gone_back_from() -> None:
    phi = nn.Parameter(PHI.clone())
    state = bilevel.solve(smooth(), phi, BATCHES, estimator=bilevel.Reverse())
    with torch.no_grad():
        state.params.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        state.params.bias.sum().backward()


def test_second_derivatives_are_refused() -> None:
    phi = nn.Parameter(PHI.clone())
    state = bilevel.solve(smooth(), phi, BATCHES, estimator=bilevel.Reverse())
    with pytest.raises(MissingDerivativeError, match="create_graph=True"):
        torch.autograd.grad(state.params.weight.sum(), phi, create_graph=True)


@pytest.mark.parametrize("estimator", [bilevel.ForwardGradient(2), bilevel.Forward(), bilevel.ZerothOrder(1)], ids=str)
def test_estimators_without_a_way_back_are_refused(estimator: bilevel.Estimator) -> None:
    for phi in (PHI, nn.Parameter(PHI.clone())):
        with pytest.raises(TypeError, match=r"has no reverse pass.*value\.backward"):
            bilevel.solve(smooth(), phi, BATCHES, estimator=estimator)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"write estimator=bilevel.Reverse\(\)"):
        bilevel.solve(smooth(), PHI, BATCHES, estimator="reverse")  # pyright: ignore[reportArgumentType]
    box = bilevel.BlackBox(lambda meta: meta.exp(), lambda s, meta, b: s.sum())
    with pytest.raises(TypeError, match="a BlackBox has no derivatives"):
        bilevel.solve(box, PHI, estimator=bilevel.Reverse())
    with pytest.raises(TypeError, match="inner_batches"):
        bilevel.solve(smooth(), PHI, iter(BATCHES))


@pytest.mark.parametrize("estimator", [None, bilevel.Reverse()], ids=str)
def test_a_diverging_loop_is_an_error(estimator: Any) -> None:
    subject = problem(bilevel.optimizer(torch.optim.SGD, lr=1e200), nn.Linear(3, 2).double(), ridge)
    with pytest.raises(NonFiniteError, match="the final inner state is not finite: inner step"):
        bilevel.solve(subject, nn.Parameter(PHI.clone()), BATCHES, estimator=estimator)


def test_a_state_without_meta_is_an_error_going_back() -> None:
    def loss(model: Any, phi: Tensor, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    subject = problem(net=nn.Linear(3, 2).double(), loss=loss)
    state = bilevel.solve(subject, nn.Parameter(PHI.clone()), BATCHES, estimator=bilevel.Reverse())
    with pytest.raises(NoDependenceError, match="neither its initial state nor any of its"):
        state.params.weight.sum().backward()


@pytest.mark.parametrize("what", ["phi", "theta"])
def test_a_loss_that_writes_into_its_arguments_is_refused(what: str) -> None:
    def loss(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            (theta if what == "theta" else phi).mul_(0.5)
        return (theta - phi).square().sum()

    subject = bilevel.GradientDescent(loss, loss, PHI.clone(), bilevel.optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="in place"):
        bilevel.solve(subject, PHI.clone(), 2)


def test_a_loss_without_the_parameters_is_refused() -> None:
    subject = bilevel.GradientDescent(
        lambda theta, phi, batch: phi.sum(), outer_loss, PHI.clone(), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    with pytest.raises(NoDependenceError, match="does not depend on the parameters"):
        bilevel.solve(subject, PHI, 2)
