"""What control variates, supports, differences and the running mean do, beyond being unbiased."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import UNROLLED, affine, tensor
from fit_settings import grouped
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel import (
    Constant,
    Estimate,
    Estimator,
    Forward,
    ForwardGradient,
    Phase,
    Reverse,
    RunningMean,
    TruncatedReverse,
    ZerothOrder,
)
from bilevel.directions.control_variates import combine, fitted_scales
from bilevel.directions.distributions import Directions
from bilevel.directions.support import reached
from bilevel.randomness import DRAW, derive
from bilevel.training.noise_warning import NoiseWatch
from bilevel.training.outer_loop import OuterStep
from bilevel.training.running_mean import PastEstimates
from bilevel.trees import flatten, leaves, map_leaves, unflatten
from bilevel.unrolling.finite_differences import FiniteDifferences
from bilevel.unrolling.tangents import push_forward
from bilevel.unrolling.unroll import Unroll, unroll

BIG = affine("many parameters", T=2, M=3, N=64)


def squared_errors(estimator_of: Any, calls: int = 60) -> tuple[np.ndarray, np.ndarray]:
    found = [BIG(estimator_of(draw)) for draw in range(calls)]
    errors = [BIG.error(estimate) ** 2 for estimate in found]
    claimed = [(estimate.standard_error or 0.0) ** 2 / float(np.sum(BIG.gradient**2)) for estimate in found]
    return np.array(errors), np.array(claimed)


@pytest.mark.parametrize("name", ["rademacher", "orthogonal"])
def test_the_variance_is_that_of_what_the_variate_leaves(name: str) -> None:
    # A variate with cosine ρ to ∇h and the best scale leaves 1 − ρ² of ‖∇h‖²; fitting it to b − 1 = 31 others adds
    # (1 − ρ²)/31 or so, and the part of a further direction of slope 0 another (1/32²)².
    rng = np.random.default_rng(0)
    off = rng.standard_normal(64)
    off -= off @ BIG.gradient / (BIG.gradient @ BIG.gradient) * BIG.gradient
    off *= 0.3 * np.linalg.norm(BIG.gradient) / np.linalg.norm(off)
    variate = Constant(tensor(-7 * (BIG.gradient + off)))  # any scale will do, of any sign
    b = 32
    errors, claimed = squared_errors(lambda draw: ForwardGradient(b, name, control_variate=variate, draw=draw))
    left = 1 - 1 / 1.09
    theory = (63 if name == "rademacher" else 64 - b) / b * (left * (1 + 1 / 31) + 1 / 32**4)
    error = errors.std(ddof=1) / np.sqrt(len(errors))
    assert abs(errors.mean() - theory) < 4 * error + 0.1 * theory
    assert abs(claimed.mean() - errors.mean()) < 4 * error + 4 * claimed.std(ddof=1) / np.sqrt(len(claimed))


def test_variance_left_is_reported() -> None:
    estimate = BIG(ForwardGradient(16, control_variate=Constant(tensor(BIG.gradient))))
    assert estimate.diagnostics["variance_left"] < 0.02
    assert not BIG(ForwardGradient(16)).diagnostics


@pytest.mark.parametrize("case", UNROLLED, ids=lambda case: case.name)
def test_differences_of_first_order_gradients(case: Any) -> None:
    # ∛ε² = 4e-11 from rounding, some 10 for the condition and the length of the inner loops.
    estimate = case(ForwardGradient(case.N, "coordinate", tangents="difference"))
    assert case.error(estimate) < 1e-9


@pytest.mark.parametrize("chunk_size", [1, 3, 4, None])
def test_chunks_can_share_the_inner_steps(chunk_size: int | None) -> None:
    calls = []

    def inner_loss(theta: Tensor, phi: Tensor, batch: Tensor) -> Tensor:
        calls.append(1)
        kept = torch.nn.functional.dropout(theta, 0.5, training=True)
        return (kept * theta @ theta - batch @ phi).square() + (theta.sin() @ phi[:3])

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda theta, phi, batch: theta.square().sum() + phi.prod(),
        lambda phi: phi[1:4] / 10,
        bilevel.optimizer(torch.optim.Adam, lr=0.1),
    )
    phi = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    batches = list(torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = ForwardGradient(4, chunk_size=chunk_size, tangents="shared", control_variate=None)(problem, phi, batches)
    assert len(calls) == len(batches)  # once a step, in however many chunks
    exact = ForwardGradient(4)(problem, phi, batches)
    assert found.grad.numpy() == pytest.approx(exact.grad.numpy(), rel=1e-10)
    assert found.standard_error == pytest.approx(exact.standard_error, rel=1e-10)


def test_steps_to_share_need_an_inner_loss() -> None:
    with pytest.raises(TypeError, match=r"bilevel\.GradientDescent"):
        BIG(ForwardGradient(4, tangents="shared"))
    unused = bilevel.GradientDescent(
        lambda theta, phi, batch: phi.sum(),
        lambda theta, phi, batch: theta.sum(),
        torch.zeros(2),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(bilevel.errors.NoDependenceError, match="inner_loss does not depend on the parameters"):
        ForwardGradient(2, tangents="shared")(unused, torch.ones(2), bilevel.no_batches(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)
        self.outside = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            y = self.inside(x).unsqueeze(0).unsqueeze(0)
            return scaled_dot_product_attention(y, y, y)[0, 0]

        return self.outside(checkpoint(block, x, use_reentrant=False)).squeeze(1)  # type: ignore[operator]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 5e-3)])
def test_differences_take_fused_attention_and_activation_checkpointing(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 4).to(dtype)
    model = Attention().to(dtype)

    def problem(of: nn.Module) -> bilevel.GradientDescent:
        return bilevel.GradientDescent(
            lambda view, meta, batch: (view(inputs) - meta).square().mean(),
            lambda view, meta, batch: view(inputs).square().mean(),
            of,
            bilevel.optimizer(torch.optim.Adam, lr=0.05),
        )

    meta, steps = torch.arange(5.0).to(dtype), bilevel.no_batches(4)
    found = ForwardGradient(5, "coordinate", tangents="difference")(problem(model), meta, steps)

    class Plain(Attention):
        def forward(self, x: Tensor) -> Tensor:
            y = self.inside(x)
            return self.outside(torch.softmax(y @ y.T / 2, 1) @ y).squeeze(1)

    plain = Plain().to(dtype)
    plain.load_state_dict(model.state_dict())
    exact = Forward()(problem(plain), meta, steps)
    assert float((found.grad - exact.grad).norm() / exact.grad.norm()) < tolerance


def weighted() -> tuple[bilevel.GradientDescent, Any]:
    """A weight for each of 40 examples, of which mini-batches reach 6."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 3).double(), torch.randn(40).double()
    chosen = [torch.tensor([3, 8]), torch.tensor([3, 30]), torch.tensor([39, 0]), torch.tensor([8, 1])]
    return bilevel.GradientDescent(
        lambda w, meta, batch: (meta[batch].exp() * (inputs[batch] @ w - targets[batch]).square()).mean(),
        lambda w, meta, batch: (inputs @ w - targets).square().mean(),
        torch.zeros(3).double(),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    ), chosen


