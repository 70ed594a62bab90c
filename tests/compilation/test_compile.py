"""Problems with a compiled inner gradient: the same hypergradients, what is refused, and what is reported of it.

Most are compiled by aot_eager, which goes the whole way but for the last step, the writing and compiling of kernels.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import results_of, rows_of, run
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

import bilevel
from bilevel import cli
from bilevel.compilation import compiled_gradient
from bilevel.errors import BilevelError, CheckpointError, CompileError, MissingDerivativeError
from bilevel.tasks.condensation.models import build

DOUBLE = torch.float64
STEPS = 5
FAST = "aot_eager"
CHECKPOINTS: list[Any] = ["all", "sqrt", "log", 2, "graph"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def rel(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Case:
    eager: bilevel.GradientDescent
    compiled: bilevel.GradientDescent
    meta: Tensor
    batches: Any

    def both(self, estimator: bilevel.Estimator, seed: int = 0) -> tuple[bilevel.Estimate, bilevel.Estimate]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Implicit: ")  # too few iterations for a solution
            return (
                estimator(self.compiled, self.meta, self.batches, None, seed),
                estimator(self.eager, self.meta, self.batches, None, seed),
            )


def case_of(problem: bilevel.GradientDescent, meta: Tensor, batches: Any = None, backend: str = FAST) -> Case:
    batches = bilevel.no_batches(STEPS) if batches is None else batches
    return Case(problem, problem.compiled(backend), meta, batches)


def mlp() -> tuple[bilevel.GradientDescent, Tensor]:
    torch.manual_seed(0)
    x, y = normal(12, 5), torch.arange(12) % 3
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 3))
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (meta.sigmoid() * functional.cross_entropy(model(x), y, reduction="none")).mean(),
        lambda model, meta, batch: functional.cross_entropy(model(x), y) + 0.01 * meta.square().sum(),
        net.double(),
        bilevel.optimizer(torch.optim.Adam, lr=0.01),
    )
    return problem, normal(12)


def convnet() -> tuple[bilevel.GradientDescent, Tensor]:
    torch.manual_seed(0)
    real, labels = normal(6, 1, 8, 8, seed=1), torch.arange(6) % 3
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: functional.cross_entropy(model(meta), torch.arange(3)),
        lambda model, meta, batch: functional.cross_entropy(model(real), labels),
        build("convnet", (1, 8, 8), 3, 4, 2).double(),
        bilevel.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9),
    )
    return problem, normal(3, 1, 8, 8)


def gpt2() -> tuple[bilevel.GradientDescent, Tensor]:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=11, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ids = torch.arange(12).reshape(2, 6) % 11

    def inner_loss(model: Any, meta: Tensor, batch: Any) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        return (meta.sigmoid() * functional.cross_entropy(logits, ids[:, 1:], reduction="none")).mean()

    problem = bilevel.GradientDescent(
        inner_loss,
        lambda model, meta, batch: model(input_ids=ids, labels=ids).loss,
        GPT2LMHeadModel(shape).double().eval(),  # pyright: ignore[reportCallIssue]
        bilevel.optimizer(torch.optim.Adam, lr=1e-3),
    )
    return problem, normal(2, 5)


MODELS: dict[str, Callable[[], tuple[bilevel.GradientDescent, Tensor]]] = {"mlp": mlp, "convnet": convnet, "gpt2": gpt2}
ESTIMATORS: list[bilevel.Estimator] = [
    *(bilevel.Reverse(kept) for kept in CHECKPOINTS),
    bilevel.Reverse(offload="disk"),
    bilevel.Reverse("sqrt"),
    bilevel.TruncatedReverse(2),
    bilevel.ForwardGradient(1),
    bilevel.ForwardGradient(3),
    bilevel.ForwardGradient(3, support="reached", control_variate=bilevel.TruncatedReverse(1)),
    bilevel.ForwardGradient(2, tangents="difference"),
    bilevel.HessianFree(preconditioner="optimizer"),
    bilevel.Implicit(bilevel.ConjugateGradient(iterations=2)),
]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Case:
    return case_of(*MODELS[request.param]())


@pytest.mark.slow
def test_every_estimator_and_checkpoint_setting_gives_the_same(model: Case) -> None:
    everything = model.meta.shape == (12,)  # of the MLP
    for estimator in ESTIMATORS:
        if not (everything or isinstance(estimator, bilevel.Reverse) or estimator == bilevel.ForwardGradient(3)):
            continue
        found, expected = model.both(estimator)
        tolerance = 1e-6 if estimator.first_order else 1e-10  # differences of gradients multiply rounding
        assert expected.grad.norm() > 1e-8
        assert rel(found.grad, expected.grad) < tolerance, estimator
        torch.testing.assert_close(found.value, expected.value, rtol=1e-10, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # on loading inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_and_keeps_random_numbers() -> None:
    """Two equal dropouts, of which none may get the numbers of the other."""
    x = normal(6, 3)
    net = nn.Sequential(nn.Dropout(0.4), nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.4)).double()
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (model(x + meta) - 1).square().mean(),
        lambda model, meta, batch: model(x).sum(),
        net,
        bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    )
    case = case_of(problem, normal(3), backend="inductor")
    for estimator in (bilevel.Reverse("sqrt"), bilevel.Reverse("graph"), bilevel.ForwardGradient(2)):
        for seed in (0, 1):
            found, expected = case.both(estimator, seed)
            assert rel(found.grad, expected.grad) < 1e-10
            assert (found.compile_seconds > 0) == (seed == 0 and estimator != bilevel.Reverse("graph"))


def one_parameter(
    loss: Callable[[Tensor, Tensor, Any], Tensor], meta: Tensor | None = None, batches: Any = None
) -> Case:
    """An inner loss of θ `[2]`."""
    problem = bilevel.GradientDescent(
        loss,
        lambda theta, meta, batch: (theta**2).sum() + theta.prod(),
        torch.tensor([0.7, -1.2], dtype=DOUBLE),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    return case_of(problem, normal(2) if meta is None else meta, batches)


class Cubed(torch.autograd.Function):
    """θ³ with derivatives of its own, in both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * w

    @staticmethod
    def jvp(ctx: Any, y: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * y


class CubedInTheOldWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * w


class CubedOnce(CubedInTheOldWay):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, w: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * w


def _target(theta: Tensor) -> Tensor:
    with torch.no_grad():
        return theta**2


LOSSES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "a gradient that is φ itself": lambda theta, meta, batch: (theta * meta).sum(),
    "detach": lambda theta, meta, batch: (theta.sin() * theta.detach() * meta.exp()).sum(),
    "no_grad": lambda theta, meta, batch: ((theta - _target(theta)) ** 2 * meta.exp()).sum(),
    "in place": lambda theta, meta, batch: (theta * meta).tanh().clone().add_(theta.exp()).sin().sum(),
    "only one entry used": lambda theta, meta, batch: theta[0] ** 3 * meta[1].exp(),
    "custom function": lambda theta, meta, batch: (Cubed.apply(theta) * meta).sum(),
}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_are_taken_as_without_compiling(name: str) -> None:
    case = one_parameter(LOSSES[name])
    for estimator in (bilevel.Reverse(), bilevel.Reverse("graph"), bilevel.ForwardGradient(2, "coordinate")):
        found, expected = case.both(estimator)
        assert expected.grad.norm() > 1e-3
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-14)


