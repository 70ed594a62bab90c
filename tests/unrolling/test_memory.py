"""How many bytes of tensors the estimators hold at their peak, counted exactly, for several numbers of inner steps.

`benchmarks/memory.py` measures the same in resident memory of whole processes; here every storage is counted as PyTorch
makes and frees it, so that what theory says can be asked for to the byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import trees
from bilevel.estimators import Estimator
from bilevel.planning.live_memory import counting

EXAMPLES = 12


def momentum() -> Any:
    return bilevel.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


def adam() -> Any:
    return bilevel.optimizer(torch.optim.Adam, lr=0.01)


class Counted:
    """Per-example weights of a small network, and the peak of live bytes of an estimator on it.

    Of more meta parameters than examples, the others are there to be carried along.
    """

    def __init__(self, optimizer: Any, meta_size: int = EXAMPLES) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(EXAMPLES, 6, dtype=torch.float64, generator=generator)
        labels = torch.randint(3, (EXAMPLES,), generator=generator)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 20, bias=False), nn.Tanh(), nn.Linear(20, 3, bias=False)).double()
        self.problem = bilevel.GradientDescent(
            inner_loss=lambda model, meta, batch: (
                meta[:EXAMPLES].sigmoid() * cross_entropy(model(inputs), labels, reduction="none")
            ).mean(),
            outer_loss=lambda model, meta, batch: cross_entropy(model(inputs), labels),
            params=network,
            optimizer=optimizer,
        )
        self.meta = torch.zeros(meta_size, dtype=torch.float64)
        state = self.problem.init(self.meta)
        self.state_bytes = 8 * trees.size([state.params, state.optimizer])

    def run(self, estimator: Estimator, steps: int) -> bilevel.Estimate:
        return estimator(self.problem, self.meta, bilevel.no_batches(steps))

    def peak(self, estimator: Estimator, steps: int) -> int:
        with counting() as live:
            self.run(estimator, steps)
        return live.peak


@pytest.fixture(scope="module")
def counted(request: pytest.FixtureRequest) -> Counted:
    """With momentum inside, unless a test says `@WITH_ADAM_TOO`."""
    return Counted(getattr(request, "param", momentum)())


WITH_ADAM_TOO = pytest.mark.parametrize("counted", [momentum, adam], indirect=True, ids=lambda make: make.__name__)


def test_what_is_counted() -> None:
    """Storages, once each, for as long as anybody holds one, also under functorch and in autograd graphs."""
    with counting() as live:
        a = torch.ones(1000, dtype=torch.float64)
        view = a[:10].view(2, 5)
        assert live.now == 8000
        del a
        assert live.now == 8000  # held by its view
        del view
        assert live.now == 0
        x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
        y = x.exp().exp()  # the inner exp(x) is held by the graph alone
        assert live.now == 3 * 8000
        del x, y
        assert live.now == 0
        ones = torch.ones(1000, dtype=torch.float64)
        tangent = torch.vmap(lambda v: torch.func.jvp(torch.exp, (ones,), (v,))[1])(ones.expand(5, 1000))
        assert (tangent.shape, live.now) == ((5, 1000), 6 * 8000)
    assert live.peak >= 6 * 8000


ALWAYS_FLAT: list[Estimator] = [bilevel.ForwardGradient(1), bilevel.ForwardGradient(4), bilevel.ZerothOrder(1)]
FLAT: list[Estimator] = [
    bilevel.ForwardGradient(2, chunk_size=1),
    bilevel.ForwardGradient(3, distribution="gaussian", chunk_size=2),
    bilevel.Forward(),
    bilevel.Forward(chunk_size=EXAMPLES // 2),
    bilevel.ZerothOrder(2, scheme="forward"),
    bilevel.TruncatedReverse(3),
    bilevel.Implicit(bilevel.ConjugateGradient(iterations=3, damping=1.0)),
    bilevel.Implicit(bilevel.Neumann(iterations=3), batches=2),
    bilevel.HessianFree(),
    bilevel.HessianFree(preconditioner="optimizer"),
]


@pytest.mark.sampled(every=4)
@WITH_ADAM_TOO
@pytest.mark.parametrize("estimator", ALWAYS_FLAT, ids=repr)
def test_forward_gradients_take_the_same_for_any_number_of_steps(counted: Counted, estimator: Estimator) -> None:
    assert counted.peak(estimator, 40) == counted.peak(estimator, 5)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("estimator", FLAT, ids=repr)
@pytest.mark.filterwarnings("ignore:Implicit. conjugate gradients reached")  # in three products; that is no matter here
def test_so_do_all_that_keep_no_states(counted: Counted, estimator: Estimator) -> None:
    assert counted.peak(estimator, 12) == counted.peak(estimator, 4)


def truncated(steps: int) -> tuple[Estimator, int]:
    return bilevel.TruncatedReverse(steps), 12


def reverse(checkpoints: Any) -> Callable[[int], tuple[Estimator, int]]:
    return lambda steps: (bilevel.Reverse(checkpoints), steps)


GROWING: dict[str, tuple[Callable[[int], tuple[Estimator, int]], tuple[int, int], int]] = {
    "all": (reverse("all"), (5, 25), 25 - 5),
    "sqrt": (reverse("sqrt"), (15, 45), 8 - 4),  # c states reach (c + 1)(c + 2)/2 steps
    "sqrt, in between": (reverse("sqrt"), (17, 40), 8 - 5),
    "log": (reverse("log"), (20, 100), 7 - 5),
    "4 checkpoints": (reverse(4), (20, 40), 0),
    "truncated": (truncated, (2, 10), 10 - 2),
}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("case", GROWING.values(), ids=GROWING)
def test_states_kept(counted: Counted, case: Any) -> None:
    """From one T (or s) to another the peak grows by the states that the docstring speaks of, and by nothing else."""
    make, (few, many), states = case
    assert counted.peak(*make(many)) - counted.peak(*make(few)) == states * counted.state_bytes


def test_graphs_grow_with_every_step(counted: Counted) -> None:
    """The same for each step, and more than a state, since a graph holds activations and gradients besides."""
    few, more, most = (counted.peak(bilevel.Reverse("graph"), steps) for steps in (3, 6, 12))
    assert most - more == 2 * (more - few)
    assert more - few > 3 * counted.state_bytes


def test_every_direction_takes_the_same(counted: Counted) -> None:
    """Peak of k directions at once: a + b·k; and a chunk of them takes no more than the chunk does."""
    two, three, five = (counted.peak(bilevel.ForwardGradient(k), 3) for k in (2, 3, 5))
    assert five - three == 2 * (three - two)
    chunked = counted.peak(bilevel.ForwardGradient(6, chunk_size=2), 3)
    rest = counted.state_bytes + 8 * 4 * EXAMPLES  # of the chunk before: its final state, directions and sum
    assert two <= chunked <= two + rest


def test_zeroth_order_takes_one_solve_for_any_number_of_directions(counted: Counted) -> None:
    one, six = (counted.peak(bilevel.ZerothOrder(k), 3) for k in (1, 6))
    assert one <= six <= one + 6 * 8 + 8 * EXAMPLES  # the slopes, and one more vector in R^N


@pytest.mark.parametrize("estimator", ALWAYS_FLAT, ids=repr)
def test_meta_parameters_cost_a_few_vectors(counted: Counted, estimator: Estimator) -> None:
    """Peak grows with N by vectors in R^N, a few for every direction, and not by N times a state as in `Forward`."""
    more = 500
    growth = Counted(momentum(), EXAMPLES + more).peak(estimator, 3) - counted.peak(estimator, 3)
    assert growth <= 8 * more * (4 + 4 * getattr(estimator, "directions", 1))


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize(
    "estimator",
    [*ALWAYS_FLAT, *FLAT, *(bilevel.Reverse(checkpoints) for checkpoints in ("all", "sqrt", "graph", 2))],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Implicit. conjugate gradients reached")
def test_nothing_stays_behind(counted: Counted, estimator: Estimator) -> None:
    """Once its result is dropped, no tensor made by an estimator is alive, not even in a reference cycle."""
    with counting() as live:
        estimate = counted.run(estimator, 4)
        held = live.now
        del estimate
        assert live.now == 0
    assert held <= counted.state_bytes + 8 * (EXAMPLES + 2)  # the final state, the gradient, the value