def test_a_support_needs_as_many_directions_as_entries_are_reached() -> None:
    problem, chosen = weighted()
    meta = torch.zeros(40, dtype=torch.float64)
    exact = Reverse()(problem, meta, chosen)
    found = ForwardGradient(6, "coordinate", support="reached")(problem, meta, chosen)
    assert (exact.grad != 0).sum() == 6
    assert found.grad.numpy() == pytest.approx(exact.grad.numpy(), abs=1e-12)
    with pytest.raises(ValueError, match="directions=7 for 6 reached"):
        ForwardGradient(7, support="reached")(problem, meta, chosen)


def test_other_draws_are_other_directions_at_the_same_seed() -> None:
    first, again, other = (BIG(ForwardGradient(4, draw=draw)).grad for draw in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# -- in fit --------------------------------------------------------------------------------------------------------


def fit(estimator: bilevel.Estimator, steps: int, out: Path | None = None, resume: bool = False) -> bilevel.FitResult:
    return bilevel.fit(
        BIG.problem,
        BIG.meta,
        BIG.inner_batches,
        tensor(BIG.outer.a),
        phases=[Phase(estimator, steps=12)],
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=1e-6),
        callbacks=[lambda step: _stop(step.number, steps)],
        out=None if out is None else bilevel.RunFolder(out, resume=resume),
        progress=False,
    )