def test_custom_functions_of_the_old_way_and_of_one_derivative() -> None:
    found, expected = one_parameter(lambda t, m, b: (CubedInTheOldWay.apply(t) * m).sum()).both(bilevel.Reverse())
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)
    once = one_parameter(lambda theta, meta, batch: (CubedOnce.apply(theta) * meta).sum())
    with pytest.raises(MissingDerivativeError, match="'CubedOnce' is marked @once_differentiable"):
        bilevel.Reverse()(once.compiled, once.meta, once.batches)


@pytest.mark.parametrize(
    "loss",
    [
        lambda theta, meta, batch: (theta**2 if theta.sum().item() > 0 else theta**3).sum() * meta.sum(),
        lambda theta, meta, batch: (theta**2 if theta.sum() > 0 else theta**3).sum() * meta.sum(),
        lambda theta, meta, batch: theta[theta > 0].square().sum() * meta.sum(),
        lambda theta, meta, batch: (theta * float(meta.detach()[0]) * meta).sum(),
    ],
    ids=["item", "bool", "mask", "float"],
)
def test_control_flow_on_values_is_refused(loss: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
    case = one_parameter(loss)
    for estimator in (bilevel.Reverse(), bilevel.ForwardGradient(2)):
        estimator(case.eager, case.meta, case.batches)
        with pytest.raises(CompileError, match=r"inner_loss can't be compiled.*torch\.where.*compile=False"):
            estimator(case.compiled, case.meta, case.batches)


def test_what_changes_after_compiling_is_an_error_or_is_followed() -> None:
    reads: dict[str, Any] = {"scale": 1.0, "target": normal(2, seed=3)}
    case = one_parameter(lambda t, m, b: (reads["scale"] * (t - reads["target"]) ** 2 * m.exp()).sum())
    for estimator in (bilevel.Reverse(), bilevel.ForwardGradient(2)):
        reads |= {"scale": 1.0, "target": normal(2, seed=3)}
        bilevel.GradientDescent.check_compiled_again(case.compiled)
        estimator(case.compiled, case.meta, case.batches)
        for changed in ({"scale": 1.1}, {"target": normal(2, seed=4)}):
            before = dict(reads)
            reads |= changed
            with pytest.raises(CompileError, match=r"has changed since it was compiled.*Pass what changes"):
                estimator(case.compiled, case.meta, case.batches)
            reads |= before
    fresh = one_parameter(lambda t, m, b: ((t - reads["target"]) ** 2 * m.exp()).sum())
    fresh.both(bilevel.Reverse())
    reads["target"].add_(1.0)
    found, expected = fresh.both(bilevel.Reverse())
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)


