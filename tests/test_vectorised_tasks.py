"""Many tasks at once: the numbers of single estimates, and refusals where there can be none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import FirstOrder, Forward, ForwardGradient, HessianFree, Implicit, Reverse, Tasks, TruncatedReverse
from bilevel.optim.torch_step import TEN
from bilevel.vectorised_tasks import derive_seed

K, STEPS = 3, 3
torch.manual_seed(0)
BATCHES = [(torch.randn(K, 5, 2).double(), torch.randn(K, 5, 1).double()) for _ in range(STEPS)]
OUTER = (torch.randn(K, 4, 2).double(), torch.randn(K, 4, 1).double())


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(2, 3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 1)]
    return nn.Sequential(*layers).double()


MODEL = network()


def loss(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def maml(algorithm: Any = torch.optim.SGD, model: Any = MODEL, **settings: Any) -> bilevel.GradientDescent:
    """Learned initial parameters: the same module is `params` and `meta`."""
    settings = {"lr": 0.1, **settings}
    return bilevel.GradientDescent(
        lambda params, meta, batch: loss(params, batch),
        lambda params, meta, batch: loss(params, batch) + 0.1 * sum(p.square().sum() for p in meta.parameters()),
        model,
        bilevel.optimizer(algorithm, **settings),
    )


def of_task(k: int) -> tuple[list[Any], Any]:
    return [(x[k], y[k]) for x, y in BATCHES], (OUTER[0][k], OUTER[1][k])


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def rows(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tree.values()], 1)


def singles(estimator: bilevel.Estimator, problem: Any, meta: Any, seeds: list[int]) -> list[bilevel.Estimate]:
    found = []
    for k in range(K):
        inner, outer = of_task(k)
        found.append(estimator(problem, meta, inner, outer, seeds[k]))
    return found


def agree(estimator: bilevel.Estimator, problem: Any, meta: Any, rtol: float = 1e-9) -> None:
    """The mean, each task, and tasks in chunks are what single estimates give."""
    each = singles(estimator, problem, meta, [0] * K)
    gradients = torch.stack([flat(e.grad) for e in each])
    values = torch.stack([e.value for e in each])
    mean = estimator(Tasks(problem, K), meta, BATCHES, OUTER)
    torch.testing.assert_close(mean.value, values.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(mean.grad), gradients.mean(0), rtol=rtol, atol=1e-12)
    per_task = estimator(Tasks(problem, K, per_task=True), meta, BATCHES, OUTER)
    torch.testing.assert_close(per_task.value, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows(per_task.grad), gradients, rtol=rtol, atol=1e-12)
    if estimator.is_random:
        return
    chunks = estimator(Tasks(problem, K, chunk_size=2), meta, BATCHES, OUTER)
    torch.testing.assert_close(chunks.value, values.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(chunks.grad), gradients.mean(0), rtol=rtol, atol=1e-12)
    parted = estimator(Tasks(problem, K, per_task=True, chunk_size=2), meta, BATCHES, OUTER)
    torch.testing.assert_close(rows(parted.grad), gradients, rtol=rtol, atol=1e-12)
    for estimate in (mean, per_task, chunks):
        for k, single in enumerate(each):
            for name, tensor in single.state.params.named_tensors.items():
                torch.testing.assert_close(estimate.state.params.named_tensors[name][k], tensor, rtol=1e-10, atol=1e-12)


ESTIMATORS = [
    Reverse(),
    Reverse("sqrt"),
    Reverse("graph"),
    FirstOrder(),
    TruncatedReverse(STEPS),
    ForwardGradient(3),
    ForwardGradient(3, chunk_size=1),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_tasks_have_the_numbers_of_single_estimates(estimator: bilevel.Estimator) -> None:
    agree(estimator, maml(), MODEL)


@pytest.mark.parametrize("estimator", [Reverse(), ForwardGradient(2)], ids=str)
@pytest.mark.parametrize("algorithm", TEN, ids=lambda algorithm: algorithm.__name__)
def test_every_optimiser_is_followed_task_by_task(algorithm: Any, estimator: bilevel.Estimator) -> None:
    agree(estimator, maml(algorithm, lr=0.05), MODEL, rtol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"clip_norm": 0.3},
        {"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)},
    ],
    ids=["momentum", "clipping", "schedule"],
)
def test_settings_are_those_of_each_task(settings: dict[str, Any]) -> None:
    agree(Reverse(), maml(**settings), MODEL)


def test_learned_rates_weights_and_trees_as_parameters() -> None:
    meta = {"lr": torch.tensor([-2.0]).double(), "w": torch.randn(5).double()}
    problem = bilevel.GradientDescent(
        lambda theta, phi, b: (phi["w"].sigmoid() * (b[0] @ theta["a"] - b[1].squeeze(1)).square()).mean(),
        lambda theta, phi, b: (b[0] @ theta["a"] - b[1].squeeze(1)).square().mean(),
        {"a": torch.ones(2).double(), "unused": torch.zeros(1).double()},
        bilevel.optimizer(torch.optim.Adam, lr=lambda phi: phi["lr"][0].exp()),
    )
    for estimator in (Reverse(), Forward()):
        each = singles(estimator, problem, meta, [0] * K)
        found = estimator(Tasks(problem, K), meta, BATCHES, OUTER)
        torch.testing.assert_close(
            flat(found.grad), torch.stack([flat(e.grad) for e in each]).mean(0), rtol=1e-9, atol=0
        )


def test_the_gradient_is_that_of_a_plain_loop() -> None:
    """MAML as it is written by hand, by finite differences in one direction."""
    model, direction = copy.deepcopy(MODEL), [torch.randn_like(p) for p in MODEL.parameters()]

    def value(offset: float) -> float:
        total = 0.0
        for k in range(K):
            start = copy.deepcopy(model)
            with torch.no_grad():
                for p, v in zip(start.parameters(), direction, strict=True):
                    p += offset * v
            adapted = copy.deepcopy(start)
            optimizer = torch.optim.Adam(adapted.parameters(), lr=0.05)
            inner, outer = of_task(k)
            for batch in inner:
                optimizer.zero_grad()
                loss(adapted, batch).backward()
                optimizer.step()
            explicit = 0.1 * sum(float(p.detach().square().sum()) for p in start.parameters())
            total += (float(loss(adapted, outer).detach()) + explicit) / K
        return total

    found = Reverse()(Tasks(maml(torch.optim.Adam, lr=0.05), K), MODEL, BATCHES, OUTER)
    slope = sum(float((g * v).sum()) for g, v in zip(found.grad.values(), direction, strict=True))
    assert slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)
    assert float(found.value.detach()) == pytest.approx(value(0.0), rel=1e-12)


def test_a_problem_with_steps_of_its_own() -> None:
    problem = bilevel.Problem(
        init=lambda phi: {"x": phi.cos(), "n": torch.tensor(0)},
        step=lambda s, phi, b: {"x": s["x"] - 0.1 * (s["x"] - b[0].mean(0)) * phi, "n": s["n"] + 1},
        outer_loss=lambda s, phi, b: (s["x"] * b[0]).square().sum() * s["n"],
    )
    phi = torch.tensor([0.3, 0.8]).double()
    for estimator in (Reverse(), Reverse("graph"), Forward(), ForwardGradient(2)):
        each = singles(estimator, problem, phi, [0] * K)
        found = estimator(Tasks(problem, K), phi, BATCHES, OUTER)
        torch.testing.assert_close(found.grad, torch.stack([e.grad for e in each]).mean(0), rtol=1e-10, atol=0)
        assert found.state["n"].tolist() == [STEPS] * K


# -- random numbers ---------------------------------------------------------------------------------------------------


def random_start(numpy: bool) -> bilevel.GradientDescent:
    def params(meta: Tensor) -> Tensor:
        noise = torch.tensor(np.random.standard_normal(2)) if numpy else torch.randn(2, dtype=torch.float64)
        return noise * meta

    return bilevel.GradientDescent(
        lambda theta, phi, b: (b[0] @ theta - b[1].squeeze(1)).square().mean(),
        lambda theta, phi, b: (b[0] @ theta).square().mean(),
        params,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2, 1])
def test_random_initial_parameters_are_those_of_single_estimates(chunk_size: int | None, numpy: bool) -> None:
    meta, problem = torch.tensor([0.7, 1.3]).double(), random_start(numpy)
    each = singles(Reverse(), problem, meta, [derive_seed(5, k) for k in range(K)])
    found = Reverse()(Tasks(problem, K, per_task=True, chunk_size=chunk_size), meta, BATCHES, OUTER, seed=5)
    torch.testing.assert_close(found.grad, torch.stack([e.grad for e in each]), rtol=1e-10, atol=0)
    assert len({round(float(v), 6) for v in found.value}) == K


@pytest.mark.parametrize("estimator", [Reverse(), ForwardGradient(3)], ids=str)
def test_dropout_is_refused_in_a_vectorised_chunk_and_exact_without(estimator: bilevel.Estimator) -> None:
    model = network(dropout=0.5)
    problem = maml(model=model)
    with pytest.raises(ValueError, match=r"a step draws random numbers \(dropout.*chunk_size=1"):
        estimator(Tasks(problem, K), model, BATCHES, OUTER, seed=5)
    each = singles(estimator, problem, model, [derive_seed(5, k) for k in range(K)])
    found = estimator(Tasks(problem, K, per_task=True, chunk_size=1), model, BATCHES, OUTER, seed=5)
    torch.testing.assert_close(rows(found.grad), torch.stack([flat(e.grad) for e in each]), rtol=1e-12, atol=0)


def test_draws_from_numpy_are_refused() -> None:
    def noisy(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        return (theta - phi).square().sum() * (1 + np.random.random())

    problem = bilevel.GradientDescent(
        noisy, lambda theta, phi, b: theta.sum(), torch.zeros(2), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    with pytest.raises(ValueError, match="random numbers from NumPy or Python"):
        Reverse()(Tasks(problem, K), torch.ones(2), BATCHES, OUTER)


@pytest.mark.slow
def test_chunks_have_random_directions_of_their_own_and_an_error_of_the_mean() -> None:
    problem = maml()
    exact = flat(Reverse()(Tasks(problem, K), MODEL, BATCHES, OUTER).grad)
    estimator = ForwardGradient(2)
    found = [estimator(Tasks(problem, K, chunk_size=2), MODEL, BATCHES, OUTER, seed) for seed in range(200)]
    errors = np.array([float((flat(e.grad) - exact).square().sum()) for e in found])
    claimed = np.array([float(e.standard_error or 0) ** 2 for e in found])
    gap = errors - claimed
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))
    mean = torch.stack([flat(e.grad) for e in found]).mean(0)
    assert float((mean - exact).square().sum()) < 4 * errors.mean() / len(found)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_tasks_that_branch_are_refused_and_taken_one_by_one() -> None:
    def branching(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        return (theta - phi).square().sum() * (2 if batch[0].sum() > 0 else 1)

    problem = bilevel.GradientDescent(
        branching,
        lambda theta, phi, b: theta.sum(),
        torch.zeros(2).double(),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    meta = torch.ones(2).double()
    with pytest.raises(ValueError, match="branches on the value of a tensor"):
        Reverse()(Tasks(problem, K), meta, BATCHES, OUTER)
    each = singles(Reverse(), problem, meta, [0] * K)
    found = Reverse()(Tasks(problem, K, chunk_size=1), meta, BATCHES, OUTER)
    torch.testing.assert_close(found.grad, torch.stack([e.grad for e in each]).mean(0))


def test_tasks_whose_states_differ_in_structure_are_refused() -> None:
    def heads(theta: Any, phi: Tensor, batch: Any) -> Tensor:
        return (theta["a" if batch[0].sum() > 0 else "b"] - phi).square().sum()

    problem = bilevel.GradientDescent(
        heads,
        lambda theta, phi, b: theta["a"].sum(),
        {"a": torch.zeros(2).double(), "b": torch.zeros(2).double()},
        bilevel.optimizer(torch.optim.Adam, lr=0.1),
    )
    signs = torch.tensor([1.0, -1.0, 1.0]).double().reshape(3, 1, 1).expand(3, 4, 2)
    with pytest.raises(ValueError, match="does not compute the same operations for all tasks"):
        Reverse()(Tasks(problem, K, chunk_size=1), torch.ones(2).double(), [(signs,)], OUTER)


@pytest.mark.parametrize("estimator", [Implicit(), HessianFree()], ids=str)
def test_implicit_methods_are_refused_by_name(estimator: bilevel.Estimator) -> None:
    who = type(estimator).__name__
    with pytest.raises(TypeError, match=f"{who} needs the inner loss.*computes the steps of all tasks together"):
        estimator(Tasks(maml(), K), MODEL, BATCHES, OUTER)


class OwnSGD(torch.optim.SGD):
    """An optimiser that PyTorch did not write."""


def test_other_problems_are_refused() -> None:
    with pytest.raises(TypeError, match="a BlackBox has none"):
        Tasks(bilevel.BlackBox(lambda meta: meta, lambda state, meta, batch: state.sum()), K)
    with pytest.raises(ValueError, match="Tasks does not take OwnSGD as inner optimiser"):
        Tasks(maml(OwnSGD), K)
    with pytest.raises(ValueError, match="number"):
        Tasks(maml(), 0)
    with pytest.raises(ValueError, match="chunk_size"):
        Tasks(maml(), K, chunk_size=0)


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        ((OUTER[0][:2], OUTER[1]), r"batch\[0\] of the outer batch has the shape \(2, 4, 2\).*the 3 tasks"),
        ((OUTER[0], torch.tensor(1.0)), r"batch\[1\] of the outer batch has the shape \(\)"),
        ((OUTER[0].numpy(), OUTER[1]), "NumPy array"),
    ],
)
def test_batches_without_a_leading_dimension_are_refused(outer: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Reverse()(Tasks(maml(), K), MODEL, BATCHES, outer)


def test_vectors_of_outer_losses_within_tasks_are_refused() -> None:
    problem = bilevel.Problem(lambda phi: phi, lambda s, phi, b: s * phi, lambda s, phi, b: s * b[0].sum())
    with pytest.raises(ValueError, match="outer_loss returned a tensor of shape"):
        Reverse()(Tasks(problem, K), torch.ones(2).double(), BATCHES, OUTER)


def test_running_statistics_are_refused_and_taken_one_by_one() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    problem = bilevel.GradientDescent(
        lambda params, meta, batch: loss(params.train(), batch),
        lambda params, meta, batch: loss(params.eval(), batch),
        model,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    meta = nn.ParameterList(model.parameters())
    each = singles(Reverse(), problem, meta, [0] * K)
    with pytest.raises(ValueError, match=r"updates '1.running_mean'.*chunk_size=1"):
        Reverse()(Tasks(problem, K), meta, BATCHES, OUTER)
    found = Reverse()(Tasks(problem, K, chunk_size=1), meta, BATCHES, OUTER)
    expected = torch.stack([flat(e.grad) for e in each]).mean(0)
    torch.testing.assert_close(flat(found.grad), expected, rtol=1e-9, atol=1e-12)
    own = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)).double()
    agree(Reverse(), maml(model=own), own)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse("graph"), ForwardGradient(2)], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Sequential(nn.GELU(), nn.Softmax(-1)),
        nn.RMSNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_have_the_second_derivatives_of_a_single_task(layer: nn.Module, estimator: bilevel.Estimator) -> None:
    """PyTorch's own are wrong under `torch.vmap` for the first and the third."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1)).double()
    agree(estimator, maml(model=model), model)