class Stop(KeyboardInterrupt):
    pass


def _stop(number: int, at: int) -> None:
    if number > at:
        raise Stop


@pytest.mark.parametrize("kind", [ForwardGradient, ZerothOrder])
def test_a_running_mean_lowers_the_error_as_the_past_grows(kind: Any) -> None:
    plain, with_past = (
        [row["standard_error"] for row in fit(kind(16, control_variate=v), 12).history] for v in (None, RunningMean())
    )
    assert with_past[0] == plain[0]
    assert np.mean(with_past[6:]) < 0.8 * np.mean(plain[6:])


def test_a_running_mean_is_in_the_checkpoint(tmp_path: Path) -> None:
    estimator = ForwardGradient(16, control_variate=RunningMean(0.7))
    whole = fit(estimator, 12)
    with pytest.raises(Stop):
        fit(estimator, 5, tmp_path)
    resumed = fit(estimator, 12, tmp_path, resume=True)
    assert torch.equal(whole.meta, resumed.meta)
    numbers = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (whole, resumed)]
    assert numbers[0] == numbers[1]


def test_a_running_mean_outside_of_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only inside bilevel\.fit"):
        BIG(ForwardGradient(2, control_variate=RunningMean()))


def test_signal_and_noise_are_logged_and_noise_is_warned_of_once() -> None:
    flat = bilevel.Problem(
        init=lambda phi: torch.zeros(1, dtype=torch.float64),
        step=lambda state, phi, batch: state + phi.sum() * batch,
        outer_loss=lambda state, phi, batch: state.sum(),
    )
    meta = torch.zeros(3999, dtype=torch.float64)  # an odd number of signs does not add up to zero
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # One direction for 3999 parameters: the expected ratio is 1/√3998 = 0.016.
        result = bilevel.fit(
            flat, meta, [1.0], phases=[Phase(ForwardGradient(1), steps=25)], progress=False,
            optimizer=bilevel.optimizer(torch.optim.SGD, lr=1e-9),
        )  # fmt: skip
    assert len([w for w in caught if "estimates are noise" in str(w.message)]) == 1
    for row in result.history:
        squared = row["grad_norm"] ** 2 - row["standard_error"] ** 2
        assert row["signal_to_noise"] == pytest.approx(max(squared, 0.0) ** 0.5 / row["standard_error"], abs=1e-6)


@pytest.mark.parametrize("control_variate", [3, "reverse", (Reverse(), None)])
def test_what_is_no_variate(control_variate: Any) -> None:
    with pytest.raises(TypeError, match="a deterministic estimator is needed"):
        ForwardGradient(2, control_variate=control_variate)


def test_random_variates_are_refused() -> None:
    with pytest.raises(ValueError, match="must not depend on random directions"):
        ForwardGradient(2, control_variate=ForwardGradient(2))


# -- the search for the support ------------------------------------------------------------------------------------

PLACES = ("start", "first step", "later step", "last step", "second leaf", "cancelling", "moving state", "outer loss")
"""The places in which `one_place_each` uses one meta parameter each."""