def test_every_shape_and_number_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(theta: Tensor, meta: Tensor, batch: Any) -> Tensor:
        return ((batch["x"] @ (theta * meta) - batch["y"]) ** 2).mean() * batch["scale"]

    def batches(sizes: list[int], scale: float = 1.0) -> list[Any]:
        return [{"x": normal(n, 2, seed=n + t), "y": torch.arange(n), "scale": scale} for t, n in enumerate(sizes)]

    case = one_parameter(loss, batches=batches([4, 4, 4, 3]))  # the last one is smaller
    for seconds in (True, False):
        found, expected = case.both(bilevel.Reverse())
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)
        assert (found.compile_seconds > 0) == seconds
        assert expected.compile_seconds == 0
    monkeypatch.setattr(compiled_gradient, "MOST_CASES", 2)
    with pytest.raises(CompileError, match=r"compiled for 2 different sets of shapes.*as tensors"):
        bilevel.Reverse()(case.compiled, case.meta, batches([4], scale=2.0))
    monkeypatch.undo()
    other = case_of(case.eager, case.meta, batches([4], scale=2.0))
    found = bilevel.Reverse()(case.compiled, case.meta, other.batches)
    torch.testing.assert_close(found.grad, other.both(bilevel.Reverse())[1].grad, rtol=1e-12, atol=0)


class Opaque:
    def __init__(self) -> None:
        self.x = normal(2)


def test_contents_that_would_be_fixed_are_refused() -> None:
    case = one_parameter(lambda theta, meta, batch: ((theta - batch[0].x) ** 2 * meta.exp()).sum())
    batches = [[Opaque()]] * 2
    bilevel.Reverse()(case.eager, case.meta, batches)
    with pytest.raises(CompileError, match=r"batch\[0\] is a Opaque.*dict\(batch\)"):
        bilevel.Reverse()(case.compiled, case.meta, batches)


