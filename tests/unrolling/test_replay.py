"""Losses, steps and datasets with a memory are refused where steps are computed again; rounding raises no alarm."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import trees
from bilevel.tasks.condensation.models import build
from bilevel.unrolling import replay, state_comparison

D = torch.float64
X = torch.linspace(-1, 1, 24, dtype=D).reshape(8, 3).sin()
Y = torch.linspace(1, 2, 8, dtype=D).cos()
WEIGHTS = torch.linspace(0.5, 1.5, 8, dtype=D)
T = 6

RECOMPUTING = {
    "reverse": bilevel.Reverse(),
    "sqrt": bilevel.Reverse("sqrt"),
    "log": bilevel.Reverse("log"),
    "two states": bilevel.Reverse(2),
    "offloaded": bilevel.Reverse(offload="disk"),
    "truncated": bilevel.TruncatedReverse(3),
    "forward in chunks": bilevel.Forward(chunk_size=4),
    "forward one by one": bilevel.Forward(chunk_size=1),
    "directions in chunks": bilevel.ForwardGradient(4, chunk_size=2),
    "differences": bilevel.ForwardGradient(2, tangents="difference"),
    "zeroth order": bilevel.ZerothOrder(2, 1e-4),
    "implicit": bilevel.Implicit(),
    "hessian-free": bilevel.HessianFree(),
    "control variate": bilevel.ForwardGradient(2, control_variate=bilevel.TruncatedReverse(2)),
}
ONCE = {
    "graph": bilevel.Reverse("graph"),
    "shared": bilevel.ForwardGradient(8, "coordinate", tangents="shared"),
}
"""They compute each step once, so a memory that is detached does no harm."""


def sgd(**settings: Any) -> Any:
    return bilevel.optimizer(torch.optim.SGD, **{"lr": 0.1, **settings})


def adam() -> Any:
    return bilevel.optimizer(torch.optim.Adam, lr=0.1)


def weighted(theta: Tensor, meta: Tensor) -> Tensor:
    return (meta * (X @ theta - Y) ** 2).mean()


def outer(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
    return ((X @ theta - Y) ** 2).mean()


def queue() -> Callable[..., Tensor]:
    """Negatives of earlier calls, as in MoCo."""
    kept: list[Tensor] = []

    def loss(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        value = weighted(theta, meta)
        for negative in kept[-3:]:
            value = value + (theta @ negative).square() * meta.mean()
        kept.append((X.T @ (X @ theta - Y)).detach())
        return value

    return loss


def running_target() -> Callable[..., Tensor]:
    target = [torch.zeros(3, dtype=D)]

    def loss(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        target[0] = 0.9 * target[0] + 0.1 * theta.detach() + 0.1
        return weighted(theta, meta) + 0.5 * (theta - target[0]).square().sum()

    return loss


def counter() -> Callable[..., Tensor]:
    calls = itertools.count()
    return lambda theta, meta, batch: weighted(theta, meta) * (1 + 0.1 * next(calls))


def frozen_at_first() -> Callable[..., Tensor]:
    """From its second call on it is the same function."""
    kept: list[float] = []

    def loss(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        value = weighted(theta, meta) + sum(kept) * theta.sum()
        if not kept:
            kept.append(2.0)
        return value

    return loss


MEMORIES = {"queue": queue, "running target": running_target, "counter": counter, "frozen": frozen_at_first}


def descent(inner_loss: Any, optimizer: Any) -> bilevel.GradientDescent:
    return bilevel.GradientDescent(inner_loss, outer, torch.zeros(3, dtype=D), optimizer)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("optimizer", [sgd(), sgd(momentum=0.9), adam()], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", RECOMPUTING)
@pytest.mark.filterwarnings("ignore:Implicit")
def test_a_loss_with_a_memory_is_refused(name: str, memory: str, optimizer: Any) -> None:
    problem, estimator = descent(MEMORIES[memory](), optimizer), RECOMPUTING[name]
    if memory == "frozen" and name in ("truncated", "control variate"):
        estimator(problem, WEIGHTS, [None] * T)  # the steps that they compute again are all after the first call
        return
    with pytest.raises(bilevel.errors.ReplayError, match=r"queue") as caught:
        estimator(problem, WEIGHTS, [None] * T)
    first = {"truncated": T - 3, "control variate": T - 2}.get(name, 0)
    if memory == "counter":
        assert caught.value.inner_step == first
    # A function that changed once and never again gives no step away when it is looked for afterwards.
    assert caught.value.inner_step is not None or ((memory == "frozen" and "chunks" in name) or "one by one" in name)


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("memory", [queue, running_target, counter], ids=lambda make: make.__name__)
def test_what_computes_each_step_once_is_right_all_the_same(name: str, memory: Any) -> None:
    meta, theta, loss = WEIGHTS.clone().requires_grad_(), torch.zeros(3, dtype=D, requires_grad=True), memory()
    for _ in range(T):
        (gradient,) = torch.autograd.grad(loss(theta, meta, None), theta, create_graph=True)
        theta = theta - 0.1 * gradient
    (truth,) = torch.autograd.grad(outer(theta, meta, None), meta)
    estimate = ONCE[name](descent(memory(), sgd()), WEIGHTS, [None] * T)
    assert torch.allclose(estimate.grad, truth, rtol=1e-12, atol=1e-15)


def test_the_first_step_that_differs_is_named() -> None:
    """A counter that has an effect at step 4 alone."""
    seen: dict[int, int] = {}

    def step(state: Any, meta: Tensor, t: int) -> Any:
        seen[t] = seen.get(t, 0) + 1
        return state * 0.9 + meta + (0.1 * seen[t] if t == 4 else 0.0)

    problem = bilevel.Problem(lambda meta: torch.zeros(3, dtype=D), step, lambda state, meta, batch: state.sum())
    with pytest.raises(bilevel.errors.ReplayError, match="inner step 4 ") as caught:
        bilevel.Reverse()(problem, torch.tensor(0.5, dtype=D), range(T))
    assert caught.value.inner_step == 4
    seen.clear()
    with pytest.raises(bilevel.errors.ReplayError, match="inner step 4 ") as caught:
        bilevel.Forward(chunk_size=1)(problem, torch.tensor([0.5, 0.1, 0.2], dtype=D), range(T))


@pytest.mark.parametrize("name", list(RECOMPUTING))
@pytest.mark.filterwarnings("ignore:Implicit")
def test_a_dataset_with_a_generator_or_iterator_of_its_own_is_refused(name: str) -> None:
    class Augmented:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __len__(self) -> int:
            return T

        def __getitem__(self, t: int) -> Tensor:
            return X + 0.1 * torch.randn(X.shape, dtype=D, generator=self.generator)

    problem = bilevel.GradientDescent(
        lambda theta, meta, x: (meta * (x @ theta - Y) ** 2).mean(), outer, torch.zeros(3, dtype=D), sgd()
    )
    with pytest.raises(bilevel.errors.ReplayError, match="generator of its own"):
        RECOMPUTING[name](problem, WEIGHTS, Augmented())
    # Also where the problem is known already, with data that can be read again.
    RECOMPUTING[name](problem, WEIGHTS, [X] * T)
    with pytest.raises(bilevel.errors.ReplayError):
        RECOMPUTING[name](problem, WEIGHTS, Augmented())


IN_PLACE: dict[str, Callable[..., Any]] = {
    "state": lambda state, meta, batch: state.sub_(0.1 * (X.T @ (meta * (X @ state - Y)))),
    "state, then another": lambda state, meta, batch: state.mul_(0.9) + (meta * Y).sum(),
    "meta": lambda state, meta, batch: state * 0.9 + meta.clamp_(max=1.2).sum(),
}


@pytest.mark.parametrize("name", [n for n in (*RECOMPUTING, "graph") if n not in ("mixed", "implicit", "hessian-free")])
@pytest.mark.parametrize("what", IN_PLACE)
def test_a_step_that_works_in_place_is_refused(name: str, what: str) -> None:
    problem = bilevel.Problem(lambda meta: torch.zeros(3, dtype=D), IN_PLACE[what], outer)
    with pytest.raises(ValueError, match=r"changes .*(state|meta).* in place.*clone"):
        {**RECOMPUTING, **ONCE}[name](problem, WEIGHTS.clone(), [None] * T)


# -- no false alarms -----------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:  # noqa: ARG004
        return tangents[0].view_as(tangents[0])


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x)  # type: ignore[no-any-return]


def groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3),
    )  # fmt: skip


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "group norm": groups,
    "instance norm": lambda: build("convnet", (1, 8, 8), 3, 8, 2),
    "dropout": dropout,
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)),
    "straight-through": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Rounded(), nn.Linear(8, 3)),
}
OPTIMIZERS = {"sgd": sgd(lr=0.05, momentum=0.9), "adam": bilevel.optimizer(torch.optim.Adam, lr=1e-2)}


def images(network: Callable[[], nn.Module], dtype: torch.dtype, autocast: bool, optimizer: Any) -> Any:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 1, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return (meta * nn.functional.cross_entropy(model(x), labels, reduction="none")).mean()

    problem = bilevel.GradientDescent(
        loss,
        lambda model, meta, batch: nn.functional.cross_entropy(model(x.flip(3)), labels),
        network().to(dtype),
        optimizer,
    )
    return problem, torch.ones(6, dtype=dtype)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "autocast"])
@pytest.mark.filterwarnings("ignore:ZerothOrder")  # bfloat16 does not see a small step
def test_rounding_is_no_memory(network: str, precision: str, optimizer: str) -> None:
    autocast = precision == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, precision)
    problem, meta = images(NETWORKS[network], dtype, autocast, OPTIMIZERS[optimizer])
    estimators: list[bilevel.Estimator] = [
        bilevel.Reverse(),
        bilevel.Reverse("log"),
        bilevel.TruncatedReverse(2),
        bilevel.ForwardGradient(2, tangents="difference", control_variate=bilevel.TruncatedReverse(2)),
        bilevel.ZerothOrder(1, 1e-2),
    ]
    if not autocast:  # under which PyTorch has no forward-mode derivative of layers of mixed precision
        forward = bilevel.Forward(chunk_size=4), bilevel.ForwardGradient(3, chunk_size=2)
        estimators += forward
    for estimator in estimators:
        estimator(problem, meta, [None] * T)


def test_adam_on_gradients_that_are_zero_but_for_rounding_is_no_memory() -> None:
    """A bias before a normalisation: Adam makes steps of full length out of rounding, whose signs are anybody's guess.

    The recomputed gradient is off by a rounding of its own here, as on a GPU; the moments agree, the parameters do not.
    """
    tiny = 1e-9

    def loss(theta: list[Tensor], meta: Tensor, batch: Any) -> Tensor:
        noise = tiny if theta[0].requires_grad and meta.requires_grad else -tiny
        return (meta * (X.float() @ theta[0] - Y.float()) ** 2).mean() + noise * theta[1].sum()

    problem = bilevel.GradientDescent(
        loss,
        lambda theta, meta, batch: ((X.float() @ theta[0] - Y.float()) ** 2).mean(),
        [torch.zeros(3), torch.zeros(40)],
        bilevel.optimizer(torch.optim.Adam, lr=0.1, eps=1e-12),
    )
    first = problem.step(problem.init(WEIGHTS.float()), WEIGHTS.float(), None)
    recorded = WEIGHTS.float().requires_grad_()
    state = problem.init(WEIGHTS.float())
    recording = state._replace(params=[p.clone().requires_grad_() for p in state.params])
    again = trees.detach(problem.step(recording, recorded, None))
    parts = state_comparison.parts_of(first)
    some, certain = state_comparison.disagreement(parts, problem.init(WEIGHTS.float()), first, again).tolist()
    assert (some, certain) == (True, False)
    bilevel.Reverse()(problem, WEIGHTS.float(), [None] * T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_tolerance(dtype: torch.dtype) -> None:
    """√ε of the step and four roundings of the state pass; a hundred times as much does not."""
    epsilon = torch.finfo(dtype).eps
    before, moved = torch.zeros(1000, dtype=dtype), torch.full((1000,), 0.5, dtype=dtype)
    parts = state_comparison.parts_of(before)

    def off_by(relative: float) -> bool:
        again = moved * (1 + relative)
        return bool(state_comparison.disagreement(parts, before, moved, again)[0])

    assert not off_by(0.5 * epsilon**0.5)
    assert off_by(3 * epsilon**0.5)
    still = torch.full((1000,), 0.5, dtype=dtype)
    assert not bool(state_comparison.disagreement(parts, still, still, still * (1 + epsilon))[0])
    assert bool(state_comparison.disagreement(parts, still, still, still * (1 + 8 * epsilon))[0])


def test_two_steps_are_computed_twice_once_for_each_problem() -> None:
    calls: list[int] = []

    def loss(theta: Tensor, meta: Tensor, t: int) -> Tensor:
        calls.append(t)
        return weighted(theta, meta)

    problem = descent(loss, sgd())
    bilevel.HessianFree()(problem, WEIGHTS, list(range(T)))
    once = len(calls)
    calls.clear()
    bilevel.HessianFree()(problem, WEIGHTS, list(range(T)))
    assert len(calls) == once - 2


def test_no_estimate_waits_for_the_device_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bits differ, flags are read once for each estimate."""
    monkeypatch.setattr(replay, "same_bits", lambda left, right, **_: False)
    reads: list[int] = []
    stack = torch.stack

    def counted(tensors: Any, *args: Any) -> Tensor:
        result = stack(tensors, *args)
        if result.dtype == torch.bool and result.ndim == 2:
            reads.append(len(result))
        return result

    monkeypatch.setattr(replay.torch, "stack", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bilevel.Reverse()(descent(lambda theta, meta, batch: weighted(theta, meta), sgd()), WEIGHTS, [None] * T)
    assert reads == [T]


@pytest.mark.parametrize("steps", [1, 2, T])
def test_a_growing_factor_is_noticed_though_adam_hides_it_in_the_parameters(steps: int) -> None:
    """The first update is lr · sign(g) but for epsilon; only the moments know how long the gradient is."""
    calls: list[int] = []

    def growing(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        return len(calls) * weighted(theta, meta)

    adam = bilevel.optimizer(torch.optim.Adam, lr=0.1, eps=0.0)
    with pytest.raises(bilevel.errors.ReplayError, match="step 0"):
        bilevel.Reverse()(descent(growing, adam), WEIGHTS, [None] * steps)


def test_a_memory_is_noticed_in_a_step_in_which_the_optimiser_begins_to_keep_something() -> None:
    """Adam has no moments of a head before the step that reaches it first."""
    calls: list[int] = []
    heads = {name: torch.linspace(0.5, 1.0, 3, dtype=D) for name in "ab"}

    def growing(theta: Any, meta: Tensor, batch: str) -> Tensor:
        calls.append(1)
        return len(calls) * weighted(theta[batch], meta)

    def judged(theta: Any, meta: Tensor, batch: Any) -> Tensor:
        return outer(theta["a"], meta, batch) + outer(theta["b"], meta, batch)

    problem = bilevel.GradientDescent(growing, judged, heads, bilevel.optimizer(torch.optim.Adam, lr=0.1))
    for estimator in (bilevel.Reverse(), bilevel.ForwardGradient(2, tangents="difference")):
        with pytest.raises(bilevel.errors.ReplayError):
            estimator(problem, WEIGHTS, list("abab"))


def test_rounding_is_no_memory_where_the_optimiser_keeps_more_from_step_to_step() -> None:
    """Every step is compared with the parts that its own state has."""
    heads = {name: torch.linspace(0.5, 1.0, 3, dtype=D) for name in "abc"}

    def rounded(theta: Any, meta: Tensor, batch: str) -> Tensor:
        calls.append(1)
        return (1 + 1e-15 * len(calls)) * weighted(theta[batch], meta)

    def judged(theta: Any, meta: Tensor, batch: Any) -> Tensor:
        return sum((outer(theta[name], meta, batch) for name in "abc"), torch.zeros((), dtype=D))

    calls: list[int] = []
    problem = bilevel.GradientDescent(rounded, judged, heads, bilevel.optimizer(torch.optim.Adam, lr=0.1))
    found = bilevel.Reverse()(problem, WEIGHTS, list("abcabc"))
    exactly = bilevel.GradientDescent(
        lambda theta, meta, batch: weighted(theta[batch], meta),
        judged,
        heads,
        bilevel.optimizer(torch.optim.Adam, lr=0.1),
    )
    torch.testing.assert_close(found.grad, bilevel.Reverse("graph")(exactly, WEIGHTS, list("abcabc")).grad)
