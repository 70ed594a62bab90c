"""What every estimator's answer must be like, whatever it estimates: one call, one kind of result.

Run over the `estimates` of every row of `estimator_table.py`.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import optree
import pytest
import torch
from estimator_table import RANDOM, ROWS
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from bilevel import ForwardGradient, Implicit, Reverse

ESTIMATORS = [estimator for row in ROWS.values() for estimator in row.estimates]
DETERMINISTIC = [estimator for estimator in ESTIMATORS if estimator not in RANDOM]
EXACT = [estimator for row in ROWS.values() for estimator in row.exact_estimates]

every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)

STEPS = 4
FEATURES, CLASSES = 3, 2

# -- one problem, as a user writes it, and the loop he would write without us --------------------------------------


def data(seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.standard_normal((6, FEATURES))), torch.tensor(rng.integers(CLASSES, size=6))


INNER_BATCHES = [data(seed) for seed in range(STEPS)]
OUTER_BATCH = data(STEPS)


def start() -> dict[str, Tensor]:
    rng = np.random.default_rng(6)
    return {"weight": torch.tensor(rng.standard_normal((FEATURES, CLASSES))), "bias": torch.zeros(CLASSES).double()}


def make_meta() -> dict[str, Tensor]:
    return {
        "shift": torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64),
        "log_decay": torch.tensor([[-1.0], [-2.0]], dtype=torch.float64),
    }


def inner_loss(params: Any, meta: Any, batch: Any, dropout: float = 0.0) -> Tensor:
    """Logistic regression on shifted inputs with a learned ridge: strictly convex, so implicit methods apply."""
    inputs, labels = batch
    hidden = functional.dropout(inputs + meta["shift"], dropout)
    scores = hidden @ params["weight"] + params["bias"]
    ridge = sum((d.exp() * p.square().sum()).sum() for d, p in zip(meta["log_decay"], params.values(), strict=True))
    return functional.cross_entropy(scores, labels) + 0.5 * ridge


def outer_loss(params: Any, meta: Any, batch: Any) -> Tensor:
    inputs, labels = batch
    return functional.cross_entropy(inputs @ params["weight"] + params["bias"], labels) + meta["shift"].square().sum()


PROBLEM = bilevel.GradientDescent(
    inner_loss, outer_loss, start(), bilevel.optimizer(torch.optim.Adam, lr=0.05, betas=(0.8, 0.9))
)


def call(estimator: bilevel.Estimator, seed: int = 0, problem: Any = PROBLEM, meta: Any = None) -> bilevel.Estimate:
    return estimator(problem, make_meta() if meta is None else meta, INNER_BATCHES, OUTER_BATCH, seed)


@functools.cache
def usual(estimator: bilevel.Estimator) -> bilevel.Estimate:
    """The call that most tests look at. Not to be changed."""
    return call(estimator)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def same(left: Any, right: Any) -> bool:
    """To the last bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors(left), tensors(right), strict=True))


def distance(left: Any, right: Any) -> float:
    """Relative."""
    a, b = (torch.cat([t.reshape(-1) for t in tensors(tree)]) for tree in (left, right))
    return float((a - b).norm() / b.norm())


# -- what comes back -----------------------------------------------------------------------------------------------


@every_estimator
def test_value_and_state_are_those_of_the_plain_loop(estimator: bilevel.Estimator) -> None:
    params, meta = {name: nn.Parameter(p) for name, p in start().items()}, make_meta()
    optimizer = torch.optim.Adam(params.values(), lr=0.05, betas=(0.8, 0.9))
    for batch in INNER_BATCHES:
        optimizer.zero_grad()
        inner_loss(params, meta, batch).backward()
        optimizer.step()
    estimate = usual(estimator)
    assert distance(estimate.value, outer_loss(params, meta, OUTER_BATCH).detach()) < 1e-12
    assert {name: tuple(p.shape) for name, p in estimate.state.params.items()} == {"weight": (3, 2), "bias": (2,)}
    for name, p in params.items():
        assert distance(estimate.state.params[name], p.detach()) < 1e-12
    assert estimate.state.steps == STEPS


