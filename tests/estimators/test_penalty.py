"""The first-order penalty method: its definition as plain PyTorch loops, its bias, streams, and fused kernels."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_forms import LEARNING_RATE, descent, tensor
from estimator_table import neumann_series
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

import bilevel
from bilevel import Penalty
from bilevel.errors import NonFiniteError
from bilevel.training.outer_loop import OuterStep

T = 5


def weights_of(meta: Any, count: int) -> Tensor:
    return meta["weights"].sigmoid()[:count]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.randint(2, (6,), generator=generator)


BATCHES, OUTER = [data(seed) for seed in range(T)], data(99)
META = {"weights": torch.linspace(-1, 1, 6, dtype=torch.float64), "log_decay": torch.tensor(-2.0, dtype=torch.float64)}


def inner_loss(model: Any, meta: Any, batch: Any) -> Tensor:
    losses = functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (weights_of(meta, len(losses)) * losses).mean()


def outer_loss(model: Any, meta: Any, batch: Any) -> Tensor:
    explicit = meta["weights"].square().sum() * model(batch[0]).square().mean()
    return functional.cross_entropy(model(batch[0]), batch[1]) + 0.1 * explicit


def by_hand(
    algorithm: Any, settings: dict[str, Any], weight: float, steps: int, batches: int, decay: bool
) -> dict[str, Tensor]:
    """Two copies of the module, each with an optimiser of PyTorch's own."""
    meta = {name: leaf.clone().requires_grad_() for name, leaf in META.items()}
    lower, rate = network(), float(META["log_decay"].exp()) if decay else 0.0

    def trainer(model: nn.Module) -> torch.optim.Optimizer:
        return algorithm(model.parameters(), weight_decay=rate, **settings)

    sign = -1 if settings.get("maximize") else 1
    optimizer, upper = trainer(lower), lower
    second = optimizer
    for t, batch in enumerate(BATCHES):
        if t == T - steps:
            upper = copy.deepcopy(lower)
            second = trainer(upper)
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if t >= T - steps:
            second.zero_grad()
            (sign * inner_loss(upper, META, batch) + sign * outer_loss(upper, META, OUTER) / weight).backward()
            second.step()
        optimizer.zero_grad()
        (sign * inner_loss(lower, META, batch)).backward()
        optimizer.step()

    def objective(model: nn.Module) -> Tensor:
        parameters = [p.detach() for p in model.parameters()]
        norms = torch.stack([p.square().sum() for p in parameters])
        losses = torch.stack([inner_loss(model, meta, batch) for batch in BATCHES[T - batches :]])
        return losses.mean() + (0.5 * meta["log_decay"].exp() * norms.sum() if decay else 0.0)

    total = outer_loss(upper, meta, OUTER) + weight * (objective(upper) - objective(lower))
    found = torch.autograd.grad(total, list(meta.values()), allow_unused=True)
    return {n: torch.zeros_like(m) if g is None else g for (n, m), g in zip(meta.items(), found, strict=True)}


def problem(algorithm: Any, settings: dict[str, Any], decay: bool) -> bilevel.GradientDescent:
    sign = -1 if settings.get("maximize") else 1
    learned: dict[str, Any] = {"weight_decay": lambda meta: meta["log_decay"].exp()} if decay else {}
    return bilevel.GradientDescent(
        lambda model, meta, batch: sign * inner_loss(model, meta, batch),
        outer_loss,
        network(),
        bilevel.optimizer(algorithm, **settings, **learned),
    )


@pytest.mark.parametrize("weight", [3.0, 100.0])
@pytest.mark.parametrize(("steps", "batches"), [(T, 1), (T, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("algorithm", "settings", "decay"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, False),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, True),
        (torch.optim.Adam, {"lr": 0.01}, False),
        (torch.optim.Adam, {"lr": 0.01}, True),
    ],
)
def test_it_is_two_plain_loops_and_three_first_order_gradients(
    algorithm: Any, settings: dict[str, Any], decay: bool, steps: int, batches: int, weight: float
) -> None:
    estimator = Penalty(weight, steps=None if steps == T else steps, batches=batches)
    found = estimator(problem(algorithm, settings, decay), META, BATCHES, OUTER)
    truth = by_hand(algorithm, settings, weight, steps, batches, decay)
    for name, value in truth.items():
        torch.testing.assert_close(found.grad[name], value, rtol=1e-8, atol=1e-10)
    assert found.grad["weights"].norm() > 1e-3


