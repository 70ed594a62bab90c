"""Hypergradients through real models: convolutions, recurrence, attention, and `transformers` as they come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from plain_training import (
    TEN_OPTIMIZERS,
    central_difference,
    class_name,
    default_dtype,
    numerical_gradient,
    trained_module,
    trained_tensors,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import bilevel
from bilevel import trees
from bilevel.directions import distributions
from bilevel.errors import BilevelError, MissingDerivativeError

DOUBLE = torch.float64
Loss = Callable[[Any, Any, Any], Tensor]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@dataclass
class Case:
    """A model, its losses, and the point at which they are differentiated."""

    model: nn.Module
    inner: Loss
    outer: Loss
    meta: Tensor
    batches: Sequence[Any] = (None, None, None)

    def problem(self, optimizer: Any) -> bilevel.GradientDescent:
        return bilevel.GradientDescent(self.inner, self.outer, self.model, optimizer)

    def h(self, algorithm: type[torch.optim.Optimizer], settings: dict[str, Any]) -> Callable[[Tensor], float]:
        """The outer loss as a function of meta, by ordinary training."""

        def value(meta: Tensor) -> float:
            trained = trained_module(self.inner, self.model, meta, self.batches, lambda p: algorithm(p, **settings))
            with torch.no_grad():
                return self.outer(trained, meta, None).item()

        return value


def assert_directional_derivatives_agree(
    case: Case, problem: Any, h: Callable[[Tensor], float], rtol: float = 1e-5, offset: float = 1e-7
) -> None:
    """Reverse, one direction, two directions at once, and differences of `h`, along random directions.

    The offset is small because Adam and its kin turn sharply where a gradient is small; some 10 roundings of h are
    then left, 1e-15/offset.
    """
    first, second = distributions.Directions("rademacher", 0, 2, trees.leaves(case.meta)).draw([0, 1])[0]
    reverse = bilevel.Reverse()(problem, case.meta, case.batches)
    one = bilevel.ForwardGradient(1)(problem, case.meta, case.batches)
    two = bilevel.ForwardGradient(2)(problem, case.meta, case.batches)

    slopes = [(reverse.grad * v).sum() for v in (first, second)]
    expected = central_difference(h, case.meta, first, offset)
    assert abs(expected) > 1e-4, "too flat to tell anything"
    torch.testing.assert_close(slopes[0].item(), expected, rtol=rtol, atol=1e-15 / offset)
    torch.testing.assert_close(one.grad, slopes[0] * first, rtol=1e-9, atol=0)
    torch.testing.assert_close(two.grad, (slopes[0] * first + slopes[1] * second) / 2, rtol=1e-9, atol=1e-12)
    for estimate in (reverse, one, two):
        torch.testing.assert_close(estimate.value.item(), h(case.meta), rtol=1e-12, atol=0)


# -- the models ------------------------------------------------------------------------------------------------------


def convnet() -> Case:
    """Condensation: the meta parameters are the training images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(3, 3),
    ).to(DOUBLE)  # fmt: skip
    labels, images = torch.arange(3), normal(6, 1, 4, 4, seed=2)
    return Case(
        model,
        lambda model, meta, batch: functional.cross_entropy(model(meta), labels),
        lambda model, meta, batch: functional.cross_entropy(model(images), labels.repeat(2)),
        normal(3, 1, 4, 4),
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1]).squeeze(1)


def lstm() -> Case:
    """A weight for each sequence, and a decay on all parameters."""
    torch.manual_seed(0)
    sequences, targets = normal(5, 6, 3), normal(5, seed=2)

    def inner(model: Any, meta: Tensor, batch: None) -> Tensor:
        decay = sum(p.square().sum() for p in model.parameters())
        return (meta[:5] * (model(sequences[:5]) - targets).square()).mean() + meta[5] * decay

    return Case(
        Recurrent().to(DOUBLE),
        inner,
        lambda model, meta, batch: (model(sequences.flip(1)) - targets).square().mean(),
        torch.tensor([1.0, 0.5, 1.5, 0.8, 1.2, 0.01], dtype=DOUBLE),
    )


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1)).squeeze(1)