@every_estimator
def test_the_gradient_is_a_tree_like_meta(estimator: bilevel.Estimator) -> None:
    grad = usual(estimator).grad
    assert {k: (v.shape, v.dtype) for k, v in grad.items()} == {k: (v.shape, v.dtype) for k, v in make_meta().items()}


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lone_tensor_gives_a_lone_tensor_of_its_dtype(estimator: bilevel.Estimator, dtype: torch.dtype) -> None:
    problem = bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: (theta - phi).square().sum(),
        outer_loss=lambda theta, phi, batch: theta.square().sum(),
        params=torch.ones(5, dtype=dtype),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    meta = torch.full((5,), 2.0, dtype=dtype)
    estimate = estimator(problem, meta, bilevel.no_batches(STEPS))
    assert (estimate.grad.shape, estimate.grad.dtype) == (meta.shape, dtype)
    assert (estimate.value.shape, estimate.value.dtype) == ((), dtype)


@every_estimator
def test_modules_give_a_dict_by_parameter_name(estimator: bilevel.Estimator) -> None:
    torch.manual_seed(0)
    model, meta = nn.Linear(FEATURES, CLASSES).double(), nn.Linear(FEATURES, 1, bias=False).double()

    def weighted(model: Any, meta: Any, batch: Any) -> Tensor:
        inputs, labels = batch
        losses = functional.cross_entropy(model(inputs), labels, reduction="none")
        ridge = 0.1 * (model.weight.square().sum() + model.bias.square().sum())
        return (meta(inputs).sigmoid().squeeze(1) * losses).mean() + ridge

    problem = bilevel.GradientDescent(
        inner_loss=weighted,
        outer_loss=lambda model, meta, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        params=model,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    before = [p.detach().clone() for p in (*model.parameters(), *meta.parameters())]
    estimate = call(estimator, problem=problem, meta=meta)
    assert {name: tuple(g.shape) for name, g in estimate.grad.items()} == {"weight": (1, FEATURES)}
    assert same(before, [*model.parameters(), *meta.parameters()])
    assert all(p.grad is None and p.requires_grad for p in (*model.parameters(), *meta.parameters()))


@every_estimator
def test_only_random_estimates_have_a_standard_error(estimator: bilevel.Estimator) -> None:
    error = usual(estimator).standard_error
    if estimator in DETERMINISTIC:
        assert error is None
    else:
        assert isinstance(error, float)
        assert error > 0


@every_estimator
def test_results_are_cut_off_from_the_graph(estimator: bilevel.Estimator) -> None:
    estimate = call(estimator, meta={name: nn.Parameter(leaf) for name, leaf in make_meta().items()})
    found = tensors([estimate.grad, estimate.state.params, estimate.state.optimizer])
    assert not any(t.requires_grad for t in found)


# -- what does not change ------------------------------------------------------------------------------------------


@every_estimator
def test_meta_and_batches_are_left_alone(estimator: bilevel.Estimator) -> None:
    meta = {name: nn.Parameter(leaf) for name, leaf in make_meta().items()}
    before = [t.detach().clone() for t in tensors([meta, INNER_BATCHES, OUTER_BATCH])]
    estimate = call(estimator, meta=meta)
    for t in tensors(estimate.grad):
        t.zero_()  # nor are they shared with the result
    assert same(before, [meta, INNER_BATCHES, OUTER_BATCH])
    assert all(leaf.grad is None for leaf in meta.values())


@every_estimator
def test_the_same_call_gives_the_same_bits(estimator: bilevel.Estimator) -> None:
    first, second = usual(estimator), call(estimator)
    assert same([first.value, first.grad, first.state], [second.value, second.grad, second.state])
    assert first.standard_error == second.standard_error


@every_estimator
def test_the_seed_decides_the_directions_and_nothing_else(estimator: bilevel.Estimator) -> None:
    first, second = usual(estimator), call(estimator, seed=1)
    assert same([first.value, first.state], [second.value, second.state])
    assert same(first.grad, second.grad) == (estimator in DETERMINISTIC)


@every_estimator
def test_gradient_mode_does_not_matter(estimator: bilevel.Estimator) -> None:
    with torch.no_grad():
        assert same(call(estimator).grad, usual(estimator).grad)


@every_estimator
def test_global_state_is_as_before(estimator: bilevel.Estimator) -> None:
    def settings() -> list[Any]:
        backends = torch.backends
        return [
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.mha.get_fastpath_enabled(),
            backends.mkldnn.enabled,
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            random.getstate(),
        ]

    torch.manual_seed(7)
    torch.backends.mha.set_fastpath_enabled(True)  # as it comes; an earlier call may have left it off
    generator, before = torch.get_rng_state(), settings()
    call(estimator, problem=with_dropout(0.5))
    assert torch.equal(torch.get_rng_state(), generator)
    assert settings() == before


# -- randomness inside the inner loop ------------------------------------------------------------------------------


def with_dropout(rate: float) -> bilevel.GradientDescent:
    """A random start and dropout in both losses. The ridge keeps the inner loss strictly convex."""

    def random_start(meta: Any) -> dict[str, Tensor]:
        weight = torch.randn(FEATURES, CLASSES, dtype=torch.float64) + meta["shift"][:, None]
        return {"weight": weight, "bias": torch.zeros(CLASSES, dtype=torch.float64)}

    def dropped_outer_loss(params: Any, meta: Any, batch: Any) -> Tensor:
        return outer_loss(params, meta, (functional.dropout(batch[0], rate), batch[1]))

    return bilevel.GradientDescent(
        inner_loss=lambda params, meta, batch: inner_loss(params, meta, batch, rate),
        outer_loss=dropped_outer_loss,
        params=random_start,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    )


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_every_exact_estimator_sees_the_same_dropout(estimator: bilevel.Estimator) -> None:
    problem = with_dropout(0.5)
    found, reference = call(estimator, seed=4, problem=problem), call(Reverse("graph"), seed=4, problem=problem)
    assert distance(found.grad, reference.grad) < 1e-12
    assert distance(found.value, reference.value) < 1e-12
    # and it is a random number of which the seed decides: the whole test would be void if dropout were off
    other = call(estimator, seed=5, problem=problem)
    assert distance(other.value, found.value) > 1e-3
    assert distance(call(estimator, seed=4, problem=with_dropout(0.0)).value, found.value) > 1e-3


@every_estimator
def test_dropout_repeats_itself(estimator: bilevel.Estimator) -> None:
    problem = with_dropout(0.5)
    first = call(estimator, seed=4, problem=problem)
    torch.rand(3)  # draws in between are of no account
    second = call(estimator, seed=4, problem=problem)
    assert same([first.value, first.grad, first.state], [second.value, second.grad, second.state])


@pytest.mark.parametrize("estimator", DETERMINISTIC, ids=str)
def test_a_step_drops_the_same_whenever_it_is_computed(estimator: bilevel.Estimator) -> None:
    seen: dict[int, list[Tensor]] = {}

    def watched_loss(params: Any, meta: Any, batch: int) -> Tensor:
        mask = functional.dropout(torch.ones(50, dtype=torch.float64), 0.5)
        seen.setdefault(batch, []).append(mask)
        return 0.5 * (params - meta).square().sum() * mask.mean()

    problem = bilevel.GradientDescent(
        watched_loss, lambda params, meta, _: params.sum(), torch.zeros(3), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    for steps in (6, 4):
        estimator(problem, torch.ones(3), range(steps), seed=2)
    assert sorted(seen) == list(range(6))
    for masks in seen.values():  # in the way forth and back, at the solution, and in loops of any length
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert len({tuple(masks[0].tolist()) for masks in seen.values()}) == 6


# -- chunks, refusals, warnings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "coordinate"])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 9])
def test_chunks_do_not_change_a_forward_gradient(chunk_size: int, distribution: str) -> None:
    whole = call(ForwardGradient(5, distribution))
    chunked = call(ForwardGradient(5, distribution, chunk_size=chunk_size))
    assert distance(chunked.grad, whole.grad) < 1e-12
    assert chunked.standard_error == pytest.approx(whole.standard_error, rel=1e-12)


@every_estimator
def test_a_black_box_is_refused_by_name_or_estimated(estimator: bilevel.Estimator) -> None:
    box = bilevel.BlackBox(
        solve=lambda meta: torch.tensor(meta.numpy() ** 2), outer_loss=lambda state, meta, batch: state.sum()
    )
    meta = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    if not estimator.needs_derivatives:
        assert estimator(box, meta).value == 21
        return
    with pytest.raises(TypeError, match=rf"^{type(estimator).__name__} differentiates.*BlackBox.*ZerothOrder"):
        estimator(box, meta)


def test_implicit_points_its_warning_at_the_caller() -> None:
    problem = bilevel.GradientDescent(
        inner_loss=lambda theta, phi, batch: -0.5 * (theta - phi).square(),
        outer_loss=lambda theta, phi, batch: theta,
        params=torch.tensor(0.0),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    with pytest.warns(UserWarning, match="negative curvature") as caught:
        Implicit()(problem, torch.tensor(1.0), bilevel.no_batches(2))
    assert caught[0].filename == __file__