def test_the_bias_falls_with_one_over_the_penalty() -> None:
    case = descent("", T=300, explicit=True)
    truth = case.gradient
    errors = [case.error(case(Penalty(penalty)), truth) for penalty in (500.0, 1000.0, 2000.0)]
    assert errors[0] > 1e-4
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.02)  # the next term is O(1/λ²)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_of_a_large_penalty_a_neumann_series_is_left(steps: int) -> None:
    case = descent("", T=100, explicit=True)  # at rest, so that ∂f/∂θ is the same at all of the last steps
    truth = case.implicit(inverse=lambda H: neumann_series(H, steps - 1, LEARNING_RATE))
    assert case.error(case(Penalty(1e6, steps=steps)), truth) < 1e-5  # O(1/λ)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_windows_at_fixed_meta_are_one_long_window() -> None:
    made = problem(torch.optim.Adam, {"lr": 0.01}, True)
    whole, carried, last = Penalty(10.0)(made, META, BATCHES * 2, OUTER), None, None
    for _ in range(2):
        last = Penalty(10.0)(made, META, BATCHES, OUTER, carried=carried)
        carried = last.carried
    assert last is not None
    for name, value in whole.grad.items():
        torch.testing.assert_close(last.grad[name], value, rtol=1e-9, atol=1e-12)
    cold = Penalty(10.0, steps=T)(made, META, BATCHES, OUTER, carried=last.carried)
    assert cold.carried is not None
    assert cold.carried.memory["second"] is None


def test_the_schedule_raises_the_penalty_from_window_to_window() -> None:
    made, carried, seen = problem(torch.optim.SGD, {"lr": 0.1}, False), None, []
    for _ in range(3):
        found = Penalty(10.0, growth=0.5)(made, META, BATCHES, OUTER, carried=carried)
        seen.append(found.diagnostics["penalty"])
        carried = found.carried
    assert seen == pytest.approx([10.0, 10.0 * 2**0.5, 10.0 * 3**0.5])


class Stop(KeyboardInterrupt):
    pass


def test_a_stream_resumes_exactly(tmp_path: Path) -> None:
    def fit(out: Path | None = None, stop_at: int = 99, resume: bool = False) -> Any:
        def stop(step: OuterStep) -> None:
            if step.number > stop_at:
                raise Stop

        return bilevel.fit(
            problem(torch.optim.Adam, {"lr": 0.01}, True),
            META,
            BATCHES,
            OUTER,
            estimator=Penalty(10.0, growth=0.3),
            steps=5,
            stream=True,
            callbacks=[stop],
            out=None if out is None else bilevel.RunFolder(out, resume=resume),
            progress=False,
        )

    straight = fit()
    with pytest.raises(Stop):
        fit(tmp_path, stop_at=2)
    resumed = fit(tmp_path, resume=True)
    for name, value in straight.meta.items():
        assert torch.equal(value, resumed.meta[name])
    assert [row["outer_loss"] for row in straight.history] == [row["outer_loss"] for row in resumed.history]


def test_a_stream_with_a_fixed_penalty_ends_where_the_penalised_loss_is_least() -> None:
    """On a quadratic, ∇L_λ is affine in φ, and the stream ends at its root rather than at that of ∇h."""
    case, penalty = descent("", T=2, N=1), Penalty(50.0)
    long = bilevel.batches(lambda t: case.inner_batches[0], 100)  # type: ignore[index]
    found = bilevel.fit(
        case.problem,
        case.meta,
        case.inner_batches,
        tensor(case.outer.a),
        estimator=penalty,
        steps=200,
        stream=True,
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.05),
        progress=False,
    ).meta

    def at_rest(estimator: bilevel.Estimator, meta: Tensor) -> float:
        return abs(float(estimator(case.problem, meta, long, tensor(case.outer.a)).grad))

    assert at_rest(penalty, found) < 1e-6 * at_rest(penalty, case.meta)
    assert at_rest(bilevel.Implicit(), found) > 1e-4 * at_rest(bilevel.Implicit(), case.meta)