def transformer_encoder() -> Case:
    """In eval mode, where PyTorch takes a fused layer if it can."""
    torch.manual_seed(0)
    sequences, targets = normal(4, 5, 4), normal(4, seed=2)
    return Case(
        Attentive().to(DOUBLE).eval(),
        lambda model, meta, batch: (meta * (model(sequences) - targets).square()).mean(),
        lambda model, meta, batch: (model(sequences.flip(1)) - targets).square().mean(),
        torch.tensor([1.0, 0.5, 1.5, 0.8], dtype=DOUBLE),
    )


TOKENS = torch.tensor([[1, 5, 2, 7, 0, 0], [3, 6, 6, 4, 9, 8]])  # the first one is padded
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
LABELS = TOKENS.masked_fill(MASK == 0, -100)
LABELS[1, :2] = -100  # a prompt


def language_case(model: nn.Module) -> Case:
    """A weight for each sequence, by the model's own loss."""

    def inner(model: Any, meta: Tensor, batch: None) -> Tensor:
        each = [
            model(input_ids=TOKENS[i : i + 1], attention_mask=MASK[i : i + 1], labels=LABELS[i : i + 1]).loss
            for i in range(2)
        ]
        return meta[0] * each[0] + meta[1] * each[1]

    def outer(model: Any, meta: Tensor, batch: None) -> Tensor:
        return model(input_ids=TOKENS.flip(1), attention_mask=MASK.flip(1), labels=LABELS.flip(1)).loss

    return Case(model.to(DOUBLE), inner, outer, torch.tensor([1.0, 0.5], dtype=DOUBLE))


SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "vocab_size": 11}


def gpt2(dropout: float = 0.0) -> Case:
    torch.manual_seed(0)
    dropouts: dict[str, Any] = {f"{place}_pdrop": dropout for place in ("resid", "embd", "attn")}
    model = GPT2LMHeadModel(GPT2Config(n_positions=6, n_embd=8, n_layer=1, n_head=2, **SPECIAL, **dropouts))
    assert model.config._attn_implementation == "sdpa"
    return language_case(model.train())


def llama() -> Case:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=6,
        **SPECIAL,
    )
    model = LlamaForCausalLM(config)
    assert model.config._attn_implementation == "sdpa"
    return language_case(model.train())


CASES = {"convnet": convnet, "lstm": lstm, "encoder": transformer_encoder, "gpt2": gpt2, "llama": llama}