def one_place_each() -> tuple[bilevel.Problem, dict[str, Tensor], list[int]]:
    """A problem of four inner steps whose meta parameters are named after the only place where they are used.

    "cancelling" moves two entries of the state by opposite amounts. "moving state" has a derivative only where the
    state differs from the initial one.
    """

    def init(meta: Any) -> Any:
        x = torch.stack([meta["start"], 0 * meta["start"].detach()])
        return {"x": x, "y": tensor(0.5), "moved": tensor(0.0)}

    def step(state: Any, meta: Any, batch: int) -> Any:
        x, y = state["x"], state["y"]
        if batch == 0:
            x = x + tensor([1.0, 2.0]) * meta["first step"]
        elif batch == 1:
            x = x + tensor([1.0, -1.0]) * meta["cancelling"]
            y = y + meta["second leaf"]
        elif batch == 2:
            x = x + tensor([0.5, 0.0]) * meta["later step"] + state["moved"] * meta["moving state"]
        else:
            x = x + tensor([0.0, 3.0]) * meta["last step"]
        return {"x": x, "y": y, "moved": state["moved"] + 1}

    def outer_loss(state: Any, meta: Any, batch: Any) -> Tensor:
        return (tensor([1.0, 3.0]) * state["x"].square()).sum() + state["y"].square() + meta["outer loss"] ** 3

    names = (*PLACES, "nowhere")
    meta = {name: tensor(0.3 + 0.1 * number) for number, name in enumerate(names)}
    return bilevel.Problem(init, step, outer_loss), meta, [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_the_support_search_sees_every_place_where_meta_is_used(seed: int) -> None:
    problem, meta, batches = one_place_each()
    masks = unflatten(flatten(meta)[1], reached(unroll(problem, meta, batches, None, seed)))
    assert {name: bool(mask) for name, mask in masks.items()} == {**dict.fromkeys(PLACES, True), "nowhere": False}


@pytest.mark.parametrize("as_one_leaf", [False, True])
def test_a_touched_support_loses_no_part_of_the_gradient(as_one_leaf: bool) -> None:
    problem, meta, batches = one_place_each()
    if as_one_leaf:
        inside, names = problem, list(meta)
        problem = bilevel.Problem(
            lambda phi: inside.init(dict(zip(names, phi, strict=True))),
            lambda state, phi, batch: inside.step(state, dict(zip(names, phi, strict=True)), batch),
            lambda state, phi, batch: inside.outer_loss(state, dict(zip(names, phi, strict=True)), batch),
        )
        meta = torch.stack(list(meta.values()))  # type: ignore[assignment]
    exact = Reverse()(problem, meta, batches).grad
    found = ForwardGradient(len(PLACES), "coordinate", support="reached")(problem, meta, batches).grad
    exact, found = (torch.cat([leaf.reshape(-1) for leaf in leaves(tree)]) for tree in (exact, found))
    assert int((exact != 0).sum()) == len(PLACES)
    assert found.numpy() == pytest.approx(exact.numpy(), rel=1e-12)


def test_the_support_search_leaves_the_global_generator_alone() -> None:
    problem, meta, batches = one_place_each()
    before = torch.get_rng_state()
    reached(unroll(problem, meta, batches, None, 0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["block", "coordinate", "orthogonal"])
@pytest.mark.parametrize("variate", [False, True])
def test_a_full_basis_of_a_touched_support_is_exact(name: str, variate: bool) -> None:
    """Two leaves with one touched entry each: two directions leave no error, whatever the control variate holds."""
    problem = bilevel.Problem(
        init=lambda phi: phi["a"][1:2] * 2,
        step=lambda state, phi, batch: state + phi["b"][:1].sin(),
        outer_loss=lambda state, phi, batch: state.square().sum(),
    )
    meta = {"a": tensor([0.1, 0.7, -0.4]), "b": tensor([1.1, 0.2])}
    other = Constant({"a": tensor([5.0, -2.0, 3.0]), "b": tensor([1.0, 7.0])}) if variate else None
    exact = Reverse()(problem, meta, [None, None]).grad
    found = ForwardGradient(2, name, support="reached", control_variate=other)(problem, meta, [None, None]).grad
    for leaf, truth in zip(leaves(found), leaves(exact), strict=True):
        assert leaf.numpy() == pytest.approx(truth.numpy(), rel=1e-12, abs=1e-14)
        assert torch.equal(leaf != 0, truth != 0)


# -- the step of central differences -------------------------------------------------------------------------------

FLOATS = {"double": (torch.float64, torch.float64), "single": (torch.float32, torch.float32)}
MIXED = {"single state": (torch.float32, torch.float64), "single meta": (torch.float64, torch.float32)}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3, 0.0])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtypes", [*FLOATS.values(), *MIXED.values()], ids=[*FLOATS, *MIXED])
def test_differences_step_by_the_cube_root_of_epsilon(
    dtypes: tuple[torch.dtype, torch.dtype], distribution: str, scale: float
) -> None:
    """The points at which `inner_loss` is called lie ∛ε ‖(θ, φ)‖ on either side, ε being that of the coarser dtype."""
    seen: list[Tensor] = []

    def inner_loss(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        seen.append(torch.tensor([*theta.tolist(), *phi.tolist()], dtype=torch.float64))  # .detach() would be held
        return ((theta.double() - phi.double()[:2]).square() * (1 + phi.double()[1:])).sum()

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda theta, phi, batch: theta.double().square().sum(),
        scale * torch.tensor([0.5, -1.5], dtype=dtypes[0]),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    phi = scale * torch.tensor([1.0, 2.0, -3.0], dtype=dtypes[1])
    for _ in range(2):  # the first estimate of a problem computes two steps again, to see whether they repeat
        seen.clear()
        ForwardGradient(1, distribution, tangents="difference")(problem, phi, bilevel.no_batches(3))
    assert len(seen) == 3 * 3
    root = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)
    for here, ahead, behind in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        wanted = root * (float(here.norm()) or 1.0)  # the origin has no length of its own
        assert float((ahead - here).norm()) == pytest.approx(wanted, rel=1e-3)
        assert float((behind - here).norm()) == pytest.approx(wanted, rel=1e-3)
        assert float((ahead + behind - 2 * here).norm()) < 1e-3 * wanted


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_differences_of_the_initial_state_step_by_the_length_of_meta(scale: float) -> None:
    seen: list[Tensor] = []

    def params(phi: Tensor) -> Tensor:
        seen.append(phi.detach())
        return phi.sin()[:2]

    problem = bilevel.GradientDescent(
        lambda theta, phi, batch: (theta - phi[1:]).square().sum(),
        lambda theta, phi, batch: theta.square().sum(),
        params,
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    phi = scale * tensor([0.5, 1.0, -2.0])
    ForwardGradient(1, tangents="difference")(problem, phi, bilevel.no_batches(1))
    lengths = [float((there - phi).norm()) for there in seen if not torch.equal(there, phi)]
    assert lengths == pytest.approx([torch.finfo(torch.float64).eps ** (1 / 3) * float(phi.norm())] * 2, rel=1e-4)


def curved(dtype: torch.dtype) -> tuple[bilevel.GradientDescent, Tensor]:
    """A problem whose inner gradient has all derivatives, so that differences have both errors."""
    problem = bilevel.GradientDescent(
        lambda theta, phi, batch: (theta * phi).sin().sum() + (theta.square() * phi.exp()).sum(),
        lambda theta, phi, batch: theta.square().sum(),
        lambda phi: phi.cos(),
        bilevel.optimizer(torch.optim.SGD, lr=0.05),
    )
    return problem, torch.tensor([0.6, -0.9, 0.3, 1.2], dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_differences_are_as_exact_as_their_step_allows(dtype: str) -> None:
    # The error is about ∛ε² of the third derivative and of rounding: 4e-11 in float64, 2e-5 in float32. A step of √ε
    # has an error of √ε from rounding, 1.5e-8 and 3e-4; one-sided differences have ∛ε, 6e-6 and 5e-3.
    problem, phi = curved(FLOATS[dtype][0])
    found = ForwardGradient(4, "coordinate", tangents="difference")(problem, phi, bilevel.no_batches(3)).grad
    exact = Reverse()(*curved(torch.float64), bilevel.no_batches(3)).grad
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < 5 * torch.finfo(phi.dtype).eps ** (2 / 3)


def test_differences_along_a_direction_of_length_zero_are_zero() -> None:
    """A chunk may hold such a direction beside others: in blocks, that of a leaf without entries."""
    problem, phi = curved(torch.float64)
    run = unroll(problem, phi, bilevel.no_batches(3), None, 0)
    slopes = push_forward(run, [torch.stack([torch.zeros_like(phi), torch.ones_like(phi)])], FiniteDifferences())
    assert slopes.slopes[0] == 0
    exact = Reverse()(problem, phi, bilevel.no_batches(3)).grad
    assert float(slopes.slopes[1]) == pytest.approx(float(exact.sum()), rel=1e-9)


# -- the fit of control variates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "m"), [(2, 1), (5, 1), (5, 2), (9, 3), (3, 4)])
def test_scales_are_least_squares_on_the_other_directions_and_one_of_weight_one_over_b(b: int, m: int) -> None:
    """s_i minimises Σ_{j≠i} (w_j − s·p_j)² + ‖s·c‖²/b, solved as a stack of equations, over two leaves of φ."""
    rng = np.random.default_rng([b, m])
    c = rng.standard_normal((m, 7))
    v = rng.choice([-1.0, 1.0], size=(b, 7))
    w, p = rng.standard_normal(b), v @ c.T
    expected = []
    for i in range(b):
        rows = np.concatenate([np.delete(p, i, axis=0), c.T / np.sqrt(b)])
        values = np.concatenate([np.delete(w, i), np.zeros(7)])
        expected.append(np.linalg.lstsq(rows, values, rcond=None)[0])
    found = fitted_scales(tensor(w), tensor(p), [tensor(c[:, :4]).reshape(m, 2, 2), tensor(c[:, 4:])])
    assert found.numpy() == pytest.approx(np.stack(expected), rel=1e-8)


def test_one_scale_per_variate_and_direction_is_what_the_estimate_uses() -> None:
    """The formula (1/b) Σ (w_i − s_i·p_i) v_i + s̄·c, with scales from least squares, by hand."""
    rng = np.random.default_rng(3)
    directions = Directions("rademacher", 0, 4, [torch.zeros(6, dtype=torch.float64)])
    v, w, c = directions.draw(range(4))[0].numpy(), rng.standard_normal(4), rng.standard_normal((2, 6))
    p = v @ c.T
    scales = fitted_scales(tensor(w), tensor(p), [tensor(c)]).numpy()
    expected = ((w - (scales * p).sum(1)) @ v) / 4 + scales.mean(0) @ c
    assert combine(directions, tensor(w), [tensor(c)]).grad[0].numpy() == pytest.approx(expected, rel=1e-10)


def test_the_number_of_the_draw_changes_directions_alone() -> None:
    """Dropout, the outer loss and the control variate's gradient go by the seed of the estimate, whatever the draw."""

    def inner_loss(theta: Tensor, phi: Tensor, batch: Any) -> Tensor:
        kept = torch.nn.functional.dropout(phi, 0.5, training=True)
        return (theta - kept).square().sum()

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda theta, phi, batch: (theta - 1).square().sum(),
        torch.zeros(6, dtype=torch.float64),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    phi = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    exact = Reverse()(problem, phi, bilevel.no_batches(4), seed=7)
    for draw in range(3):
        plain, helped, whole = (
            ForwardGradient(b, "orthogonal", control_variate=variate, draw=draw)(
                problem, phi, bilevel.no_batches(4), seed=7
            )
            for b, variate in ((5, None), (5, Reverse()), (6, None))
        )
        assert torch.equal(plain.value, exact.value)
        assert torch.equal(helped.value, exact.value)
        assert whole.grad.numpy() == pytest.approx(exact.grad.numpy(), rel=1e-10)
        # The exact gradient as the variate: what the fit leaves is that of one direction of slope 0, 1/b² or so.
        assert helped.diagnostics["variance_left"] < 0.1
    assert not torch.equal(exact.value, Reverse()(problem, phi, bilevel.no_batches(4), seed=8).value)


# -- what the running mean is a mean of ----------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 40.0])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_the_running_mean_is_that_of_whole_estimates_over_all_phases(decay: float, clip_norm: float | None) -> None:
    """Against a loop by hand, whose mean takes in each step's averaged estimate as it is before clipping."""
    estimator, rate = ForwardGradient(4, control_variate=RunningMean(decay)), 1e-3
    phases = [Phase(TruncatedReverse(1), 1), Phase(estimator, 2), Phase(estimator, 3, accumulate=2)]
    result = bilevel.fit(
        BIG.problem,
        BIG.meta,
        BIG.inner_batches,
        tensor(BIG.outer.a),
        phases=phases,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=rate),
        update=bilevel.OuterUpdate(clip_norm=clip_norm),
        progress=False,
    )
    phi, past, rows, factors = BIG.meta.clone(), None, [], []
    for phase in phases:
        for _ in range(phase.steps):
            used = phase.estimator
            if used is estimator:
                used = ForwardGradient(4, control_variate=None if past is None else Constant(past))
            seeds = [derive(0, DRAW, len(rows), number) for number in range(phase.accumulate)]
            found = [used(BIG.problem, phi, BIG.inner_batches, tensor(BIG.outer.a), seed) for seed in seeds]
            grad = torch.stack([estimate.grad for estimate in found]).mean(0)
            past = (1 - decay) * grad + (0 if past is None else decay * past)
            rows.append(float(grad.norm()))
            factors.append(1.0 if clip_norm is None else min(1.0, clip_norm / float(grad.norm())))
            phi = phi - rate * factors[-1] * grad
    assert [row["grad_norm"] for row in result.history] == pytest.approx(rows, rel=1e-9)
    assert result.meta.numpy() == pytest.approx(phi.numpy(), rel=1e-9)
    if clip_norm is not None:
        assert len(set(factors)) == len(factors)  # every estimate was cut, and by a factor of its own


def test_the_running_mean_of_equal_estimates_is_that_estimate() -> None:
    """Its weight makes up for the zeros that it begins with, from the first estimate on."""
    estimator = ForwardGradient(2, control_variate=RunningMean(0.8))
    past, grad = PastEstimates.wanted_by([Reverse(), estimator]), tensor([1.0, -2.0])
    assert past.given_to(estimator) == ForwardGradient(2)
    for _ in range(5):
        past.remember([grad])
        (variate,) = past.given_to(estimator).control_variate  # type: ignore[attr-defined]
        assert isinstance(variate, Constant)
        assert variate.value[0].numpy() == pytest.approx(grad.numpy(), rel=1e-12)
    past.remember([tensor([11.0, -2.0])])
    (variate,) = past.given_to(estimator).control_variate  # type: ignore[attr-defined]
    assert float(variate.value[0][0]) == pytest.approx(1 + 10 * 0.2 / (1 - 0.8**6), rel=1e-12)


# -- the warning of noise ------------------------------------------------------------------------------------------

SIGNAL, NOISE = (10.0, 1.0), (3.0, 3.0)
"""An estimate's length and standard error; that of the second is noise alone."""


@dataclass(frozen=True)
class Scripted(Estimator):
    """An estimator whose estimates have prescribed lengths and standard errors, draw by draw."""

    script: tuple[tuple[float, float | None], ...]
    is_random = False

    def units(self, steps: int, meta_size: int, losses: int = 1) -> float:
        raise NotImplementedError

    def _estimate(self, run: Unroll) -> Estimate:
        length, error = self.script[run.outer_batch]
        grad = map_leaves(lambda leaf: torch.full_like(leaf, length / leaf.numel() ** 0.5), run.meta)
        return Estimate(tensor(0.0), grad, run.start(), error)


def steps_that_warn(script: Any, phases: Callable[[Estimator], list[Phase]] | None = None, **changes: Any) -> list[int]:
    """The outer steps, from 1 on, at which a scripted run warns of noise."""
    estimator = Scripted(tuple(script))
    ends, stop_at = [0], changes.pop("stop_at", 99)

    def note(step: OuterStep) -> None:
        ends.extend([step.number] * (len(caught) - len(ends) + 1))
        _stop(step.number, stop_at)

    constant = bilevel.Problem(lambda phi: phi, lambda state, phi, batch: state, lambda state, phi, batch: state.sum())
    with warnings.catch_warnings(record=True) as caught, suppress(Stop):
        warnings.simplefilter("always")
        bilevel.fit(
            constant,
            torch.zeros(4, dtype=torch.float64),
            bilevel.no_batches(1),
            lambda draw: draw,
            phases=[Phase(estimator, len(script))] if phases is None else phases(estimator),
            optimizer=bilevel.optimizer(torch.optim.SGD, lr=1e-3),
            callbacks=[note],
            progress=False,
            **grouped(changes),
        )
    assert all("estimates are noise" in str(warning.message) for warning in caught)
    return ends[1:]


def test_noise_is_warned_of_at_the_tenth_noisy_step_and_never_again() -> None:
    assert steps_that_warn([NOISE] * 9) == []
    assert steps_that_warn([NOISE] * 25) == [10]
    assert steps_that_warn([SIGNAL] * 10 + [NOISE] * 30) == []  # the first ten decide
    exact = (3.0, None)  # no random directions
    assert steps_that_warn([exact] * 4 + [NOISE] * 6 + [exact] * 3 + [NOISE] * 6) == [17]


def test_the_watch_for_noise_goes_on_through_phases() -> None:
    assert steps_that_warn([NOISE] * 12, lambda each: [Phase(each, 6), Phase(each, 6)]) == [10]
    assert steps_that_warn([SIGNAL] * 6 + [NOISE] * 12, lambda each: [Phase(each, 6), Phase(each, 12)]) == []
    assert steps_that_warn([NOISE] * 24, lambda each: [Phase(each, 12, accumulate=2)]) == []  # their mean has a signal


@pytest.mark.parametrize(("squared_ratio", "warned"), [(0.0, True), (0.0091, True), (0.0109, False), (0.09, False)])
@pytest.mark.parametrize("error", [1e-3, 1.0, 50.0])
def test_noise_is_a_signal_of_less_than_a_tenth_of_the_standard_error(
    squared_ratio: float, warned: bool, error: float
) -> None:
    watch = NoiseWatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            watch.add((1 + squared_ratio) * error**2, error)
    assert len(caught) == warned
    if warned:
        assert f"the signal is {squared_ratio**0.5:.2g} of the standard error" in str(caught[0].message)


@pytest.mark.parametrize("stop_at", [1, 6, 9, 10, 12])
@pytest.mark.parametrize("name", ["noise", "first noise", "first signal"])
def test_a_resumed_run_warns_of_noise_where_the_whole_run_does(name: str, stop_at: int, tmp_path: Path) -> None:
    script: Any = {
        "noise": [NOISE] * 25,
        "first noise": [(300.0, 300.0)] * min(stop_at, 9) + [SIGNAL] * 20,
        "first signal": [(300.0, 1.0)] * min(stop_at, 9) + [NOISE] * 20,
    }[name]
    whole = steps_that_warn(script)
    assert whole == ([] if name == "first signal" else [10])
    steps_that_warn(script, out=tmp_path, stop_at=stop_at)
    assert steps_that_warn(script, out=tmp_path, resume=True) == [step for step in whole if step > stop_at]


def test_clipping_does_not_make_noise_of_a_signal() -> None:
    assert steps_that_warn([SIGNAL] * 12, clip_norm=0.1) == []