# -- language models ---------------------------------------------------------------------------------------------------


def language_model(checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model: Any = GPT2LMHeadModel(config)  # pyright: ignore[reportCallIssue]
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


TOKENS = torch.randint(17, (3, 8, 16), generator=torch.Generator().manual_seed(0))


def mixture(model: Any, bfloat16: bool) -> bilevel.GradientDescent:
    """Weights of two sources of text, chosen for a third one. Attention must not fall back to its plain form."""

    def source_loss(model: Any, tokens: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return model(input_ids=tokens, labels=tokens).loss

    def inner_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        weights = meta.softmax(0)
        return torch.stack([weights[i] * source_loss(model, TOKENS[i]) for i in range(2)]).sum()

    return bilevel.GradientDescent(
        inner_loss,
        lambda model, meta, batch: source_loss(model, TOKENS[2]),
        model,
        bilevel.optimizer(torch.optim.AdamW, lr=1e-3),
    )


def operations(call: Any) -> tuple[Any, set[str]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    return result, {event.key for event in profile.key_averages()}


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_fused_attention_and_checkpointing_stay_as_they_are(checkpointing: bool, bfloat16: bool) -> None:
    made = mixture(language_model(checkpointing), bfloat16)
    found, seen = operations(lambda: Penalty(10.0)(made, torch.zeros(2), 3))
    assert any("_scaled_dot_product_flash_attention_for_cpu_backward" in name for name in seen)
    assert not any("attention_math" in name for name in seen)
    plain = mixture(language_model(), False)
    truth = Penalty(10.0)(plain, torch.zeros(2), 3).grad
    assert float(truth.norm()) > 0
    # Adam turns bfloat16's 8 bits into steps of another sign where a gradient is small, so the bound is wide there.
    bound = 0.3 if bfloat16 else 1e-3
    assert float((found.grad - truth).norm() / truth.norm()) < bound


def test_a_language_model_trains_under_fit() -> None:
    result = bilevel.fit(
        mixture(language_model(True), True),
        torch.zeros(2),
        2,
        estimator=Penalty(10.0),
        steps=2,
        stream=True,
        progress=False,
    )
    assert len(result.history) == 2
    assert bool(torch.isfinite(result.meta).all())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    made = problem(torch.optim.SGD, {"lr": 0.1}, False)
    with pytest.raises(ValueError, match=r"Penalty\(steps=6\) of an inner loop with 5 steps; take steps <= 5"):
        Penalty(steps=6)(made, META, BATCHES, OUTER)
    with pytest.raises(ValueError, match=r"Penalty\(batches=6\)"):
        Penalty(batches=6)(made, META, BATCHES, OUTER)
    for settings in ({"penalty": 0.0}, {"growth": -1.0}, {"steps": 0}, {"batches": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Penalty(**settings)  # type: ignore[arg-type]
    stream = bilevel.StreamingForwardGradient(2)(made, META, BATCHES, OUTER)
    with pytest.raises(ValueError, match="not the second copy"):
        Penalty()(made, META, BATCHES, OUTER, carried=stream.carried)
    hooked = network()
    next(hooked.parameters()).register_hook(lambda grad: 2 * grad)
    with pytest.raises(ValueError, match="hooks that change its gradient"):
        Penalty()(bilevel.GradientDescent(inner_loss, outer_loss, hooked, made.optimizer), META, BATCHES, OUTER)


def test_a_second_copy_that_diverges_is_named() -> None:
    case = descent("", T=150)
    with pytest.raises(NonFiniteError, match=r"second copy became NaN or infinite.*larger penalty"):
        case(Penalty(1e-3))