class Wrong(torch.autograd.Function):
    """A function whose batching rule is wrong: it forgets a factor of 2."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * cotangent

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return 1 * x, in_dims[0]


def test_a_wrong_batching_rule_is_noticed() -> None:
    problem = bilevel.Problem(
        lambda phi: phi, lambda s, phi, b: s * Wrong.apply(phi * b[0].mean(0)), lambda s, phi, b: s.sum()
    )
    with pytest.raises(ValueError, match=r"torch.vmap gives another state than a step of a single task.*chunk_size=1"):
        Reverse()(Tasks(problem, K), torch.ones(2).double(), BATCHES, OUTER)


def test_an_operation_without_batching_rule_is_refused_by_name() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.GRU(2, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x.unsqueeze(1))[0].squeeze(1)

    model = Recurrent().double()
    with pytest.raises(ValueError, match=r"torch.vmap does not take an operation of outer_loss .*gru.*chunk_size=1"):
        Reverse()(Tasks(maml(model=model), K), model, BATCHES, OUTER)
    each = singles(Reverse(), maml(model=model), model, [0] * K)
    found = Reverse()(Tasks(maml(model=model), K, chunk_size=1), model, BATCHES, OUTER)
    torch.testing.assert_close(flat(found.grad), torch.stack([flat(e.grad) for e in each]).mean(0))


def test_fit_trains_over_tasks() -> None:
    model = copy.deepcopy(MODEL)
    result = bilevel.fit(
        Tasks(maml(model=model), K), model, BATCHES, OUTER, estimator=Reverse(), steps=15, progress=False
    )
    assert result.history[-1]["outer_loss"] < result.history[0]["outer_loss"]