class Shifted(nn.Module):
    """A layer with a buffer and a frozen parameter, drawn at random when it is built."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(2, dtype=DOUBLE))
        self.frozen = nn.Parameter(torch.randn(2, dtype=DOUBLE), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(2, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x + self.shift) * self.frozen


def test_modules_built_anew_for_every_solve_are_not_compiled_again() -> None:
    problem = bilevel.GradientDescent(
        lambda model, meta, batch: (model(meta) - 1).square().sum(),
        lambda model, meta, batch: model(torch.ones(2, dtype=DOUBLE)).sum(),
        lambda meta: Shifted(),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    case = case_of(problem, normal(2))
    seconds = []
    for seed in range(3):
        found, expected = case.both(bilevel.Reverse(), seed)
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)
        seconds.append(found.compile_seconds)
    assert seconds[0] > 0
    assert seconds[1:] == [0, 0]


def test_modes_of_a_module_are_compiled_apart_and_left_alone() -> None:
    x = normal(4, 2)
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).double()
    case = case_of(
        bilevel.GradientDescent(
            lambda model, meta, batch: (model(x) * meta).square().sum(),
            lambda model, meta, batch: model(x).sum(),
            net,
            bilevel.optimizer(torch.optim.SGD, lr=0.1),
        ),
        normal(2),
    )
    for training in (True, False, True):
        net.train(training)
        found, expected = case.both(bilevel.Reverse())
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)
        assert net[1].training == training


def test_meta_parameters_in_a_module() -> None:
    torch.manual_seed(0)
    x = normal(4, 2)
    problem = bilevel.GradientDescent(
        lambda theta, net, batch: (net(x) - theta).square().sum(),
        lambda theta, net, batch: theta.sum(),
        torch.zeros(2, dtype=DOUBLE),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
    )
    net = nn.Linear(2, 2).double()
    expected = bilevel.Reverse()(problem, net, bilevel.no_batches(3)).grad
    found = bilevel.Reverse()(problem.compiled(FAST), net, bilevel.no_batches(3)).grad
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_meta_parameters_in_the_update() -> None:
    """The update is not compiled, and its dependence on φ is not to be lost beside what is."""
    problem = bilevel.GradientDescent(
        lambda theta, meta, batch: (theta.sin() * meta.exp()).sum(),
        lambda theta, meta, batch: (theta**2).sum(),
        normal(2, seed=1),
        bilevel.optimizer(torch.optim.SGD, lr=lambda meta: meta[0].sigmoid()),
    )
    case = case_of(problem, normal(2))
    for estimator in (bilevel.Reverse(), bilevel.Reverse("graph"), bilevel.ForwardGradient(2)):
        found, expected = case.both(estimator)
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("carry", ["same", "fresh"])
def test_carried_tangents(carry: Any) -> None:
    case = one_parameter(lambda theta, meta, batch: (theta.cos() * meta.exp()).sum())
    estimator, carried = bilevel.StreamingForwardGradient(2, carry=carry), [None, None]
    for _ in range(2):
        pair = [
            estimator(problem, case.meta, case.batches, carried=before)
            for problem, before in zip((case.compiled, case.eager), carried, strict=True)
        ]
        torch.testing.assert_close(pair[0].grad, pair[1].grad, rtol=1e-12, atol=0)
        carried = [each.carried for each in pair]


def test_what_does_not_go_together_is_refused() -> None:
    case = one_parameter(lambda theta, meta, batch: (theta.sin() * meta.exp()).sum())
    with pytest.raises(CompileError, match=r'tangents="shared".*take tangents="exact"'):
        bilevel.ForwardGradient(2, tangents="shared")(case.compiled, case.meta, case.batches)
    theta = torch.zeros(2, dtype=DOUBLE)
    with pytest.raises(CompileError, match=r"torch\.func.*problem\.eager"):
        torch.func.jacrev(lambda meta: case.compiled.gradient(theta, meta, None)[0])(case.meta)
    recomputed = bilevel.GradientDescent(
        lambda model, meta, batch: model(meta).sum(),
        lambda model, meta, batch: model(meta).sum(),
        bilevel.experimental.Recomputed(nn.Linear(2, 2)),
        bilevel.optimizer(torch.optim.SGD, lr=0.1),
        compile=FAST,
    )
    with pytest.raises(CompileError, match="Recomputed layer has no effect in a compiled gradient"):
        bilevel.Reverse()(recomputed, torch.zeros(2), bilevel.no_batches(2))
    with pytest.raises(ValueError, match=r"compile='inductr': write True or False, or a backend.*inductor"):
        case.eager.compiled("inductr")


def test_faults_of_a_loss_are_reported_as_without_compiling() -> None:
    for loss in (
        lambda theta, meta, batch: theta.square().sum(),
        lambda theta, meta, batch: meta.square().sum(),
        lambda theta, meta, batch: theta * meta,
        lambda theta, meta, batch: (theta.reshape(3) * meta).sum(),
        lambda theta, meta, batch: ((theta - 0.7).sqrt() * meta).sum(),
    ):
        case, messages = one_parameter(loss), []
        for problem in (case.eager, case.compiled):
            with pytest.raises((BilevelError, ValueError, RuntimeError)) as caught:
                bilevel.Reverse()(problem, case.meta, case.batches)
            messages.append((type(caught.value), str(caught.value)))
        assert messages[0] == messages[1]
        assert messages[0][0] is not CompileError


def test_without_a_compiler_inductor_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = one_parameter(lambda theta, meta, batch: (theta.sin() * meta.exp()).sum())

    def no_compiler(graph: Any, inputs: Any) -> Any:
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: no_compiler)
    with pytest.raises(CompileError, match=r"C\+\+ compiler.*compile='aot_eager'.*compile=False"):
        bilevel.Reverse()(case.compiled, case.meta, case.batches)


def test_cuda_graphs_are_off_whatever_the_process_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import lookup_backend
    from torch._inductor import config

    seen: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(config.triton.cudagraphs)
        return lookup_backend("aot_eager")(graph, inputs)

    case = one_parameter(lambda theta, meta, batch: (theta.sin() * meta.exp()).sum())
    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: backend)
    with config.patch({"triton.cudagraphs": True}):
        bilevel.Reverse()(case.compiled, case.meta, case.batches)
        assert config.triton.cudagraphs
    assert seen
    assert not any(seen)


@pytest.mark.slow
def test_compile_time_is_reported_apart() -> None:
    problem, meta = mlp()
    problem, steps = problem.compiled(FAST), bilevel.no_batches(2)
    rows = bilevel.compare(problem, meta, steps, estimators=[bilevel.Reverse(), bilevel.ForwardGradient(2)])
    assert [row.relative_error < 1e-10 for row in rows] == [True, False]
    for row in rows:
        assert row.compile_seconds is not None
        assert row.compile_seconds > 5 * row.seconds > 0
    (eager,) = bilevel.compare(problem.eager, meta, steps, estimators=[bilevel.Reverse()])
    assert eager.compile_seconds is None
    history = bilevel.fit(problem, meta, steps, phases=[bilevel.Phase(bilevel.Reverse(), 2)], progress=False).history
    assert history[0]["compile_seconds"] > 5 * history[-1]["seconds"]
    assert history[1]["compile_seconds"] == 0


def test_a_run_is_not_resumed_with_other_compiling(tmp_path: Path) -> None:
    case = one_parameter(lambda theta, meta, batch: (theta.sin() * meta.exp()).sum())
    phases = [bilevel.Phase(bilevel.Reverse(), 1)]
    bilevel.fit(case.compiled, case.meta, case.batches, phases=phases, out=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="compile"):
        bilevel.fit(
            case.eager,
            case.meta,
            case.batches,
            phases=phases,
            out=bilevel.RunFolder(tmp_path, resume=True),
            progress=False,
        )


def test_auto_plans_with_uncompiled_steps_and_estimates_with_compiled_ones() -> None:
    case = one_parameter(lambda theta, meta, batch: (theta.sin() * meta.exp()).sum())
    found = bilevel.Auto("1GB")(case.compiled, case.meta, case.batches)
    assert found.compile_seconds > 0
    torch.testing.assert_close(found.grad, case.both(bilevel.Reverse())[1].grad, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_command_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--outer-steps", "2", "--checkpoint-every", "1"]
    run(tmp_path / "eager", *flags)
    run(tmp_path / "compiled", *flags, "--compile", FAST)
    losses = [[row["outer_loss"] for row in rows_of(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert results_of(tmp_path / "compiled")["compile_seconds"] > 0
    assert rows_of(tmp_path / "compiled")[0]["compile_seconds"] > 0
    assert "compiling, besides" in (tmp_path / "compiled" / "report.html").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["run", "pde", "--out", str(tmp_path / "pde"), "--compile", FAST])
    assert "the gradient of an inner loss is what is compiled" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "pde").exists()
