"""What only a GPU can show: the numbers of a CPU, where the host waits, and kernels that a CPU does not have.

`python benchmarks/gpu.py` runs these tests first. Without a GPU they are skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import philox, trees
from bilevel.directions.distributions import DISTRIBUTIONS, Directions

pytestmark = pytest.mark.gpu

ESTIMATORS: list[bilevel.Estimator] = [
    bilevel.Reverse(),
    bilevel.Reverse("graph"),
    bilevel.Reverse("log", offload="cpu"),
    bilevel.Reverse("all", offload="disk"),
    bilevel.TruncatedReverse(2),
    bilevel.Forward(chunk_size=4),
    bilevel.ForwardGradient(2, control_variate=bilevel.TruncatedReverse(1)),
    bilevel.ForwardGradient(3, tangents="shared", chunk_size=2),
    bilevel.ForwardGradient(2, "gaussian", tangents="difference"),
    bilevel.ZerothOrder(2),
    bilevel.Implicit(bilevel.Neumann(3)),
    bilevel.HessianFree(),
    bilevel.Penalty(),
]


def inner_loss(model: Any, meta: Tensor, x: Tensor) -> Tensor:
    return (meta.exp() * model(x)[:, 0].square()).mean()


def outer_loss(model: Any, meta: Tensor, x: Tensor) -> Tensor:
    return (model(-x) - 1).square().mean()


def case(device: str, steps: int = 4, norm: Callable[[int], nn.Module] = nn.BatchNorm1d, **problem: Any) -> Any:
    """A problem in float64, φ, batches and the outer batch."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64).to(device)
    net = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 1)).double().to(device)
    adam = bilevel.optimizer(torch.optim.Adam, lr=0.01, clip_norm=1.0)
    descent = bilevel.GradientDescent(inner_loss, outer_loss, net, adam, **problem)
    return descent, torch.linspace(-1, 1, 8, dtype=torch.float64).to(device), [x] * steps, x


@pytest.mark.filterwarnings("ignore:Implicit|ZerothOrder")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_an_estimate_is_that_of_the_cpu(estimator: bilevel.Estimator) -> None:
    expected, found = estimator(*case("cpu")), estimator(*case("cuda"))
    assert found.grad.device.type == "cuda"
    torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-6, atol=1e-9)
    assert "tf32" not in found.diagnostics  # in float64


def test_philox_gives_the_bits_of_the_cpu() -> None:
    for rows in (range(3), [5, 2]):
        here, there = (philox.signs(7, rows, 5, 10**6, device=device) for device in ("cpu", "cuda"))
        assert torch.equal(there.cpu(), here)
        here, there = (philox.normals(7, rows, 5, 10**6, device=device) for device in ("cpu", "cuda"))
        torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_directions_are_those_of_the_cpu(name: str) -> None:
    like = [torch.zeros(2, 3), torch.zeros(5)]
    for here, there in zip(
        Directions(name, 3, 4, like).draw(range(4)),
        Directions(name, 3, 4, [leaf.cuda() for leaf in like]).draw(range(4)),
        strict=True,
    ):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-6)


def test_a_hundred_million_signs_take_the_memory_of_the_result() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    signs = philox.signs(7, [0], 0, 10**8, device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 1.2 * 4 * 10**8
    assert abs(float(signs.mean())) < 5e-4  # five standard deviations


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if "disk" not in str(e)], ids=str)
@pytest.mark.filterwarnings("ignore:Implicit|ZerothOrder")
def test_the_host_waits_as_often_for_many_steps_as_for_few(estimator: bilevel.Estimator) -> None:
    if isinstance(estimator, bilevel.ZerothOrder | bilevel.Penalty):
        pytest.skip("its inner loops are followed by others, whose number of steps may vary")

    def waits(steps: int) -> int:
        arguments = case("cuda", steps)
        estimator(*arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                estimator(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    assert waits(4) == waits(8)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_gradients_are_those_of_eager_ones() -> None:
    eager, compiled = (bilevel.Reverse()(*case("cuda", norm=nn.LayerNorm, compile=c)).grad for c in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


def test_autocast_and_tf32() -> None:
    def mixed(model: Any, meta: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return (meta.exp() * model(x)[:, 0].float().square()).mean()

    def single(loss: Callable[..., Tensor]) -> bilevel.Estimate:
        torch.manual_seed(0)
        x = torch.randn(64, 32, device="cuda")
        net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()
        problem = bilevel.GradientDescent(loss, outer_loss, net, bilevel.optimizer(torch.optim.SGD, lr=0.1))
        return bilevel.Reverse()(problem, torch.zeros(64, device="cuda"), [x] * 5, x)

    plain, half = single(inner_loss), single(mixed)
    assert half.grad.dtype == torch.float32
    assert float((half.grad - plain.grad).norm() / plain.grad.norm()) < 0.1
    assert plain.diagnostics["tf32"].startswith("matrix products")


@pytest.mark.parametrize("estimator", [bilevel.Reverse(), bilevel.ForwardGradient(2)], ids=str)
def test_attention_is_differentiated_as_on_the_cpu(estimator: bilevel.Estimator) -> None:
    def attended(params: Tensor, meta: Tensor, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x @ params, x, x * meta.exp())

    def estimate(device: str) -> Tensor:
        x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).to(device)
        problem = bilevel.GradientDescent(
            lambda params, meta, x: attended(params, meta, x).square().mean(),
            lambda params, meta, x: (attended(params, meta, x) - 1).square().mean(),
            torch.eye(8, device=device),
            bilevel.optimizer(torch.optim.SGD, lr=0.1),
        )
        return estimator(problem, torch.zeros(8, device=device), [x] * 3, x).grad

    torch.testing.assert_close(estimate("cuda").cpu(), estimate("cpu"), rtol=1e-3, atol=1e-5)


def test_a_plan_measures_on_the_gpu() -> None:
    problem, meta, batches, x = case("cuda")
    plan = bilevel.plan(problem, meta, batches, x, memory="1GB")
    assert plan.recommended is not None
    assert all(row.bytes > 0 for row in plan.rows)
    assert {leaf.device.type for leaf in trees.leaves(meta)} == {"cuda"}