@pytest.fixture
def transformers_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` rounds logits and norms to float32 on the way, which would leave differences three digits."""

    def rms_norm(self: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)


@pytest.mark.sampled(every=5)
@pytest.mark.usefixtures("transformers_in_double")
@pytest.mark.parametrize("algorithm", TEN_OPTIMIZERS, ids=class_name)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_derivatives_of_every_model_with_every_optimizer(
    make: Callable[[], Case], algorithm: type[torch.optim.Optimizer]
) -> None:
    case, settings = make(), TEN_OPTIMIZERS[algorithm]
    with default_dtype(DOUBLE):  # for the counters of the plain NAdam and ASGD
        problem = case.problem(bilevel.optimizer(algorithm, **settings))
        assert_directional_derivatives_agree(case, problem, case.h(algorithm, settings))


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_transformers_as_they_come(make: Callable[[], Case], request: pytest.FixtureRequest) -> None:
    """With their own roundings to float32: no differences to compare with, but the derivative is the same."""
    optimizer = bilevel.optimizer(torch.optim.AdamW, lr=0.01)
    case = make()
    reverse = bilevel.Reverse()(case.problem(optimizer), case.meta, case.batches)
    forward = bilevel.Forward()(case.problem(optimizer), case.meta, case.batches)
    request.getfixturevalue("transformers_in_double")
    in_double = bilevel.Reverse()(case.problem(optimizer), case.meta, case.batches)
    assert reverse.value.dtype == torch.float32
    torch.testing.assert_close(reverse.grad, in_double.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(forward.grad, in_double.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("transformers_in_double")
def test_dropout_is_a_function_of_seed_and_step() -> None:
    case = gpt2(dropout=0.2)
    problem = case.problem(bilevel.optimizer(torch.optim.AdamW, lr=0.01))

    def value(meta: Tensor) -> float:
        return bilevel.TruncatedReverse(1)(problem, meta, case.batches).value.item()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_directional_derivatives_agree(case, problem, value)
    assert torch.equal(torch.get_rng_state(), before)

    again, other = (bilevel.ForwardGradient(2)(problem, case.meta, case.batches, seed=seed) for seed in (0, 1))
    first = bilevel.ForwardGradient(2)(problem, case.meta, case.batches)
    assert torch.equal(first.grad, again.grad)
    assert not torch.equal(first.value, other.value)
    assert first.value != bilevel.Reverse()(gpt2().problem(problem.optimizer), case.meta, case.batches).value


def test_every_step_draws_its_own_numbers_again() -> None:
    drawn: dict[int, set[float]] = {}

    def inner(theta: Tensor, meta: Tensor, batch: int) -> Tensor:
        drawn.setdefault(batch, set()).add(torch.rand(()).item())
        return (theta - meta).square().sum()

    problem = bilevel.GradientDescent(
        inner, lambda theta, meta, batch: theta.sum(), THETA, bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )
    for estimator in (bilevel.Reverse(), bilevel.ForwardGradient(2)):
        estimator(problem, PHI, [0, 1, 2])
    assert [len(numbers) for numbers in drawn.values()] == [1, 1, 1], "the same at every computation of a step"
    assert len(set.union(*drawn.values())) == 3, "others in another step"


def test_fresh_initialisation_for_each_solve() -> None:
    case = lstm()
    problem = bilevel.GradientDescent(
        case.inner, case.outer, lambda meta: Recurrent().to(DOUBLE), bilevel.optimizer(torch.optim.SGD, lr=0.1)
    )

    def value(meta: Tensor, seed: int = 0) -> float:
        return bilevel.TruncatedReverse(1)(problem, meta, case.batches, seed=seed).value.item()

    assert_directional_derivatives_agree(case, problem, value)
    assert value(case.meta, seed=1) != value(case.meta)
    assert not torch.__future__.get_swap_module_params_on_conversion()


@pytest.mark.usefixtures("transformers_in_double")
def test_fresh_model_keeps_its_tied_weights() -> None:
    case = gpt2()

    def made(meta: Tensor) -> nn.Module:
        return copy.deepcopy(case.model).to(torch.float32).to(DOUBLE)

    problem = bilevel.GradientDescent(case.inner, case.outer, made, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    estimate = bilevel.ForwardGradient(2)(problem, case.meta, case.batches)
    assert estimate.state.params.named_tensors.keys() == dict(case.model.named_parameters()).keys()


# -- kernels without a forward mode ----------------------------------------------------------------------------------


def kernel_switches() -> list[Any]:
    return [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.mkldnn.deterministic,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    ]


@pytest.mark.parametrize("make", [lstm, transformer_encoder], ids=["lstm", "encoder"])
@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.ForwardGradient(2)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("fails", [False, True], ids=["", "exception"])
@pytest.mark.parametrize("fast", [False, True], ids=["slow before", "fast before"])
def test_kernels_are_chosen_inside_only(
    make: Callable[[], Case], estimator: bilevel.Estimator, fails: bool, fast: bool
) -> None:
    case, seen = make(), []

    def outer(model: Any, meta: Tensor, batch: None) -> Tensor:
        seen.append(kernel_switches())
        if fails:
            raise ZeroDivisionError
        return case.outer(model, meta, batch)

    problem = bilevel.GradientDescent(case.inner, outer, case.model, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    default = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fast)
        before = kernel_switches()
        if fails:
            with pytest.raises(ZeroDivisionError):
                estimator(problem, case.meta, case.batches)
        else:
            estimator(problem, case.meta, case.batches)
        assert kernel_switches() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(default)
    flash, efficient, math, cudnn_attention, fast_layer, onednn, _, cudnn, *_ = seen[0]
    assert (flash, efficient, math, cudnn_attention, fast_layer) == (False, False, True, False, False)
    recurrent = make is lstm  # convolutions share oneDNN and cuDNN, and keep them elsewhere
    assert (onednn, cudnn) == (not recurrent and before[5], not recurrent and before[7])


def test_lstm_in_single_precision() -> None:
    """Where PyTorch would take the fused kernel of oneDNN."""
    case = lstm()
    double = bilevel.Reverse()(case.problem(bilevel.optimizer(torch.optim.SGD, lr=0.1)), case.meta, case.batches)

    model, sequences = Recurrent(), normal(5, 6, 3).float()
    model.load_state_dict(case.model.state_dict())
    if torch.backends.mkldnn.is_available():
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        with pytest.raises(NotImplementedError, match="mkldnn_rnn_layer"):
            torch.func.jvp(lambda t: torch.func.functional_call(model, t, (sequences,)), (tensors,), (tensors,))

    single = Case(model, in_single_precision(case.inner), in_single_precision(case.outer), case.meta.float())
    problem = single.problem(bilevel.optimizer(torch.optim.SGD, lr=0.1))
    for estimator in (bilevel.Reverse(), bilevel.Forward()):
        found = estimator(problem, single.meta, single.batches)
        assert found.value.dtype == torch.float32
        # three steps of a dozen products each, every one rounded to 6e-8
        torch.testing.assert_close(found.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


def in_single_precision(loss: Loss) -> Loss:
    """The loss, with its data (which is in double precision) rounded on entering the model."""

    def rounded(model: Any, meta: Tensor, batch: Any) -> Tensor:
        class Rounding:
            def __call__(self, x: Tensor) -> Tensor:
                return model(x.float())

            def parameters(self) -> Any:
                return model.parameters()

        return loss(Rounding(), meta, batch).float()

    return rounded


def test_fused_attention_has_no_forward_mode() -> None:
    """So that the choice of another kernel is known to be needed."""
    query = normal(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="scaled_dot_product"):
        torch.func.jvp(lambda q: functional.scaled_dot_product_attention(q, q, q), (query,), (query,))


# -- meta parameters of every kind -----------------------------------------------------------------------------------


class Weighting(nn.Module):
    """A weight for each example, from its loss (Meta-Weight-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, 3)
        self.out = nn.Linear(3, 1)

    def forward(self, losses: Tensor) -> Tensor:
        return self.out(self.hidden(losses.unsqueeze(1)).tanh()).sigmoid().squeeze(1)


INPUTS, TARGETS = normal(6, 2), normal(6, seed=2)


def residuals(model: Any) -> Tensor:
    return (model(INPUTS).squeeze(1) - TARGETS).square()


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(DOUBLE)


def module_at(module: nn.Module, flat: Tensor) -> Any:
    """A copy of the module with these parameters."""
    moved = copy.deepcopy(module)
    vector_to_parameters(flat, moved.parameters())
    return moved


def flatten(grad: Any) -> Tensor:
    """A gradient as one vector, entries of dicts in the order of the dict."""
    if isinstance(grad, dict):
        return torch.cat([flatten(part) for part in grad.values()])
    return grad.reshape(-1)


ESTIMATORS = pytest.mark.parametrize(
    "estimator", [bilevel.Reverse(), bilevel.Reverse("graph"), bilevel.Forward()], ids=str
)


@ESTIMATORS
def test_meta_parameters_as_a_dict(estimator: bilevel.Estimator) -> None:
    model = small_network()
    settings: dict[str, Any] = {"lr": 0.05}

    def inner(model: Any, meta: Any, batch: None) -> Tensor:
        return (meta["weights"]["each"] * residuals(model)).mean() + meta["decay"] * model[0].weight.square().sum()

    def outer(model: Any, meta: Any, batch: None) -> Tensor:
        return residuals(model).mean() + meta["decay"].square()

    def meta_at(flat: Tensor) -> Any:
        return {"decay": flat[0], "weights": {"each": flat[1:]}}

    def h(flat: Tensor) -> float:
        trained = trained_module(inner, model, meta_at(flat), [None] * 3, lambda p: torch.optim.Adam(p, **settings))
        return outer(trained, meta_at(flat), None).item()

    flat = torch.cat([torch.tensor([0.1], dtype=DOUBLE), 1 + 0.1 * normal(6)])
    problem = bilevel.GradientDescent(inner, outer, model, bilevel.optimizer(torch.optim.Adam, **settings))
    grad = estimator(problem, meta_at(flat), bilevel.no_batches(3)).grad
    assert grad["weights"]["each"].shape == (6,)
    torch.testing.assert_close(flatten(grad), numerical_gradient(h, flat), rtol=1e-6, atol=1e-8)


@ESTIMATORS
def test_meta_parameters_as_a_module(estimator: bilevel.Estimator) -> None:
    torch.manual_seed(1)
    model, weighting = small_network(), Weighting().to(DOUBLE)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}

    def inner(model: Any, meta: Any, batch: None) -> Tensor:
        losses = residuals(model)
        return (meta(losses) * losses).mean()

    def outer(model: Any, meta: Any, batch: None) -> Tensor:
        return residuals(model)[:2].mean()

    def h(flat: Tensor) -> float:
        meta = module_at(weighting, flat)
        trained = trained_module(inner, model, meta, [None] * 3, lambda p: torch.optim.SGD(p, **settings))
        return outer(trained, meta, None).item()

    problem = bilevel.GradientDescent(inner, outer, model, bilevel.optimizer(torch.optim.SGD, **settings))
    before = copy.deepcopy(weighting.state_dict())
    grad = estimator(problem, weighting, bilevel.no_batches(3)).grad
    assert grad.keys() == dict(weighting.named_parameters()).keys()
    expected = numerical_gradient(h, parameters_to_vector(weighting.parameters()).detach())
    torch.testing.assert_close(flatten(grad), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weighting.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in weighting.parameters())


@ESTIMATORS
def test_meta_parameters_as_a_tree_with_a_module_in_it(estimator: bilevel.Estimator) -> None:
    torch.manual_seed(1)
    model, weighting = small_network(), Weighting().to(DOUBLE)
    log_lr = torch.tensor(-2.0, dtype=DOUBLE)

    def inner(model: Any, meta: Any, batch: None) -> Tensor:
        losses = residuals(model)
        return (meta["nets"][0](losses) * losses).mean()

    def outer(model: Any, meta: Any, batch: None) -> Tensor:
        return residuals(model)[:2].mean()

    def h(flat: Tensor) -> float:
        meta = {"log_lr": flat[0], "nets": [module_at(weighting, flat[1:])]}
        lr = flat[0].exp().item()
        trained = trained_module(inner, model, meta, [None] * 3, lambda p: torch.optim.AdamW(p, lr=lr))
        return outer(trained, meta, None).item()

    optimizer = bilevel.optimizer(torch.optim.AdamW, lr=lambda meta: meta["log_lr"].exp())
    problem = bilevel.GradientDescent(inner, outer, model, optimizer)
    grad = estimator(problem, {"log_lr": log_lr, "nets": [weighting]}, bilevel.no_batches(3)).grad
    found = torch.cat([grad["log_lr"].reshape(1), flatten(grad["nets"][0])])
    flat = torch.cat([log_lr.reshape(1), parameters_to_vector(weighting.parameters()).detach()])
    torch.testing.assert_close(found, numerical_gradient(h, flat, 1e-6), rtol=1e-6, atol=1e-8)


@ESTIMATORS
def test_meta_parameters_as_the_initial_network(estimator: bilevel.Estimator) -> None:
    """MAML: the inner loop starts from the meta parameters, and does not see them otherwise."""
    network = small_network()

    def inner(model: Any, meta: Any, batch: None) -> Tensor:
        return residuals(model)[:3].mean()

    def outer(model: Any, meta: Any, batch: None) -> Tensor:
        return residuals(model)[3:].mean()

    def h(flat: Tensor) -> float:
        start = module_at(network, flat)
        trained = trained_module(inner, start, None, [None] * 3, lambda p: torch.optim.SGD(p, lr=0.1))
        return outer(trained, None, None).item()

    problem = bilevel.GradientDescent(inner, outer, lambda meta: meta, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    grad = estimator(problem, network, bilevel.no_batches(3)).grad
    expected = numerical_gradient(h, parameters_to_vector(network.parameters()).detach())
    torch.testing.assert_close(flatten(grad), expected, rtol=1e-6, atol=1e-9)


@ESTIMATORS
def test_frozen_parameters_stay_constants(estimator: bilevel.Estimator) -> None:
    model, weighting = small_network(), Weighting().to(DOUBLE)
    for part in (model[0], weighting.hidden):  # type: ignore[index]
        part.requires_grad_(False)

    def inner(model: Any, meta: Any, batch: None) -> Tensor:
        losses = residuals(model)
        return (meta(losses) * losses).mean()

    def outer(model: Any, meta: Any, batch: None) -> Tensor:
        return residuals(model).mean()

    problem = bilevel.GradientDescent(inner, outer, model, bilevel.optimizer(torch.optim.SGD, lr=0.1))
    estimate = estimator(problem, weighting, bilevel.no_batches(3))
    assert estimate.grad.keys() == {"out.weight", "out.bias"}
    assert estimate.state.params.named_tensors.keys() == {"2.weight", "2.bias"}

    def h(flat: Tensor) -> float:
        meta = copy.deepcopy(weighting)
        vector_to_parameters(flat, meta.out.parameters())

        def free(parameters: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)

        return outer(trained_module(inner, model, meta, [None] * 3, free), meta, None).item()

    expected = numerical_gradient(h, parameters_to_vector(weighting.out.parameters()).detach())
    torch.testing.assert_close(flatten(estimate.grad), expected, rtol=1e-6, atol=1e-9)


# -- batch normalisation ---------------------------------------------------------------------------------------------


def normalised_case() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).to(DOUBLE)
    return Case(
        model,
        lambda model, meta, batch: (meta * residuals(model)).mean(),
        lambda model, meta, batch: residuals(model).mean(),
        1 + 0.1 * normal(6),
    )


def test_batch_norm_without_running_statistics_or_in_evaluation_mode() -> None:
    case = normalised_case()
    sgd: dict[str, Any] = {"lr": 0.1}
    with pytest.raises(ValueError, match=r"layer '1' of meta is a BatchNorm1d .*write torch.func.replace_all_batch"):
        bilevel.Reverse()(lstm().problem(bilevel.optimizer(torch.optim.SGD)), case.model, case.batches)

    torch.func.replace_all_batch_norm_modules_(case.model)
    problem = case.problem(bilevel.optimizer(torch.optim.SGD, **sgd))
    assert_directional_derivatives_agree(case, problem, case.h(torch.optim.SGD, sgd))

    case = normalised_case()
    case.model.eval()
    problem = case.problem(bilevel.optimizer(torch.optim.SGD, **sgd))
    assert_directional_derivatives_agree(case, problem, case.h(torch.optim.SGD, sgd))


# -- operations that lack a derivative -------------------------------------------------------------------------------


class Squared(torch.autograd.Function):
    """x² with a backward pass and nothing else."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * grad


class SquaredForVmap(Squared):
    generate_vmap_rule = True


class SquaredWithForwardMode(Squared):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * tangent


class SquaredOnce(Squared):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * grad


class SquaredOnceInTheOldWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * grad


class SquaredInTheOldWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * grad


THETA, PHI = torch.tensor([1.0, -0.5], dtype=DOUBLE), torch.tensor([0.7, 0.4], dtype=DOUBLE)
PIXELS = normal(1, 1, 3, 3)


def problem_with(operation: Callable[[Any], Any]) -> tuple[bilevel.GradientDescent, Callable[[Tensor], float]]:
    """A problem whose inner loss uses the operation, and its outer loss as a function of meta by ordinary training."""

    def inner(theta: Any, meta: Tensor, batch: None) -> Tensor:
        theta = theta if isinstance(theta, Tensor) else theta[0]
        return operation(theta * meta).square().sum()

    def outer(theta: Tensor) -> Tensor:
        return theta.square().sum() + theta.prod()

    def h(meta: Tensor) -> float:
        return outer(trained_tensors(inner, [THETA], meta, [None] * 2, lambda p: torch.optim.SGD(p, lr=0.1))[0]).item()

    optimizer = bilevel.optimizer(torch.optim.SGD, lr=0.1)
    return bilevel.GradientDescent(inner, lambda theta, meta, batch: outer(theta), THETA, optimizer), h


WITHOUT_FORWARD_MODE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "grid_sample": (
        lambda x: functional.grid_sample(PIXELS, x.reshape(1, 1, 1, 2), align_corners=False),
        "the operation 'grid_sampler_2d' has no forward-mode derivative",
    ),
    "custom function": (Squared.apply, "autograd.Function 'Squared' has no forward-mode derivative"),
    "custom function for vmap": (SquaredForVmap.apply, "Function 'SquaredForVmap' has no forward-mode derivative"),
    "custom function in the old way": (
        SquaredInTheOldWay.apply,
        "'SquaredInTheOldWay' .* give it a static",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_FORWARD_MODE)
def test_operation_without_forward_mode_takes_hessian_products(name: str) -> None:
    operation, _ = WITHOUT_FORWARD_MODE[name]
    problem, h = problem_with(operation)
    reverse = bilevel.Reverse()(problem, PHI, bilevel.no_batches(2)).grad
    torch.testing.assert_close(reverse, numerical_gradient(h, PHI), rtol=1e-6, atol=1e-8)
    assert reverse.norm() > 1e-3
    for estimator in (bilevel.Forward(), bilevel.Forward(chunk_size=1), bilevel.ForwardGradient(2, "coordinate")):
        found = estimator(problem, PHI, bilevel.no_batches(2))
        torch.testing.assert_close(found.grad, reverse, rtol=1e-12, atol=1e-14)
        chunks = 2 if estimator == bilevel.Forward(chunk_size=1) else 1
        units = 2 * chunks * (1 + 2 * 2 // chunks)
        assert found.diagnostics == {"hessian_product_steps": 2 * chunks, "hessian_product_steps_units": units}


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.Reverse("graph"), bilevel.Implicit()], ids=str)
def test_operation_without_second_derivative_is_named_and_differences_take_it(estimator: bilevel.Estimator) -> None:
    table = normal(3, 2)

    def operation(x: Tensor) -> Tensor:
        return functional.embedding_bag(torch.tensor([[0, 1]]), table[:2] * x)

    problem, h = problem_with(operation)
    with pytest.raises(MissingDerivativeError, match="operation '_embedding_bag_backward' has no derivative") as caught:
        estimator(problem, PHI, bilevel.no_batches(2))
    assert "take ZerothOrder(...)" in str(caught.value)
    differences = bilevel.ZerothOrder(2, step_size=1e-5, distribution="coordinate")
    found = differences(problem, PHI, bilevel.no_batches(2)).grad
    torch.testing.assert_close(found, numerical_gradient(h, PHI), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("estimator", "function"),
    [
        (bilevel.Reverse(), SquaredOnce),
        (bilevel.Reverse(), SquaredOnceInTheOldWay),
        (bilevel.Reverse("graph"), SquaredOnce),
        (bilevel.TruncatedReverse(1), SquaredOnceInTheOldWay),
        (bilevel.Implicit(), SquaredOnceInTheOldWay),
        (bilevel.HessianFree(), SquaredOnce),
    ],
    ids=str,
)
def test_custom_function_marked_once_differentiable(
    estimator: bilevel.Estimator, function: type[torch.autograd.Function]
) -> None:
    problem, h = problem_with(function.apply)
    with pytest.raises(MissingDerivativeError, match=f"'{function.__name__}' is marked @once_differentiable"):
        estimator(problem, PHI, bilevel.no_batches(2))
    differences = bilevel.ZerothOrder(2, step_size=1e-5, distribution="coordinate")
    found = differences(problem, PHI, bilevel.no_batches(2)).grad
    torch.testing.assert_close(found, numerical_gradient(h, PHI), rtol=1e-6, atol=1e-8)


class Checkpointed(nn.Module):
    """Its hidden layer is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Any:
        hidden: Any = torch.utils.checkpoint.checkpoint(lambda x: self.hidden(x).tanh() ** 2, x, use_reentrant=False)
        return self.output(hidden)


def test_activation_checkpointing_is_refused_where_it_would_be_wrong() -> None:
    """The layers would be computed again with the module's own parameters instead of those of the step."""
    torch.manual_seed(0)
    x = normal(6, 2)
    problem = bilevel.GradientDescent(
        inner_loss=lambda model, meta, batch: ((model(x)[:, 0] - x[:, 1]) ** 2 * meta.exp()).mean(),
        outer_loss=lambda model, meta, batch: (model(x) ** 2).mean(),
        params=Checkpointed().double(),
        optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    meta, batches = normal(6), bilevel.no_batches(3)
    differences = bilevel.ZerothOrder(6, step_size=1e-5, distribution="coordinate")(problem, meta, batches).grad
    first_order = bilevel.ForwardGradient(6, "coordinate", tangents="difference")(problem, meta, batches).grad
    torch.testing.assert_close(first_order, differences, rtol=1e-6, atol=1e-9)
    estimators = [bilevel.Reverse(), bilevel.Reverse("graph"), bilevel.HessianFree(), bilevel.ForwardGradient(2)]
    for estimator in estimators:
        with pytest.raises(MissingDerivativeError, match=r"activation checkpointing .* switch it off"):
            estimator(problem, meta, batches)


REFUSED_BY_VMAP: dict[str, Callable[[Any], Any]] = {
    "custom function": SquaredWithForwardMode.apply,
    "random leaks": lambda x: functional.rrelu(x, training=True),
}


@pytest.mark.parametrize("name", REFUSED_BY_VMAP)
def test_operation_that_vmap_refuses_takes_hessian_products(name: str) -> None:
    problem, _ = problem_with(REFUSED_BY_VMAP[name])
    reverse = bilevel.Reverse()(problem, PHI, bilevel.no_batches(2)).grad
    alone = bilevel.Forward(chunk_size=1)(problem, PHI, bilevel.no_batches(2))
    assert not alone.diagnostics, "forward mode takes one direction"
    together = bilevel.Forward()(problem, PHI, bilevel.no_batches(2))
    assert together.diagnostics["hessian_product_steps"] == 2
    torch.testing.assert_close(alone.grad, reverse, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(together.grad, reverse, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x**2 if x.sum().item() > 0 else x**3,
        lambda x: x[x > 0] ** 2,
        lambda x: torch.stack([x[0]] * int(x.sum() + 3)),
    ],
    ids=["item", "mask", "shape"],
)
def test_control_flow_on_values(operation: Callable[[Tensor], Tensor]) -> None:
    """Directions share the value, which is therefore a plain number also where several are carried at once."""
    problem, h = problem_with(operation)
    expected = numerical_gradient(h, PHI)
    assert expected.norm() > 1e-3
    for estimator in (bilevel.Reverse(), bilevel.Forward(), bilevel.Forward(chunk_size=1)):
        found = estimator(problem, PHI, bilevel.no_batches(2)).grad
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_other_errors_of_a_loss_come_through_as_they_are() -> None:
    problem, _ = problem_with(lambda x: x.reshape(3))
    for estimator in (bilevel.Reverse(), bilevel.ForwardGradient(2)):
        with pytest.raises(RuntimeError, match="shape '\\[3\\]' is invalid") as caught:
            estimator(problem, PHI, bilevel.no_batches(2))
        assert not isinstance(caught.value, BilevelError)

    def not_done(x: Tensor) -> Tensor:
        raise NotImplementedError("to be done")

    with pytest.raises(NotImplementedError, match=r"^to be done$"):
        bilevel.ForwardGradient(2)(problem_with(not_done)[0], PHI, bilevel.no_batches(2))
